"""The model as the samplers call it: without projectors, and with weights that are rounded to bf16 only once."""

import copy
from contextlib import nullcontext

import torch
from torch import nn

from maskalign.runtime.device import compute_dtype
from maskalign.sampling.state import StateLayout


class Network:
    """Computes the velocity of a model at (state, t, labels) in the precision of the sampling settings.

    A state is the image. For a model with a class token it is the image and the class token in one tensor, as
    `state.StateLayout` packs them. The velocity has the same form.

    With `bf16` it runs a copy of the model with bf16 weights. Autocast would round each weight at every use, or keep a
    second set of weights. The time is given in float32, because bfloat16 cannot distinguish 0.999 from 1, and the
    velocity is returned in float32. A model that is compiled or sharded cannot be copied and runs under autocast.

    Args:
        model: a `SiT`, or a callable with the same signature and the attributes `in_channels`, `input_size` and
            `num_classes` (and `class_dim`, if it has a class token).
        precision: `fp32` (the dtype of the model's own weights), `bf16`, or `auto`: bf16 if the processor supports it.

    Attributes:
        in_channels, input_size, num_classes, class_dim: of the model; class_dim is None without a class token.
        layout: `StateLayout` of the states.
        device: torch.device of the model.
        dtype: torch.dtype of the states, float32 (float64 for a float64 model).
        precision: `fp32` or `bf16`.
    """

    def __init__(self, model, precision="auto"):
        parameter = next(model.parameters())
        self.model, self.device = model, parameter.device
        self.in_channels, self.input_size, self.num_classes = model.in_channels, model.input_size, model.num_classes
        self.layout = StateLayout.of(model)
        self.class_dim = self.layout.class_dim
        self.precision = resolve_precision(precision, self.device)
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        # Only training needs the projectors, which are a quarter of the work of a small model.
        self.extra = {"align": False} if hasattr(model, "projectors") else {}
        self.low = self.precision == "bf16" and can_copy(model)
        self.autocast = self.precision == "bf16" and not self.low
        if self.low:
            self.model = bf16_copy(model)

    def __call__(self, x, t, labels):
        """Velocity of a state, in `dtype` and of x's shape.

        Args:
            x: (B, C, H, W), or (B, C * H * W + class_dim) for a model with a class token, in `dtype`.
            t: (B,) in `dtype`.
            labels: (B,) int64, or (B, D) class embeddings.
        """
        if self.low:
            x = x.to(torch.bfloat16)
            labels = labels.to(torch.bfloat16) if labels.is_floating_point() else labels
        image, class_token = self.layout.unpack(x)
        extra = self.extra if class_token is None else {**self.extra, "class_token": class_token}
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            out = self.model(image, t, labels, **extra)
        velocity = getattr(out, "velocity", out).to(self.dtype)
        return velocity if class_token is None else self.layout.pack(velocity, out.class_velocity.to(self.dtype))

    def class_embeddings(self):
        """(num_classes + 1, D) the rows of the model's label table in its own precision, "no class" last."""
        return self.model.y_embedder.embedding_table.weight


def resolve_precision(precision, device):
    """`fp32` or `bf16`; `auto` becomes bf16 if the device multiplies it natively."""
    return "bf16" if compute_dtype(precision, device) == torch.bfloat16 else "fp32"


def can_copy(model):
    """False if a model's forward is compiled or its weights are sharded, because a copy would refer to the original."""
    from torch.distributed.tensor import DTensor

    plain = not any("forward" in vars(module) for module in model.modules())
    return plain and not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def bf16_copy(model):
    """A copy of the model in bf16, in eval mode and without projectors."""
    skipped = {id(model.projectors): nn.ModuleList()} if hasattr(model, "projectors") else {}
    return copy.deepcopy(model, skipped).requires_grad_(False).to(torch.bfloat16).eval()
