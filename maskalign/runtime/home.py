"""`~` at the beginning of a path, which shells do not expand after `=` and inside quotes."""

import os
from dataclasses import fields, is_dataclass
from pathlib import Path

from maskalign.errors import UsageError


def expand_home(value):
    """Expand `~` in a value: a path, text, a list or dict of them, or a tree of settings (in place).

    Text may hold several paths separated by commas. What does not begin with `~` is unchanged.

    Raises:
        UsageError: there is no such user.
    """
    if isinstance(value, Path):
        return Path(_expand(str(value))) if str(value).startswith("~") else value
    if isinstance(value, str):
        return ",".join(map(_expand, value.split(","))) if "~" in value else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(expand_home, value))
    if isinstance(value, dict):
        return {expand_home(key): expand_home(entry) for key, entry in value.items()}
    if is_dataclass(value):
        for entry in fields(value):
            object.__setattr__(value, entry.name, expand_home(getattr(value, entry.name)))
    return value


def _expand(path):
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded == path:
        raise UsageError(
            f"{path}: there is no user {path.partition('/')[0][1:]!r}; write ./{path} if a folder is meant"
        )
    return expanded
