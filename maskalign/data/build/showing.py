"""`maskalign data show`: a contact sheet of a data set with one row per class and the teachers' features as colors."""

import os

import numpy as np
from PIL import Image, ImageDraw

from maskalign.data.build.images import BadImage, decode_image
from maskalign.data.format.manifest import Manifest, class_member, is_url, teacher_member
from maskalign.data.format.npy import load_npy
from maskalign.data.format.tar_shards import read_shard
from maskalign.errors import RunError, UsageError
from maskalign.runtime.fonts import drawable_names, load_font
from maskalign.runtime.outputs import check_file

GAP, TEXT = 4, 13
INK, FAINT = (20, 20, 20), (110, 110, 110)
MAX_SHARDS = 64


def show(path, out, *, columns=8, rows=12, tile=None, quiet=False):
    """Write a contact sheet.

    Args:
        path: folder or URL prefix of the data set.
        out: the PNG file to write.
        columns: samples per class.
        rows: number of classes; if there are more, evenly spaced ones are shown.
        tile: side of a picture on the sheet in pixels; the default is the resolution, but between 64 and 160.
        quiet: print nothing.

    Returns:
        The path of the sheet.

    Raises:
        UsageError: an option is invalid.
        RunError: no sample can be read, or the sheet cannot be written.

    Below each picture, each teacher's tokens are shown in colors, if the data set has features: red, green and blue are
    the first three principal components over all tokens on the sheet. The class token is shown in the same way as one
    color. For data sets without images, the pictures are the mean latents.
    """
    for option, value in (("--columns", columns), ("--rows", rows)):
        if value < 1:
            raise UsageError(f"{option}: {value} must be at least 1")
    manifest = Manifest.load(path)
    out = check_file(out)
    tile = tile or min(max(manifest.resolution, 64), 160)
    classes = _spread(manifest.num_classes, rows)
    samples = collect(manifest, classes, columns)
    if not any(samples.values()):
        raise RunError(f"{path}: no sample could be read; maskalign data check {path} lists what is wrong")
    strips = [("", _pictures(manifest, samples), tile)]
    for name, entry in manifest.teachers.items():
        strips.append((name, _components(samples, f"{teacher_member(name)}.npy", entry["grid"]), tile))
        if "class_token" in entry:
            bars = _components(samples, class_member(name), (1, 1), lambda array: array[None], unit=False)
            strips.append((f"{name} class token", bars, max(tile // 4, 8)))
    sheet = _draw(manifest, classes, samples, strips, columns, tile)
    try:
        sheet.save(out, format="PNG")
    except OSError as error:
        raise RunError(f"cannot write {out} ({error.strerror or error}); choose another --out") from None
    if not quiet:
        print(f"{out}: {sum(map(len, samples.values()))} of {manifest.num_samples:,} samples")
        if manifest.license:
            print(f"license: {manifest.license}".encode("ascii", "replace").decode())
    return os.fspath(out)


def _spread(count, most):
    """At most `most` evenly spaced numbers below `count`."""
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)}) if count > most else range(count)


def collect(manifest, classes, columns):
    """The first samples of some classes: {class: [{extension: bytes}]}.

    Args:
        manifest: of the data set.
        classes: the labels.
        columns: samples per class.

    Shards are read until all samples are found, at most MAX_SHARDS; damaged ones are skipped.
    """
    samples = {label: [] for label in classes}
    missing = len(samples) * columns
    for shard in manifest.shards[:MAX_SHARDS]:
        with _open(manifest.shard_path(shard)) as file:
            try:
                for _, members in read_shard(file):
                    label = members.get("cls", b"").strip()
                    chosen = samples.get(int(label)) if label.isdigit() else None
                    if chosen is not None and len(chosen) < columns:
                        chosen.append(members)
                        missing -= 1
                        if not missing:
                            return samples
            except Exception:  # a damaged shard, which `data check` reports, is skipped
                continue
    return samples


def _open(path):
    if is_url(path):
        import fsspec

        return fsspec.open(path, "rb").open()
    try:
        return open(path, "rb")
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); maskalign data check lists what is wrong") from None


