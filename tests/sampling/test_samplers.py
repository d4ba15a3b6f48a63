"""The solvers against closed forms and against plain loops over the published grids."""

import math

import pytest
import torch

from maskalign.sampling import euler, euler_maruyama, heun, score_from_velocity
from maskalign.sampling.guidance import Guided

MEAN, STD = 0.7, 0.4


def coefficients(path, t):
    """alpha, sigma and their derivatives at a float t, written out once more."""
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    a = math.pi / 2
    return math.cos(a * t), math.sin(a * t), -a * math.sin(a * t), a * math.cos(a * t)


def gaussian_velocity(path):
    """Exact velocity E[alpha' x + sigma' eps | x_t] where the data are N(MEAN, STD^2)."""

    def velocity(x, t):
        out = torch.empty_like(x)
        for row in range(len(x)):
            alpha, sigma, d_alpha, d_sigma = coefficients(path, float(t[row]))
            variance = alpha**2 * STD**2 + sigma**2
            off = x[row] - alpha * MEAN
            data = MEAN + alpha * STD**2 / variance * off
            out[row] = d_alpha * data + d_sigma * sigma / variance * off
        return out

    return velocity


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_score_is_the_gaussian_score(path, seed):
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor([1.0, 0.9, 0.5, 0.04, 0.3], dtype=torch.float64)
    score = score_from_velocity(gaussian_velocity(path)(x, t), x, t, path)
    for row in range(5):
        alpha, sigma, _, _ = coefficients(path, float(t[row]))
        expected = -(x[row] - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        torch.testing.assert_close(score[row], expected, rtol=1e-10, atol=1e-10)


def test_a_straight_path_is_solved_in_one_step(seed):
    noise = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    data = torch.full_like(noise, 0.25)
    for solver in (euler, heun):
        for steps in (1, 7):
            out = solver(lambda x, t: noise - data, noise, steps)
            assert out.dtype == torch.float64
            torch.testing.assert_close(out, data.double(), atol=1e-6, rtol=0)


def test_orders_of_convergence():
    """The ODE carries N(0, 1) to N(MEAN, STD^2) by x -> MEAN + STD x; halving the step shows each method's order."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    exact = MEAN + STD * noise

    def error(solver, steps):
        return (solver(gaussian_velocity("linear"), noise, steps) - exact).abs().max().item()

    assert 1.8 < error(euler, 100) / error(euler, 200) < 2.2
    assert 3.6 < error(heun, 100) / error(heun, 200) < 4.6
    assert error(heun, 200) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_model_sees_its_own_dtype_and_the_published_grids(dtype):
    noise = torch.zeros(3, 1, 2, 2, dtype=dtype)
    grids = {
        (euler, 4): [1, 0.75, 0.5, 0.25],
        (heun, 4): [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25],
        (euler_maruyama, 4): [1, 0.68, 0.36, 0.04],
        (euler_maruyama, 1): [1],
    }
    for (solver, steps), times in grids.items():
        seen = []

        def velocity(x, t, seen=seen):
            assert x.dtype == t.dtype == dtype and t.shape == (3,)
            seen.append(float(t[0]))
            return torch.ones_like(x)

        out = solver(velocity, noise, steps)
        assert out.dtype == torch.float64 and out.shape == noise.shape
        assert seen == pytest.approx(times, abs=1e-7 if dtype != torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_step_by_step(path, seed):
    """A loop over the grid with numbers, fed the same noise."""
    steps = 6
    field = gaussian_velocity(path)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=generator)
    draws = torch.randn(steps - 1, 2, 1, 2, 2, dtype=torch.float64, generator=generator)
    feed = iter(draws)
    out = euler_maruyama(field, noise, steps, path=path, randn=lambda x: next(feed))

    times = [1 + i * (0.04 - 1) / (steps - 1) for i in range(steps)] + [0.0]
    x = noise.clone()
    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]
        v = field(x, torch.full((2,), t, dtype=torch.float64))
        alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
        r = alpha / d_alpha
        score = (r * v - x) / (sigma**2 - r * d_sigma * sigma)
        x = x + (v - t * score) * dt
        if i < steps - 1:
            x = x + math.sqrt(2 * t) * math.sqrt(-dt) * draws[i]
    torch.testing.assert_close(out, x, rtol=1e-10, atol=1e-10)
    assert next(feed, None) is None, "the last step must not draw noise"


def test_sde_reaches_the_data_distribution(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 1, 200, 200, dtype=torch.float64, generator=generator)

    def randn(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    out = euler_maruyama(gaussian_velocity("linear"), noise, 250, randn=randn)
    # 40,000 draws: the mean is known to 0.002, the deviation to 0.0015; the grid's own bias is of that order.
    assert out.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert out.std().item() == pytest.approx(STD, abs=0.02)


def test_sde_draws_from_torchs_generator_by_default(seed):
    noise = torch.zeros(2, 1, 2, 2)
    results = []
    for _ in range(2):
        torch.manual_seed(seed)
        results.append(euler_maruyama(gaussian_velocity("linear"), noise, 5))
    assert torch.equal(*results)
    assert not torch.equal(results[0], euler_maruyama(gaussian_velocity("linear"), noise, 5))


def test_no_graph_is_kept():
    weight = torch.ones((), requires_grad=True)
    for solver in (euler, heun, euler_maruyama):
        assert not solver(lambda x, t: x * weight, torch.ones(1, 1, 1, 1), 3).requires_grad


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_bad_steps(steps):
    for solver in (euler, heun, euler_maruyama):
        with pytest.raises(ValueError, match="steps"):
            solver(lambda x, t: x, torch.zeros(1, 1, 1, 1), steps)


class CountingModel:
    """A linear model of two classes and "no class" (2) that records what it is asked."""

    num_classes = 2

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels):
        self.calls.append((float(t[0]), labels.tolist()))
        return x * (labels.to(x.dtype) + 1).reshape(-1, 1, 1, 1)


def test_guidance_formula_and_interval(seed):
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model = CountingModel()
    guided = Guided(model, torch.tensor([0, 1]), scale=1.8, interval=(0.25, 0.7))
    factor = torch.tensor([3 + 1.8 * (1 - 3), 3 + 1.8 * (2 - 3)], dtype=torch.float64).reshape(2, 1, 1, 1)
    for time, inside in [(0.7, True), (0.25, True), (0.71, False), (0.24, False), (0.5, True)]:
        plain = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
        expected = x.double() * (factor if inside else plain)
        for known in ({}, {"time": time}):
            out = guided(x, torch.full((2,), time, dtype=torch.float64), **known)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    # With times of its own, every image is judged by its own.
    mixed = guided(x, torch.tensor([0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(mixed[0], x[0].double() * factor[0])
    torch.testing.assert_close(mixed[1], x[1].double() * 2)
    assert model.calls[0][1] == [0, 1, 2, 2]


def test_scale_one_costs_one_evaluation():
    model = CountingModel()
    Guided(model, torch.tensor([0, 1]))(torch.ones(2, 1, 1, 1), torch.full((2,), 0.5))
    assert model.calls == [(0.5, [0, 1])]


def test_interval_end_is_compared_before_rounding():
    """0.7 in float32 is below 0.7, 0.3 above 0.3: only the unrounded time is inside both ends."""
    model = CountingModel()
    guided = Guided(model, torch.tensor([0]), scale=2.0, interval=(0.3, 0.7))
    euler(guided, torch.ones(1, 1, 1, 1), 10)
    by_time = {round(time, 3): len(labels) for time, labels in model.calls}
    # linspace(1, 0, 11) in float64 gives 0.7 and 0.3 to the last bits: REPA compares those.
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)[:-1].tolist()
    assert by_time == {round(t, 3): 2 if 0.3 <= t <= 0.7 else 1 for t in grid}
    assert 2 in by_time.values() and 1 in by_time.values()


def test_heun_guides_both_halves_of_a_step_alike():
    model = CountingModel()
    heun(Guided(model, torch.tensor([0]), scale=2.0, interval=(0.0, 0.6)), torch.ones(1, 1, 1, 1), 4)
    assert [(t, len(labels)) for t, labels in model.calls] == [
        (1.0, 1), (0.75, 1), (0.75, 1), (0.5, 1), (0.5, 2), (0.25, 2), (0.25, 2),
    ]  # fmt: skip


def test_guidance_of_the_velocity_is_guidance_of_the_drift(seed):
    """REPA combines the drifts of the SDE; ours combines the velocities: the same to rounding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64)
    a, b = torch.randn(2, 2, 1, 2, 2, generator=generator, dtype=torch.float64)
    for path in ("linear", "cosine"):
        t = torch.full((2,), 0.6, dtype=torch.float64)

        def drift(v, path=path, t=t):
            return v - 0.6 * score_from_velocity(v, x, t, path)

        torch.testing.assert_close(drift(b + 1.8 * (a - b)), drift(b) + 1.8 * (drift(a) - drift(b)))


def test_bad_interval():
    with pytest.raises(ValueError, match="interval"):
        Guided(CountingModel(), torch.tensor([0]), interval=(0.7, 0.1))
