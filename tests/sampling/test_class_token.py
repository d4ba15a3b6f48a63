"""Sampling with a class token: REG's sampler written out once more, noise by index, and every picture that is drawn."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskalign.checkpoints import Loaded, ModelInfo, ModelSpec
from maskalign.cli import main
from maskalign.config import parse_config
from maskalign.errors import RunError, UsageError
from maskalign.runtime.ranks import Ranks
from maskalign.sampling import Sampling, class_sheet, euler, generate, heun
from maskalign.sampling.command import sample
from maskalign.sampling.denoising import Trajectory, denoising_strip, save_animation
from maskalign.sampling.guidance import Guided
from maskalign.sampling.interpolation import BlendedNoise, interpolate
from maskalign.sampling.network import Network
from maskalign.sampling.noise import ImageNoise, image_seed
from maskalign.sampling.pictures import to_uint8
from maskalign.sampling.sets import draw_set
from maskalign.sampling.state import StateLayout
from maskalign.training.previews import Previews

NAMES = ["Animals & Nature", "Flags", "Objects", "Symbols"]
SHAPE, CLASS_DIM = (3, 8, 8), 5
NUMBERS = 3 * 8 * 8


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """In every test here."""


@pytest.fixture
def model(random_model):
    """Denoises a class token of five numbers, mixes in two layers, and has a projector that sampling leaves out."""
    settings = dict(class_dim=CLASS_DIM, mixer="attention", mixer_layers=2, teacher_dims=(5,), projector_dim=8)
    return random_model(patch_size=2, depth=2, **settings).eval()


def predict(model, image, class_token, time, labels):
    """(image velocity, class velocity) of a model at one time."""
    with torch.no_grad():
        out = model(image, torch.full((len(image),), time, dtype=image.dtype), labels, class_token=class_token)
    return out.velocity, out.class_velocity


def reg_sampler(model, labels, starts, draws, steps, cfg_scale, cls_cfg_scale, low, high):
    """REG's Euler-Maruyama sampler from its description, on the linear path, with the noise given.

    Image and class token are two states. On the linear path the score at time t is -(x + (1 - t) v) / t, so that
    the drift v - t * score is (2 - t) v + x. The drifts are guided, where the image's scale is above 1.

    Args:
        starts: (image noise, class noise). draws: the same per step, one pair less than there are steps.
    """
    times = [1 + i * (0.04 - 1) / (steps - 1) for i in range(steps)] + [0.0]
    state = [x.clone() for x in starts]
    null = torch.full_like(labels, model.num_classes)
    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]

        def drifts(labels, t=t, state=state):
            velocities = predict(model, *state, t, labels)
            return [(2 - t) * v + x for v, x in zip(velocities, state, strict=True)]

        drift = drifts(labels)
        if cfg_scale > 1 and low <= t <= high:
            free = drifts(null)
            scales = (cfg_scale, cls_cfg_scale if cls_cfg_scale > 0 else 1.0)
            drift = [u + s * (c - u) for c, u, s in zip(drift, free, scales, strict=True)]
        state = [x + d * dt for x, d in zip(state, drift, strict=True)]
        if i < steps - 1:
            state = [x + math.sqrt(2 * t * -dt) * eps for x, eps in zip(state, draws[i], strict=True)]
    return state


def noise_of(seed, indices, count):
    """[(image noise, class noise)] of the first `count` draws of images, sliced out of the packed ones by hand."""
    stream = ImageNoise(seed, indices, SHAPE, class_dim=CLASS_DIM)
    packed = [stream.draw(torch.float64) for _ in range(count)]
    return [(x[:, :NUMBERS].reshape(-1, *SHAPE), x[:, NUMBERS:]) for x in packed]


@pytest.mark.parametrize(
    "cfg_scale, cls_cfg_scale, interval",
    [
        (2.3, 2.3, (0.0, 0.85)),  # as published
        (2.3, None, (0.0, 0.85)),
        (2.3, 0.0, (0.0, 0.85)),
        (2.3, 1.0, (0.0, 0.85)),
        (1.8, 3.1, (0.1, 0.7)),
        (1.0, None, (0.0, 1.0)),
        (1.0, 0.0, (0.0, 1.0)),
    ],
)
def test_pictures_are_those_of_regs_sampler(model, seed, cfg_scale, cls_cfg_scale, interval):
    model = model.double()
    labels = torch.tensor([2, 0, 3])
    settings = Sampling("sde", 10, cfg_scale, interval, seed=seed, batch_size=2, cls_cfg_scale=cls_cfg_scale)
    drawn = generate(model, labels, settings)
    start, *draws = noise_of(seed, range(3), 10)
    class_scale = cfg_scale if cls_cfg_scale is None else cls_cfg_scale
    expected, _ = reg_sampler(model, labels, start, draws, 10, cfg_scale, class_scale, *interval)
    assert drawn.shape == (3, *SHAPE) and drawn.dtype == torch.float64
    assert (drawn - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("solver", [euler, heun])
def test_ode_solvers_move_both_parts(model, seed, solver):
    """Against plain loops over two states; what is guided here is a bare model, without `generate`."""
    model, steps, interval = model.double(), 5, (0.3, 0.9)
    labels, null = torch.tensor([1, 3]), torch.tensor([4, 4])
    noise = ImageNoise(seed, [7, 8], SHAPE, class_dim=CLASS_DIM).draw(torch.float64)
    guided = Guided(model, labels, scale=1.7, interval=interval, class_scale=2.6)
    found = solver(guided, noise, steps)
    assert found.shape == (2, NUMBERS + CLASS_DIM) and found.dtype == torch.float64

    def velocity(state, t, guide):
        out = predict(model, *state, t, labels)
        if not guide:
            return out
        free = predict(model, *state, t, null)
        return [u + s * (c - u) for c, u, s in zip(out, free, (1.7, 2.6), strict=True)]

    state = [noise[:, :NUMBERS].reshape(-1, *SHAPE), noise[:, NUMBERS:]]
    for i in range(steps):
        t, then = 1 - i / steps, 1 - (i + 1) / steps
        guide = interval[0] <= t <= interval[1]
        v = velocity(state, t, guide)
        if solver is heun and i < steps - 1:
            ahead = velocity([x + (then - t) * d for x, d in zip(state, v, strict=True)], then, guide)
            v = [(a + b) / 2 for a, b in zip(v, ahead, strict=True)]
        state = [x + (then - t) * d for x, d in zip(state, v, strict=True)]
    torch.testing.assert_close(found[:, :NUMBERS].reshape(-1, *SHAPE), state[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[:, NUMBERS:], state[1], rtol=1e-10, atol=1e-10)


def test_scales_of_the_class_token(model, seed):
    """None is the image's scale, 0 the conditional velocity to the last bit, also where the image is not guided."""
    model = model.double()
    labels, null = torch.tensor([1, 3]), torch.tensor([4, 4])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, NUMBERS + CLASS_DIM, dtype=torch.float64, generator=generator)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    network = Network(model, "fp32")
    c, u = network(x, t, labels), network(x, t, null)
    image, cls = slice(0, NUMBERS), slice(NUMBERS, None)

    def guided(scale, class_scale, **known):
        return Guided(network, labels, scale=scale, class_scale=class_scale)(x, t, **known)

    for scale, class_scale, of_image, of_class in [
        (2.0, None, 2.0, 2.0), (2.0, 2.0, 2.0, 2.0), (2.0, 0, 2.0, 1.0), (2.0, 1.0, 2.0, 1.0), (2.0, 0.5, 2.0, 0.5),
        (1.0, 3.0, 1.0, 3.0), (1.0, None, 1.0, 1.0), (1.0, 0, 1.0, 1.0), (0.0, None, 0.0, 0.0), (0.0, 0, 0.0, 1.0),
    ]:  # fmt: skip
        for known in ({}, {"time": 0.5}):
            out = guided(scale, class_scale, **known)
            for part, factor in ((image, of_image), (cls, of_class)):
                # In a batch of its own, a row may be rounded otherwise.
                expected = u[:, part] + factor * (c[:, part] - u[:, part])
                torch.testing.assert_close(out[:, part], expected, rtol=1e-12, atol=1e-12)
    # Every image by its own time: the second one is outside the interval.
    guide = Guided(network, labels, scale=2.0, class_scale=3.0, interval=(0.0, 0.7))
    times = torch.tensor([0.5, 0.9], dtype=torch.float64)
    expected = network(x, times, labels)
    expected[0, image] = u[0, image] + 2 * (c[0, image] - u[0, image])
    expected[0, cls] = u[0, cls] + 3 * (c[0, cls] - u[0, cls])
    torch.testing.assert_close(guide(x, times), expected, rtol=1e-12, atol=1e-12)


