"""Solvers of the sampling ODE and SDE, from noise (t = 1) to data (t = 0), on REPA's grids.

The state is float64 in any precision of the model. A velocity function is called as `velocity_fn(x, t)`, with x in the
noise's dtype and t a (B,) tensor of that dtype, and returns the velocity, of x's shape. Use `functools.partial` or
`guidance.Guided` to bind a model and its labels.

The solvers treat every element of the state independently, so x may be images, or images and class tokens in one tensor
(`state.StateLayout`).
"""

from typing import Callable, Optional

import torch

from maskalign.objective.interpolant import Interpolant
from maskalign.sampling.guidance import Guided

# REPA's SDE grid ends at this time, because the score diverges as t goes to 0. One step without noise then goes to 0.
LAST_SDE_TIME = 0.04


# Called with x (B, ...) and t (B,); returns the velocity, of x's shape and dtype.
Velocity = Callable[..., torch.Tensor]
OnStep = Optional[Callable[[], object]]
OnState = Optional[Callable[[int, float, torch.Tensor, Optional[torch.Tensor]], object]]


def _check(steps):
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps}")
    return int(steps)


def _velocity(velocity_fn, x, time, dtype, guidance_time=None):
    """The velocity at a float64 state x, as float64; `time` is a float."""
    t = torch.full((x.shape[0],), time, dtype=torch.float64, device=x.device).to(dtype)
    # The guidance interval is compared with the unrounded time, which also avoids a copy from the device.
    known = {"time": time if guidance_time is None else guidance_time} if isinstance(velocity_fn, Guided) else {}
    return velocity_fn(x.to(dtype), t, **known).to(torch.float64)


def score_from_velocity(
    velocity: torch.Tensor, x: torch.Tensor, t: torch.Tensor | float, path: str = "linear"
) -> torch.Tensor:
    """Score of the marginal at time t: (r v - x) / (sigma^2 - r sigma' sigma), with r = alpha / alpha'.

    This is equation 9 of SiT, arXiv 2401.08740.

    Args:
        velocity, x: (B, ...).
        t: (B,) or 0-d, in (0, 1].
        path: `linear` or `cosine`.

    Returns:
        (B, ...).
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    t = t.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() else t
    alpha, sigma, d_alpha, d_sigma = Interpolant(path).coefficients(t)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma.square() - ratio * d_sigma * sigma)


def data_from_velocity(velocity: torch.Tensor, x: torch.Tensor, time: float, path: str = "linear") -> torch.Tensor:
    """The clean image that a velocity predicts: (sigma' x - sigma v) / (alpha sigma' - sigma alpha').

    Solves x = alpha x0 + sigma eps and v = alpha' x0 + sigma' eps for x0; on the linear path it is x - t v.

    Args:
        velocity, x: (B, ...).
        time: float in [0, 1].
        path: `linear` or `cosine`.

    Returns:
        (B, ...).
    """
    t = torch.tensor(time, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (float(value) for value in Interpolant(path).coefficients(t))
    return (d_sigma * x - sigma * velocity) / (alpha * d_sigma - sigma * d_alpha)


@torch.no_grad()
def euler(
    velocity_fn: Velocity, noise: torch.Tensor, steps: int, *, on_step: OnStep = None, on_state: OnState = None
) -> torch.Tensor:
    """Euler's method on `linspace(1, 0, steps + 1)`, with one evaluation per step.

    Args:
        velocity_fn: (x, t) -> velocity.
        noise: (B, ...) the state at t = 1; velocity_fn gets states of this dtype.
        steps: number of steps, at least 1.
        on_step: called without arguments after each step.
        on_state: called as `on_state(step, time, x, velocity)` with the state before each step, and at the end with
            step = steps, time 0 and velocity None.

    Returns:
        (B, ...) float64, the state at t = 0.
    """
    times = torch.linspace(1, 0, _check(steps) + 1, dtype=torch.float64).tolist()
    x = noise.to(torch.float64)
    for step, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        velocity = _velocity(velocity_fn, x, now, noise.dtype)
        if on_state:
            on_state(step, now, x, velocity)
        x = x + (then - now) * velocity
        if on_step:
            on_step()
    if on_state:
        on_state(steps, 0.0, x, None)
    return x


@torch.no_grad()
def heun(
    velocity_fn: Velocity, noise: torch.Tensor, steps: int, *, on_step: OnStep = None, on_state: OnState = None
) -> torch.Tensor:
    """Heun's method on the same grid as `euler`, with 2 * steps - 1 evaluations; the last step is an Euler step.

    The time at which a step begins decides whether both its evaluations are guided. For the arguments and the result
    see `euler`.
    """
    times = torch.linspace(1, 0, _check(steps) + 1, dtype=torch.float64).tolist()
    x = noise.to(torch.float64)
    for step, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        velocity = _velocity(velocity_fn, x, now, noise.dtype)
        if on_state:
            on_state(step, now, x, velocity)
        if step < len(times) - 2:
            ahead = _velocity(velocity_fn, x + (then - now) * velocity, then, noise.dtype, guidance_time=now)
            velocity = 0.5 * velocity + 0.5 * ahead
        x = x + (then - now) * velocity
        if on_step:
            on_step()
    if on_state:
        on_state(steps, 0.0, x, None)
    return x


@torch.no_grad()
def euler_maruyama(
    velocity_fn: Velocity,
    noise: torch.Tensor,
    steps: int,
    *,
    path: str = "linear",
    last: float = LAST_SDE_TIME,
    randn: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
    on_step: OnStep = None,
    on_state: OnState = None,
) -> torch.Tensor:
    """Euler-Maruyama on the reverse SDE with diffusion w(t) = 2 t: `linspace(1, last, steps)`, then 0.

    dx = (v - w/2 score) dt + sqrt(w) dW; the step from `last` to 0 adds no noise. The drift is linear in the velocity,
    so guiding the velocity guides the whole drift.

    Args:
        velocity_fn, noise, steps, on_step, on_state: as for `euler`.
        path: `linear` or `cosine`, for the score.
        last: the last time before 0.
        randn: function x -> standard normal noise of x's shape and dtype (float64); torch.randn_like by default. See
            `noise.ImageNoise`.

    Returns:
        (B, ...) float64.
    """
    times = torch.linspace(1, last, _check(steps), dtype=torch.float64).tolist() + [0.0]
    randn = randn or torch.randn_like
    x = noise.to(torch.float64)
    for step, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        diffusion, dt = 2 * now, then - now
        # The noise is drawn before the model is called, as in REPA, so that a seed gives the same images in both.
        eps = randn(x) if step < len(times) - 2 else None
        velocity = _velocity(velocity_fn, x, now, noise.dtype)
        if on_state:
            on_state(step, now, x, velocity)
        drift = velocity - 0.5 * diffusion * score_from_velocity(velocity, x, now, path)
        x = x + drift * dt
        if eps is not None:
            x = x + (diffusion * -dt) ** 0.5 * eps.to(x)
        if on_step:
            on_step()
    if on_state:
        on_state(steps, 0.0, x, None)
    return x
