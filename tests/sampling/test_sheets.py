"""Interpolations, denoising strips and animations of a real, small model, and the points that must not be invented."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskalign.checkpoints.weight_files import repa_checkpoint, write_repa
from maskalign.errors import UsageError
from maskalign.sampling import Sampling, class_sheet, generate
from maskalign.sampling.command import sample
from maskalign.sampling.denoising import Trajectory, denoising_strip, save_animation
from maskalign.sampling.drawing import sheet_labels
from maskalign.sampling.grids import picture_grid
from maskalign.sampling.interpolation import BlendedNoise, interpolate
from maskalign.sampling.noise import ImageNoise
from maskalign.sampling.pictures import to_uint8
from maskalign.sampling.samplers import data_from_velocity, euler

NAMES = ["Animals & Nature", "Flags", "Objects", "Symbols"]


@pytest.fixture
def model(random_model):
    return random_model(patch_size=4, depth=1).eval()


def close(a, b):
    """uint8 pictures that are equal to a level: batches of other sizes round differently."""
    return (a.to(torch.int16) - b.to(torch.int16)).abs().max() <= 1


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_the_ends_of_every_row_stand_on_the_class_sheet(model, sampler):
    settings = Sampling(sampler, steps=3, cfg_scale=2.0)
    _, pictures = class_sheet(model, [0, 1, 3], NAMES, settings, per_class=2)
    for kind in ("noise", "class", "both"):
        sheet, rows = interpolate(model, kind, [0, 1, 3], NAMES, settings, columns=4)
        assert rows.shape == (3 if kind == "noise" else 2, 4, 8, 8, 3) and isinstance(sheet, Image.Image)
        for number, row in enumerate(rows):
            assert close(row[0], pictures[number, 0])
            if kind != "class":
                assert close(row[-1], pictures[number, 1] if kind == "noise" else pictures[number + 1, 0])
            assert all(not torch.equal(a, b) for a, b in zip(row[:-1], row[1:], strict=True))
    # Between classes the noise stays: the last picture is the next class on the former's noise.
    labels, indices = sheet_labels([0], 1)
    expected = to_uint8(generate(model, [1], settings, indices=indices))
    assert close(interpolate(model, "class", [0, 1], NAMES, settings, columns=3)[1][0, -1], expected[0])


def test_blended_noise_is_standard_normal_everywhere_and_exact_at_the_ends(seed):
    count, shape = 5, (1, 60, 60)
    one, other = ImageNoise(seed, [3] * count, shape), ImageNoise(seed, [8] * count, shape)
    weight = torch.linspace(0, 1, count, dtype=torch.float64)
    blended = BlendedNoise(one, other, weight)
    start, then = blended.draw(), blended(torch.zeros((), dtype=torch.float64))
    a, b = ImageNoise(seed, [3], shape), ImageNoise(seed, [8], shape)
    assert torch.equal(start[0], a.draw()[0]) and torch.equal(start[-1], b.draw()[0])
    assert torch.equal(then[0], a.draw(torch.float64)[0]) and torch.equal(then[-1], b.draw(torch.float64)[0])
    # 3,600 draws: the deviation is known to 0.012; a straight line's middle would have 0.71.
    assert (then.flatten(1).std(dim=1) - 1).abs().max() < 0.07


def test_a_float_label_is_a_class_embedding(model):
    table = model.y_embedder.embedding_table.weight.detach()
    settings = Sampling(steps=2, cfg_scale=1.7)
    for precision in ("fp32", "bf16"):
        settings = Sampling(steps=2, cfg_scale=1.7, precision=precision)
        assert torch.equal(generate(model, table[[2, 0]], settings), generate(model, [2, 0], settings))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([0.5])
    half = model(x, t, table[[0, 1]].mean(dim=0, keepdim=True)).velocity
    assert not torch.allclose(half, model(x, t, torch.tensor([0])).velocity)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_guess_of_the_image_is_exact_for_the_true_velocity(path, seed):
    generator = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=generator)
    from maskalign.objective.interpolant import Interpolant

    for time in (0.0, 0.3, 1.0):
        x, velocity = Interpolant(path).interpolate(data, noise, torch.full((3,), time, dtype=torch.float64))
        torch.testing.assert_close(data_from_velocity(velocity, x, time, path), data, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler, evaluations", [("ode", 6), ("heun", 6), ("sde", 6)])
def test_a_trajectory_holds_the_samplers_own_states(model, sampler, evaluations):
    settings = Sampling(sampler, steps=6, batch_size=2)
    trajectory = Trajectory(6, 4)
    images = generate(model, [0, 1, 2], settings, record=trajectory)
    assert len(trajectory.times) == 4 and trajectory.times[0] == 1 and trajectory.times[-1] == 0
    assert trajectory.times == sorted(trajectory.times, reverse=True)
    noise = ImageNoise(0, range(3), (3, 8, 8)).draw()
    torch.testing.assert_close(trajectory.states(0), noise)
    torch.testing.assert_close(trajectory.states(3), images)
    torch.testing.assert_close(trajectory.guesses(3), images)
    assert not torch.equal(trajectory.states(1), trajectory.guesses(1))
    assert torch.equal(generate(model, [0, 1, 2], settings), images), "recording changes nothing"


def test_states_are_seen_before_each_step():
    seen = []
    out = euler(lambda x, t: x, torch.ones(1, 1, 1, 1), 2, on_state=lambda *state: seen.append(state))
    assert [(step, time, float(x), v if v is None else float(v)) for step, time, x, v in seen] == [
        (0, 1.0, 1.0, 1.0), (1, 0.5, 0.5, 0.5), (2, 0.0, 0.25, None),
    ]  # fmt: skip
    assert float(out) == 0.25


def test_strip_and_animations(model, tmp_path):
    classes, per_class = [1, 2], 2
    trajectory = Trajectory(5, 48)
    class_sheet(model, classes, NAMES, Sampling(steps=5), per_class=per_class, record=trajectory)
    assert len(trajectory.times) == 6
    strip = denoising_strip(trajectory, classes, NAMES, per_class, frames=3, title="a title")
    assert strip.height > 4 * 64 and strip.width > 3 * 64
    # The first column of the first row is the first class's noise, the last one of the third the other's image.
    pixels = np.asarray(strip)
    cell = 64 + 4
    top, left = strip.height - 4 * cell, strip.width - 3 * cell
    noise = to_uint8(trajectory.states(0))[0].numpy().repeat(8, 0).repeat(8, 1)
    assert np.array_equal(pixels[top : top + 64, left : left + 64], noise)
    image = to_uint8(trajectory.states(5))[per_class].numpy().repeat(8, 0).repeat(8, 1)
    assert np.array_equal(pixels[top + 2 * cell : top + 2 * cell + 64, left + 2 * cell : left + 2 * cell + 64], image)
    for suffix in (".gif", ".webp", ".png"):
        path = save_animation(tmp_path / f"a{suffix}", trajectory, classes, NAMES, per_class, title="a run")
        with Image.open(path) as film:
            assert film.is_animated and film.n_frames == 6
            film.seek(5)
            last = np.asarray(film.convert("RGB")).astype(int)
        if suffix == ".png":
            assert np.array_equal(
                last[-68:-4, -68:-4], to_uint8(trajectory.states(5))[3].numpy().repeat(8, 0).repeat(8, 1)
            )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gif", "a.png", "a.webp"]


def test_the_command_writes_all_of_it(model, tmp_path):
    write_repa(tmp_path / "model.pt", repa_checkpoint(model, model, steps=40))
    paths = sample(
        tmp_path / "model.pt", tmp_path / "out", settings=Sampling(steps=2), classes="0,2", per_class=3,
        interpolation="both", strip=True, animation="webp", progress=False,
    )  # fmt: skip
    assert [path.name for path in paths] == ["grid.png", "interpolation.png", "strip.png", "denoising.webp"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 128
    with pytest.raises(UsageError, match="at least 2"):
        sample(tmp_path / "model.pt", tmp_path / "b", per_class=1, interpolation="noise", progress=False)


def test_names_stand_beside_and_above_their_pictures():
    rows = [np.full((3, 64, 64, 3), 90, np.uint8)] * 2
    plain = np.asarray(picture_grid(rows, ["a", "b"]))
    sheet = np.asarray(picture_grid(rows, ["a", "b"], right=["Flags", "Objects"], columns=["x", "y", "z"]))
    assert sheet.shape[0] > plain.shape[0] and sheet.shape[1] > plain.shape[1]
    right = sheet[:, plain.shape[1] :]
    assert (right < 128).any() and (sheet[: sheet.shape[0] - plain.shape[0]] < 200).any()
    with pytest.raises(ValueError, match="names"):
        picture_grid(rows, ["a", "b"], right=["only one"])
