"""Parameters, moments and averages of a model in one buffer each, so that an update is a few operations.

The tensors of modules, checkpoints and averages are views of the buffers. Gradients are separate tensors, which
autograd passes without a copy, until the update concatenates them.
"""

import itertools

import torch

ROW = 4096  # elements whose squares are summed first, so that the norm is as accurate as if computed per tensor


class FlatBuffers:
    """The buffers of a list of parameters, which become views of the buffers.

    A parameter without a gradient must keep its value, its moments and its number of steps. So the buffers are cut into
    segments of neighboring parameters that have had gradients in the same steps. As long as all parameters have
    gradients, there is one segment.

    Args:
        params: list of parameters of one dtype and device.
        dtype: bfloat16 makes the parameters bfloat16 copies of float32 masters; other dtypes change nothing.
        ema_device: device of the averages.
        adamw: `torch.optim.AdamW`, whose parameters become the segments of the masters.

    Attributes:
        master, ema, exp_avg, exp_avg_sq: 1-D, with one element per parameter element; float32 (float64 for float64
            parameters).
        copies: 1-D bfloat16, or None.
        steps: (number of parameters,) float32: the number of updates of each parameter. It is valid for the first
            parameter
            of each segment, and for all of them after `spread_steps`.
        segments: list of (first, end), indices of parameters.
    """

    def __init__(self, params, dtype, ema_device, adamw):
        self.shapes = [p.shape for p in params]
        self.ends = list(itertools.accumulate(p.numel() for p in params))
        self.adamw = adamw
        with torch.no_grad():
            self.master = torch.cat([p.detach().reshape(-1) for p in params])
            self.copies = self.master.to(dtype) if dtype == torch.bfloat16 else None
            self.ema = self.master.to(ema_device, copy=True)
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
            self.steps = torch.zeros(len(params), dtype=torch.float32, device=self.master.device)
        for p, view in zip(params, self.views(self.master if self.copies is None else self.copies), strict=True):
            p.data = view
        self._cut([(0, len(params))])

    def views(self, buffer):
        """The tensor of each parameter in a buffer."""
        return [self._slice(buffer, k, k + 1).view(shape) for k, shape in enumerate(self.shapes)]

    def _slice(self, buffer, first, end):
        return buffer[self.ends[first - 1] if first else 0 : self.ends[end - 1]]

    def _cut(self, segments):
        """Set the segments, and make AdamW update them."""
        self.segments = segments
        self.masters = [self._slice(self.master, *segment) for segment in segments]
        self.adamw.param_groups[0]["params"] = self.masters
        self.adamw.state.clear()
        for segment, master in zip(segments, self.masters, strict=True):
            moments = {key: self._slice(getattr(self, key), *segment) for key in ("exp_avg", "exp_avg_sq")}
            self.adamw.state[master] = {"step": self.steps[segment[0]], **moments}

    @torch.no_grad()
    def spread_steps(self):
        """Write the number of updates of every parameter to `steps`."""
        for first, end in self.segments:
            self.steps[first:end] = self.steps[first].clone()

    def after_load(self):
        """Set the segments according to `steps`, after values have been loaded into the views."""
        runs = itertools.groupby(enumerate(self.steps.tolist()), key=lambda entry: entry[1])
        numbers = [[k for k, _ in run] for _, run in runs]
        self._cut([(run[0], run[-1] + 1) for run in numbers])

    def join_gradients(self, gradients):
        """Set the gradients of the masters' segments.

        Args:
            gradients: list with the gradient of each parameter, or None. The list is emptied.
        """
        there = [gradient is not None for gradient in gradients]
        ends = [k for k in range(1, len(there)) if there[k] != there[k - 1]]
        inside = [k for k in ends if not any(k == first for first, _ in self.segments)]
        if inside:
            self.spread_steps()
            starts = sorted({first for first, _ in self.segments} | set(inside))
            self._cut(list(zip(starts, [*starts[1:], len(there)], strict=True)))
        for (first, end), master in zip(self.segments, self.masters, strict=True):
            if there[first]:
                flat = [g if g.dim() == 1 else g.reshape(-1) for g in gradients[first:end]]
                master.grad = torch.cat(flat).to(master.dtype)
        gradients.clear()


def norm_of(flat):
    """Euclidean norm of a long 1-D tensor, 0-d, computed in two levels."""
    rows = flat.numel() // ROW
    parts = torch.linalg.vector_norm(flat[: rows * ROW].view(rows, ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[rows * ROW :])
    return torch.linalg.vector_norm(torch.cat([parts, rest.unsqueeze(0)]))
