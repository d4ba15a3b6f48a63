"""`maskalign completion`: a script that completes commands, options and their choices."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

from maskalign.cli.options import dashed, help_texts, options_of, parse_options
from maskalign.config.option import option
from maskalign.errors import UsageError


@dataclass(kw_only=True)
class Completion:
    """Print a script that completes commands, options, settings and recipes in a shell."""

    EXAMPLES = (
        'eval "$(maskalign completion bash)"        # in ~/.bashrc',
        "maskalign completion zsh > ~/.zfunc/_maskalign",
    )

    shell: Literal["bash", "zsh"] = option(positional=True)
    """The shell: bash or zsh."""


SETTINGS = Completion


def run(argv, start):
    settings, _ = parse_options(Completion, "completion", argv)
    try:
        import shtab
    except ImportError:
        raise UsageError("completion needs the package shtab; install it: pip install shtab") from None
    print(shtab.complete(command_tree(), settings.shell))


def command_tree():
    """An argparse parser with every command, option and choice, from which shtab writes its scripts."""
    from maskalign.cli.main import COMMANDS, command_module

    parser = argparse.ArgumentParser(prog="maskalign")
    commands = parser.add_subparsers()
    data = commands.add_parser("data", help="build, encode, check and show data sets").add_subparsers()
    for name, (_, summary) in COMMANDS.items():
        place, word = (data, name.split()[1]) if name.startswith("data ") else (commands, name)
        command = place.add_parser(word, help=summary)
        if settings := command_module(name).SETTINGS:
            _add_own(command, settings)
        if name in ("train", "plan"):
            _add_tree(command)
    return parser


def _add_own(parser, settings):
    texts = help_texts(settings)
    for entry in options_of(settings):
        positional = entry.metadata.get("positional")
        words = {"help": texts[entry.name].replace("%", "%%"), "choices": _choices(entry.type)}
        action = parser.add_argument(entry.name if positional else f"--{dashed(entry.name)}", **words)
        if entry.metadata.get("path") or "Path" in str(entry.type):
            _complete_files(action)


def _add_tree(parser):
    """The settings of a run: `--config`, with the packaged recipes, and `--section.key`."""
    from maskalign.config.parsing import packaged_recipes
    from maskalign.config.settings import Config

    parser.add_argument("--config", choices=sorted(packaged_recipes()), help="YAML file, or a packaged recipe")
    for section, kind in get_type_hints(Config).items():
        if not hasattr(kind, "__dataclass_fields__"):
            parser.add_argument(f"--{section}")
            continue
        for key, annotation in get_type_hints(kind).items():
            parser.add_argument(f"--{section}.{key}", choices=_choices(annotation))


def _complete_files(action):
    import shtab

    action.complete = shtab.FILE


def _choices(annotation):
    """The values that an option of this type can have, as text; None where they cannot be listed."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) is Union and Path not in get_args(annotation):
        inside = [_choices(part) for part in get_args(annotation) if part is not type(None)]
        return None if None in inside or not inside else [value for values in inside for value in values]
    return None
