"""What jsonargparse says of a wrong setting, in words that say what, where and how to mend it."""

import re
from difflib import get_close_matches

from maskalign.errors import one_line

KINDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
    "Schedule": "a schedule such as {kind: step, start: 0.5, end: 1.0, begin: 0.7} (constant, linear, cosine or step)",
}
UNION = re.compile(
    r'Parser key "(?P<key>[\w.]+)": Does not validate against any of the Union subtypes '
    r"Subtypes: \[(?P<types>.*?)\] Errors: .*Given value: (?P<value>.*)"
)
TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|Literal\[([^\]]*)\]|[Tt]uple\[([^\]]*)\]")
UNKNOWN = (
    r"nrecognized arguments: --([\w.]+)",
    r"[Kk]ey '([\w.]+)' is not expected",
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
)


def plain_message(message):
    """A message of jsonargparse as one line, without Python's names of types where it lists several.

    Args:
        message: the text, or the exception.
    """
    message = one_line(message)
    found = UNION.search(message)
    if not found:
        return message
    kinds = _kinds(found["types"])
    if not kinds:
        return message
    rule = f"is neither {' nor '.join(kinds)}" if len(kinds) > 1 else f"is not {kinds[0]}"
    return f"{found['key']}: {found['value']} {rule}"


def _kinds(types):
    """The types of a union, as it prints them, in words."""
    kinds = []
    for name, literal, inner in TYPE.findall(types):
        if literal:
            kinds += [word.strip().strip("'") for word in literal.split(",")]
        elif inner:
            kinds.append(f"{len(inner.split(','))} numbers in brackets")
        else:
            kinds.append(KINDS.get(name, name))
    return kinds


def with_suggestion(message, names):
    """Add the nearest of the settings' names to a message about an unknown one.

    Args:
        message: see `plain_message`; names: every dotted name of a setting.
    """
    match = next((found for pattern in UNKNOWN if (found := re.search(pattern, message))), None)
    if not match:
        return message
    wrong = ".".join(match.groups())
    near = get_close_matches(wrong, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no setting {wrong!r}{hint}; maskalign train --help lists them"
