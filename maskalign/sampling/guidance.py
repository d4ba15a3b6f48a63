"""Classifier-free guidance (arXiv 2207.12598) inside an interval of time (arXiv 2404.07724)."""

import torch
from torch import nn

from maskalign.sampling.network import Network
from maskalign.sampling.settings import class_token_scale


class Guided:
    """A guided velocity function of a model and its labels: v_null + scale * (v_label - v_null) for low <= t <= high.

    All channels are guided. Outside the interval, and with scale 1, only the conditional velocity is computed.

    For a model with a class token, x holds the image and the class token, as `state.StateLayout` packs them, and the
    class token has its own guidance scale. If the image's scale is above 1, the velocities are those of REG's sampler
    (arXiv 2507.01467). At other scales REG guides neither of the two, while here the class token's own scale still
    applies.

    Args:
        model: called as `model(x, t, labels)`; returns the velocity, or an object with an attribute `velocity`. A `SiT`
            with a class token takes image and class token separately, so it is called through a `Network`.
        labels: (B,) int64, or (B, D) class embeddings.
        null_label: the label for "no class", by default `model.num_classes`; (D,) if labels are embeddings.
        scale: guidance scale; 1 is none.
        interval: (low, high), both included.
        class_scale: guidance scale of the class token: None for the image's scale, 0 for no guidance.
    """

    def __init__(self, model, labels, *, null_label=None, scale=1.0, interval=(0.0, 1.0), class_scale=None):
        low, high = interval
        if not low <= high:
            raise ValueError(f"the guidance interval must have low <= high, got {low}, {high}")
        self.class_dim = getattr(model, "class_dim", None)
        self.model = Network(model, "fp32") if self.class_dim and isinstance(model, nn.Module) else model
        self.labels = labels
        null = model.num_classes if null_label is None else null_label
        self.null = torch.as_tensor(null, dtype=labels.dtype, device=labels.device).expand_as(labels)
        self.scale = scale
        self.class_scale = class_token_scale(scale, class_scale) if self.class_dim else scale
        self.interval = (low, high)

    def __call__(self, x, t, time=None):
        """Velocity of x (B, ...) at t (B,).

        Args:
            time: the time, as a float, to compare with the interval; by default every image's own t.
        """
        if self.scale == self.class_scale == 1:
            return self._velocity(x, t, self.labels)
        low, high = self.interval
        if time is None:
            inside = ((t >= low) & (t <= high)).reshape(-1, *[1] * (x.dim() - 1))
        elif low <= time <= high:
            inside = None
        else:
            return self._velocity(x, t, self.labels)
        both = self._velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([self.labels, self.null]))
        conditional, unconditional = both.chunk(2)
        guided = self._guide(conditional, unconditional)
        return guided if inside is None else torch.where(inside, guided, conditional)

    def _guide(self, conditional, unconditional):
        if self.class_scale == self.scale:
            return _extrapolate(conditional, unconditional, self.scale)
        # One scale for the elements of the image, another one for those of the class token.
        sizes = [conditional.shape[1] - self.class_dim, self.class_dim]
        parts = zip(
            conditional.split(sizes, dim=1),
            unconditional.split(sizes, dim=1),
            (self.scale, self.class_scale),
            strict=True,
        )
        return torch.cat([_extrapolate(*part) for part in parts], dim=1)

    def _velocity(self, x, t, labels):
        out = self.model(x, t, labels)
        # Guidance multiplies rounding errors by its scale, so combine in float64, the dtype of the samplers' state.
        return getattr(out, "velocity", out).to(torch.float64)


def _extrapolate(conditional, unconditional, scale):
    return conditional if scale == 1 else unconditional + scale * (conditional - unconditional)
