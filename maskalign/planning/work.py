"""Floating-point operations per image in each phase of a run, split by part.

A multiply-add of a matrix product counts as 2. models/flops.py counts the student, and torch's counter the teachers, on
the meta device.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from maskalign.config import TokenBudget
from maskalign.models.flops import aligned_rows, block_flops, forward_flops, projector_flops
from maskalign.training.compiling import spread

RESOLUTION = 2000  # number of points at which schedules are evaluated
# sd-vae-ft-mse's encoder (Stable Diffusion's f8 autoencoder, arXiv 2112.10752): widths of its four levels.
VAE_WIDTHS = (128, 256, 512, 512)
VAE_LATENT = 4


@dataclass(frozen=True)
class Phase:
    """A part of a run in which every step does the same work.

    Attributes:
        kept: number of patch tokens in the subset, N for all, without the class token.
        aligned: number of patch tokens that are projected and aligned with a teacher; 0 without an alignment loss.
        share: the part's share of the run's steps.
    """

    kept: int
    aligned: int
    share: float


def schedule_phases(config, model, teachers=True):
    """The phases of a run that follow from its schedules.

    Args:
        config: `Config`.
        model: a `SiT`.
        teachers: False for a run without teachers.

    Returns:
        list of `Phase` with shares that add up to 1, starting with the fewest kept tokens.
    """
    budget, shares = TokenBudget(config.method, model), {}
    for point in range(RESOLUTION):
        progress = (point + 0.5) / RESOLUTION
        counts = budget.kept(progress), budget.aligned(progress) if teachers else 0
        shares[counts] = shares.get(counts, 0) + 1
    return [Phase(kept, aligned, count / RESOLUTION) for (kept, aligned), count in sorted(shares.items())]


def student_flops(model, phase):
    """FLOPs of one forward pass per image.

    Returns:
        dict with student (embeddings, blocks, final layer, restore), mixer and projector. Each of them includes the
        class token, which is one more token.
    """
    without = forward_flops(model, phase.kept, align=False)
    student = forward_flops(_WithoutMixer(model), phase.kept, align=False)
    projector = 0
    if phase.aligned:
        projector = projector_flops(model, aligned_rows(model, phase.kept, phase.aligned))
    return {"student": student, "mixer": without - student, "projector": projector}


class _WithoutMixer:
    """A model without its mixer, for counting FLOPs."""

    mixer = None

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)


def recomputed_flops(model, phase, parallel):
    """FLOPs per image that are computed again in the backward, according to `parallel.recompute`."""
    budget = {"none": 1.0, "block": 0.0, "selective": parallel.memory_budget}[parallel.recompute]
    blocks = block_flops(model, phase.kept)
    return sum(blocks[number] for number in spread(round((1 - budget) * len(blocks)), len(blocks)))


@dataclass(frozen=True)
class Frozen:
    """A frozen network.

    Attributes:
        parameters: number of parameters.
        flops: FLOPs per image.
        dim: width of its tokens.
        grid: (rows, columns) of its tokens.
        class_dim: width of its class token.
    """

    parameters: int
    flops: int
    dim: int
    grid: tuple
    class_dim: int


def teacher_facts(name, image_size):
    """The sizes and FLOPs of a teacher (`Frozen`), counted on the meta device without loading weights.

    Args:
        name: see `config.teacher_names`.
        image_size: side of the images in pixels.

    Raises:
        UsageError: there is no such teacher.
    """
    from maskalign.teachers import load_teacher

    with torch.device("meta"):
        teacher = load_teacher(name, weights="random", image_size=image_size, device="meta")
        images = torch.empty(1, 3, image_size, image_size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.encoder(images)
    count = sum(p.numel() for p in teacher.encoder.network.parameters())
    class_dim = getattr(teacher.encoder, "class_dim", teacher.dim)
    return Frozen(count, counter.get_total_flops(), teacher.dim, tuple(teacher.grid), class_dim)


def vae_encoder_flops(image_size):
    """FLOPs of sd-vae-ft-mse's encoder for one image, which `data encode --latents` runs once per image."""
    side, total, before = image_size, 0, VAE_WIDTHS[0]

    def conv(width_in, width_out, kernel=3):
        return side * side * width_in * width_out * kernel * kernel

    def residual(width_in, width_out):
        shortcut = conv(width_in, width_out, 1) if width_in != width_out else 0
        return conv(width_in, width_out) + conv(width_out, width_out) + shortcut

    total += conv(3, before)
    for level, width in enumerate(VAE_WIDTHS):
        total += residual(before, width) + residual(width, width)
        before = width
        if level + 1 < len(VAE_WIDTHS):
            side //= 2
            total += conv(width, width)
    pixels = side * side
    total += 2 * residual(before, before) + 4 * pixels * before**2 + 2 * pixels**2 * before  # residuals, attention
    total += conv(before, 2 * VAE_LATENT) + conv(2 * VAE_LATENT, 2 * VAE_LATENT, 1)
    return 2 * total


def parameter_counts(model):
    """Numbers of parameters of a `SiT` by part: student, class token (its embedding and final linear), mixer,
    projector.
    """
    counts = {"student": 0, "class token": 0, "mixer": 0, "projector": 0}
    parts = {"mixer": "mixer", "projectors": "projector", "class_embedder": "class token"}
    for name, parameter in model.named_parameters():
        part = "class token" if "class_linear" in name else parts.get(name.split(".")[0], "student")
        counts[part] += parameter.numel()
    return counts
