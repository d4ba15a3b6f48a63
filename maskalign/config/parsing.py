"""The tree of settings from YAML and the command line, and back to YAML."""

import os
from argparse import RawDescriptionHelpFormatter
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, List, Union

from maskalign.config.checks import validate
from maskalign.config.messages import RANGED, explain
from maskalign.config.settings import Config
from maskalign.errors import UsageError
from maskalign.runtime.home import expand_home


def make_config_parser(more_names=(), shown=str, **kwargs):
    """A jsonargparse parser of `--config FILE.yaml` and `--section.key value`.

    Args:
        more_names: names of options besides the settings, which a message about an unknown one may suggest.
        shown: function from a name to what the user writes, see `messages.explain`.
        kwargs: those of jsonargparse's ArgumentParser.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class ConfigParser(ArgumentParser):
        def parse_args(self, args=None, **kwargs):
            return super().parse_args(underscored(files_first(args or [])), **kwargs)

        def error(self, message, ex=None):
            raise UsageError(explain(message, [*all_keys(), *more_names], shown))

    class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Descriptions and examples as they are written; types with their ranges, and defaults, after each setting."""

        def _get_type_str(self, action):
            text = super()._get_type_str(action)
            return text and RANGED.sub(r"\g<type>, \g<range>", text)

    parser = ConfigParser(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of settings, or a packaged recipe by name, e.g. imagenet256/b2/maskalign; options override it.",
    )
    parser.add_class_arguments(Config, as_group=False)
    return parser


def underscored(argv):
    """A command line in which `--training.max-steps` is written `--training.max_steps`, as the settings are named."""
    known = {key.replace("_", "-"): key for key in all_keys()}
    words = []
    for word in argv:
        key, equals, value = word.partition("=")
        if key.startswith("--") and key[2:].replace("_", "-") in known:
            word = f"--{known[key[2:].replace('_', '-')]}{equals}{value}"
        words.append(word)
    return words


def files_first(argv):
    """A command line with its `--config` files in front, found and checked, so that options win wherever they stand."""
    files, options = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise UsageError("--config: no file is given; name a YAML file, or a recipe such as quickstart")
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            options.append(word)
            continue
        path = find_config(path)
        check_yaml(path)
        files += ["--config", path]
    return files + options


def find_config(path):
    """The path of a file of settings: as it is given, or that of a packaged recipe of this name, with or without .yaml.

    Raises:
        UsageError: no such file or recipe.
    """
    expanded = str(expand_home(path))
    if os.path.exists(expanded) or set("{\n") & set(path):
        return expanded
    recipes = packaged_recipes()
    name = path.removesuffix(".yaml").removeprefix("configs/")
    if name in recipes:
        return str(recipes[name])
    near = get_close_matches(name, recipes, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else f"recipes by name are {', '.join(sorted(recipes)[:3])}, ..."
    raise UsageError(f"--config: {path} does not exist; {hint}")


def packaged_recipes():
    """{name: path} of the recipes that are installed with the package, e.g. `imagenet256/b2/maskalign`."""
    import maskalign_configs

    root = Path(str(maskalign_configs.__file__)).parent
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.yaml")}


def check_yaml(path):
    """Raise a UsageError unless a file of settings is a YAML mapping; its content is checked later."""
    import yaml

    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"--config: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config: {path} is not a text file; give a YAML file of settings") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f" in line {mark.line + 1}" if mark else ""
        raise UsageError(f"--config: {path} is not valid YAML{line}: {' '.join(str(problem).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"--config: {path} holds no settings; write sections of them, such as training: {{max_steps: 1000}}"
        )


def parse_config(argv: List[str], **kwargs: Any) -> Config:
    """Read a command line into a checked `Config`.

    Args:
        argv: `--config FILE.yaml` and `--section.key value`, in any order: options win over files, and later ones over
            earlier ones.
        kwargs: those of jsonargparse's ArgumentParser.

    Raises:
        UsageError: an unknown key, a bad value or a rule of `validate`.
    """
    parser = _parser_of(**kwargs)
    return config_of(parser.instantiate(parser.parse_args(argv)))


_parser_of = cache(make_config_parser)  # two thirds of the time of a parse, and reports parse a file for every run


def config_of(values):
    """The checked `Config` among what a parser of `make_config_parser` has read.

    Raises:
        UsageError: a rule of `validate`.
    """
    config = Config(**{name: getattr(values, name) for name in Config.__dataclass_fields__})
    expand_home(config)  # in place; of all settings only paths begin with ~
    validate(config)
    return config


def load_config(path: Union[str, Path]) -> Config:
    """A checked `Config` from a YAML file, or from a packaged recipe by its name (`imagenet256/b2/maskalign`)."""
    return parse_config(["--config", str(path)])


def dump_config(config: Config) -> str:
    """All settings as YAML that `load_config` reads back."""
    import yaml

    return yaml.safe_dump(as_plain(config), sort_keys=False, default_flow_style=None, width=120)


def as_plain(value):
    """Settings as dicts, lists and plain values, as YAML and JSON have them."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return [as_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def all_keys(cls=Config, prefix=""):
    """Every dotted name of a setting."""
    keys = []
    for name, entry in cls.__dataclass_fields__.items():
        nested = entry.default_factory if hasattr(entry.default_factory, "__dataclass_fields__") else None
        keys += all_keys(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return keys
