"""Fields of settings dataclasses that are options of a command. Imports no torch."""

from dataclasses import MISSING, field


def option(default=MISSING, *, positional=False, path=False, parse=None, metavar=None, group=None, hidden=False):
    """A dataclass field with what its type does not say of the option.

    Args:
        default: the field's default; without one the option is required.
        positional: given by its place instead of by `--name`.
        path: the text may be a path, in which `~` is the home folder (of a `Path` it always is).
        parse: function of the option's text that returns the field's value; with it the text is kept as it is.
        metavar: how the value is called in the help.
        group: heading in the help below which the option stands.
        hidden: the field does not become an option.
    """
    metadata = dict(positional=positional, path=path, parse=parse, metavar=metavar, group=group, hidden=hidden)
    return field(default=default, metadata=metadata)
