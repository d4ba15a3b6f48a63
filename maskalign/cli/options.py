"""A command's options from its settings dataclass, and the settings from its command line.

The text under a field is its help, the class's docstring the description above the options. Imports no torch.
"""

import argparse
import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from maskalign.config.messages import explain
from maskalign.errors import UsageError
from maskalign.runtime.home import expand_home


def parse_options(settings, name, argv):
    """The settings of a command from its command line.

    Args:
        settings: the command's dataclass. name: of the command, e.g. `data build`. argv: list of str.

    Returns:
        (instance of `settings`, set of the names of the fields that the command line gives).

    Raises:
        UsageError: an unknown option, a bad value, or what the dataclass refuses itself.
    """
    argv = normalize(settings, argv)
    parser = make_parser(settings, name)
    values = parser.parse_args(argv).as_dict()
    given = {key for key, value in parser.parse_args(argv, defaults=False).as_dict().items() if value is not None}
    return build_settings(settings, values), given


def build_settings(settings, values):
    """An instance of a settings dataclass from the values of its options, dict name -> value."""
    known = {}
    for entry in options_of(settings):
        value = values[entry.name]
        if _is_path(entry):
            value = expand_home(value)
        parse = entry.metadata.get("parse")
        known[entry.name] = parse(value) if parse and isinstance(value, str) else value
    return settings(**known)


def part(cls, settings):
    """The settings of `cls` that an instance of a class which extends it holds."""
    return cls(**{entry.name: getattr(settings, entry.name) for entry in fields(cls)})


def make_parser(settings, name):
    """The jsonargparse parser of a command."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message, ex=None):
            names = [entry.name for entry in options_of(settings)]
            problem = explain(message, names, lambda key: shown_name(settings, key), "option")
            raise UsageError(f"{problem} (maskalign {name} --help lists the options)")

    parser = Parser(
        prog=f"maskalign {name}",
        usage=f"maskalign {name} {usage_of(settings)}",
        description=description_of(settings),
        epilog=epilog_of(settings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, settings)
    return parser


def add_options(parser, settings):
    """Add the options of a settings dataclass to a jsonargparse parser."""
    groups, texts = {}, help_texts(settings)
    for entry in options_of(settings):
        title = entry.metadata.get("group")
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups.get(title, parser), entry, texts[entry.name])


def _add_option(parser, entry, text):
    extra, kind = entry.metadata, entry.type
    several = get_origin(kind) is list
    keywords = {"type": str if extra.get("parse") else get_args(kind)[0] if several else kind}
    if several:
        keywords["nargs"] = "+"
    if extra.get("positional"):
        if entry.default is not MISSING:
            keywords |= {"nargs": "?", "default": entry.default}
        parser.add_argument(entry.name, metavar=extra.get("metavar") or entry.name.upper(), help=text, **keywords)
        return
    if kind is bool:
        keywords |= {"nargs": "?", "const": True, "metavar": "true|false"}
    elif get_origin(kind) is not Literal and not _optional_literal(kind):
        keywords["metavar"] = extra.get("metavar") or _metavar(kind, entry.name)
    required = entry.default is MISSING
    if not required:
        keywords["default"] = _shown(entry.default) if extra.get("parse") else entry.default
        shown = "" if entry.default in (None, False) else f" (default: {_shown(entry.default)})"
        text = text.rstrip(".") + shown + "." if shown else text
    parser.add_argument(f"--{dashed(entry.name)}", required=required, help=text.replace("%", "%%"), **keywords)


def options_of(settings):
    """The fields of a settings dataclass that are options: positional ones first, required ones before the others."""
    own = [entry for entry in fields(settings) if not entry.metadata.get("hidden")]
    rank = {True: 0, False: 1}
    return sorted(
        own,
        key=lambda entry: (rank[bool(entry.metadata.get("positional"))], rank[entry.default is MISSING]),
    )


def help_texts(settings):
    """{field: its text} of a settings dataclass and of those it extends."""
    import docstring_parser

    texts = {}
    for cls in reversed(inspect.getmro(settings)):
        if cls is not object:
            parsed = docstring_parser.parse_from_object(cls)
            texts |= {p.arg_name: " ".join(p.description.split()) for p in parsed.params if p.description}
    return texts


def description_of(settings, width=80):
    paragraphs = inspect.cleandoc(settings.__doc__).split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(text.split()), width) for text in paragraphs)


def epilog_of(settings):
    examples = getattr(settings, "EXAMPLES", ())
    return "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None


def usage_of(settings):
    """The usage line, for example `RUN --out OUT [options]`."""
    words = []
    for entry in options_of(settings):
        metavar = entry.metadata.get("metavar") or entry.name.upper()
        if entry.metadata.get("positional"):
            words.append(f"{metavar} ..." if get_origin(entry.type) is list else metavar)
        elif entry.default is MISSING:
            words += [f"--{dashed(entry.name)}", metavar]
    return " ".join([*words, "[options]"])


def normalize(settings, argv):
    """A command line in one spelling: `--cfg_scale` as `--cfg-scale`, and `--classes 0 3 5-8` as `0,3,5-8`."""
    names = {dashed(entry.name) for entry in options_of(settings)}
    words, labels = [], False
    for word in argv:
        key, equals, value = word.partition("=")
        if word.startswith("--") and dashed(key[2:]) in names:
            word = f"--{dashed(key[2:])}{equals}{value}"
            labels = word == "--classes"
            count = 0
        elif labels and not word.startswith("--"):
            count += 1
            if count > 1 and re.fullmatch(r"\d[\d,-]*", word):
                words[-1] += "," + word
                continue
            labels = count == 1
        words.append(word)
    return words


def shown_name(settings, key):
    """How an option is written: `--cfg-scale`, or `RUN` for one that is given by its place."""
    for entry in options_of(settings):
        if entry.name == key:
            return (
                (entry.metadata.get("metavar") or key.upper())
                if entry.metadata.get("positional")
                else f"--{dashed(key)}"
            )
    return key


def dashed(name):
    return name.replace("_", "-")


def _is_path(entry):
    return entry.metadata.get("path") or "Path" in str(entry.type)


def _optional_literal(kind):
    return get_origin(kind) is Union and any(get_origin(part) is Literal for part in get_args(kind))


def _metavar(kind, name):
    known = [part for part in (get_args(kind) or (kind,)) if part is not type(None)]
    short = {int: "N", float: "X", Path: "PATH"}
    return short.get(known[0] if known else kind, name.upper())


def _shown(value):
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