def test_only_what_is_guided_costs_a_second_evaluation(model):
    sizes = []
    forward = model.forward
    model.forward = lambda x, *rest, **more: sizes.append(len(x)) or forward(x, *rest, **more)
    for scale, class_scale in [(1.0, None), (1.0, 0.0), (1.0, 2.0), (2.0, 0.0)]:
        generate(model, [0], Sampling(steps=1, cfg_scale=scale, cls_cfg_scale=class_scale))
    assert sizes == [1, 1, 2, 2]


def test_class_noise_has_a_key_of_its_own(seed):
    with_class, without = ImageNoise(seed, [4, 9], SHAPE, class_dim=CLASS_DIM), ImageNoise(seed, [4, 9], SHAPE)
    for _ in range(3):
        packed, image = with_class.draw(), without.draw()
        assert packed.shape == (2, NUMBERS + CLASS_DIM) and packed.dtype == torch.float32
        assert torch.equal(packed[:, :NUMBERS], image.flatten(1)), (
            "the class token changes nothing of the image's noise"
        )
    # Neither another width nor another image's presence changes an image's numbers.
    for width in (1, 16, 768):
        alone = ImageNoise(seed, [9], SHAPE, class_dim=width).draw(torch.float64)
        again = ImageNoise(seed, [1, 9, 4], SHAPE, class_dim=width).draw(torch.float64)
        assert torch.equal(alone[0], again[1])
    numbers = ImageNoise(seed, range(40), (1, 1, 1), class_dim=2000).draw(torch.float64)[:, 1:]
    # 80,000 draws: the mean is known to 0.0035, the deviation to 0.0025.
    assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.015
    assert numbers.corrcoef().fill_diagonal_(0).abs().max() < 0.13
    assert image_seed(seed, 3) != image_seed(seed, 3, "class-noise")
    assert ImageNoise(seed, [], SHAPE, class_dim=CLASS_DIM).draw().shape == (0, NUMBERS + CLASS_DIM)


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
def test_an_image_depends_on_its_index_alone(model, sampler):
    model = model.double()
    labels = [0, 1, 2, 3, 0]
    settings = dict(sampler=sampler, steps=3, cfg_scale=1.5, cfg_interval=(0.0, 0.7), cls_cfg_scale=2.5, seed=5)
    whole = generate(model, labels, Sampling(**settings, batch_size=7))
    pieces = generate(model, labels, Sampling(**settings, batch_size=2))
    torch.testing.assert_close(whole, pieces, rtol=1e-10, atol=1e-10)
    chosen = generate(model, [0, 1], Sampling(**settings), indices=[4, 1])
    torch.testing.assert_close(chosen, whole[[4, 1]], rtol=1e-10, atol=1e-10)

    class TwoRanks(Ranks):
        """The batches in another order, as other ranks would draw them."""

        def share(self, items, function):
            return [part for _, part in sorted((item.start, function(item)) for item in reversed(items))]

    shared = generate(model, labels, Sampling(**settings, batch_size=2), ranks=TwoRanks(0, 2))
    assert torch.equal(shared, pieces)
    other = generate(model, labels, Sampling(**{**settings, "cls_cfg_scale": 0.0}, batch_size=7))
    assert (other - whole).abs().amax(dim=(1, 2, 3)).min() > 1e-6, "the class token's guidance reaches the picture"


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
@pytest.mark.parametrize("scale", [1.0, 2.2])
def test_a_model_without_class_token_draws_the_bits_it_always_has(random_model, seed, sampler, scale):
    """Noise, guidance and solvers as they were before there were class tokens, written out; equal to the last bit."""
    model = random_model(patch_size=2, depth=2).eval()
    labels, steps, low, high = torch.tensor([1, 2, 0]), 4, 0.2, 0.8
    drawn = generate(model, labels, Sampling(sampler, steps, scale, (low, high), seed=seed))
    streams = [torch.Generator().manual_seed(image_seed(seed, index)) for index in range(3)]
    randn = lambda: torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in streams])  # noqa: E731

    @torch.no_grad()
    def velocity(x, time, judged):
        x, t = x.float(), torch.full((3,), time, dtype=torch.float64).float()
        if scale == 1 or not low <= judged <= high:
            return model(x, t, labels).velocity.double()
        null = torch.full_like(labels, 4)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null])).velocity.double()
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    x = randn().float().double()
    if sampler == "sde":
        times = torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist() + [0.0]
    else:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for step, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        dt = then - now
        if sampler == "sde":
            eps = randn() if step < steps - 1 else None
            v, t = velocity(x, now, now), torch.tensor(now, dtype=torch.float64)
            ratio = (1 - t) / -1.0
            score = (ratio * v - x) / (t.square() - ratio * 1.0 * t)
            x = x + (v - 0.5 * (2 * now) * score) * dt
            x = x if eps is None else x + (2 * now * -dt) ** 0.5 * eps
            continue
        v = velocity(x, now, now)
        if sampler == "heun" and step < steps - 1:
            v = 0.5 * v + 0.5 * velocity(x + dt * v, then, now)
        x = x + dt * v
    assert torch.equal(drawn, x.float())


