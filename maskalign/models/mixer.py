"""Token mixers, which share information across all tokens before some of them are dropped.

`attention` is that of the paper (MaskAlign, arXiv 2606.08788): SiT blocks over the class token and all patches. The
others are smaller and mix only patches: `X <- X + gate(c) * M(LN(X) * (1 + scale(c)) + shift(c))`, where M acts along
the token axis. Every adaLN linear is initialized with 0, so a new mixer is the identity, and training of any SiT, REPA
or REG checkpoint can be continued with one. Mixing and dropping are one operation: a mixer receives the indices of the
rows to keep and returns only these rows.
"""

import torch
import torch.nn.functional as F
from torch import nn

from maskalign.models.layers import AdaLN, Block, modulate
from maskalign.models.routing import gather_tokens
from maskalign_kernels import mix_and_drop

MIXERS = ("token_mlp", "depthwise_conv", "attention", "none")


class TokenMLPMixer(nn.Module):
    """M = W2 gelu(W1 u + b1) + b2 along the tokens (MLP-Mixer's token mixing, arXiv 2105.01601), with the fused kernel.

    `fc1` has W1 (T, N) and b1, `fc2` has W2 (N, T) and b2.
    """

    needs_grid = True

    def __init__(self, width, tokens, hidden=64):
        super().__init__()
        self.fc1 = nn.Linear(tokens, hidden)
        self.fc2 = nn.Linear(hidden, tokens)
        self.adaLN_modulation = AdaLN(width, 3)

    def forward(self, x, c, subset=None):
        """Rows `subset` (B, K) of the mixed x (B, N, D), or all N rows if it is None."""
        shift, scale, gate = self.adaLN_modulation(c)
        return mix_and_drop(
            x, shift, scale, gate, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, subset
        )


class DepthwiseConvMixer(nn.Module):
    """M = depthwise 7x7 convolution over the token grid, as in ConvNeXt (arXiv 2201.03545), for any resolution."""

    needs_grid = True

    def __init__(self, width, grid, kernel_size=7):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.conv = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.adaLN_modulation = AdaLN(width, 3)

    def forward(self, x, c, subset=None):
        shift, scale, gate = self.adaLN_modulation(c)
        u = modulate(self.norm(x), shift, scale).transpose(1, 2).unflatten(2, self.grid)
        # A convolution gives its weight's gradient arbitrary strides for dimensions of size 1, about which DDP warns on
        # every rank. Through a view with two dimensions, the gradient has the strides of the weight.
        weight = self.conv.weight.flatten(1).unflatten(1, self.conv.weight.shape[1:])
        mixed = F.conv2d(u, weight, self.conv.bias, padding=self.conv.padding, groups=self.conv.groups)
        mixed = mixed.flatten(2).transpose(1, 2)
        if subset is not None:
            x, mixed = gather_tokens(x, subset), gather_tokens(mixed, subset)
        return torch.addcmul(x, gate.unsqueeze(1), mixed)


class AttentionMixer(nn.Module):
    """SiT blocks on all tokens, including the class token. With adaLN-Zero they are initialized as the identity.

    The last layer attends to all tokens, but computes queries, output projection and MLP only for the kept rows,
    because the other rows are not used.
    """

    needs_grid = False

    def __init__(self, width, heads, layers=2, mlp_ratio=4.0, qk_norm=False, attention="auto", fused_adaln=False):
        super().__init__()
        if layers < 1:
            raise ValueError(f"mixer_layers must be at least 1, got {layers}; choose the mixer none for no mixing")
        self.layers = nn.ModuleList(
            Block(width, heads, mlp_ratio, qk_norm, attention, fused_adaln) for _ in range(layers)
        )

    def forward(self, x, c, subset=None):
        """Rows `subset` (B, K) of the mixed x (B, n, D), or all n rows if it is None."""
        for layer in self.layers[:-1]:
            x = layer(x, c)
        return self.layers[-1](x, c, subset)


class NoMixer(nn.Module):
    """Drops tokens without mixing."""

    needs_grid = False

    def forward(self, x, c, subset=None):
        return x if subset is None else gather_tokens(x, subset)


def make_mixer(
    kind, width, grid, heads, *, hidden=64, layers=2, mlp_ratio=4.0, qk_norm=False, attention="auto", fused_adaln=False
):
    """Make a mixer.

    Args:
        kind: one of `MIXERS`.
        width, heads, mlp_ratio, qk_norm, attention, fused_adaln: as for the model's blocks, for the layers of
            `attention`.
        grid: (rows, columns) of the token grid.
        hidden: T of `token_mlp`.
        layers: number of layers of `attention`.
    """
    if kind == "token_mlp":
        return TokenMLPMixer(width, grid[0] * grid[1], hidden)
    if kind == "depthwise_conv":
        return DepthwiseConvMixer(width, grid)
    if kind == "attention":
        return AttentionMixer(width, heads, layers, mlp_ratio, qk_norm, attention, fused_adaln)
    if kind == "none":
        return NoMixer()
    raise ValueError(f"mixer must be one of {MIXERS}, got {kind!r}")
