"""Interpolations: rows of images between two noises, two classes, or both."""

import math

import torch

from maskalign.sampling.drawing import INDICES_PER_CLASS, generate, visible
from maskalign.sampling.grids import picture_grid
from maskalign.sampling.network import Network
from maskalign.sampling.noise import ImageNoise

KINDS = ("noise", "class", "both")


class BlendedNoise:
    """Noise on the quarter circle between two images' noises: cos(pi w / 2) a + sin(pi w / 2) b.

    The squares of the weights sum to one, so every point is standard normal noise. This would not hold on a straight
    line. All draws are blended, including the later draws of the SDE and those of the class token.

    Args:
        first, second: `ImageNoise` of the same number of images, B.
        weight: (B,) float64; 0 gives exactly the first noise and 1 exactly the second.
    """

    def __init__(self, first, second, weight):
        self.first, self.second = first, second
        angle = weight * (math.pi / 2)
        self.cos, self.sin = angle.cos() * (weight < 1), angle.sin()

    def draw(self, dtype=torch.float32):
        """The next draw of every image, of the shape of the two streams' draws."""
        a, b = self.first.draw(torch.float64), self.second.draw(torch.float64)
        cos, sin = (factor.to(a).reshape(-1, *[1] * (a.dim() - 1)) for factor in (self.cos, self.sin))
        return (cos * a + sin * b).to(dtype)

    def __call__(self, x):
        """The next draw in x's dtype: the `randn` of `euler_maruyama`."""
        return self.draw(x.dtype)


def plan_rows(kind, classes):
    """The two ends of every row, as ((label, k), (label, k)), where k is the number of an image of the class sheet.

    `noise`: from the first to the second image of each class. `class`: from each class to the next one, with the
    noise of the first class's first image. `both`: from the first image of each class to that of the next class.
    """
    if kind == "noise":
        return [((label, 0), (label, 1)) for label in classes]
    return [((one, 0), (other, 0)) for one, other in zip(classes[:-1], classes[1:], strict=True)]


def interpolate(
    model, kind, classes, class_names, settings, *, columns=8, decoder=None, title=None, on_images=None, ranks=None
):
    """Draw a sheet of interpolations.

    Args:
        model, settings, on_images, ranks: as for `generate`.
        kind: `noise`, `class` (the class embeddings are blended in a straight line) or `both`.
        classes: labels, at least one for `noise` and two otherwise.
        class_names: name of every label of the model.
        columns: images in a row, including the two ends; at least 2.
        decoder: latents -> images; None for pixels.

    Returns:
        (PIL.Image, pictures): pictures is (rows, columns, H, W, C) uint8.
    """
    network = model if isinstance(model, Network) else Network(model, settings.precision)
    rows = plan_rows(kind, classes)
    weight = torch.linspace(0, 1, columns, dtype=torch.float64).repeat(len(rows))
    first, second = (torch.tensor([row[end][0] for row in rows]).repeat_interleave(columns) for end in (0, 1))
    table = network.class_embeddings().detach()
    share = weight.to(table).unsqueeze(1)
    embeddings = torch.lerp(table[first.to(table.device)], table[second.to(table.device)], share)
    ends = [[label * INDICES_PER_CLASS + k for label, k in row for _ in range(columns)] for row in rows]
    starts = [index for row in ends for index in row[:columns]]
    stops = [index for row in ends for index in row[columns:]] if kind != "class" else starts
    layout = network.layout

    def noise(part):
        one, other = (
            ImageNoise(settings.seed, indices[part], layout.shape, network.device, layout.class_dim)
            for indices in (starts, stops)
        )
        return one if kind == "class" else BlendedNoise(one, other, weight[part])

    images = generate(network, embeddings, settings, noise=noise, on_images=on_images, ranks=ranks)
    pictures = visible(images, decoder).unflatten(0, (len(rows), columns))
    names = [(class_names[one], "" if one == other else class_names[other]) for (one, _), (other, _) in rows]
    sheet = picture_grid(list(pictures), [name for name, _ in names], right=[name for _, name in names], title=title)
    return sheet, pictures