def test_the_layout_packs_and_unpacks(seed):
    layout = StateLayout(SHAPE, CLASS_DIM)
    image, cls = torch.randn(2, *SHAPE), torch.randn(2, CLASS_DIM)
    state = layout.pack(image, cls)
    assert state.shape == (2, NUMBERS + CLASS_DIM)
    assert torch.equal(layout.image(state), image) and torch.equal(layout.unpack(state)[1], cls)
    plain = StateLayout(SHAPE)
    assert plain.pack(image) is image and plain.unpack(image) == (image, None)


def test_bf16_runs_a_copy_with_the_class_token(model):
    with torch.no_grad():  # calm weights: a random model of gain above one multiplies any rounding
        for parameter in model.parameters():
            parameter.mul_(0.3)
    network = Network(model, "bf16")
    assert network.low and {p.dtype for p in network.model.parameters()} == {torch.bfloat16}
    settings = dict(steps=4, cfg_scale=2.0, cls_cfg_scale=1.5)
    full, half = (generate(model, [0, 1], Sampling(**settings, precision=p)) for p in ("fp32", "bf16"))
    assert not torch.equal(full, half) and half.dtype == torch.float32
    assert (full - half).norm() / full.norm() < 0.05
    block, forward = model.blocks[0], model.blocks[0].forward
    block.forward = lambda x, c: forward(x, c)  # as a compiled block's: it runs under autocast
    cast = generate(model, [0, 1], Sampling(**settings, precision="bf16"))
    assert Network(model, "bf16").autocast and (full - cast).norm() / full.norm() < 0.05


