"""Images on their way in: ADM's crop against a transcription, bounded decoding, encoding that is always the same."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskalign.data.build.images import BadImage, adm_crop, decode_image, encode_image, plain_resize, to_rgb


def noise(width, height, seed=0, mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode if len(mode) != 1 else "L")


def file_bytes(image, **how):
    buffer = io.BytesIO()
    image.save(buffer, **how)
    return buffer.getvalue()


def adm_reference(image, size):
    """What guided-diffusion's loader computes, written down from its description: halve, scale, cut the middle."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    factor = size / min(width, height)
    image = image.resize((round(width * factor), round(height * factor)), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("width, height", [(32, 32), (33, 65), (500, 333), (64, 63), (31, 200), (640, 64), (127, 129)])
def test_adm_crop_is_adms(width, height):
    image = noise(width, height)
    assert np.array_equal(np.asarray(adm_crop(image, 32)), adm_reference(image, 32))


def test_adm_crop_of_powers_of_two_is_the_area_mean():
    image = noise(128, 128)
    mean = np.asarray(image, dtype=np.float64).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(adm_crop(image, 32)) - mean).max() <= 2  # Pillow rounds to 8 bits four times


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 70))
def test_any_image_becomes_a_square(width, height, size):
    image = Image.new("RGB", (width, height), (10, 200, 30))
    for prepared in (adm_crop(image, size), plain_resize(image, size)):
        assert prepared.size == (size, size)
        assert prepared.getcolors() == [(size * size, (10, 200, 30))]  # nothing from outside the image


def test_plain_resize_keeps_the_whole_image():
    image = Image.new("RGB", (100, 20), "white")
    image.paste((255, 0, 0), (0, 0, 20, 20))
    left = np.asarray(plain_resize(image, 10))[:, 0]
    assert (np.abs(left.astype(int) - [255, 0, 0]) < 12).all()
    assert (np.asarray(adm_crop(image, 10)) == 255).all()  # which cuts the red end off


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        source = Image.fromarray(np.full((5, 7), 0x80FF, dtype=np.uint16))
        data, expected = file_bytes(source, format="PNG"), (128, 128, 128)
    elif mode == "CMYK":
        data, expected = file_bytes(Image.new("CMYK", (7, 5), (0, 0, 0, 255)), format="JPEG"), (0, 0, 0)
    else:
        gray = Image.new("RGBA", (7, 5), (255, 255, 255, 255)).convert(mode)
        data, expected = file_bytes(gray, format="PNG"), (255, 255, 255)
    image = decode_image(data)
    assert image.mode == "RGB" and image.size == (7, 5)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 2


def test_transparent_parts_lie_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 255, 255))
    decoded = np.asarray(decode_image(file_bytes(image, format="PNG")))
    assert tuple(decoded[1, 1]) == (0, 0, 255) and (np.delete(decoded.reshape(-1, 3), 5, axis=0) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    decoded = decode_image(file_bytes(palette, format="GIF", transparency=0))
    assert (np.asarray(decoded) == 255).all()


def test_a_bomb_is_refused_before_it_unfolds():
    real = file_bytes(Image.new("1", (10_000, 10_000)), format="PNG")
    assert len(real) < 100_000
    with pytest.raises(BadImage, match="10000x10000"):
        decode_image(real)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    claimed = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x"))
    with pytest.raises(BadImage, match="limit"):
        decode_image(claimed)
    assert decode_image(file_bytes(noise(30, 20), format="PNG"), max_pixels=600).size == (30, 20)
    with pytest.raises(BadImage, match="30x20"):
        decode_image(file_bytes(noise(30, 20), format="PNG"), max_pixels=599)


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b"\x00" * 500, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n"],
)
def test_other_bytes_are_a_bad_image_in_one_line(data):
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


@pytest.mark.parametrize("how", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_file_cut_short_is_a_bad_image(how):
    data = file_bytes(noise(40, 40), format=how)
    assert decode_image(data).size == (40, 40)
    with pytest.raises(BadImage):
        decode_image(data[: len(data) // 2])


def test_damaged_files_are_bad_or_decoded_but_never_a_crash(seed):
    draw = random.Random(seed)
    originals = [file_bytes(noise(24, 17, mode="RGB"), format=how) for how in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")]
    bad = 0
    for _ in range(400):
        data = bytearray(draw.choice(originals))
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(min(len(data), 400))] = draw.randrange(256)
        try:
            image = decode_image(bytes(data), max_pixels=10_000)
        except BadImage:
            bad += 1
        else:
            assert image.mode == "RGB" and image.width * image.height <= 10_000
    assert 40 < bad < 400


@pytest.mark.parametrize("how, error", [("png", 0), ("webp", 0), ("jpg", 40)])
def test_encoding_is_the_same_every_time_and_takes_nothing_along(how, error):
    smooth = noise(6, 6).resize((32, 32), Image.BICUBIC)
    tagged = smooth.copy()
    tagged.info.update(icc_profile=b"secret", gamma=0.1, dpi=(3, 3), comment=b"secret", exif=b"Exif\0\0secret")
    data = encode_image(smooth, how)
    assert data == encode_image(tagged, how) == encode_image(smooth.copy(), how)
    assert b"secret" not in data
    difference = np.abs(np.asarray(decode_image(data)).astype(int) - np.asarray(smooth))
    assert difference.max() <= error


def test_to_rgb_loads_what_is_rgb_already():
    image = noise(3, 3)
    assert to_rgb(image) is image
