"""Write docs/configuration.md from the dataclasses in maskalign/config/settings.py.

    python -m docs.generate [--check] [--page docs/configuration.md]

--check changes nothing and exits with status 1 where the page differs from the code.
"""

import argparse
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import docstring_parser

from maskalign.config.ranges import Range
from maskalign.config.schedules import Schedule
from maskalign.config.settings import Config

PAGE = Path(__file__).parent / "configuration.md"
INTRODUCTION = """# Configuration

A run is described by one tree of settings. A YAML file gives some of them, the command line overrides the file, and
everything else has the default below. `config.yaml` in the run folder records all of them.

```sh
maskalign train --config imagenet256/b2/maskalign --training.max_steps 1000 --method.keep_ratio 0.5
```

`--config` takes a file, or the name of a recipe that is installed with the package. Values are written as in YAML, for
example `--method.keep_ratio "{kind: linear, start: 0.25, end: 1.0}"`. `maskalign train --help` lists the same settings.

*This page is written by `python -m docs.generate` from `maskalign/config/settings.py`.*
"""


def type_name(annotation):
    """A type as a user writes it: `int`, `"a" or "b"`, `number or schedule`."""
    names = {float: "number", int: "integer", str: "text", bool: "true or false", type(None): "null"}
    names[Schedule] = "[schedule](#schedules)"
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = (entry for entry in annotation.__metadata__ if isinstance(entry, Range))
        return ", ".join([type_name(annotation.__origin__), *map(str, ranges)])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is Union:
        return " or ".join(type_name(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        return f"[{', '.join(type_name(argument) for argument in arguments)}]"
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}}}"
    raise TypeError(f"no name for the type {annotation}")


def default_of(field):
    """A field's default as YAML."""
    value = field.default_factory() if field.default is MISSING else field.default
    if value is None:
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def help_lines(cls):
    """{field name: its help, on one line} from the texts under the fields of a dataclass."""
    parsed = docstring_parser.parse_from_object(cls)
    return {entry.arg_name: " ".join(entry.description.split()) for entry in parsed.params if entry.description}


def table(cls, prefix):
    """A table of a dataclass's own fields, nested ones left out."""
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    texts = help_lines(cls)
    for field in fields(cls):
        if is_dataclass(field.type):
            continue
        cells = [f"`{prefix}{field.name}`", type_name(field.type), default_of(field), texts[field.name]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def summary(cls):
    """The first sentence of a dataclass's docstring."""
    return docstring_parser.parse(cls.__doc__).short_description


def page():
    """The whole page."""
    parts = [INTRODUCTION, "## General\n", table(Config, ""), ""]
    for field in fields(Config):
        if is_dataclass(field.type):
            parts += [f"## {field.name}\n", summary(field.type) + "\n", table(field.type, f"{field.name}."), ""]
    parts += ["## Schedules\n", summary(Schedule) + " A plain number is constant.\n", table(Schedule, ""), ""]
    parts.append("For example `{kind: linear, start: 0.25, end: 1.0, begin: 0.4, until: 0.9}`.\n")
    return "\n".join(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where the page differs")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    new = page()
    if options.page.is_file() and options.page.read_text(encoding="utf-8") == new:
        return 0
    if options.check:
        print(f"{options.page} differs from maskalign/config/settings.py; run python -m docs.generate")
        return 1
    options.page.write_text(new, encoding="utf-8")
    print(f"written: {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
