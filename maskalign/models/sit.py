"""SiT with a token mixer, a route for a subset of its tokens and a tap for representation alignment.

The steps of the forward pass are, in order: embed, mix, drop, route, tap, restore, predict. With `mixer="none"` and no
subset it is SiT (arXiv 2401.08740) with REPA's projectors (arXiv 2410.06940), and with `class_dim` it is REG (arXiv
2507.01467), with the same parameters. With two mixing layers and a subset of the patches it is MaskAlign (arXiv
2606.08788).
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from maskalign.config.presets import preset_sizes
from maskalign.models.initial import initialize
from maskalign.models.layers import (
    Block,
    ClassEmbedder,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
    unpatchify,
)
from maskalign.models.mixer import make_mixer
from maskalign.models.projector import make_projector
from maskalign.models.routing import Fuse, gather_tokens, scatter_tokens

RESTORES = ("none", "bypass", "fuse")


class SiTOutput(NamedTuple):
    """The result of one forward pass.

    velocity: (B, C, H, W), or (B, K, p*p*C) for the kept tokens if dropped tokens are not restored. aligned: one (B, n,
    Dz) per teacher, the projected tokens at the tap, with the class token first if there is one. Empty
        for a model without teachers.
    aligned_index: (B, n) int64, the indices of these tokens among the N tokens; None for all tokens in order. For a
    model
        with a class token, they are indices in [class token, patches], where the class token is 0 and patch i is 1 + i.
    class_velocity: (B, class_dim), or None for a model without a class token.
    """

    velocity: torch.Tensor
    aligned: List[torch.Tensor]
    aligned_index: Optional[torch.Tensor]
    class_velocity: Optional[torch.Tensor] = None


class SiT(nn.Module):
    """A diffusion transformer that predicts velocities and can be trained on subsets of its tokens.

    Args:
        input_size: height and width of the (square) input.
        patch_size: side of a patch; it divides input_size.
        in_channels: channels of the input: 4 for latents, 3 for pixels.
        num_classes: number of classes; label `num_classes` means "no class".
        depth, width, heads: number of blocks, token width D, attention heads.
        mlp_ratio: hidden width of a block's MLP divided by D.
        qk_norm: LayerNorm on queries and keys.
        teacher_dims: width Dz of every teacher; () for a model without projectors.
        class_dim: width of the class token that is denoised together with the image (REG); None for none.
        align_depth: the tap is the output of this block, counted from 1.
        projector: `mlp` (REPA's) or `conv` (iREPA's 3x3, which needs all tokens at the tap).
        projector_dim: hidden width of the MLP projector.
        mixer: `token_mlp`, `depthwise_conv`, `attention` or `none`.
        mixer_hidden: T, the hidden number of tokens of `token_mlp`.
        mixer_layers: number of SiT blocks of `attention`.
        route: `all`, `none` or (start, end): blocks [start, end) process only the subset. With `none` the subset only
            selects the tokens that are aligned (loss-only masking).
        restore: what happens to dropped tokens at `end`: `none` (they are not restored), `bypass` (TREAD) or `fuse`
            (SPRINT).
        attention: `auto`, `sdpa`, `math` or `flash_attn`, see `layers.Attention`.
        position_grid: side of the grid for which the weights were trained, see `counted` in
            `layers.sincos_position_embedding`; None for the model's grid.
        fused_adaln: run norms, modulations and residuals of the blocks and of the mixer `attention` as the fused
            operations of `maskalign_kernels`, see `layers.Block`.

    Attributes:
        num_tokens: N, the number of patch tokens, without the class token.
    """

    pos_embed: torch.Tensor

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int = 1000,
        depth: int = 28,
        width: int = 1152,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        teacher_dims: Sequence[int] = (768,),
        class_dim: Optional[int] = None,
        align_depth: int = 8,
        projector: str = "mlp",
        projector_dim: int = 2048,
        mixer: str = "attention",
        mixer_hidden: int = 64,
        mixer_layers: int = 2,
        route: Union[str, Tuple[int, int]] = "all",
        restore: str = "none",
        attention: str = "auto",
        fused_adaln: bool = False,
        position_grid: Optional[int] = None,
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
        self.class_dim = class_dim or None
        self.grid = (input_size // patch_size,) * 2
        self.num_tokens = self.grid[0] * self.grid[1]
        self.position_grid = None if position_grid == self.grid[0] else position_grid
        self.route = resolve_route(route, depth)
        self.restore = restore

        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.register_buffer("pos_embed", self._positions())
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.class_embedder = ClassEmbedder(class_dim, width) if class_dim else None
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qk_norm, attention, fused_adaln) for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, patch_size, in_channels, class_dim)
        self.projectors = nn.ModuleList(
            make_projector(projector, width, projector_dim, dim, self.grid) for dim in self.teacher_dims
        )
        self.mixer = make_mixer(
            mixer,
            width,
            self.grid,
            heads,
            hidden=mixer_hidden,
            layers=mixer_layers,
            mlp_ratio=mlp_ratio,
            qk_norm=qk_norm,
            attention=attention,
            fused_adaln=fused_adaln,
        )
        self.fuse = Fuse(width) if restore == "fuse" else None
        if not self.pos_embed.is_meta:
            self.reset_parameters()

    @property
    def mixing_layers(self):
        """The SiT blocks of an `attention` mixer, in order; empty for other mixers."""
        return list(getattr(self.mixer, "layers", ()))

    @property
    def all_blocks(self):
        """All SiT blocks, including mixing layers, in execution order: the units of compilation and sharding."""
        start = self.route[0] if self.route else 0
        return [*self.blocks[:start], *self.mixing_layers, *self.blocks[start:]]

    @property
    def tap_sees_subset(self):
        """Whether only the tokens of a subset are present at the tap, if a subset is given."""
        if self.route is None or self.align_depth <= self.route[0]:
            return False
        return self.align_depth <= self.route[1] or self.restore == "none"

    @classmethod
    def from_preset(cls, name: str, **settings) -> "SiT":
        """Make a model of a named size, e.g. `SiT.from_preset("SiT-B/2", in_channels=3)`.

        Args:
            name: a preset, see `maskalign.models.PRESETS`.
            settings: arguments of `SiT`, which override the preset.

        Raises:
            UsageError: the name is unknown.
        """
        return cls(**{**preset_sizes(name), **settings})

    def reset_parameters(self, seed: Optional[int] = None) -> None:
        """Initialize parameters as REPA does (see initial.py), and buffers. Needed after `to_empty` of a meta model.

        Args:
            seed: each parameter is a function of the seed and its name. It is the same on any device, with any
                sharding,
                and in all models that have a parameter of this name and shape. With None, torch's global generator is
                used.
        """
        with torch.device("cpu"):
            self.pos_embed.copy_(self._positions())
        initialize(self, seed)

    def count_positions(self, grid):
        """Set `position_grid`, and compute the position embedding again."""
        self.position_grid = None if grid == self.grid[0] else grid
        with torch.device("cpu"):
            self.pos_embed.copy_(self._positions())

    def _positions(self):
        return sincos_position_embedding(self.width, self.grid, self.position_grid)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        subset: Optional[torch.Tensor] = None,
        align_subset: Optional[torch.Tensor] = None,
        align: bool = True,
        class_token: Optional[torch.Tensor] = None,
    ) -> SiTOutput:
        """Predict the velocity, on all tokens or on a subset of them.

        Args:
            x: (B, C, H, W) noised input.
            t: (B,) time in [0, 1], 1 is noise.
            labels: (B,) int64 in [0, num_classes]; `num_classes` means "no class". Or (B, D) class embeddings.
            subset: (B, K) int64, ascending: the patch tokens that are kept; the class token is always kept. None: all
                tokens (evaluation).
            align_subset: (B, n) int64: the patch tokens to align, as indices among the patch tokens present at the tap.
                None: all that are present (with `route="none"`: those of `subset`).
            align: False does not run the projectors, for steps without an alignment loss.
            class_token: (B, class_dim), the noised class token, for a model that has one.

        Returns:
            SiTOutput.

        Raises:
            ValueError: x has another shape than the model's input; a class token is missing, or given to a model
                without
                one.
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x is of shape {tuple(x.shape)}; this model takes (B, {', '.join(map(str, expected))})")
        tokens = self.x_embedder(x) + self.pos_embed.to(x.dtype)
        tokens = self._with_class_token(tokens, class_token)
        c = self.t_embedder(t) + self.y_embedder(labels)

        start, end = self.route or (0, 0)
        dropping = subset is not None and self.route is not None
        rows = self._rows(subset) if dropping else None
        before = None  # all tokens at `start`, for the restore at `end`
        aligned, aligned_index = [], None
        for depth, block in enumerate(self.blocks):
            if depth == start:
                if dropping and self.restore == "none":
                    tokens = self._mix(tokens, c, subset, rows)  # mixed and dropped in one operation
                else:
                    tokens = self._mix(tokens, c)
                    if self.restore != "none":
                        before = tokens
                    if dropping:
                        tokens = gather_tokens(tokens, rows)
            tokens = block(tokens, c)
            if align and depth + 1 == self.align_depth and self.projectors:
                present = subset if dropping and self.tap_sees_subset else None
                aligned, aligned_index = self._tap(tokens, present, subset, align_subset)
            if depth + 1 == end and self.restore != "none":
                tokens = self._restore(tokens, before, rows)
                before = None

        velocity, class_velocity = self.final_layer(tokens, c)
        if velocity.shape[1] == self.num_tokens:
            velocity = unpatchify(velocity, self.patch_size, self.grid)
        return SiTOutput(velocity, aligned, aligned_index, class_velocity)

    def _with_class_token(self, tokens, class_token):
        """The tokens with the embedded class token as the first one, if the model has a class token."""
        if class_token is None and self.class_embedder is None:
            return tokens
        if class_token is None or self.class_embedder is None:
            has = "has none" if self.class_embedder is None else f"needs one of {self.class_dim} numbers"
            raise ValueError(f"class_token is {'missing' if class_token is None else 'given'}; this model {has}")
        if class_token.shape != (len(tokens), self.class_dim):
            raise ValueError(
                f"class_token is of shape {tuple(class_token.shape)}, not ({len(tokens)}, {self.class_dim})"
            )
        return torch.cat([self.class_embedder(class_token).to(tokens.dtype), tokens], dim=1)

    def _rows(self, patches):
        """Convert patch indices (B, n) to indices in the sequence, with the class token (0) first if there is one."""
        if self.class_embedder is None or patches is None:
            return patches
        return torch.cat([torch.zeros_like(patches[:, :1]), patches + 1], dim=1)

    def _mix(self, tokens, c, subset=None, rows=None):
        """Mix all tokens and return the kept ones, given as patch indices `subset` and as sequence indices `rows`."""
        if self.class_embedder is None or not self.mixer.needs_grid:
            return self.mixer(tokens, c, rows)
        # A mixer along the patch grid cannot process the class token, which bypasses it.
        return torch.cat([tokens[:, :1], self.mixer(tokens[:, 1:], c, subset)], dim=1)

    def _tap(self, tokens, present, subset, align_subset):
        """Project the tokens to align. `present` (B, K) are the patches present at the tap (None: all).

        Returns:
            (aligned, aligned_index) of `SiTOutput`.
        """
        if align_subset is None and self.route is None:
            align_subset = subset
        index = present
        if align_subset is not None:
            index = align_subset if present is None else present.gather(1, align_subset)
        if self.projectors[0].needs_grid:
            return self._tap_on_grid(tokens, index, align_subset)
        # A pointwise projector commutes with the gather, which comes first so that fewer rows are projected.
        rows = tokens if align_subset is None else gather_tokens(tokens, self._rows(align_subset))
        return [projector(rows) for projector in self.projectors], self._rows(index)

    def _tap_on_grid(self, tokens, index, align_subset):
        """The tap for projectors along the patch grid, which do not project the class token."""
        shift = 0 if self.class_embedder is None else 1
        outputs = [projector(tokens[:, shift:]) for projector in self.projectors]
        if align_subset is not None:
            outputs = [gather_tokens(z, align_subset) for z in outputs]
        if shift and index is None:
            index = torch.arange(self.num_tokens, device=tokens.device).expand(len(tokens), -1)
        return outputs, index if index is None else index + shift

    def _restore(self, tokens, before, subset):
        if self.fuse is not None:
            return self.fuse(before, tokens, subset)
        return tokens if subset is None else scatter_tokens(before, subset, tokens)


def resolve_route(route: Union[str, Tuple[int, int], None], depth: int) -> Optional[Tuple[int, int]]:
    """Convert `all`, `none` or (start, end) to (start, end), or to None if all blocks process all tokens."""
    if isinstance(route, str):
        if route not in ("all", "none"):
            raise ValueError(f"route must be all, none or (start, end), got {route!r}")
        return (0, depth) if route == "all" else None
    if route is None:
        return None
    start, end = route
    if not 0 <= start < end <= depth:
        raise ValueError(f"route [{start}, {end}) is outside the model's blocks [0, {depth})")
    return (start, end)
