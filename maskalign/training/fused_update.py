"""Clip, AdamW, the moving average and the copy in bfloat16 as one pass over memory, in compiled code for CPUs.

torch's fused AdamW is one pass of its own, but wants float32 gradients, and average and copy are two more: together
they move 64 bytes per weight where 38 are enough. Small tensors are not worth a call of compiled code.
"""

from functools import cache, partial

import torch

SMALLEST = 2**16


def fits(parameter):
    """True where a parameter's gradient is there and worth the call; all that belongs to it is then contiguous."""
    return parameter.grad is not None and parameter.numel() >= SMALLEST and parameter.is_contiguous()


class FusedUpdate:
    """AdamW (arXiv 1711.05101) in float32, as torch computes it.

    Args:
        betas, eps: of AdamW.
    """

    def __init__(self, betas, eps):
        self.betas = tuple(betas)
        self.update = _compiled(*self.betas, eps)
        self.numbers = torch.zeros(5)
        self.lr = 0.0

    @staticmethod
    def norm(grads):
        """Global norm of contiguous bfloat16 gradients, 0-d float32."""
        return torch.stack([_square(grad.view(-1)) for grad in grads]).sum().sqrt()

    def prepare(self, lr, weight_decay, divisor, ema_decay):
        """The numbers of one step that are the same for all tensors; divisor (0-d tensor) is the clip's."""
        self.lr = lr
        self.numbers[2] = 1 - lr * weight_decay
        self.numbers[3] = 1 / divisor
        self.numbers[4] = 1 - ema_decay

    def __call__(self, master, grad, state, average, copy):
        """One tensor's step, in place.

        Args:
            master, average: float32; grad, copy: bfloat16; all contiguous and of one shape.
            state: AdamW's: `step` (0-d float32, counted up here), `exp_avg`, `exp_avg_sq`.
        """
        state["step"] += 1
        beta1, beta2 = self.betas
        step = int(state["step"])
        self.numbers[0] = self.lr / (1 - beta1**step)
        self.numbers[1] = (1 - beta2**step) ** -0.5
        tensors = (master, grad, state["exp_avg"], state["exp_avg_sq"], average, copy)
        self.update(*(tensor.view(-1) for tensor in tensors), self.numbers)


@partial(torch.compile, dynamic=True, fullgraph=True)
def _square(grad):
    """Sum of squares in float32: half the time of ATen's norm of a bfloat16 tensor."""
    return grad.float().square().sum()


@cache
def _compiled(beta1, beta2, eps):
    """The update of flat tensors, compiled once for all lengths."""

    def update(master, grad, first, second, average, copy, numbers):
        size, correction, shrink, scale, pull = numbers.unbind()
        g = grad.float() * scale
        m = first + (1 - beta1) * (g - first)
        v = beta2 * second + (1 - beta2) * g * g
        p = master * shrink - size * m / (v.sqrt() * correction + eps)
        first.copy_(m)
        second.copy_(v)
        master.copy_(p)
        average.copy_(average + pull * (p - average))
        copy.copy_(p)

    return torch.compile(update, dynamic=True, fullgraph=True)
