"""Sheets of images: one row per class, with the class's name on its left."""

import numpy as np
from PIL import Image, ImageDraw

from maskalign.runtime.fonts import load_font

PAPER = (255, 255, 255)
INK = (45, 45, 50)
FAINT = (130, 130, 138)
LONGEST_NAME = 190


def _shorten(text, font, width):
    """`text`, cut with an ellipsis if it is wider than `width` pixels."""
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
    return picture_grid(rows, names, title=title, cell=cell, gap=gap)


def picture_grid(rows, left, *, right=None, columns=None, title=None, cell=None, gap=4):
    """Draw rows of pictures with a name on their left and, if given, on their right and above each column.

    Args:
        rows, title, cell, gap: as for `class_grid`.
        left, right: a name per row.
        columns: a heading per column.

    Returns:
        PIL.Image, RGB.
    """
    rows = [np.asarray(row) for row in rows]
    for names in (left, right):
        if names is not None and len(rows) != len(names):
            raise ValueError(f"{len(rows)} rows of pictures have {len(names)} names")
    if not rows or any(row.ndim != 4 or row.shape[1:] != rows[0].shape[1:] or row.dtype != np.uint8 for row in rows):
        raise ValueError("rows must be (n, H, W, C) uint8 arrays of one picture size, at least one")
    height, width, channels = rows[0].shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"pictures must have 1 or 3 channels, got {channels}")
    factor = max(1, -(-64 // height)) if cell is None else cell / height
    height_out, width_out = round(height * factor), round(width * factor)

    size = min(16, max(11, height_out // 5))
    font = load_font(size, [*left, *(right or ()), title or ""])
    left, left_edge = _names(left, font, gap)
    right, right_edge = _names(right, font, gap) if right is not None and any(right) else ([""] * len(rows), 0)
    line = size + 5 * gap
    top = gap if title is None else line
    across = max(row.shape[0] for row in rows) * (width_out + gap)
    full = left_edge + across + right_edge
    if title is not None:
        full = max(full, round(font.getlength(title)) + 4 * gap)
    headings = top
    top += line if columns is not None else 0
    sheet = Image.new("RGB", (full, top + len(rows) * (height_out + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        draw.text((2 * gap, line / 2), title, fill=FAINT, font=font, anchor="lm")
    for number, heading in enumerate(columns or []):
        middle = left_edge + number * (width_out + gap) + width_out / 2
        heading = _shorten(str(heading), font, width_out)
        draw.text((middle, headings + line / 2), heading, fill=FAINT, font=font, anchor="mm")
    for number, row in enumerate(rows):
        y = top + number * (height_out + gap)
        draw.text((left_edge - 2 * gap, y + height_out / 2), left[number], fill=INK, font=font, anchor="rm")
        draw.text((left_edge + across + gap, y + height_out / 2), right[number], fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(row):
            image = _scaled(picture, (width_out, height_out))
            sheet.paste(image, (left_edge + column * (width_out + gap), y))
    return sheet


def _names(names, font, gap):
    """(names shortened to one line of LONGEST_NAME pixels, width in pixels of their column)."""
    names = [_shorten(str(name).replace("\n", " "), font, LONGEST_NAME) for name in names]
    return names, round(max(font.getlength(name) for name in names)) + 3 * gap


def _scaled(picture, size):
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).convert("RGB")
    if image.size == size:
        return image
    how = Image.Resampling.NEAREST if size[1] >= image.height else Image.Resampling.LANCZOS
    return image.resize(size, how)