def test_a_class_token_that_is_not_finite_is_an_error(model):
    with torch.no_grad():
        model.final_layer.class_linear.bias.fill_(float("nan"))
    with pytest.raises(RunError, match="non-finite"):
        generate(model, [0], Sampling(steps=1))


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_the_ends_of_interpolations_stand_on_the_class_sheet(model, sampler):
    settings = Sampling(sampler, steps=3, cfg_scale=2.0, cls_cfg_scale=1.2)
    _, pictures = class_sheet(model, [0, 1, 3], NAMES, settings, per_class=2)
    assert pictures.shape == (3, 2, 8, 8, 3)

    def close(a, b):
        return (a.int() - b.int()).abs().max() <= 1

    for kind in ("noise", "class", "both"):
        _, rows = interpolate(model, kind, [0, 1, 3], NAMES, settings, columns=4)
        for number, row in enumerate(rows):
            assert close(row[0], pictures[number, 0])
            if kind != "class":
                assert close(row[-1], pictures[number, 1] if kind == "noise" else pictures[number + 1, 0])
            assert all(not torch.equal(a, b) for a, b in zip(row[:-1], row[1:], strict=True))
    expected = to_uint8(generate(model, [1], settings, indices=[0]))
    assert close(interpolate(model, "class", [0, 1], NAMES, settings, columns=3)[1][0, -1], expected[0])


