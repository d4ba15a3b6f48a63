"""Images that a model draws for its evaluation, batch by batch. They are not stored."""

import time
from dataclasses import replace

import torch

from maskalign.errors import UsageError
from maskalign.sampling.drawing import generate
from maskalign.sampling.noise import image_labels
from maskalign.sampling.pictures import to_uint8


class DrawnPictures:
    """Images drawn by a model, one per label.

    Args:
        network: a `SiT` or a sampling `Network`.
        count: number of images.
        settings: `Sampling`.
        decoder: latents -> images; None for pixels.
        label_choice: see `choose_labels`.

    Attributes:
        count: number of images.
        size: (height, width).
        labels: (count,) int64; must be set before the first batch.
        on_images: None, or a function that is called with a (fractional) number of images as they progress.

    Raises:
        UsageError: the model does not draw RGB images.
    """

    def __init__(self, network, count, settings, decoder=None, label_choice="reference"):
        self.label_choice = label_choice
        self.network, self.count, self.settings, self.decoder = network, count, settings, decoder
        self.labels = self.on_images = None
        self.size, channels = (network.input_size,) * 2, network.in_channels
        if decoder is not None:  # the size is known only after decoding
            device = getattr(network, "device", None) or next(network.parameters()).device
            channels, *size = decoder(torch.zeros(1, network.in_channels, *self.size, device=device)).shape[1:]
            self.size = tuple(size)
        if channels != 3:
            raise UsageError(f"the model draws {channels} channels; only RGB pictures can be evaluated")

    def choose_labels(self, reference):
        """Set the labels: those of the real images in turn (`reference`), or random ones (`uniform`).

        Args:
            reference: (n,) labels of the real pictures, in their order.
        """
        self.labels = labels_like(reference, self.count)
        if self.label_choice == "uniform":
            classes = torch.as_tensor(reference).unique()
            self.labels = classes[image_labels(self.settings.seed, range(self.count), len(classes))]

    def seconds(self, images=32):
        """Estimate the time in seconds for drawing all images, from two evaluations of the network.

        Args:
            images: number of images in an evaluation.
        """
        settings, images = self.settings, min(images, self.count)
        trial = replace(settings, sampler="ode", steps=1, batch_size=images)
        labels, took = torch.zeros(images, dtype=torch.int64), 0.0
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            generate(self.network, labels, trial, indices=range(images))
            took = time.perf_counter() - begin
        return took * settings.steps * (2 if settings.sampler == "heun" else 1) * self.count / images

    def batches(self, size):
        """Yield (b, 3, H, W) uint8 tensors on the CPU.

        Raises:
            RunError: the model draws numbers that are not finite.
        """
        for begin in range(0, self.count, size):
            indices = range(begin, min(begin + size, self.count))
            labels = self.labels[begin : begin + size]
            images = generate(self.network, labels, self.settings, indices=indices, on_images=self.on_images)
            images = self.decoder(images) if self.decoder else images
            pictures = to_uint8(images, truncate=self.decoder is not None)
            yield pictures.permute(0, 3, 1, 2).contiguous()


def labels_like(reference, count):
    """(count,) labels: those of the real images in turn, so that both sets have the same class frequencies.

    Args:
        reference: (n,) labels of the real pictures, in their order.
    """
    return torch.as_tensor(reference)[torch.arange(count) % len(reference)]
