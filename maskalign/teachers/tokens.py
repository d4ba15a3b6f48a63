"""Token grids: resampled to the student's, normalized, rounded to int8; class tokens standardized."""

import torch
import torch.nn.functional as F

from maskalign.errors import UsageError

MOST_DEVIATIONS = 100.0


def resample_tokens(z, grid, new_grid):
    """Resample a grid of tokens to another grid: area means where an axis shrinks, bilinear where it grows.

    Args:
        z: (B, gh * gw, D), any dtype (int8 too), rows of the grid one after the other.
        grid: (gh, gw).
        new_grid: (Gh, Gw).

    Returns:
        (B, Gh * Gw, D): `z` itself where the grids are equal, else floating (int8 comes out as float32).
    """
    (gh, gw), (new_h, new_w) = grid, new_grid
    if z.ndim != 3 or z.shape[1] != gh * gw:
        raise ValueError(f"z has shape {tuple(z.shape)}, expected (B, {gh * gw}, D) for a grid of {gh}x{gw}")
    if (gh, gw) == (new_h, new_w):
        return z
    if not z.is_floating_point():
        z = z.float()
    maps = z.transpose(1, 2).reshape(z.shape[0], z.shape[2], gh, gw)
    smaller = (min(gh, new_h), min(gw, new_w))
    if smaller != (gh, gw):
        maps = F.interpolate(maps, size=smaller, mode="area")
    if smaller != (new_h, new_w):
        maps = F.interpolate(maps, size=(new_h, new_w), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2).contiguous()


def normalize_tokens(z, mode="none", mean=None, eps=1e-6):
    """Normalize teacher tokens before the cosine.

    Args:
        z: (B, T, D) floating.
        mode: "none"; "spatial", as iREPA (arXiv 2512.10794): every channel of an image minus its mean over
            the tokens, divided by its standard deviation (unbiased) + eps; "mean": minus the data set's mean.
        mean: (D,) for "mean".

    Returns:
        (B, T, D).
    """
    if mode == "none":
        return z
    if mode == "spatial":
        if z.shape[1] < 2:
            raise UsageError("normalize spatial needs a teacher with at least 2 tokens")
        return (z - z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + eps)
    if mode == "mean":
        if mean is None:
            raise UsageError("normalize mean needs a mean token: maskalign data encode --normalize mean")
        return z - mean.to(device=z.device, dtype=z.dtype)
    raise UsageError(f"normalize is {mode!r}, not one of none, spatial, mean")


def standardize_class_token(values, mean, std):
    """Standardize class tokens per channel with a data set's statistics.

    The statistics come from a sample, in which a channel may vary much less than elsewhere. Values beyond 100 standard
    deviations are clipped, so that none of them dominates the loss or overflows float16.

    Args:
        values: (B, D) floating.
        mean, std: (D,) each, a tensor or a list of numbers; std has no zeros.

    Returns:
        (B, D) float32.
    """
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=values.device) for v in (mean, std))
    return ((values.float() - mean) / std).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)


def class_projection(entry, count):
    """The projection of a class token to its leading principal components, for `(values - mean) @ matrix`.

    Args:
        entry: a manifest's `class_token` entry with `components`.
        count: how many of them.

    Returns:
        (mean (D,), matrix (D, count)), float32.

    Raises:
        ValueError: the entry has fewer components.
    """
    components = entry.get("components") or {"basis": []}
    if len(components["basis"]) < count:
        raise ValueError(f"{count} principal components were asked for, and {len(components['basis'])} are there")
    mean, basis, scale = (torch.tensor(components[key], dtype=torch.float64) for key in ("mean", "basis", "scale"))
    return mean.float(), (basis[:count] / scale[:count, None]).T.float()


def project_class_token(values, entry, count=None):
    """Stored class tokens as a model denoises them.

    Args:
        values: (B, D), any floating dtype, as they are stored or as `Teacher.tokens_and_class` gives them.
        entry: the `class_token` entry of the training data's manifest, whose `components` are used.
        count: `model.class_token_dim`: the number of principal components; None for the class token as it is.

    Returns:
        (B, count or D) float32.
    """
    values = values.float()
    if count is None:
        return values
    mean, matrix = (part.to(values.device) for part in class_projection(entry, count))
    return (values - mean) @ matrix


def quantize_rows(z, check=True):
    """Scale every token so that its largest magnitude is 127, and round it to int8.

    The cosine of a row ignores its length, so no scale is kept. A row of zeros stays zero.

    Rounding turns a row by an angle of about r / (127 sqrt(12)) radians, r its largest magnitude over its root mean
    square: 0.0073 for r = 3.2, the teachers' here. At an angle theta between student and teacher that is an error of
    0.0073 / sin(theta) of the alignment gradient, which is within 1 % up to a cosine of 0.68; store float16 for
    students that agree better. A smaller scale that clips the largest entries, searched row by row, reduces the angle
    by less than 2 % (see the tests), so the largest magnitude is the scale.

    Args:
        z: (..., D) floating, finite.
        check: raise for entries that are not finite; on a GPU this synchronizes.

    Returns:
        (..., D) int8 in [-127, 127].
    """
    largest = z.abs().amax(dim=-1, keepdim=True)
    if check and not torch.isfinite(largest).all():
        raise ValueError("z has entries that are not finite, they cannot be rounded to int8")
    # Divide first: 127 / largest overflows for rows of subnormal numbers.
    return torch.round(z / torch.where(largest > 0, largest, 1) * 127).to(torch.int8)