def _pictures(manifest, samples):
    """{class: [PIL image or None]}: the images, or the mean latents in colors if the data set has no images."""
    if manifest.image_format is None:
        if manifest.latent is None:
            return {label: [None] * len(chosen) for label, chosen in samples.items()}
        _, height, width = manifest.latent["shape"]

        def tokens(array):
            return array[: array.shape[0] // 2].reshape(array.shape[0] // 2, -1).T  # the means only

        return _components(samples, "moments.npy", (height, width), tokens, unit=False)

    def decode(members):
        try:
            return decode_image(members[manifest.image_format])
        except (KeyError, BadImage):
            return None

    return {label: [decode(members) for members in chosen] for label, chosen in samples.items()}


def _components(samples, member, grid, tokens=lambda array: array, unit=True):
    """The first three principal components of the tokens as small RGB images: {class: [image or None]}.

    Args:
        samples: as returned by `collect`.
        member: extension of the .npy member with the tokens.
        grid: (gh, gw) of the tokens.
        tokens: function from the member's array to tokens (gh * gw, d).
        unit: whether tokens are scaled to length 1 first.
    """
    arrays = {}
    for label, chosen in samples.items():
        for number, members in enumerate(chosen):
            try:
                array = tokens(load_npy(members[member])).astype(np.float32)
            except (KeyError, ValueError):
                continue
            if array.ndim == 2 and array.shape[0] == grid[0] * grid[1]:
                if unit:  # cosine alignment depends only on directions
                    array = array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-6)
                arrays[label, number] = array
    pictures = {label: [None] * len(chosen) for label, chosen in samples.items()}
    if not arrays:
        return pictures
    colors = principal_colors(np.concatenate(list(arrays.values())))
    start = 0
    for label, number in arrays:
        part = colors[start : start + grid[0] * grid[1]]
        start += len(part)
        pictures[label][number] = Image.fromarray(np.ascontiguousarray(part.reshape(grid[0], grid[1], 3)))
    return pictures


def principal_colors(rows):
    """Colors of rows (n, d), uint8 (n, 3): the first three principal components, scaled from the 2nd to 98th
    percentile.

    The sign of a component is such that its largest loading is positive, so a sheet always looks the same.
    """
    rows = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    axes = vectors[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
    values = rows @ axes
    values = np.pad(values, ((0, 0), (0, 3 - values.shape[1])))
    low, high = np.percentile(values, [2, 98], axis=0)
    return (np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1) * 255).round().astype(np.uint8)


def _draw(manifest, classes, samples, strips, columns, tile):
    """Draw the sheet. `strips` are (name, pictures by class, height of a picture), from top to bottom in each row."""
    every = drawable_names(manifest.class_names, classes)
    names = [every[label] for label in classes]
    font = load_font(TEXT, names)
    margin = 2 * GAP + round(max([font.getlength(_short(name)) for name in names] + [font.getlength("Label")]))
    heights = [height + GAP for _, _, height in strips]
    step = sum(heights) + GAP
    width = margin + columns * (tile + GAP) + GAP
    title = f"{manifest.source}: {manifest.num_samples:,} samples, {manifest.num_classes:,} classes, "
    title += f"{manifest.resolution} px" + "".join(f", {name}" for name, *_ in strips[1:])
    footer = _wrap(f"License: {manifest.license}", font, width - 2 * GAP) if manifest.license else []
    head = _wrap(title, font, width - 2 * GAP)
    line = TEXT + GAP
    top = GAP + len(head) * line + GAP
    sheet = Image.new("RGB", (width, top + step * len(names) + len(footer) * line + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(head):
        pen.text((GAP, GAP + number * line), text, fill=INK, font=font)
    for row, (label, name) in enumerate(zip(classes, names, strict=True)):
        y = top + row * step
        pen.text((GAP, y + tile // 2 - TEXT), _short(name), fill=INK, font=font)
        pen.text((GAP, y + tile // 2 + GAP), str(label), fill=FAINT, font=font)
        for strip, (_, pictures, height) in enumerate(strips):
            for column, picture in enumerate(pictures[label]):
                left, above = margin + column * (tile + GAP), y + sum(heights[:strip])
                if picture is None:
                    pen.rectangle((left, above, left + tile - 1, above + height - 1), outline=FAINT)
                    continue
                larger = picture.width < tile
                how = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
                sheet.paste(picture.resize((tile, height), how), (left, above))
    for number, text in enumerate(footer):
        pen.text((GAP, top + step * len(names) + number * line), text, fill=FAINT, font=font)
    return sheet


def _short(name, most=24):
    """A class name, shortened to fit in the margin."""
    return name if len(name) <= most else name[: most - 3] + "..."


def _wrap(text, font, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
