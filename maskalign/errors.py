"""The two types of errors that a command reports; the package `cli` turns each into one line and an exit status."""


def one_line(message):
    """A message or an exception's message as one line; the name of the exception's type if its message is empty."""
    text = " ".join(str(message).split())
    return type(message).__name__ if not text and isinstance(message, BaseException) else text


class OneLine(Exception):
    """An error whose message is one line, whatever names are in it."""

    def __str__(self):
        return one_line(super().__str__())


class UsageError(OneLine, ValueError):
    """What was asked for cannot be done: a wrong setting, path, shape or label. Exit status 2.

    The message is one line that says what is wrong, where, and how to fix it.
    """


class RunError(OneLine, RuntimeError):
    """The work itself failed: bad data, a non-finite loss, a full disk. Exit status 1.

    The message is one line that says what is wrong, where, and how to fix it.
    """
