"""Show the denoising from noise to image: a strip of states, and an animation of the whole sheet."""

from pathlib import Path

import torch
from PIL import Image

from maskalign.runtime.files import replacing
from maskalign.sampling.drawing import visible
from maskalign.sampling.grids import class_grid, picture_grid
from maskalign.sampling.samplers import data_from_velocity

ANIMATIONS = {"gif": ".gif", "webp": ".webp", "apng": ".png"}
FRAME_MS, LAST_FRAME_MS = 80, 2000
MOST_FRAMES = 32


class Trajectory:
    """Records some of a sampler's states; used as the `record` of `generate`.

    Args:
        steps: steps of the sampler.
        frames: number of states to keep, including the noise and the image; a sampler has steps + 1 states.
        path: the interpolant's path, for the model's prediction of the image.

    Attributes:
        times: times of the kept states, from 1 (noise) to 0; available after recording.
    """

    def __init__(self, steps, frames, path="linear"):
        count = min(max(frames, 2), steps + 1)
        self.kept = sorted({round(k * steps / (count - 1)) for k in range(count)})
        self.path = path
        self.parts = {}  # begin of the batch -> kept step -> (time, states, guesses)

    def __call__(self, rows, step, time, state, velocity):
        if step in self.kept:
            guess = state if velocity is None else data_from_velocity(velocity, state, time, self.path)
            batch = self.parts.setdefault(rows.start, {})
            batch[step] = (time, state.to("cpu", torch.float32), guess.to("cpu", torch.float32))

    def gather(self, ranks):
        """Collect what the ranks have recorded, on every rank; all ranks must call this."""
        self.parts = {begin: part for parts in ranks.gather(self.parts) for begin, part in parts.items()}

    @property
    def times(self):
        first = self.parts[min(self.parts)]
        return [first[step][0] for step in self.kept]

    def states(self, frame):
        """(B, C, H, W) float32, the states at a kept frame."""
        return self._joined(frame, 1)

    def guesses(self, frame):
        """(B, C, H, W) float32, the clean images that the model predicts at a kept frame."""
        return self._joined(frame, 2)

    def _joined(self, frame, which):
        return torch.cat([self.parts[begin][self.kept[frame]][which] for begin in sorted(self.parts)])


def denoising_strip(trajectory, classes, class_names, per_class, *, frames=10, decoder=None, title=None):
    """The denoising of each class's first image, in two rows per class: the states, and the predicted clean images.

    Args:
        trajectory: `Trajectory` of a class sheet.
        classes, class_names, per_class: as for the class sheet.
        frames: number of columns, evenly spread over the kept states.
        decoder: latents -> images; None for pixels.

    Returns:
        PIL.Image.
    """
    kept = len(trajectory.times)
    count = min(frames, kept)
    chosen = [round(k * (kept - 1) / max(1, count - 1)) for k in range(count)]
    rows, names = [], []
    for number, label in enumerate(classes):
        for part, name in ((trajectory.states, class_names[label]), (trajectory.guesses, "the model's guess")):
            latents = torch.stack([part(frame)[number * per_class] for frame in chosen])
            rows.append(visible(latents, decoder))
            names.append(name)
    columns = [f"t = {trajectory.times[frame]:.2f}" for frame in chosen]
    return picture_grid(rows, names, columns=columns, title=title)


def save_animation(path, trajectory, classes, class_names, per_class, *, decoder=None, title=None):
    """Write the denoising of the class sheet as an animation.

    Args:
        path: the file; its ending, one of the values of ANIMATIONS, gives the format.
        trajectory, classes, class_names, per_class, decoder, title: as for `denoising_strip`.

    Returns:
        The path.
    """
    path, names, count = Path(path), [class_names[label] for label in classes], len(trajectory.times)

    def frame(number):
        pictures = visible(trajectory.states(number), decoder).unflatten(0, (len(classes), per_class))
        words = ", ".join(filter(None, [title, f"t = {trajectory.times[number]:.2f}"]))
        return class_grid(list(pictures), names, title=words)

    # A title can be wider than the sheet, and its width changes with the digits. All frames get the size of the last.
    last = frame(count - 1)
    frames = [frame(number).crop((0, 0, *last.size)) for number in range(count - 1)] + [last]
    kind = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}[path.suffix]
    if kind == "GIF":
        palette = last.quantize(256)  # one palette for all frames, so that the finished images do not flicker
        frames = [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in frames]
    options = {"quality": 75, "method": 4} if kind == "WEBP" else {}
    durations = [FRAME_MS] * (count - 1) + [LAST_FRAME_MS]
    with replacing(path) as temporary:
        frames[0].save(temporary, kind, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)
    return path
