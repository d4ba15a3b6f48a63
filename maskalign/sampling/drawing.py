"""Draw images from a model, in batches, each with noise of its own; and sheets of them by class."""

from contextlib import contextmanager

import torch

from maskalign.errors import RunError, UsageError
from maskalign.sampling.grids import class_grid
from maskalign.sampling.guidance import Guided
from maskalign.sampling.noise import ImageNoise
from maskalign.sampling.pictures import to_uint8
from maskalign.sampling.samplers import euler, euler_maruyama, heun
from maskalign.sampling.settings import Sampling

# The k-th picture of a class has the same noise whichever other classes are drawn with it.
INDICES_PER_CLASS = 1 << 16


@contextmanager
def evaluating(model):
    """Evaluation mode inside, the mode from before afterwards."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


@torch.no_grad()
def generate(model, labels, settings=None, *, indices=None, on_images=None):
    """Draw one image per label.

    Args:
        model: a `SiT`, or anything with its `in_channels`, `input_size` and `num_classes` that is called like one.
        labels: (B,) int64 tensor or list, in [0, num_classes].
        settings: `Sampling`.
        indices: index of every image in its set, which its noise depends on; 0, 1, 2... by default.
        on_images: called with a (fractional) number of images as they progress.

    Returns:
        (B, C, H, W) float32 on the model's device: pixels in about [-1, 1], or scaled latents.

    Raises:
        UsageError: a label outside the classes.
        RunError: the model gave non-finite numbers.
    """
    settings = settings or Sampling()
    device = next(model.parameters()).device
    labels = torch.as_tensor(labels, dtype=torch.int64)
    wrong = labels[(labels < 0) | (labels > model.num_classes)]
    if len(wrong):
        raise UsageError(f"label {int(wrong[0])} is outside the model's classes 0 to {model.num_classes - 1}")
    indices = list(range(len(labels)) if indices is None else indices)
    if len(indices) != len(labels):
        raise ValueError(f"{len(indices)} indices were given for {len(labels)} labels")
    shape = (model.in_channels, model.input_size, model.input_size)
    # The noise in the model's own dtype, as REPA has it; at float64 models (in tests) nothing is rounded.
    dtype = next(model.parameters()).dtype
    dtype = dtype if dtype == torch.float64 else torch.float32
    batches = []
    with evaluating(model):
        for begin in range(0, len(labels), settings.batch_size):
            part = labels[begin : begin + settings.batch_size].to(device)
            noise = ImageNoise(settings.seed, indices[begin : begin + settings.batch_size], shape, device)
            velocity = Guided(model, part, scale=settings.cfg_scale, interval=settings.cfg_interval)
            share = len(part) / settings.steps
            step = (lambda share=share: on_images(share)) if on_images else None
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                batches.append(_solve(settings, velocity, noise, dtype, step))
    images = torch.cat(batches) if batches else torch.empty(0, *shape, device=device)
    if not images.isfinite().all():
        raise RunError("the model draws non-finite numbers; use an earlier checkpoint, or --precision fp32")
    return images.to(dtype)


def _solve(settings, velocity, noise, dtype, on_step):
    start = noise.draw(dtype)
    if settings.sampler == "ode":
        return euler(velocity, start, settings.steps, on_step=on_step)
    if settings.sampler == "heun":
        return heun(velocity, start, settings.steps, on_step=on_step)
    return euler_maruyama(velocity, start, settings.steps, path=settings.path, randn=noise, on_step=on_step)


def class_sheet(model, classes, class_names, settings=None, *, per_class=8, decoder=None, title=None, on_images=None):
    """A sheet of pictures, a row per class.

    Args:
        model, settings, on_images: those of `generate`.
        classes: labels, one row each.
        class_names: name of every label of the model.
        per_class: pictures in a row.
        decoder: latents (B, C, h, w) -> images in [-1, 1]; None for pixels.
        title: a line above the pictures.

    Returns:
        (PIL.Image, pictures): pictures is (len(classes), per_class, H, W, C) uint8.
    """
    labels = torch.tensor(classes).repeat_interleave(per_class)
    indices = [label * INDICES_PER_CLASS + k for label in classes for k in range(per_class)]
    images = generate(model, labels, settings, indices=indices, on_images=on_images)
    images = decoder(images) if decoder else images
    # Three of more channels are better than nothing where no decoder can be had (a preview during training).
    images = images if images.shape[1] in (1, 3) else images[:, :3] if images.shape[1] > 3 else images[:, :1]
    pictures = to_uint8(images).unflatten(0, (len(classes), per_class))
    return class_grid(list(pictures), [class_names[label] for label in classes], title=title), pictures
