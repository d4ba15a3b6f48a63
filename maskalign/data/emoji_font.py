"""The glyph that an emoji is drawn with, and a font that has it under a character of its own.

Many emoji are several characters but one glyph: flags, keycaps, families. To join them is a text shaper's work. That of
Pillow (raqm) needs FriBidi, a library of the system; HarfBuzz itself comes with pip.
"""

import io
import struct

import uharfbuzz
from fontTools.ttLib import TTFont
from fontTools.ttLib.tables.DefaultTable import DefaultTable

# Glyph n is character FIRST + n: a plane for private use, with room for every glyph that a font can have.
FIRST = 0xF0000


class EmojiFont:
    """A font file whose texts are emoji.

    Attributes:
        data: bytes of the same font with a character for each glyph, in place of its own characters and ligatures.
    """

    def __init__(self, path):
        self._shaper = uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(str(path))))
        self.data = _by_number(path)

    def character(self, text):
        """The character that draws `text` in the font `data`; ValueError where it is not one glyph."""
        buffer = uharfbuzz.Buffer()
        buffer.add_str(text)
        buffer.guess_segment_properties()
        buffer.flags = uharfbuzz.BufferFlags.REMOVE_DEFAULT_IGNORABLES  # variation selectors, joiners
        uharfbuzz.shape(self._shaper, buffer)
        glyphs = [info.codepoint for info in buffer.glyph_infos]
        if len(glyphs) != 1 or glyphs[0] == 0:
            raise ValueError(f"the font has no single glyph for {text!r}")
        return chr(FIRST + glyphs[0])


def _by_number(path):
    """Bytes of the font at `path` in which glyph n is character FIRST + n."""
    with TTFont(path, lazy=True, recalcBBoxes=False, recalcTimestamp=False) as font:
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
