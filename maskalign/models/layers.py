"""The parts of a SiT block and the embeddings, with REPA's parameter names."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from maskalign.models.flash import flash_function
from maskalign.models.gelu import gelu
from maskalign.models.routing import gather_tokens
from maskalign_kernels import adaln_modulate, gated_residual, gated_residual_adaln

ATTENTIONS = ("auto", "sdpa", "math", "flash_attn")


def modulate(x, shift, scale):
    """x (B, N, D) * (1 + scale) + shift, with shift and scale (B, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class PatchEmbed(nn.Module):
    """Embeds patches as tokens, row-major.

    The parameters are those of a convolution with stride = kernel. It is computed as one matmul, which also works for
    inputs of a lower precision and of any memory layout.
    """

    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, x):
        """x (B, C, H, W) -> (B, N, D)."""
        p = self.patch_size
        batch, channels, height, width = x.shape
        x = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def patchify(x, patch_size):
    """(B, C, H, W) -> (B, N, p*p*C): the layout in which the final layer predicts a token, (p, p, C)."""
    p = patch_size
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.flatten(3).flatten(1, 2)


def unpatchify(tokens, patch_size, grid):
    """(B, N, p*p*C) -> (B, C, H, W), the inverse of `patchify` on a token grid (rows, columns)."""
    p = patch_size
    rows, columns = grid
    x = tokens.unflatten(1, grid).unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(tokens.shape[0], -1, rows * p, columns * p)


def sincos_position_embedding(width, grid, counted=None):
    """Fixed 2-D sine-cosine position embedding (that of MAE, as used by SiT and REPA).

    Each axis has half of the channels, the width axis the first half. Within a half, sines precede cosines, with
    frequencies 10000^(-i / (D/4)). It is computed in float64.

    Args:
        width: D.
        grid: (rows, columns) of the tokens.
        counted: side of the square grid for which the weights were trained, if it differs: token i of n then has
            position
            (i + 1/2) counted / n - 1/2, the position of the same part of the image in that grid. With None, the
            positions are 0 to n - 1.

    Returns:
        (1, N, D) float32.
    """
    rows, columns = grid
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def axis(positions):
        angle = positions.to(torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def positions(count):
        own = torch.arange(count, dtype=torch.float64)
        return own if counted is None else (own + 0.5) * (counted / count) - 0.5

    row = positions(rows).repeat_interleave(columns)
    column = positions(columns).repeat(rows)
    return torch.cat([axis(column), axis(row)], dim=1).float().unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """256 sinusoidal features of t in [0, 1], which is not scaled, followed by Linear-SiLU-Linear."""

    def __init__(self, width, features=256, max_period=10000):
        super().__init__()
        self.features = features
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def sinusoid(self, t):
        """t (B,) -> (B, features) in t's dtype, but at least float32: cosines, then sines."""
        half = self.features // 2
        precise = torch.promote_types(t.dtype, torch.float32)
        frequency = torch.exp(-math.log(self.max_period) / half * torch.arange(half, dtype=precise, device=t.device))
        angle = t.to(precise)[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t):
        return self.mlp(self.sinusoid(t).to(self.mlp[0].weight.dtype))  # pyright: ignore


class LabelEmbedder(nn.Module):
    """An embedding table with one row per class, and a last row for "no class"."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels):
        """labels (B,) int64 -> (B, D); class embeddings (B, D) are returned unchanged."""
        return labels if labels.is_floating_point() else self.embedding_table(labels)


class ClassEmbedder(nn.Module):
    """Embeds the noised class token as a token: Linear, then LayerNorm with affine parameters (REG, arXiv 2507.01467).

    The position embedding of the class token is zero, so none is added.
    """

    def __init__(self, class_dim, width):
        super().__init__()
        self.proj = nn.Linear(class_dim, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, class_token):
        """class_token (B, class_dim) -> (B, 1, D)."""
        return self.norm(self.proj(class_token)).unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention with qkv bias.

    Args:
        width: D.
        heads: number of heads, which divides D.
        qk_norm: LayerNorm on queries and keys.
        implementation: `sdpa` (torch's fused kernel), `math` (matmul, softmax, matmul), `flash_attn` or `auto`. `auto`
            uses
            `math` for up to 512 tokens on a CPU, where the backward of the fused kernel is slow, and `sdpa` otherwise.
            `flash_attn` is the package flash-attn, which must be installed (see flash.py); tensors that are not in half
            precision on a GPU use the fused kernel instead.
    """

    def __init__(self, width, heads, qk_norm=False, implementation="auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        if implementation not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {implementation!r}")
        self.heads = heads
        self.head_dim = width // heads
        self.implementation = implementation
        self.flash = flash_function() if implementation == "flash_attn" else None
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x, subset=None):
        """Self-attention of x.

        Args:
            x: (B, N, D).
            subset: (B, K) int64, the rows whose output is computed; keys and values are always those of all N rows.
                None
                computes all rows.

        Returns:
            (B, N, D), or (B, K, D) with a subset.
        """
        q, k, v = self._heads_of(x, subset)
        q, k = self.q_norm(q), self.k_norm(k)
        plain = self.implementation == "math" or (
            self.implementation == "auto" and x.device.type == "cpu" and x.shape[1] <= 512
        )
        if plain:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            out = scores.softmax(dim=-1) @ v
        elif self.flash is not None and fits_flash(v):
            q, k = q.to(v.dtype), k.to(v.dtype)  # LayerNorm under autocast gives float32
            return self.proj(self.flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).flatten(2))
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _heads_of(self, x, subset):
        """Queries (B, heads, N or K, d), keys and values (B, heads, N, d)."""
        if subset is None:
            return self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        width = x.shape[-1]
        # The backward of a split is one concatenation; that of two slices would be two full-size tensors of zeros.
        (w_q, w_kv), (b_q, b_kv) = (p.split([width, 2 * width]) for p in (self.qkv.weight, self.qkv.bias))
        q = F.linear(gather_tokens(x, subset), w_q, b_q).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k, v = F.linear(x, w_kv, b_kv).unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


