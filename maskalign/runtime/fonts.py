"""The font of image sheets, and replacements for names whose characters no installed font has."""

import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/System/Library/Fonts",
    "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
# Fonts with many scripts come before those with few: fragments of their file names, the likeliest first.
WIDE = ("notosanscjk", "sourcehan", "wqy", "droidsansfallback", "arialuni", "unifont", "msyh", "pingfang", "noto")


def load_font(size, texts=()):
    """A font that has the characters of all texts, if one is installed; otherwise the default font.

    The default is DejaVu Sans, which comes with matplotlib (Latin with all accents, Greek, Cyrillic), or Pillow's
    built-in font without matplotlib.

    Args:
        size: size in pixels.
        texts: the strings that will be drawn.

    Returns:
        A font object of Pillow.
    """
    path = _font_path(texts)
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def drawable_names(class_names, labels):
    """Class names that can be drawn: a name whose characters no font has is replaced by, for example, `label 3`.

    Args:
        class_names: name of every label.
        labels: the labels that will be drawn on one sheet; other names are unchanged.

    Returns:
        list of names, one per label.
    """
    names = list(class_names)
    characters = _characters(_font_path([names[label] for label in labels]))
    missing = [label for label in labels if set(names[label]) - characters]
    if missing:
        print(
            f"maskalign: no installed font has the characters of {names[missing[0]]!r}: labels are written instead of "
            "such names (on Debian and Ubuntu, apt install fonts-noto-cjk has most scripts)",
            file=sys.stderr,
        )
    for label in missing:
        names[label] = f"label {label}"
    return names


def _font_path(texts):
    """Path of a font for texts: the default one, unless only another installed font has all their characters."""
    usual, needed = _usual_path(), frozenset("".join(texts))
    if needed <= _characters(usual):
        return usual
    return _path_with(needed) or usual


def _usual_path():
    package = find_spec("matplotlib")  # not imported, because this takes a second
    if package is not None:
        path = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return str(path)
    return None


@lru_cache(maxsize=32)
def _path_with(characters):
    """Path of an installed font that has all of these characters, or None."""
    for path in _installed():
        if characters <= _characters(path):
            return path
    return None


def _installed():
    """Paths of the installed fonts, those with many scripts first."""
    found = []
    for folder in map(os.path.expanduser, FOLDERS):
        for parent, _, names in os.walk(folder):
            found += [os.path.join(parent, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def place(path):
        name = os.path.basename(path).lower().replace("-", "").replace("_", "")
        return next((number for number, part in enumerate(WIDE) if part in name), len(WIDE)), path

    return sorted(found, key=place)


@lru_cache(maxsize=512)
def _characters(path):
    """The characters of a font as a frozenset: ASCII for Pillow's built-in font, and none for an unreadable file."""
    if path is None:
        return frozenset(map(chr, range(32, 127)))
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            return frozenset(map(chr, font.getBestCmap() or ())) | {"\n"}
    except (TTLibError, OSError, KeyError, AssertionError):
        return frozenset()
