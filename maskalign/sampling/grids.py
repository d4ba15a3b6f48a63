"""One picture of many: a row per class, the class's name at its left."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (45, 45, 50)
FAINT = (130, 130, 138)


def _shorten(text, font, width):
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def class_grid(rows, names, *, title=None, cell=None, gap=4):
    """Draw a sheet of pictures, a row per class.

    Args:
        rows: one (n, H, W, C) uint8 array or tensor per class, C = 1 or 3; n may differ between rows.
        names: the classes' names.
        title: a line above the pictures.
        cell: side of a drawn picture in pixels; by default small pictures are enlarged by a whole factor, without
            smoothing, to at least 64.
        gap: pixels between pictures.

    Returns:
        PIL.Image, RGB.
    """
    rows = [np.asarray(row) for row in rows]
    if len(rows) != len(names):
        raise ValueError(f"{len(rows)} rows of pictures have {len(names)} names")
    if not rows or any(row.ndim != 4 or row.shape[1:] != rows[0].shape[1:] or row.dtype != np.uint8 for row in rows):
        raise ValueError("rows must be (n, H, W, C) uint8 arrays of one picture size, at least one")
    height, width, channels = rows[0].shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"pictures must have 1 or 3 channels, got {channels}")
    factor = max(1, -(-64 // height)) if cell is None else cell / height
    height_out, width_out = round(height * factor), round(width * factor)

    size = min(16, max(11, height_out // 5))
    font = ImageFont.load_default(size)
    names = [_shorten(str(name).replace("\n", " "), font, 190) for name in names]
    left = round(max(font.getlength(name) for name in names)) + 3 * gap
    top = gap if title is None else size + 5 * gap
    columns = max(row.shape[0] for row in rows)
    full = left + columns * (width_out + gap)
    if title is not None:
        full = max(full, round(font.getlength(title)) + 4 * gap)
    sheet = Image.new("RGB", (full, top + len(rows) * (height_out + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        draw.text((2 * gap, top / 2), title, fill=FAINT, font=font, anchor="lm")
    for line, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + line * (height_out + gap)
        draw.text((left - 2 * gap, y + height_out / 2), name, fill=INK, font=font, anchor="rm")
        for column, picture in enumerate(row):
            image = Image.fromarray(picture.squeeze(-1) if channels == 1 else picture).convert("RGB")
            if (height_out, width_out) != (height, width):
                enlarging = height_out >= height
                how = Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS
                image = image.resize((width_out, height_out), how)
            sheet.paste(image, (left + column * (width_out + gap), y))
    return sheet
