"""Inception features and scores with torch-fidelity, whose network has the weights that FID is defined with."""

import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from maskalign.errors import UsageError, one_line
from maskalign.evaluation.features import CPU_CHUNK, module_digest
from maskalign.runtime.hub import hub_answers

NAME = "inception"
SPATIAL_NAME = "inception-spatial"
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def find_weights(asked):
    """Path of torch-fidelity's Inception weights: the given file, or with "download" the one in torch's cache.

    Raises:
        UsageError: there is no such file, or it is neither cached nor can it be fetched.
    """
    if asked != "download":
        if not Path(asked).is_file():
            raise UsageError(f"--inception: there is no weights file {asked}; give {WEIGHTS}, or write download")
        return Path(asked)
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    if path.is_file():
        return path
    if not hub_answers(URL_INCEPTION_V3):
        raise UsageError(
            f"--inception download: {URL_INCEPTION_V3} does not answer and {path} is not there; fetch the file "
            "elsewhere and give its path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--inception download: {one_line(error)}; give a path") from None
    return path


class InceptionOutput(NamedTuple):
    """The network's outputs for B images, float32 on the CPU.

    pooled: (B, 2048), the features for FID, KID, precision and recall; logits: (B, 1008) without bias, for the
    Inception score; spatial: (B, 2023), the features for sFID.
    """

    pooled: torch.Tensor
    logits: torch.Tensor
    spatial: torch.Tensor


class InceptionFeatures(nn.Module):
    """Pooled features, logits and spatial features of pictures.

    The spatial features are those of ADM's evaluator (arXiv 2105.05233; sFID is from arXiv 2103.03841): the first 7
    channels of `mixed_6/conv:0` of the TensorFlow graph, 17 x 17 x 7 = 2023 numbers. torch-fidelity's weights were
    converted from that graph, where `mixed_6/conv` became `Mixed_6d.branch1x1`: the 1x1 convolution that comes first in
    the third of the four 17x17 blocks. The node of that name is the ReLU that the block's concatenation reads (the
    convolution alone is `mixed_6/conv/Conv2D`), so the features are taken after batch normalization and ReLU.

    Args:
        path: weights file of torch-fidelity.

    Attributes:
        spatial: `SpatialInception`, the same network with the spatial features as its output.

    Raises:
        UsageError: the file is not such a file. It is read as tensors only, and no code in it runs.
    """

    name, dim = NAME, 2048

    def __init__(self, path):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        from maskalign.teachers.weights import read_state_dict

        # torch-fidelity unpickles its file, so it gets a new file with only the tensors that were read here.
        clean = io.BytesIO()
        torch.save(read_state_dict(path, NAME), clean)
        clean.seek(0)
        outputs = ["2048", "logits_unbiased"]
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", outputs, clean)
        except (RuntimeError, KeyError) as error:
            reason = one_line(error)[:200]
            raise UsageError(f"--inception: {path} is not torch-fidelity's file of weights ({reason})") from None
        self._branch = None  # output of the spatial layer in the current pass
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_branch)

    def _keep_branch(self, module, inputs, output):
        self._branch = output

    @property
    def spatial(self):
        return SpatialInception(self)

    def fingerprint(self):
        """16 hex digits that change with the weights."""
        return module_digest(self.network, f"{NAME} torch-fidelity")

    @torch.no_grad()
    def outputs(self, pictures):
        """`InceptionOutput` of pictures (B, 3, H, W) uint8."""
        device = next(self.network.parameters()).device
        chunk = CPU_CHUNK if device.type == "cpu" else max(1, len(pictures))
        parts = []
        for part in pictures.split(chunk):
            pooled, logits = self.network(part.to(device))
            channels, self._branch = self._branch[:, :SPATIAL_CHANNELS], None
            # In the order of TensorFlow: channels last.
            parts.append((pooled, logits, channels.permute(0, 2, 3, 1).flatten(1)))
        return InceptionOutput(*(torch.cat(column).float().cpu() for column in zip(*parts, strict=True)))

    def forward(self, pictures):
        """Features of pictures (B, 3, H, W) uint8: (B, 2048) float32 on the CPU."""
        return self.outputs(pictures).pooled


class SpatialInception:
    """The spatial features of an `InceptionFeatures` as a separate network, for sFID."""

    name, dim = SPATIAL_NAME, SPATIAL_CHANNELS * SPATIAL_SIDE**2

    def __init__(self, inception):
        self.inception = inception

    def fingerprint(self):
        """16 hex digits that change with the weights."""
        return module_digest(self.inception.network, f"{SPATIAL_NAME} torch-fidelity")

    def __call__(self, pictures):
        """Spatial features of pictures (B, 3, H, W) uint8: (B, 2023) float32 on the CPU."""
        return self.inception.outputs(pictures).spatial


def inception_score(logits, splits=10):
    """Inception Score (arXiv 1606.03498) as torch-fidelity computes it: mean and standard deviation over the splits.

    Args:
        logits: (n, 1008), n at least `splits`.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(torch.as_tensor(logits), splits)
    return found["inception_score_mean"], found["inception_score_std"]
