"""SiT with a token mixer, a route for a subset of its tokens and a tap for representation alignment.

The forward pass is, in order: embed, mix, drop, route, tap, restore, predict. With `mixer="none"` and no subset it is
SiT (arXiv 2401.08740) with REPA's projectors (arXiv 2410.06940), weight for weight.
"""

from typing import List, NamedTuple, Optional

import torch
from torch import nn

from maskalign.models.initial import initialise
from maskalign.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
    unpatchify,
)
from maskalign.models.mixer import make_mixer
from maskalign.models.presets import preset_sizes
from maskalign.models.projector import make_projector
from maskalign.models.routing import Fuse, gather_tokens, scatter_tokens

RESTORES = ("none", "bypass", "fuse")


class SiTOutput(NamedTuple):
    """What one forward pass gives.

    velocity: (B, C, H, W), or (B, K, p*p*C) for the kept tokens where the route ends without restoring them.
    aligned: one (B, n, Dz) per teacher, the projected tokens at the tap; empty for a model without teachers.
    aligned_index: (B, n) int64, which of the N tokens they are; None for all of them in order.
    """

    velocity: torch.Tensor
    aligned: List[torch.Tensor]
    aligned_index: Optional[torch.Tensor]


class SiT(nn.Module):
    """A diffusion transformer that predicts velocities and can be trained on subsets of its tokens.

    Args:
        input_size: height and width of the (square) input.
        patch_size: side of a patch; it divides input_size.
        in_channels: channels of the input: 4 for latents, 3 for pixels.
        num_classes: number of classes; label `num_classes` means "no class".
        depth, width, heads: number of blocks, token width D, attention heads.
        mlp_ratio: hidden width of a block's MLP over D.
        qk_norm: LayerNorm on queries and keys.
        teacher_dims: width Dz of every teacher; () builds no projector.
        align_depth: the tap is the output of this block, counted from 1.
        projector: `mlp` (REPA's) or `conv` (iREPA's 3x3, needs all tokens at the tap).
        projector_dim: hidden width of the MLP projector.
        mixer: `token_mlp`, `depthwise_conv`, `attention` or `none`.
        mixer_hidden: T, the hidden number of tokens of `token_mlp`.
        route: `all`, `none` or (start, end): blocks [start, end) see only the subset. With `none` the subset chooses
            only which tokens are aligned (loss-only masking).
        restore: what returns at `end`: `none`, `bypass` (TREAD) or `fuse` (SPRINT).
        attention: `auto`, `sdpa` or `math`.
    """

    def __init__(
        self,
        *,
        input_size=32,
        patch_size=2,
        in_channels=4,
        num_classes=1000,
        depth=28,
        width=1152,
        heads=16,
        mlp_ratio=4.0,
        qk_norm=False,
        teacher_dims=(768,),
        align_depth=8,
        projector="mlp",
        projector_dim=2048,
        mixer="token_mlp",
        mixer_hidden=64,
        route="all",
        restore="none",
        attention="auto",
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not divisible by patch_size {patch_size}")
        if width % 4:
            raise ValueError(f"width {width} must be divisible by 4 for the position embedding")
        if not 1 <= align_depth <= depth:
            raise ValueError(f"align_depth {align_depth} is outside the model's blocks 1..{depth}")
        if restore not in RESTORES:
            raise ValueError(f"restore must be one of {RESTORES}, got {restore!r}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.depth = depth
        self.width = width
        self.heads = heads
        self.align_depth = align_depth
        self.teacher_dims = tuple(teacher_dims)
        self.grid = (input_size // patch_size,) * 2
        self.num_tokens = self.grid[0] * self.grid[1]
        self.route = resolve_route(route, depth)
        self.restore = restore

        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.register_buffer("pos_embed", sincos_position_embedding(width, self.grid))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm, attention) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size, in_channels)
        self.projectors = nn.ModuleList(
            make_projector(projector, width, projector_dim, dim, self.grid) for dim in self.teacher_dims
        )
        self.mixer = make_mixer(
            mixer,
            width,
            self.grid,
            heads,
            hidden=mixer_hidden,
            mlp_ratio=mlp_ratio,
            qk_norm=qk_norm,
            attention=attention,
        )
        self.fuse = Fuse(width) if restore == "fuse" else None
        if not self.pos_embed.is_meta:
            self.reset_parameters()

    @property
    def tap_sees_subset(self):
        """True where only the subset is present at the tap, when there is one."""
        if self.route is None or self.align_depth <= self.route[0]:
            return False
        return self.align_depth <= self.route[1] or self.restore == "none"

    @classmethod
    def from_preset(cls, name, **settings):
        """A model of a named size, e.g. `SiT.from_preset("SiT-B/2", in_channels=3)`; settings override the preset.

        Raises:
            UsageError: for an unknown name.
        """
        return cls(**{**preset_sizes(name), **settings})

    def reset_parameters(self, seed=None):
        """REPA's initialisation, see initial.py, and the buffers; needed after `to_empty` of a model on `meta`.

        Args:
            seed: makes the weights a function of this and of each parameter's name alone: the same on any device, under
                any sharding, and for what two recipes have in common. None draws from torch's global generator.
        """
        with torch.device("cpu"):
            self.pos_embed.copy_(sincos_position_embedding(self.width, self.grid))
        initialise(self, seed)

    def forward(self, x, t, labels, subset=None, align_subset=None, align=True):
        """Predict the velocity, on all tokens or on a subset of them.

        Args:
            x: (B, C, H, W) noised input.
            t: (B,) time in [0, 1], 1 is noise.
            labels: (B,) int64 in [0, num_classes]; `num_classes` means "no class". Or (B, D) class embeddings.
            subset: (B, K) int64, ascending: the tokens that take the route. None: all tokens (evaluation).
            align_subset: (B, n) int64: which of the tokens present at the tap are aligned, by their position among
                those. None: all that are present (with `route="none"`: those of `subset`).
            align: False leaves the projectors out, for steps without an alignment loss.

        Returns:
            SiTOutput.

        Raises:
            ValueError: x of another shape than the model's.
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x is of shape {tuple(x.shape)}; this model takes (B, {', '.join(map(str, expected))})")
        tokens = self.x_embedder(x) + self.pos_embed.to(x.dtype)
        c = self.t_embedder(t) + self.y_embedder(labels)

        start, end = self.route or (0, 0)
        dropping = subset is not None and self.route is not None
        before = None  # all tokens as they were at `start`, where some of them are to return
        aligned, aligned_index = [], None
        for depth, block in enumerate(self.blocks):
            if depth == start:
                if dropping and self.restore == "none":
                    tokens = self.mixer(tokens, c, subset)  # mixed and dropped in one operation
                else:
                    tokens = self.mixer(tokens, c)
                    if self.restore != "none":
                        before = tokens
                    if dropping:
                        tokens = gather_tokens(tokens, subset)
            tokens = block(tokens, c)
            if align and depth + 1 == self.align_depth and self.projectors:
                present = subset if dropping and self.tap_sees_subset else None
                aligned, aligned_index = self._tap(tokens, present, subset, align_subset)
            if depth + 1 == end and self.restore != "none":
                tokens = self._restore(tokens, before, subset if dropping else None)
                before = None

        velocity = self.final_layer(tokens, c)
        if velocity.shape[1] == self.num_tokens:
            velocity = unpatchify(velocity, self.patch_size, self.grid)
        return SiTOutput(velocity, aligned, aligned_index)

    def _tap(self, tokens, present, subset, align_subset):
        """Project the tokens to align; `present` says which of the N tokens these are (None: all)."""
        if align_subset is None and self.route is None:
            align_subset = subset
        index = present
        if align_subset is not None:
            index = align_subset if present is None else present.gather(1, align_subset)
        outputs = []
        for projector in self.projectors:
            # A pointwise projector commutes with the gather, and then works on fewer rows.
            rows = tokens
            if align_subset is not None and not projector.needs_grid:
                rows = gather_tokens(tokens, align_subset)
            z = projector(rows)
            if align_subset is not None and projector.needs_grid:
                z = gather_tokens(z, align_subset)
            outputs.append(z)
        return outputs, index

    def _restore(self, tokens, before, subset):
        if self.restore == "fuse":
            return self.fuse(before, tokens, subset)
        return tokens if subset is None else scatter_tokens(before, subset, tokens)


def resolve_route(route, depth):
    """`all`, `none` or (start, end) as (start, end), or None where all blocks see all tokens."""
    if route == "all":
        return (0, depth)
    if route is None or route == "none":
        return None
    start, end = route
    if not 0 <= start < end <= depth:
        raise ValueError(f"route [{start}, {end}) is outside the model's blocks [0, {depth})")
    return (start, end)
