"""The names of teachers. Imports no torch, so that a wrong name is refused at once."""

from difflib import get_close_matches

from maskalign.errors import UsageError

DINOV2_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
PLAIN_NAMES = (*(f"dinov2-{size}" for size in DINOV2_SIZES), "efficientnet-lite0", "efficientnet-lite0:16")
INSTALLED_TEACHER = "efficientnet-lite0"  # its weights come with the package, without a network
NORMALIZATIONS = ("none", "spatial", "mean")


def check_teacher_name(name):
    """Return `name` if it is the name of a teacher; raise a UsageError that lists the names otherwise."""
    if name in PLAIN_NAMES or (name.startswith("timm:") and len(name) > len("timm:")):
        return name
    near = get_close_matches(name, PLAIN_NAMES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"no teacher is called {name!r}; {hint}names are {', '.join(PLAIN_NAMES)} and timm:MODEL")


def class_kind_of(name):
    """ "prefix" or "mean", as `Encoder.class_kind`; None for timm models, of which only the built model tells."""
    if name.startswith("timm:"):
        return None
    return "prefix" if name.startswith("dinov2-") else "mean"


def class_field(teacher):
    """Name of a teacher's class token in a batch, and in the `fields` of a stream."""
    return f"{teacher}.class"


def no_class_tokens(teacher, path):
    """The message about a data set whose rows were encoded without class tokens, and how to add them."""
    return (
        f"it has rows of {teacher!r}, but no class tokens; add them without changing the rows: "
        f"maskalign data encode --data {path} --teacher {teacher} --class-token only"
    )


def check_normalization(mode):
    """Return `mode` if it is a normalization of teacher tokens, else raise a UsageError."""
    if mode not in NORMALIZATIONS:
        raise UsageError(f"normalize is {mode!r}, not one of {', '.join(NORMALIZATIONS)}")
    return mode


def parse_teachers(names):
    """Names of one or several teachers, checked and without repeats.

    Args:
        names: "dinov2-b", "dinov2-b,timm:resnet50", a list of such, or None.

    Returns:
        list of names, in the order given.
    """
    if names is None:
        return []
    text = names if isinstance(names, str) else ",".join(names)
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"teacher {text!r} has an empty name; give one, or several with commas between them")
    for word in words:
        check_teacher_name(word)
        if words.count(word) > 1:
            raise UsageError(f"teacher {word!r} is named twice")
    return words
