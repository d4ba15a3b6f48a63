"""Compare the settings of runs."""

# Settings that are not compared, because they do not affect the training.
PLACES = ("run_dir",)


def flatten(tree, prefix=""):
    """A tree of settings as a dict from `section.name` to text. A schedule (a dict with a `kind`) is one setting."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "kind" not in value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = as_text(value)
    return flat


def as_text(value):
    """The value of a setting as text for a reader."""
    if isinstance(value, dict):
        if {"start", "end", "kind"} <= value.keys():
            if value["kind"] == "constant" or value["start"] == value["end"]:
                return as_text(value["start"])
            text = f"{value['kind']} {as_text(value['start'])} → {as_text(value['end'])}"
            begin, until = value.get("begin"), value.get("until")
            if value["kind"] == "step":
                return text if begin is None else f"{text} at {as_text(begin)}"
            return text if begin is None or until is None else f"{text} over {as_text(begin)} to {as_text(until)}"
        return ", ".join(f"{key} {as_text(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(as_text(part) for part in value) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def compare(trees):
    """Compare the settings of several runs.

    Args:
        trees: one tree of settings per run.

    Returns:
        (differing, equal): lists of (name, values), where values is one text per run, or None if a run lacks it.
    """
    flat = [flatten(tree) for tree in trees]
    names = list(dict.fromkeys(name for settings in flat for name in settings if name not in PLACES))
    rows = [(name, [settings.get(name) for settings in flat]) for name in names]
    differing = [row for row in rows if len(set(row[1])) > 1]
    return differing, [row for row in rows if len(set(row[1])) == 1]
