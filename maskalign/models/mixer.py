"""Token mixers: `X <- X + gate(c) * M(LN(X) * (1 + scale(c)) + shift(c))`, where M acts along the token axis.

The adaLN linear starts at zero, so a fresh mixer is the identity and any SiT or REPA checkpoint can be continued with
one. The form of M is a setting because the MaskAlign abstract leaves it open (DESIGN, section 2).
"""

import torch
from torch import nn

from maskalign.models.layers import AdaLN, Block, modulate
from maskalign.models.routing import gather_tokens
from maskalign_kernels import mix_and_drop

MIXERS = ("token_mlp", "depthwise_conv", "attention", "none")


class TokenMLPMixer(nn.Module):
    """M = W2 gelu(W1 u + b1) + b2 along the tokens (MLP-Mixer's token mixing, arXiv 2105.01601), by the fused kernel.

    `fc1` holds W1 (T, N) and b1, `fc2` holds W2 (N, T) and b2.
    """

    def __init__(self, width, tokens, hidden=64):
        super().__init__()
        self.fc1 = nn.Linear(tokens, hidden)
        self.fc2 = nn.Linear(hidden, tokens)
        self.adaLN_modulation = AdaLN(width, 3)

    def forward(self, x, c, subset=None):
        """Rows `subset` (B, K) of the mixed x (B, N, D), all N rows where it is None."""
        shift, scale, gate = self.adaLN_modulation(c)
        return mix_and_drop(
            x, shift, scale, gate, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, subset
        )


class DepthwiseConvMixer(nn.Module):
    """M = depthwise 7x7 convolution over the token grid, as ConvNeXt mixes (arXiv 2201.03545); any resolution."""

    def __init__(self, width, grid, kernel_size=7):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.conv = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.adaLN_modulation = AdaLN(width, 3)

    def forward(self, x, c, subset=None):
        shift, scale, gate = self.adaLN_modulation(c)
        u = modulate(self.norm(x), shift, scale).transpose(1, 2).unflatten(2, self.grid)
        mixed = self.conv(u).flatten(2).transpose(1, 2)
        if subset is not None:
            x, mixed = gather_tokens(x, subset), gather_tokens(mixed, subset)
        return torch.addcmul(x, gate.unsqueeze(1), mixed)


class AttentionMixer(nn.Module):
    """M = one SiT block on all tokens; the block's own adaLN-Zero gates make it the identity at the start."""

    def __init__(self, width, heads, mlp_ratio=4.0, qk_norm=False, attention="auto"):
        super().__init__()
        self.block = Block(width, heads, mlp_ratio, qk_norm, attention)

    def forward(self, x, c, subset=None):
        x = self.block(x, c)
        return x if subset is None else gather_tokens(x, subset)


class NoMixer(nn.Module):
    """Drops tokens without mixing them first."""

    def forward(self, x, c, subset=None):
        return x if subset is None else gather_tokens(x, subset)


def make_mixer(kind, width, grid, heads, *, hidden=64, mlp_ratio=4.0, qk_norm=False, attention="auto"):
    """A mixer by name; `kind` is one of `MIXERS`, grid the (rows, columns) of the token grid."""
    if kind == "token_mlp":
        return TokenMLPMixer(width, grid[0] * grid[1], hidden)
    if kind == "depthwise_conv":
        return DepthwiseConvMixer(width, grid)
    if kind == "attention":
        return AttentionMixer(width, heads, mlp_ratio, qk_norm, attention)
    if kind == "none":
        return NoMixer()
    raise ValueError(f"mixer must be one of {MIXERS}, got {kind!r}")
