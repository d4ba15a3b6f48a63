"""Turn jsonargparse's messages about a wrong option or setting into one line: what, where, and how to fix it."""

import re
from difflib import SequenceMatcher, get_close_matches

from maskalign.errors import one_line

KINDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list in brackets, such as [a, b]",
    "tuple": "a list of numbers in brackets, such as [0.9, 0.999]",
    "Path": "a path",
    "NoneType": "null",
    "Schedule": "a schedule such as {kind: step, start: 0.5, end: 1.0, begin: 0.7} (constant, linear, cosine or step)",
}
WRONG = re.compile(r'Parser key "(?P<key>[\w.]+)": (?P<types>Expected a .*?)\.? Got value: ?(?P<value>.*)')
UNION = re.compile(
    r'Parser key "(?P<key>[\w.]+)": Does not validate against any of the Union subtypes '
    r"Subtypes: \[(?P<types>.*?)\] Errors: (?P<errors>.*) Given value type: .* Given value:(?P<value>.*)"
)
# A type with a range, as Python writes it: typing.Annotated[int, at least 1], typing.Annotated[float, in [0, 1)].
RANGED = re.compile(
    r"(?:typing\.)?Annotated\[(?P<type>[\w.]+(?:\[[^\]]*\])?), (?P<range>in [\[(][^\])]*[\])]|[^\[\],]*)\]"
)
TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|Literal\[([^\]]*)\]|[Tt]uple\[([^\]]*)\]")
SECTION = re.compile(r"Parser key \"([\w.]+)\": Unable to load config '?\"?([^'\"]*)")
UNKNOWN = (
    r"nrecognized arguments: --([\w.-]+)",
    r"[Kk]ey '([\w.]+)' is not expected",
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
)
NO_VALUE = re.compile(r"argument (--[\w.-]+)(?:/\S+)*: expected (?:one|at least one) argument")
MISSING = re.compile(r"(?:arguments are required|[Kk]ey|option)[: ]+\"?([\w.,\- ]+?)\"?(?: is required.*)?$")


def explain(message, names, shown=str, what="setting"):
    """Rewrite a message of jsonargparse as one line in the terms of this package.

    Args:
        message: the text, or the exception.
        names: the parser's names of all settings or options, e.g. `optimizer.lr` or `cfg_scale`.
        shown: function from such a name to what the user writes, e.g. `--cfg-scale`.
        what: `setting` or `option`.
    """
    message = one_line(message)
    if found := UNION.search(message):
        key, value = shown(found["key"]), found["value"].strip()
        if not value:
            return _empty(key)
        if value.startswith("{"):
            return f"{key}: {_inside_schedule(found['errors'])}"
        types = RANGED.sub(lambda ranged: _spelled_out(ranged["type"]), found["types"])
        kinds = [kind for kind in _kinds(types) if not (what == "option" and kind == "null")]
        if not kinds:
            return message
        if kinds == [KINDS["list"], KINDS["str"]]:
            kinds = ["a name or a list of names"]
        rule = f"is neither {' nor '.join(kinds)}" if len(kinds) > 1 else f"is not {kinds[0]}"
        return f"{key}: {value} {rule}{_near_choice(value, kinds)}"
    if found := WRONG.search(message):
        key, value = shown(found["key"]), found["value"].strip()
        if not value:
            return _empty(key)
        kinds = _kinds(found["types"])
        several = "Literal" in found["types"]
        rule = f"one of {', '.join(kinds)}" if several else kinds[0] if kinds else "of the right kind"
        return f"{key}: {value} is not {rule}{_near_choice(value, kinds) if several else ''}"
    if found := SECTION.search(message):
        section, value = found.groups()
        inside = [name for name in names if name.startswith(f"{section}.")]
        preferred = {f"{section}.{last}" for last in ("path", "preset", "plan", "names", "keep_ratio", "lr")}
        meant = next((name for name in inside if name in preferred), inside[0] if inside else None)
        hint = f"; did you mean --{meant} {value}?" if meant else ""
        return f"{section} is a section of settings and takes no value{hint}"
    if found := NO_VALUE.search(message):
        return f"{found[1]}: no value is given"
    if "required" in message and (found := MISSING.search(message)):
        absent = [shown(name.strip().strip("-").replace("-", "_")) for name in found[1].split(",")]
        return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing"
    return with_suggestion(message, names, shown, what)


def with_suggestion(message, names, shown=str, what="setting"):
    """A message about an unknown option or setting, with the one that may be meant.

    Args:
        message: of jsonargparse; one about something else is returned as it is.
        names, shown, what: see `explain`.
    """
    match = next((found for pattern in UNKNOWN if (found := re.search(pattern, message))), None)
    if not match:
        stray = re.search(r"nrecognized arguments: (\S+)", message)
        if stray:
            remedy = "write --section.key VALUE" if what == "setting" else "options begin with --"
            return f"{stray[1]!r} is neither a known {what} nor the value of one; {remedy}"
        return message
    wrong = ".".join(match.groups())
    near = nearest(wrong, names)
    hint = f"; did you mean {shown(near)!r}?" if near else ""
    if what == "setting":
        return f"there is no setting {wrong!r}{hint} (maskalign train --help lists the settings)"
    return f"there is no option {'--' + wrong!r}{hint}"


def nearest(wrong, names):
    """The name that a wrong one may stand for: the same last part first, then a similar last part, then similar in all.

    Returns:
        str, or None where nothing is similar.
    """
    flat = {name.replace("-", "_"): name for name in names}
    wrong = wrong.replace("-", "_")
    last = {}
    for name in flat:
        last.setdefault(name.rpartition(".")[2], []).append(name)
    ends = get_close_matches(wrong.rpartition(".")[2], last, n=1, cutoff=0.8)
    likely = last[ends[0]] if ends else get_close_matches(wrong, flat, n=1, cutoff=0.6)
    if not likely:
        return None
    return flat[max(likely, key=lambda name: SequenceMatcher(None, wrong, name).ratio())]


def _empty(key):
    return f"{key}: no value is given; write {key}=VALUE, or leave it out"


def _near_choice(value, kinds):
    near = get_close_matches(value, kinds, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _inside_schedule(errors):
    """What is wrong with a schedule; the parser inside has explained its own error already, last of several."""
    problem = errors.rpartition(" - ")[2].removesuffix(" (maskalign train --help lists the settings)")
    unknown = re.match(r"there is no setting '([\w.]+)'", problem)
    if unknown:
        return f"a schedule has no {unknown[1]!r}; it has kind, start, end, begin and until"
    return f"in the schedule, {problem}"


def _spelled_out(name):
    """A type's name as a list of classes, in the form in which jsonargparse lists the types of a union."""
    names = re.findall(r"\w+", name.partition("[")[2]) if "[" in name else [name]
    return ", ".join(f"<class '{one}'>" for one in names if one in KINDS)


def _kinds(types):
    """The types that a message lists, in words."""
    kinds = []
    for name, literal, inner in TYPE.findall(types):
        if literal:
            kinds += [word.strip().strip("'") for word in literal.split(",")]
        elif inner:
            kinds.append(f"{len(inner.split(','))} numbers in brackets")
        else:
            kinds.append(KINDS.get(name, name))
    return kinds
