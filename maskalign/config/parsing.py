"""The tree of settings from YAML and the command line, and back to YAML."""

import re
from difflib import get_close_matches

from maskalign.config.checks import validate
from maskalign.config.settings import Config
from maskalign.errors import UsageError


def make_config_parser(**kwargs):
    """A jsonargparse parser of `--config FILE.yaml` and `--section.key value`."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class ConfigParser(ArgumentParser):
        def error(self, message, ex=None):
            raise UsageError(_with_suggestion(" ".join(str(message).split())))

    parser = ConfigParser(allow_abbrev=False, **kwargs)
    parser.add_argument("--config", action="config", help="YAML file of settings; later options override it.")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def parse_config(argv, **kwargs):
    """Read a command line into a checked `Config`.

    Args:
        argv: `--config FILE.yaml` and `--section.key value`, in any order; later ones win.
        kwargs: those of jsonargparse's ArgumentParser.

    Raises:
        UsageError: an unknown key, a bad value or a rule of `validate`.
    """
    parser = make_config_parser(**kwargs)
    config = parser.instantiate(parser.parse_args(argv))
    config = Config(**{name: getattr(config, name) for name in Config.__dataclass_fields__})
    validate(config)
    return config


def load_config(path):
    """A checked `Config` from a YAML file."""
    return parse_config(["--config", str(path)])


def dump_config(config):
    """All settings as YAML that `load_config` reads back."""
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False, default_flow_style=None, width=120)


def _plain(value):
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def all_keys(cls=Config, prefix=""):
    """Every dotted name of a setting."""
    keys = []
    for name, entry in cls.__dataclass_fields__.items():
        nested = entry.default_factory if hasattr(entry.default_factory, "__dataclass_fields__") else None
        keys += all_keys(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def _with_suggestion(message):
    """Add the nearest setting's name to a message about an unknown key."""
    patterns = (
        r"nrecognized arguments: --([\w.]+)",
        r"[Kk]ey '([\w.]+)' is not expected",
        r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    )
    match = next((found for pattern in patterns if (found := re.search(pattern, message))), None)
    if not match:
        return message
    wrong = ".".join(match.groups())
    near = get_close_matches(wrong, all_keys(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no setting {wrong!r}{hint}; maskalign train --help lists them"
