"""Inception features and scores, by torch-fidelity, whose network has the weights of the field's FID."""

import io
from pathlib import Path

import torch
from torch import nn

from maskalign.errors import UsageError, one_line
from maskalign.evaluation.features import CPU_CHUNK, digest_of
from maskalign.teachers.hub import hub_answers

NAME = "inception"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def find_weights(asked):
    """Path of torch-fidelity's Inception weights: the file that is asked for, or with "download" from torch's cache.

    Raises:
        UsageError: there is no such file, or it is neither cached nor can it be fetched.
    """
    if asked != "download":
        if not Path(asked).is_file():
            raise UsageError(f"--inception: there is no weights file {asked}; give {WEIGHTS}, or say download")
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


class InceptionFeatures(nn.Module):
    """Pooled features (2048) and logits (1008) of pictures.

    Args:
        path: weights file of torch-fidelity.

    Raises:
        UsageError: not such a file. It is read as tensors alone: nothing in it is run.
    """

    name, dim, title = NAME, 2048, "FID, inception"

    def __init__(self, path):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        from maskalign.teachers.weights import read_state_dict

        # torch-fidelity unpickles its file: it is given one that holds nothing but the tensors read here.
        clean = io.BytesIO()
        torch.save(read_state_dict(path, NAME), clean)
        clean.seek(0)
        outputs = ["2048", "logits_unbiased"]
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", outputs, clean)
        except (RuntimeError, KeyError) as error:
            reason = one_line(error)[:200]
            raise UsageError(f"--inception: {path} is not torch-fidelity's file of weights ({reason})") from None

    def fingerprint(self):
        """16 hex digits that change with the weights."""
        return digest_of(self.network, f"{NAME} torch-fidelity")

    @torch.no_grad()
    def both(self, pictures):
        """(B, 2048) features and (B, 1008) logits without bias of pictures (B, 3, H, W) uint8; float32, on the CPU."""
        device = next(self.network.parameters()).device
        chunk = CPU_CHUNK if device.type == "cpu" else max(1, len(pictures))
        parts = [self.network(part.to(device)) for part in pictures.split(chunk)]
        return tuple(torch.cat(column).float().cpu() for column in zip(*parts, strict=True))

    def forward(self, pictures):
        """Features of pictures (B, 3, H, W) uint8: (B, 2048) float32 on the CPU."""
        return self.both(pictures)[0]


def inception_score(logits, splits=10):
    """Inception Score (arXiv 1606.03498) as torch-fidelity computes it: mean and standard deviation over the splits.

    Args:
        logits: (n, 1008), n at least `splits`.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(torch.as_tensor(logits), splits)
    return found["inception_score_mean"], found["inception_score_std"]
