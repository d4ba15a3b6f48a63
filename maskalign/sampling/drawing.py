"""Draw images from a model in batches, where every image has its own noise stream; and draw sheets by class."""

from contextlib import contextmanager
from typing import Any, Callable, Optional, Sequence, Union

import torch

from maskalign.errors import RunError, UsageError
from maskalign.runtime.ranks import Ranks
from maskalign.sampling.grids import class_grid
from maskalign.sampling.guidance import Guided
from maskalign.sampling.network import Network
from maskalign.sampling.noise import ImageNoise
from maskalign.sampling.pictures import to_uint8
from maskalign.sampling.samplers import euler, euler_maruyama, heun
from maskalign.sampling.settings import Sampling

# The k-th image of a class has index label * INDICES_PER_CLASS + k, so its noise does not depend on the other classes.
INDICES_PER_CLASS = 1 << 16


@contextmanager
def evaluating(model):
    """Context in which the model is in eval mode; its earlier mode is restored at the end."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


@torch.no_grad()
def generate(
    model: Any,
    labels: Union[torch.Tensor, Sequence[int]],
    settings: Optional[Sampling] = None,
    *,
    indices: Optional[Sequence[int]] = None,
    noise: Optional[Callable[[slice], Any]] = None,
    on_images: Optional[Callable[[float], object]] = None,
    record: Optional[Callable[..., object]] = None,
    ranks: Optional[Ranks] = None,
) -> torch.Tensor:
    """Draw one image per label.

    Args:
        model: a `SiT`, or a callable with the same signature and the attributes `in_channels`, `input_size` and
            `num_classes`; or a `Network`, which avoids a copy of the weights in every call that draws in bf16. If the
            model has a class token, it is denoised together with the image and not returned.
        labels: (B,) int64 tensor or list, in [0, num_classes]; or (B, D) class embeddings, for points between classes.
        settings: `Sampling`.
        indices: index of every image in its set, which determines its noise; 0, 1, 2... by default.
        noise: function from a slice of the set to an object with the methods of `ImageNoise`, which draws the noise of
            these images; by default `ImageNoise` of the indices.
        on_images: called with a (fractional) number of images as they progress.
        record: called as `record(rows, step, time, state, velocity)`, see `samplers.euler`; rows is a slice, and state
            and velocity are of the images, without the class token.
        ranks: `Ranks` that share the batches; every rank gets all images. By default this process alone.

    Returns:
        (B, C, H, W) float32 on the model's device: pixels in about [-1, 1], or scaled latents. The result is identical
        in every bit for any number of ranks with equal numbers of threads, because the batches are the same.

    Raises:
        UsageError: a label is outside the classes, or guidance of a class token that the model does not have.
        RunError: the model gave non-finite numbers.
    """
    settings = settings or Sampling()
    if isinstance(model, Network):
        return _generate(model, labels, settings, indices, noise, on_images, record, ranks)
    with evaluating(model):
        network = Network(model, settings.precision)
        return _generate(network, labels, settings, indices, noise, on_images, record, ranks)


def _generate(network, labels, settings, indices, noise, on_images, record, ranks):
    labels = checked_labels(labels, network.num_classes)
    indices = list(range(len(labels)) if indices is None else indices)
    if len(indices) != len(labels):
        raise ValueError(f"{len(indices)} indices were given for {len(labels)} labels")
    check_class_guidance(network, settings)
    layout = network.layout
    noise = noise or (
        lambda rows: ImageNoise(settings.seed, indices[rows], layout.shape, network.device, layout.class_dim)
    )
    rows = [slice(begin, begin + settings.batch_size) for begin in range(0, len(labels), settings.batch_size)]

    def draw(part):
        chosen = labels[part].to(network.device)
        null = network.class_embeddings()[-1] if chosen.is_floating_point() else network.num_classes
        velocity = Guided(
            network,
            chosen,
            null_label=null,
            scale=settings.cfg_scale,
            interval=settings.cfg_interval,
            class_scale=settings.cls_cfg_scale,
        )
        share = len(chosen) / settings.steps
        step = (lambda: on_images(share)) if on_images else None

        def on_state(step, time, state, velocity):
            record(part, step, time, layout.image(state), None if velocity is None else layout.image(velocity))

        drawn = _solve(settings, velocity, noise(part), network.dtype, step, on_state if record else None)
        if not drawn.isfinite().all():
            raise RunError("the model draws non-finite numbers; use an earlier checkpoint, or --precision fp32")
        return layout.image(drawn).to(network.dtype)

    if ranks is None or ranks.world_size == 1:
        batches = [draw(part) for part in rows]
    else:
        batches = [batch.to(network.device) for batch in ranks.share(rows, lambda part: draw(part).cpu())]
    return torch.cat(batches) if batches else torch.empty(0, *layout.shape, device=network.device)


def check_class_guidance(network, settings):
    """Raise a UsageError if the settings guide a class token and the model has none."""
    if settings.cls_cfg_scale is not None and getattr(network, "class_dim", None) is None:
        raise UsageError(f"--cls-cfg-scale: {settings.cls_cfg_scale:g}, but the model has no class token; leave it out")


def checked_labels(labels, num_classes):
    """Labels as an int64 tensor, or class embeddings unchanged.

    Raises:
        UsageError: a label is outside [0, num_classes].
    """
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() and labels.dim() == 2:
        return labels
    labels = labels.to(torch.int64)
    wrong = labels[(labels < 0) | (labels > num_classes)]
    if len(wrong):
        raise UsageError(f"label {int(wrong[0])} is outside the model's classes 0 to {num_classes - 1}")
    return labels


def _solve(settings, velocity, noise, dtype, on_step, on_state):
    start, hooks = noise.draw(dtype), {"on_step": on_step, "on_state": on_state}
    if settings.sampler == "ode":
        return euler(velocity, start, settings.steps, **hooks)
    if settings.sampler == "heun":
        return heun(velocity, start, settings.steps, **hooks)
    return euler_maruyama(velocity, start, settings.steps, path=settings.path, randn=noise, **hooks)


def class_sheet(
    model, classes, class_names, settings=None, *, per_class=8, decoder=None, title=None, on_images=None, record=None,
    ranks=None,
):  # fmt: skip
    """Draw a sheet of images with one row per class.

    Args:
        model, settings, on_images, record, ranks: as for `generate`.
        classes: labels, one row each.
        class_names: name of every label of the model.
        per_class: images in a row.
        decoder: latents (B, C, h, w) -> images in [-1, 1]; None for pixels.
        title: a line above the images.

    Returns:
        (PIL.Image, pictures): pictures is (len(classes), per_class, H, W, C) uint8.
    """
    labels, indices = sheet_labels(classes, per_class)
    images = generate(model, labels, settings, indices=indices, on_images=on_images, record=record, ranks=ranks)
    pictures = visible(images, decoder).unflatten(0, (len(classes), per_class))
    return class_grid(list(pictures), [class_names[label] for label in classes], title=title), pictures


def sheet_labels(classes, per_class):
    """(labels, indices) of the images of a sheet, row by row."""
    labels = torch.tensor(classes).repeat_interleave(per_class)
    return labels, [label * INDICES_PER_CLASS + k for label in classes for k in range(per_class)]


def visible(images, decoder=None):
    """Convert (B, C, H, W) pixels or latents to images (B, H, W, 1 or 3), uint8 on the CPU."""
    images = decoder(images) if decoder else images
    # Latents without a decoder (previews during training) are shown by their first three channels.
    images = images if images.shape[1] in (1, 3) else images[:, :3] if images.shape[1] > 3 else images[:, :1]
    return to_uint8(images)