def fits_flash(x):
    """Whether FlashAttention's kernels support x: half precision on a GPU."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class AdaLN(nn.Sequential):
    """SiLU and a linear from the condition to `chunks` vectors of the model's width, initialized with 0 (as in DiT)."""

    def __init__(self, width, chunks):
        super().__init__(nn.SiLU(), nn.Linear(width, chunks * width))
        self.chunks = chunks

    def forward(self, c):
        return super().forward(c).chunk(self.chunks, dim=-1)


class Block(nn.Module):
    """SiT block: attention and MLP, each modulated by adaLN-Zero (DiT, arXiv 2212.09748, figure 3).

    Args:
        width, heads, qk_norm, attention: as for `Attention`.
        mlp_ratio: hidden width of the MLP divided by D.
        fused_adaln: normalize, modulate and add the residuals with the fused operations of `maskalign_kernels`, which
            are
            three launches on a GPU. On a CPU the results are bit for bit the same.
    """

    def __init__(self, width, heads, mlp_ratio=4.0, qk_norm=False, attention="auto", fused_adaln=False):
        super().__init__()
        self.fused_adaln = fused_adaln
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm, attention)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = AdaLN(width, 6)

    def forward(self, x, c, subset=None):
        """Run the block for all rows or for a subset.

        Args:
            x: (B, n, D) for any number of tokens n.
            c: (B, D) condition.
            subset: (B, K) int64, the rows whose output is needed. Keys and values are those of all n rows, but queries,
                output projection and MLP are computed only for these rows. None computes all rows.

        Returns:
            (B, n, D), or with a subset (B, K, D), equal to these rows of the result without a subset.
        """
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        if self.fused_adaln:
            attended = self.attn(adaln_modulate(x, shift_attn, scale_attn), subset)
            x, modulated = gated_residual_adaln(x, attended, gate_attn, shift_mlp, scale_mlp, subset)
            return gated_residual(x, self.mlp(modulated), gate_mlp)
        attended = self.attn(modulate(self.norm1(x), shift_attn, scale_attn), subset)
        x = x if subset is None else gather_tokens(x, subset)
        x = torch.addcmul(x, gate_attn.unsqueeze(1), attended)
        return torch.addcmul(x, gate_mlp.unsqueeze(1), self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear to the p*p*C numbers of a patch, initialized with 0.

    Args:
        width: D.
        patch_size: p.
        out_channels: C.
        class_dim: width of the class token; token 0 then has a separate linear, also initialized with 0 (REG, arXiv
            2507.01467). With None, every token is a patch.
    """

    def __init__(self, width, patch_size, out_channels, class_dim=None):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.class_linear = nn.Linear(width, class_dim) if class_dim else None
        self.adaLN_modulation = AdaLN(width, 2)

    def forward(self, x, c):
        """Predict velocities from x (B, n, D) and c (B, D).

        Returns:
            Those of the patches (B, n, p*p*C), and None. With a class token in row 0: (B, n - 1, p*p*C) and (B,
            class_dim).
        """
        shift, scale = self.adaLN_modulation(c)
        x = modulate(self.norm_final(x), shift, scale)
        if self.class_linear is None:
            return self.linear(x), None
        return self.linear(x[:, 1:]), self.class_linear(x[:, 0])
