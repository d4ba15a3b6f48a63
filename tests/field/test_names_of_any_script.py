"""Class names in any script: drawn where a font has them, replaced by the label where none has, never boxes."""

import numpy as np
import pytest
from PIL import Image

from maskalign.runtime import fonts
from maskalign.sampling.grids import class_grid

CJK, GREEK = "猫", "γάτα"


@pytest.fixture(autouse=True)
def fresh():
    fonts._path_with.cache_clear()
    yield
    fonts._path_with.cache_clear()


def a_font_with(path, characters):
    """A small TrueType font that has the given characters and no others."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names = {ord(character): f"c{number}" for number, character in enumerate(characters)}
    builder = FontBuilder(1000, isTTF=True)
    order = [".notdef", *names.values()]
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(names)
    pen = TTGlyphPen(None)
    for corner in ((0, 0), (0, 800), (700, 800), (700, 0)):
        (pen.moveTo if corner == (0, 0) else pen.lineTo)(corner)
    pen.closePath()
    glyph = pen.glyph()
    builder.setupGlyf(dict.fromkeys(order, glyph))
    builder.setupHorizontalMetrics(dict.fromkeys(order, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_without_a_font_the_label_is_written_and_said_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    assert fonts.drawable_names(["cat", CJK, GREEK], [0, 1, 2]) == ["cat", "label 1", GREEK]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and CJK in err and "labels are written instead" in err
    assert fonts.drawable_names(["cat", CJK, GREEK], [0, 2]) == ["cat", CJK, GREEK], "1 is not drawn"
    assert not capsys.readouterr().err


def test_an_installed_font_is_found(monkeypatch, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    path = a_font_with(tmp_path / "deep" / "wide.ttf", "cat" + CJK)
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    assert fonts.drawable_names(["cat", CJK], [0, 1]) == ["cat", CJK] and not capsys.readouterr().err
    assert fonts.load_font(12, [CJK]).path == str(path)
    assert fonts.load_font(12, ["cat", GREEK]).path.endswith("DejaVuSans.ttf"), "the usual one where it suffices"


def test_the_sheet_uses_it(monkeypatch, tmp_path):
    a_font_with(tmp_path / "wide.ttf", CJK)
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    sheet = class_grid([np.zeros((2, 8, 8, 3), dtype=np.uint8)], [CJK])
    other = class_grid([np.zeros((2, 8, 8, 3), dtype=np.uint8)], ["x"])
    assert isinstance(sheet, Image.Image) and sheet.size != other.size