def test_blended_noise_blends_both_parts(seed):
    streams = [[ImageNoise(seed, [index] * 3, SHAPE, class_dim=CLASS_DIM) for index in (3, 8)] for _ in range(2)]
    weight = torch.tensor([0.0, 1 / 3, 1.0], dtype=torch.float64)
    blended = BlendedNoise(*streams[0], weight)
    for _ in range(2):
        found, (a, b) = blended(torch.zeros((), dtype=torch.float64)), (s.draw(torch.float64) for s in streams[1])
        assert torch.equal(found[0], a[0]) and torch.equal(found[2], b[2])
        expected = math.cos(math.pi / 6) * a[1] + math.sin(math.pi / 6) * b[1]
        torch.testing.assert_close(found[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
def test_a_trajectory_holds_images(model, sampler, tmp_path):
    settings = Sampling(sampler, steps=4, batch_size=2, cfg_scale=1.5)
    classes, per_class = [1, 2], 2
    trajectory = Trajectory(4, 4)
    _, pictures = class_sheet(model, classes, NAMES, settings, per_class=per_class, record=trajectory)
    states, guesses = trajectory.states(1), trajectory.guesses(1)
    assert states.shape == guesses.shape == (4, *SHAPE) and not torch.equal(states, guesses)
    indices = [label * 65536 + k for label in classes for k in range(per_class)]
    torch.testing.assert_close(trajectory.states(0), ImageNoise(0, indices, SHAPE).draw())
    assert torch.equal(to_uint8(trajectory.states(len(trajectory.times) - 1)), pictures.flatten(0, 1))
    # The first guess is what the model points at from the noise: x - v at t = 1.
    start = noise_of(0, indices, 1)[0]
    labels, null = torch.tensor([1, 1, 2, 2]), torch.full((4,), 4)
    c, u = (predict(model, *(x.float() for x in start), 1.0, y)[0] for y in (labels, null))
    torch.testing.assert_close(trajectory.guesses(0), start[0].float() - (u + 1.5 * (c - u)), rtol=1e-4, atol=1e-4)
    strip = denoising_strip(trajectory, classes, NAMES, per_class, frames=3)
    assert strip.height > 4 * 64
    path = save_animation(tmp_path / "a.png", trajectory, classes, NAMES, per_class)
    with Image.open(path) as film:
        assert film.n_frames == len(trajectory.times)


def test_a_set_by_two_ranks_is_that_of_one(model, tmp_path):
    settings = Sampling("sde", steps=2, batch_size=2, cfg_scale=2.0, cls_cfg_scale=0.0)
    info = ModelInfo("a run", 3)
    one = draw_set(Network(model), 7, tmp_path / "one", settings, info, Ranks())
    barrier = threading.Barrier(2, timeout=60)

    class Thread(Ranks):
        def barrier(self):
            barrier.wait()

    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(draw_set, Network(model), 7, tmp_path / "two", settings, info, Thread(rank, 2))
            for rank in range(2)
        ]
        two = [run.result() for run in runs][0]
    assert np.array_equal(np.load(one)["arr_0"], np.load(two)["arr_0"])
    record = json.loads(one.with_suffix(".json").read_text())
    assert record["cls_cfg_scale"] == 0.0 and record["cfg_scale"] == 2.0
    with pytest.raises(UsageError, match="cls_cfg_scale 0.0, now 1.5"):
        draw_set(Network(model), 7, tmp_path / "one", Sampling("sde", 2, 2.0, cls_cfg_scale=1.5), info, Ranks())


def test_a_set_from_before_class_tokens_is_resumed(random_model, tmp_path):
    """Its record knows no guidance of a class token."""
    network, info = Network(random_model(patch_size=4, depth=1)), ModelInfo("a run", 3)
    settings = Sampling(steps=1, batch_size=2)
    path = draw_set(network, 3, tmp_path, settings, info, Ranks())
    record = path.with_suffix(".json")
    before = json.loads(record.read_text())
    assert before.pop("cls_cfg_scale") is None
    record.write_text(json.dumps(before))
    path.unlink()
    assert draw_set(network, 3, tmp_path, settings, info, Ranks()) == path and path.exists()


def test_words_for_a_title():
    for settings, words in [
        (Sampling(cfg_scale=2.3, cfg_interval=(0.0, 0.85)), "guidance 2.3 on [0, 0.85]"),
        (Sampling(cfg_scale=2.3, cls_cfg_scale=2.3), "guidance 2.3"),
        (Sampling(cfg_scale=2.3, cls_cfg_scale=0), "guidance 2.3 (class token 0)"),
        (Sampling(cfg_scale=1.0, cls_cfg_scale=1.5, cfg_interval=(0, 0.5)), "guidance 1 (class token 1.5) on [0, 0.5]"),
        (Sampling(cfg_scale=1.0, cls_cfg_scale=0), None),
        (Sampling(cfg_scale=1.0), None),
    ]:
        assert settings.describe() == "ode, 50 steps" + (f", {words}" if words else "")
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--cls-cfg-scale"):
            Sampling(cls_cfg_scale=wrong)


def loaded(model):
    """What `checkpoints.load` would give of a run with this model."""
    return Loaded(model, "run", Path("run"), Path("run"), None, ModelInfo("a run", 3, class_names=NAMES))


def test_the_command_draws_all_of_it(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("maskalign.sampling.command.load", lambda run, ema: loaded(model))
    words = ["sample", str(tmp_path), "--steps", "2", "--precision", "fp32", "--cls-cfg-scale", "0"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(tmp_path / "a"), "--per-class", "2", "--interpolate", "both", "--strip",
              "--animate", "webp"])  # fmt: skip
    out, err = capfd.readouterr()
    assert end.value.code == 0, err
    assert [line.rsplit("/")[-1] for line in out.split()] == [
        "grid.png", "interpolation.png", "strip.png", "denoising.webp",
    ]  # fmt: skip
    expected = to_uint8(generate(model, [2], Sampling(steps=2, cfg_scale=2.0, cls_cfg_scale=0), indices=[2 * 65536]))
    found = np.asarray(Image.open(tmp_path / "a" / "images" / "0002_000.png")).astype(int)
    assert np.abs(found - expected[0].numpy()).max() <= 1
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(tmp_path / "b"), "--npz", "4"])
    assert end.value.code == 0
    assert json.loads((tmp_path / "b" / "samples_4.json").read_text())["cls_cfg_scale"] == 0


