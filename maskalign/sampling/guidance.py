"""Classifier-free guidance (arXiv 2207.12598) inside an interval of time (arXiv 2404.07724)."""

import torch


class Guided:
    """A velocity function of a model and its labels: v_null + scale * (v_label - v_null) where low <= t <= high.

    All channels are guided. Outside the interval, and with scale 1, the model runs on the labels alone.

    Args:
        model: called as `model(x, t, labels)`; gives the velocity, or something with an attribute `velocity`.
        labels: (B,) int64, or (B, D) class embeddings.
        null_label: the label that means "no class", by default `model.num_classes`; (D,) where labels are embeddings.
        scale: guidance scale; 1 is none.
        interval: (low, high), both included.
    """

    def __init__(self, model, labels, *, null_label=None, scale=1.0, interval=(0.0, 1.0)):
        low, high = interval
        if not low <= high:
            raise ValueError(f"the guidance interval must have low <= high, got {low}, {high}")
        self.model = model
        self.labels = labels
        null = model.num_classes if null_label is None else null_label
        self.null = torch.as_tensor(null, dtype=labels.dtype, device=labels.device).expand_as(labels)
        self.scale = scale
        self.interval = (low, high)

    def __call__(self, x, t, time=None):
        """Velocity of x (B, ...) at t (B,).

        Args:
            time: the time, as a float, to compare with the interval; by default every image's own t.
        """
        if self.scale == 1:
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
        guided = unconditional + self.scale * (conditional - unconditional)
        return guided if inside is None else torch.where(inside, guided, conditional)

    def _velocity(self, x, t, labels):
        out = self.model(x, t, labels)
        # Guidance multiplies rounding by its scale: combine in float64, as the samplers' state.
        return getattr(out, "velocity", out).to(torch.float64)
