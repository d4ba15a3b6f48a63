"""The tree of settings from YAML and the command line, and back to YAML."""

import os

from maskalign.config.checks import validate
from maskalign.config.messages import plain_message, with_suggestion
from maskalign.config.settings import Config
from maskalign.errors import UsageError
from maskalign.home import expand_home


def make_config_parser(**kwargs):
    """A jsonargparse parser of `--config FILE.yaml` and `--section.key value`."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class ConfigParser(ArgumentParser):
        def parse_args(self, args=None, **kwargs):
            args = expand_config_paths(args or [])
            for word, following in zip(args, [*args[1:], ""], strict=False):
                if word == "--config" or word.startswith("--config="):
                    check_yaml(word[len("--config=") :] or following)
            return super().parse_args(args, **kwargs)

        def error(self, message, ex=None):
            raise UsageError(with_suggestion(plain_message(message), all_keys()))

    parser = ConfigParser(allow_abbrev=False, **kwargs)
    parser.add_argument("--config", action="config", help="YAML file of settings; later options override it.")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def expand_config_paths(argv):
    """A command line with the home folder put into `--config ~/x.yaml` and `--config=~/x.yaml`."""
    expanded, before = [], None
    for word in argv:
        if before == "--config":
            word = expand_home(word)
        elif word.startswith("--config="):
            word = "--config=" + expand_home(word.removeprefix("--config="))
        expanded.append(word)
        before = word
    return expanded


def check_yaml(path):
    """Raise a UsageError where a file of settings is missing or no YAML mapping; what is in it is checked later."""
    import yaml

    if not os.path.exists(path) and not set("{\n") & set(path):
        raise UsageError(f"--config: {path} does not exist; configs/ holds one per recipe and size")
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"--config: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config: {path} is no text; give a YAML file of settings") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f" in line {mark.line + 1}" if mark else ""
        raise UsageError(f"--config: {path} is no YAML{line}: {' '.join(str(problem).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"--config: {path} holds no settings; write sections of them, such as training: {{max_steps: 1000}}"
        )


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
    config = expand_home(config)  # of all settings only paths begin with ~
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
