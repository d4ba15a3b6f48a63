"""The state that a sampler integrates: the image, or the image and the class token side by side in one tensor."""

from typing import NamedTuple, Optional

import torch


class StateLayout(NamedTuple):
    """The layout of a model's state.

    The state of a model without a class token is the image (B, C, H, W). With a class token (REG, arXiv 2507.01467)
    both are denoised together, and the state is (B, C * H * W + class_dim): the elements of the image, then those of
    the class token. Solvers treat all elements alike, so they need not distinguish the two.

    shape: (C, H, W) of an image; class_dim: width of the class token, None for a model without one.
    """

    shape: tuple
    class_dim: Optional[int] = None

    @classmethod
    def of(cls, model):
        """The layout of a model, from its `in_channels`, `input_size` and, if it exists, `class_dim`."""
        shape = (model.in_channels, model.input_size, model.input_size)
        return cls(shape, getattr(model, "class_dim", None))

    def pack(self, image, class_token=None):
        """The state of an image (B, C, H, W) and a class token (B, class_dim) of the same dtype."""
        if self.class_dim is None:
            return image
        return torch.cat([image.flatten(1), class_token], dim=1)

    def unpack(self, state):
        """(image (B, C, H, W), class token (B, class_dim), or None for a model without one)."""
        if self.class_dim is None:
            return state, None
        image, class_token = state.split([state.shape[1] - self.class_dim, self.class_dim], dim=1)
        return image.unflatten(1, self.shape), class_token

    def image(self, state):
        """The image (B, C, H, W) of a state."""
        return self.unpack(state)[0]
