"""AdamW on float32 masters with the gradient clip folded in, skipped steps, and the moving average of the weights."""

from contextlib import contextmanager

import torch


class Optimizer:
    """One optimiser step of training: clip, AdamW, EMA, without a synchronisation with the host.

    torch's fused AdamW divides gradients by `grad_scale` and skips the update where `found_inf` is set, inside its one
    pass over the weights; the clip and the guard against non-finite steps ride on these two.

    Where the model computes in bfloat16 its parameters are bfloat16 copies of float32 masters: no cast per use, half
    the memory traffic, and updates that do not round to nothing.

    Args:
        model: the model; its parameters are cast to `dtype` in place.
        config: `OptimizerConfig`.
        dtype: float32, bfloat16, or float64 for tests.
    """

    def __init__(self, model, config, dtype=torch.float32):
        self.config = config
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        if dtype == torch.bfloat16:
            self.masters = [p.detach().float().clone() for p in self.params]
            for p in self.params:
                p.data = p.data.to(dtype)
        else:
            self.masters = self.params
        with torch.no_grad():
            self.ema = [p.detach().clone() for p in self.masters]
        self.adamw = torch.optim.AdamW(
            self.masters,
            lr=config.lr,
            betas=tuple(config.betas),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def has_copies(self):
        return self.masters is not self.params

    @torch.no_grad()
    def step(self, lr, healthy):
        """Clip, update and average; gradients are freed.

        Args:
            lr: learning rate, a number.
            healthy: 0-d bool tensor, False where the loss was not finite.

        Returns:
            (norm, skipped): the global gradient norm before the clip, 0-d float32, and a 0-d bool tensor that tells
            whether the step was skipped since the loss or the norm was not finite.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        skipped = ~(healthy & norm.isfinite())
        if self.has_copies:
            for master, p in zip(self.masters, self.params, strict=True):
                master.grad = None if p.grad is None else p.grad.float()
        # torch's clip_grad_norm_ multiplies by min(1, clip / (norm + 1e-6)); the fused kernel divides, in float32.
        clip = self.config.grad_clip
        divisor = ((norm + 1e-6) / clip).clamp(min=1) if clip else torch.ones_like(norm)
        if divisor.dtype == torch.float64:
            torch._foreach_div_([p.grad for p in self.masters if p.grad is not None], divisor)
            divisor = torch.ones_like(divisor)
        self.adamw.grad_scale = divisor.float()
        self.adamw.found_inf = skipped.float()
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        torch._foreach_lerp_(self.ema, self.masters, 1 - self.config.ema_decay)
        if self.has_copies:
            torch._foreach_copy_(self.params, self.masters)
        for p in self.params:
            p.grad = None
        for master in self.masters:
            master.grad = None
        return norm, skipped

    def ema_state(self):
        """dict from parameter name to its moving average (not a copy)."""
        return dict(zip(self.names, self.ema, strict=True))

    @contextmanager
    def averaged(self):
        """Inside, the model's parameters are the moving averages, in float32."""
        own = [p.data for p in self.params]
        try:
            for p, average in zip(self.params, self.ema, strict=True):
                p.data = average
            yield
        finally:
            for p, data in zip(self.params, own, strict=True):
                p.data = data

    def tensors(self):
        """Flat dict of everything to checkpoint, by `kind/parameter`; the tensors themselves, not copies.

        Moments are made where a parameter has none yet, so that saving and loading see one layout.
        """
        out = {}
        for name, master, ema in zip(self.names, self.masters, self.ema, strict=True):
            state = self.adamw.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state["exp_avg"] = torch.zeros_like(master.detach())
                state["exp_avg_sq"] = torch.zeros_like(master.detach())
            out[f"model/{name}"] = master.detach()
            out[f"ema/{name}"] = ema
            for key in ("exp_avg", "exp_avg_sq", "step"):
                out[f"{key}/{name}"] = state[key]
        return out

    @torch.no_grad()
    def after_load(self):
        """Bring the bfloat16 copies up to masters that were loaded in place."""
        if self.has_copies:
            torch._foreach_copy_(self.params, self.masters)