def test_guidance_of_a_class_token_that_is_not_there(random_model, tmp_path, monkeypatch):
    model = random_model(patch_size=4, depth=1)
    with pytest.raises(UsageError, match="--cls-cfg-scale: 1.5, but the model has no class token"):
        generate(model, [0], Sampling(steps=1, cls_cfg_scale=1.5))
    monkeypatch.setattr("maskalign.sampling.command.load", lambda run, ema: loaded(model))
    with pytest.raises(UsageError, match="no class token"):
        sample(tmp_path, tmp_path / "out", settings=Sampling(cls_cfg_scale=0.0), npz=4, progress=False)
    assert not (tmp_path / "out").exists(), "found before anything is written"
    for section in ("preview", "evaluate"):
        with pytest.raises(UsageError, match=f"{section}.cls_cfg_scale: there is no class token"):
            parse_config(["--model.preset", "SiT-B/2", f"--{section}.cls_cfg_scale", "2"])
        with pytest.raises(UsageError, match=f"{section}.cls_cfg_scale: -1"):
            parse_config(
                ["--model.preset", "SiT-B/2", "--model.class_token", "true", f"--{section}.cls_cfg_scale", "-1"]
            )


def test_previews_are_guided_as_they_are_told(model, tmp_path):
    words = ["--model.preset", "SiT-B/2", "--model.class_token", "true", "--preview.steps", "2"]
    spec = ModelSpec(model.input_size, model.in_channels, 4, teacher_dims=[], class_names=NAMES)
    sheets = {}
    for scale in (None, 0.0, 3.0):
        own = [] if scale is None else ["--preview.cls_cfg_scale", str(scale)]
        previews = Previews(parse_config([*words, *own]), spec, torch.device("cpu"))
        assert previews.sampling.cls_cfg_scale == scale
        sheets[scale] = np.asarray(previews.draw(model, 7, tmp_path / f"{scale}.png"))
    assert sheets[None].shape[1] > 0 and (tmp_path / "3.0.png").exists()
    for scale in (0.0, 3.0):
        assert sheets[None].shape != sheets[scale].shape or not np.array_equal(sheets[None], sheets[scale])
