"""A teacher: a frozen encoder, its tokens resampled and normalized as asked, its class token; loaded by name."""

import torch
from torch import nn

from maskalign.config.teacher_names import check_normalization, check_teacher_name, parse_teachers
from maskalign.errors import UsageError
from maskalign.teachers.encoders import Dinov2, EfficientNetLite0, TimmEncoder
from maskalign.teachers.tokens import normalize_tokens, resample_tokens, standardize_class_token

# Images per pass on CPUs. The allocator returns larger activations to the system after every layer, and touching them
# again costs page faults: EfficientNet-Lite0 runs half as fast with 16 images at a time as with 4.
CPU_CHUNK = 4


class Teacher(nn.Module):
    """A frozen encoder of images.

    Attributes:
        name: the name that it was loaded by.
        dim: width of its tokens.
        grid: (gh, gw) of the tokens that it returns.
        normalize: "none", "spatial" or "mean"; of the tokens, not of the class token.
        class_dim: numbers of its class token.
        class_kind: "prefix", the network's own class token, or "mean", the average of its tokens, which is standardized
            per channel with a data set's statistics.
    """

    def __init__(self, name, encoder, *, normalize="none", mean=None, grid=None, class_statistics=None):
        super().__init__()
        self.name = name
        self.encoder = encoder
        self.dim = encoder.dim
        self.normalize = check_normalization(normalize)
        self.grid = tuple(grid) if grid is not None else encoder.grid
        if normalize == "mean":
            if mean is None:
                raise UsageError(
                    f"teacher {name}: normalize mean needs the data set's mean token, which is in its manifest "
                    "after maskalign data encode --normalize mean"
                )
            mean = torch.as_tensor(mean, dtype=torch.float32)
            if mean.shape != (self.dim,):
                raise UsageError(f"teacher {name}: the mean token has {mean.numel()} numbers, expected {self.dim}")
        self.register_buffer("mean", mean if normalize == "mean" else None, persistent=False)
        self.class_dim, self.class_kind = encoder.class_dim, encoder.class_kind
        used = class_statistics is not None and self.class_kind == "mean"
        for key, values in zip(("class_mean", "class_std"), class_statistics if used else (None, None), strict=True):
            values = torch.as_tensor(values, dtype=torch.float32) if used else None
            if used and values.shape != (self.class_dim,):
                raise UsageError(
                    f"teacher {name}: the statistics of its class token have {values.numel()} numbers, "
                    f"expected {self.class_dim}"
                )
            self.register_buffer(key, values, persistent=False)
        self.requires_grad_(False)
        super().train(False)

    @property
    def tokens(self):
        """Number of tokens, gh * gw."""
        return self.grid[0] * self.grid[1]

    def train(self, mode=True):
        """Does nothing: norms and dropouts of a teacher are never in training mode."""
        return self

    @torch.no_grad()
    def forward(self, images):
        """Tokens of images.

        Args:
            images: (B, 3, H, W) uint8.

        Returns:
            (B, gh * gw, dim) float32, row-major.
        """
        return self.finish(self.encode(images)[0])

    @torch.no_grad()
    def tokens_and_class(self, images):
        """Tokens and class token of images, from one pass of the network.

        Args:
            images: (B, 3, H, W) uint8.

        Returns:
            (tokens as `forward` gives them, class token (B, class_dim) float32).

        Raises:
            UsageError: the class token is an average of tokens, and there are no statistics to standardize it with.
        """
        self.check_class_statistics()
        tokens, values = self.encode(images)
        return self.finish(tokens), self._standardized(values)

    @torch.no_grad()
    def class_token(self, images):
        """The class token alone, as `tokens_and_class` gives it."""
        self.check_class_statistics()
        return self._standardized(self.encode(images)[1])

    def check_class_statistics(self):
        """Raise a UsageError where the class token needs statistics of the data set that are not there."""
        if self.class_kind == "mean" and self.class_mean is None:
            raise UsageError(
                f"teacher {self.name}: its class token is the average of its tokens, standardized with the data set's "
                f"statistics, which are in the manifest after: maskalign data encode --data DIR --teacher {self.name}"
            )

    def _standardized(self, values):
        if self.class_kind == "prefix":
            return values
        return standardize_class_token(values, self.class_mean, self.class_std)

    @torch.no_grad()
    def encode(self, images):
        """What the network gives, before resampling, normalization and standardization.

        Args:
            images: (B, 3, H, W) uint8.

        Returns:
            (tokens (B, T, dim) on `encoder.grid`, class token (B, class_dim)), float32 both.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            shape = tuple(images.shape)
            raise ValueError(f"images are {images.dtype} {shape}, expected torch.uint8 (B, 3, H, W)")
        chunk = CPU_CHUNK if images.device.type == "cpu" else max(1, len(images))
        # Disabled because autocast would make the tokens depend on the caller; the teacher has its own dtype.
        with torch.autocast(images.device.type, enabled=False):
            parts = [self.encoder.tokens_and_class(part) for part in images.split(chunk)]
            return tuple(torch.cat([part.float() for part in column]) for column in zip(*parts, strict=True))

    def finish(self, tokens):
        """Tokens (B, T, dim) of `encode`, resampled to `grid` and normalized."""
        return normalize_tokens(resample_tokens(tokens, self.encoder.grid, self.grid), self.normalize, self.mean)


def load_teacher(
    name,
    *,
    weights=None,
    normalize="none",
    mean=None,
    grid=None,
    class_statistics=None,
    image_size=None,
    device="cpu",
    dtype=None,
):
    """Load a teacher by name.

    Args:
        name: "efficientnet-lite0" (stride 32: 8x8 tokens), "efficientnet-lite0:16" (16x16 tokens),
            "dinov2-s", "-b", "-l", "-g", or "timm:MODEL".
        weights: "hub", "random" (for tests), or the path of a .safetensors / .pth file; None is the hub, and
            for efficientnet-lite0 the installed weights.
        normalize: "none", "spatial" (iREPA) or "mean" (needs `mean`).
        mean: the data set's mean token, `dim` numbers.
        grid: (gh, gw) to resample the tokens to, e.g. the student's; None keeps the teacher's own.
        class_statistics: (mean, std), `class_dim` numbers each, with which a class token of the kind "mean" is
            standardized; ignored for others. Without them such a teacher gives no class token.
        image_size: side of the images in pixels, from which DINOv2 takes its input size (224 for less than
            512, 448 for less than 768, and so on); None is 256.
        device: where it runs.
        dtype: of its weights and activations, None is float32; the tokens come out in float32.

    Returns:
        Teacher, frozen and in eval mode.

    Raises:
        UsageError: no such name, no weights, or weights that do not fit; the hub not reachable.
    """
    check_teacher_name(name)
    check_normalization(normalize)
    weights = str(weights) if weights is not None else None
    if name.startswith("dinov2-"):
        encoder = Dinov2(name, weights or "hub", image_size or 256)
    elif name.startswith("efficientnet-lite0"):
        encoder = EfficientNetLite0(16 if name.endswith(":16") else 32, weights, name)
    else:
        encoder = TimmEncoder(name.removeprefix("timm:"), weights or "hub", name)
    encoder.requires_grad_(False)
    if dtype is not None:
        encoder.network.to(dtype)
    own = {"normalize": normalize, "mean": mean, "grid": grid, "class_statistics": class_statistics}
    return Teacher(name, encoder, **own).to(device)


def load_teachers(names, *, weights=None, **kwargs):
    """Load several teachers: `names` and `weights` (one for all, or one each) as lists or with commas."""
    names = parse_teachers(names)
    sources = [None] if weights is None else weights.split(",") if isinstance(weights, str) else list(weights)
    if len(sources) not in (1, len(names)):
        raise UsageError(f"{len(names)} teachers but {len(sources)} weights; give one for all or one each")
    sources = sources * len(names) if len(sources) == 1 else sources
    pairs = zip(names, sources, strict=True)
    return [load_teacher(name, weights=source or None, **kwargs) for name, source in pairs]


def load_teacher_like(name, entry, **kwargs):
    """A teacher that computes the tokens and class tokens that a data set has stored, up to their rounding.

    Args:
        name: the teacher.
        entry: its entry in the manifest: normalization, mean token, grid and the statistics of class tokens are taken
            from it.
        **kwargs: `weights`, `image_size`, `device`, `dtype` for `load_teacher`.
    """
    settings = {"normalize": entry.get("normalize", "none"), "mean": entry.get("mean"), "grid": entry["grid"]}
    class_token = entry.get("class_token")
    if class_token is not None and class_token["kind"] == "mean":
        settings["class_statistics"] = class_token["mean"], class_token["std"]
    return load_teacher(name, **settings, **kwargs)
