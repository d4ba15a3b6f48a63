"""Draw a set of images for an evaluation (`maskalign sample --npz N`)."""

from dataclasses import asdict
from pathlib import Path

import torch

from maskalign.errors import UsageError
from maskalign.sampling.drawing import generate
from maskalign.sampling.noise import image_labels
from maskalign.sampling.npz import write_npz
from maskalign.sampling.pictures import to_uint8


def draw_set(network, count, out, settings, info, ranks, *, classes=None, labels=None, decoder=None, on_images=None):
    """Draw `count` images into `out`/samples_<count>.npz. If an earlier call was interrupted, draws the missing ones.

    Args:
        network: `Network`.
        count: number of images.
        settings: `Sampling`.
        info: `ModelInfo`; its label, step and `ema` are written next to the set, with the settings.
        ranks: `Ranks` that share the work.
        classes: the classes of the set; by default all of them.
        labels: `balanced` assigns the classes to the images in turn. `uniform` draws a class per image at random, as
            REG and REPA do, keyed by the image's index. None is `balanced` if `classes` is given, else `uniform`.
        decoder: latents -> images; None for pixels.
        on_images: called with a number of images that have been finished.

    Returns:
        Path of the .npz.

    Raises:
        UsageError: the model does not draw RGB images, or the set was begun with other settings.
    """
    # The size of decoded images is known only after decoding one.
    side = network.input_size
    probe = torch.zeros(1, network.in_channels, side, side, device=network.device)
    channels, height, width = (decoder(probe) if decoder else probe).shape[1:]
    if channels != 3:
        raise UsageError(f"--npz holds RGB images; this model draws {channels} channels")

    chosen = torch.tensor(classes if classes is not None else range(network.num_classes))
    labels = labels or ("uniform" if classes is None else "balanced")

    def labels_of(indices):
        if labels == "uniform":
            return chosen[image_labels(settings.seed, indices, len(chosen))]
        return chosen[torch.tensor(list(indices)) % len(chosen)]

    def draw(indices):
        images = generate(network, labels_of(indices), settings, indices=indices)
        return to_uint8(decoder(images) if decoder else images, truncate=decoder is not None)

    record = {key: value for key, value in asdict(settings).items() if key != "batch_size"}
    record |= {
        "precision": network.precision,
        "classes": classes,
        "labels": labels,
        "model": info.label,
        "step": info.step,
    }
    record |= {"ema": info.ema, "images": count}
    return write_npz(
        Path(out) / f"samples_{count}.npz",
        count,
        (height, width, 3),
        draw,
        settings=record,
        batch_size=settings.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        barrier=ranks.barrier,
        on_done=on_images,
    )
