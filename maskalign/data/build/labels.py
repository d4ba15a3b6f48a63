"""Map the labels of a source to classes 0 ... n - 1: order, names, and numbers without an image."""

import re
from collections import Counter

from maskalign.errors import UsageError

MAX_CLASSES = 1_000_000
HOLES = ("keep", "close")


def in_order(names):
    """The distinct class names in the order of their labels: integers first, in numeric order, then other names."""
    return sorted(set(names), key=lambda name: (0, int(name), name) if is_number(name) else (1, 0, name))


def is_number(name):
    """Whether a class name is an integer, such as "7" or "007"."""
    return re.fullmatch(r"[0-9]{1,18}", name) is not None


def check_names(names, what):
    """Check class names and return them.

    Args:
        names: list of str.
        what: their origin, for the message.

    Raises:
        UsageError: a name is empty, repeated, or cannot be encoded as UTF-8.
    """
    for number, name in enumerate(names):
        if not str(name).strip():
            raise UsageError(f"{what}: the name of class {number} is empty; give every class a name")
        check_text(name, what)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        places = [number for number, name in enumerate(names) if name == twice[0]]
        more = f", and {len(twice) - 1} other names are repeated" if len(twice) > 1 else ""
        raise UsageError(
            f"{what}: {twice[0]!r} is the name of the classes {tell_numbers(places)}{more}; make the names different, "
            f"for example '{twice[0]} ({places[0]})' and '{twice[0]} ({places[1]})'"
        )
    return list(names)


def check_text(name, what):
    """Raise a UsageError where a name cannot be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{what}: the class name {ascii(name)} is not UTF-8; rename it (folders can be renamed with "
            "convmv -f latin1 -t utf8 -r --notest FOLDER)"
        ) from None


def tell_numbers(numbers, most=12):
    """Sorted integers as text with ranges, such as "0, 4-6, 9"; at most `most` entries."""
    runs = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [f"{low}" if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def number_classes(labels, class_names, source, holes=None):
    """Map a source's labels, which are either all integers or all names, to classes.

    Args:
        labels: the label of every image.
        class_names: list of names by number, or None.
        source: the source, for messages.
        holes: what to do with numbers that no image has: "keep" them as classes, or "close" the holes, so that the
            remaining classes are numbered from 0. With None, they are kept if there are class names, and an error
            otherwise.

    Returns:
        (names, function from a label to its class, notes): notes are lines for the user.

    Raises:
        UsageError: labels are mixed, negative, missing, or without a name.
    """
    texts = in_order(label for label in labels if isinstance(label, str))
    numbers = sorted({label for label in labels if not isinstance(label, str)})
    if texts and numbers:
        raise UsageError(f"source {source}: some labels are numbers, others are names (for example {texts[0]!r})")
    if texts:
        names = texts if class_names is None else class_names
        unknown = in_order(set(texts) - set(names))
        if unknown:
            raise UsageError(f"source {source}: label {unknown[0]!r} is not among the class names")
        absent = [number for number, name in enumerate(names) if name not in set(texts)]
        number_of = {text: number for number, text in enumerate(names)}
        numbers = [number_of[text] for text in texts]
    else:
        low, high = min(numbers, default=0), max(numbers, default=0)
        limit = MAX_CLASSES if class_names is None else len(class_names)
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            raise UsageError(f"source {source}: label {wrong} is outside [0, {limit}), the range of the classes")
        names = [str(number) for number in range(high + 1)] if class_names is None else class_names
        absent = _absent(numbers, len(names))
        number_of = {number: number for number in numbers}
        if absent and class_names is None and holes is None:
            raise UsageError(
                f"source {source}: labels run from {low} to {high}, but no image has the label {tell_numbers(absent)}: "
                f"sampling would draw such a class without training; give --holes close for {len(numbers)} classes "
                f"numbered 0 to {len(numbers) - 1}, named after the old numbers, or --holes keep to keep the numbers"
            )
    if not absent:
        return list(names), number_of.__getitem__, []
    if holes == "close":
        place = {number: index for index, number in enumerate(numbers)}
        closed = {label: place[number] for label, number in number_of.items()}
        note = f"holes closed: {len(absent):,} labels without an image are left out, the others renumbered from 0"
        return [names[number] for number in numbers], closed.__getitem__, [note]
    first = ", ".join(f"{number} ({names[number]})" for number in absent[:5]) + (", ..." if len(absent) > 5 else "")
    note = f"{len(absent):,} of {len(names):,} classes have no image and cannot be learned: {first}; --holes close"
    return list(names), number_of.__getitem__, [f"{note} leaves them out"]


def _absent(numbers, count):
    """The numbers in [0, count) that do not occur, sorted."""
    present = set(numbers)
    return [number for number in range(count) if number not in present]
