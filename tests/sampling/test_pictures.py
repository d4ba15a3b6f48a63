"""Noise by index, sheets by class, uint8 pictures and the decoder of latents."""

import numpy as np
import pytest
import torch

from maskalign.errors import UsageError
from maskalign.sampling.grids import class_grid
from maskalign.sampling.noise import ImageNoise, image_labels, image_seed
from maskalign.sampling.pictures import Decoder, load_decoder, to_uint8


def test_an_images_noise_is_its_own(seed):
    shape = (3, 4, 4)
    whole = ImageNoise(seed, range(7), shape)
    start, then = whole.draw(), whole.draw(torch.float64)
    assert start.dtype == torch.float32 and then.dtype == torch.float64
    for indices in ([4], [6, 0, 2], [1, 3, 5]):
        part = ImageNoise(seed, indices, shape)
        assert torch.equal(part.draw(), start[indices])
        assert torch.equal(part(then[indices]), then[indices])
    assert not torch.equal(ImageNoise(seed + 1, [0], shape).draw(), start[:1])
    assert ImageNoise(seed, [], shape).draw().shape == (0, 3, 4, 4)


def test_seeds_of_a_set_never_meet(seed):
    """torch's generator keeps 32 bits of a seed, so these must differ in 32 bits."""
    seeds = np.array([image_seed(seed, index) for index in range(60_000)])
    assert seeds.max() < 2**32 and len(np.unique(seeds)) == len(seeds)


def test_noise_is_standard_normal_and_uncorrelated(seed):
    draws = ImageNoise(seed, range(500), (1, 10, 10)).draw(torch.float64).flatten(1)
    assert abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.02
    neighbors = (draws[1:] * draws[:-1]).mean()
    assert abs(neighbors) < 0.02


def test_labels_by_index(seed):
    labels = image_labels(seed, range(6000), 6)
    assert labels.dtype == torch.int64
    assert torch.equal(labels[[5, 77, 4000]], image_labels(seed, [5, 77, 4000], 6))
    # Each count is binomial(6000, 1/6): 1000 with a deviation of 29.
    assert (labels.bincount(minlength=6) - 1000).abs().max() < 180


def test_to_uint8():
    images = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0, float("nan"), float("inf")]).reshape(1, 2, 2, 2)
    rounded = to_uint8(images)
    assert rounded.shape == (1, 2, 2, 2) and rounded.dtype == torch.uint8
    assert rounded.permute(0, 3, 1, 2).flatten().tolist() == [0, 0, 128, 255, 255, 255, 0, 255]
    truncated = to_uint8(images, truncate=True).permute(0, 3, 1, 2).flatten()
    assert truncated.tolist() == [0, 0, 127, 254, 255, 255, 0, 255]
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1).permute(0, 3, 1, 2), levels)


class DoublingVae:
    """Stands in for an AutoencoderKL: enlarges twofold and keeps a record of batch sizes."""

    def __init__(self):
        self.batches = []

    def decode(self, z):
        self.batches.append(len(z))
        return torch.nn.functional.interpolate(z[:, :3], scale_factor=2.0)


def test_decoder_works_in_chunks_and_undoes_the_scale(seed):
    latents = torch.randn(7, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    vae = DoublingVae()
    out = Decoder(vae, scale=0.5, bias=0.25, chunk=3)(latents)
    assert vae.batches == [3, 3, 1]
    expected = torch.nn.functional.interpolate((latents[:, :3] - 0.25) / 0.5, scale_factor=2.0)
    torch.testing.assert_close(out, expected)


def test_a_real_autoencoder_from_a_folder(tmp_path, seed):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, layers_per_block=1,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    latents = torch.randn(3, 4, 4, 4)
    out = load_decoder(str(tmp_path / "vae"), scale=0.2, chunk=2)(latents)
    assert out.shape == (3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(out, vae.decode(latents / 0.2).sample, rtol=1e-4, atol=1e-5)


def test_a_missing_autoencoder_is_one_clear_line(tmp_path):
    pytest.importorskip("diffusers")
    with pytest.raises(UsageError, match="no such folder") as error:
        load_decoder(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


def test_class_grid_shows_each_picture_where_it_belongs():
    rows = [np.full((n, 32, 32, 3), level, np.uint8) for n, level in [(3, 40), (5, 90), (1, 200)]]
    names = ["Animals & Nature", "Flags", "a name that is far too long to be drawn in whole beside its pictures"]
    sheet = class_grid(rows, names, title="step 100")
    pixels = np.asarray(sheet)
    gap, side = 4, 64  # 32 pixels are enlarged twofold
    left = sheet.width - 5 * (side + gap)
    top = sheet.height - 3 * (side + gap)
    for line, row in enumerate(rows):
        for column in range(5):
            y, x = top + line * (side + gap), left + column * (side + gap)
            cell = pixels[y : y + side, x : x + side]
            if column < len(row):
                assert (cell == row[0, 0, 0, 0]).all()
            else:
                assert (cell == 255).all()
        label = pixels[top + line * (side + gap) : top + line * (side + gap) + side, :left]
        assert (label < 128).any(), "the class's name is drawn at the left"
    assert (pixels[:top] < 200).any(), "the title is drawn"
    assert left < 260


def test_enlarging_keeps_pixels_square(seed):
    picture = np.random.default_rng(seed).integers(0, 256, (1, 16, 16, 1), dtype=np.uint8)
    sheet = class_grid([picture], ["x"])
    drawn = np.asarray(sheet)[4:68, -68:-4]
    assert np.array_equal(drawn[..., 0], picture[0, ..., 0].repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize(
    "rows, names",
    [
        ([], []),
        ([np.zeros((1, 8, 8, 3), np.uint8)], ["a", "b"]),
        ([np.zeros((1, 8, 8, 3), np.float32)], ["a"]),
        ([np.zeros((1, 8, 8, 4), np.uint8)], ["a"]),
        ([np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 9, 8, 3), np.uint8)], ["a", "b"]),
    ],
)
def test_class_grid_refuses_what_it_cannot_draw(rows, names):
    with pytest.raises(ValueError, match="picture|channels"):
        class_grid(rows, names)
