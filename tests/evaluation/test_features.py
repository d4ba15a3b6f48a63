"""Features of pictures for the distances: which part of each network they are, and whose preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

from maskalign.errors import UsageError
from maskalign.evaluation.features import load_features
from maskalign.evaluation.inception import InceptionFeatures, find_weights, inception_score
from maskalign.teachers import load_teacher
from tests.evaluation.conftest import pictures, write_folder


def tensor(arrays):
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def test_efficientnet_is_the_mean_token():
    batch = tensor(pictures(5, 32))
    features = load_features("efficientnet-lite0")
    assert features.dim == 320 and features(batch).shape == (5, 320)
    torch.testing.assert_close(features(batch), load_teacher("efficientnet-lite0")(batch).mean(dim=1))
    torch.testing.assert_close(features(batch[:1]), features(batch)[:1], rtol=1e-4, atol=1e-5)


def test_dinov2_is_the_class_token_prepared_as_for_fdd():
    """The field's FDD (arXiv 2306.04675) prepares a PIL image with torchvision: resize, scale, normalise."""
    arrays = pictures(2, 32, seed=1)
    features = load_features("dinov2-s", weights="random")
    prepare = Compose([
        Resize((224, 224), InterpolationMode.BICUBIC), ToTensor(),
        Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    theirs = torch.stack([prepare(Image.fromarray(picture)) for picture in arrays])
    with torch.no_grad():
        expected = features.encoder.network.forward_features(theirs)[:, 0]
    found = features(tensor(arrays))
    assert found.shape == (2, 384) and features.dim == 384
    # Pillow computes with fixed-point weights: a few bytes of the resized picture differ by one.
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_timm_models_are_pooled_as_timm_does():
    features = load_features("timm:resnet18", weights="random")
    batch = tensor(pictures(2, 32))
    assert features.dim == 512
    timm = features.encoder.encoder
    with torch.no_grad():
        expected = timm.network(timm.preprocess(batch))
    torch.testing.assert_close(features(batch), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_numbers():
    features = load_features("efficientnet-lite0")
    with torch.no_grad():
        features.encoder.encoder.network[0].bias[0] = torch.nan
    with pytest.raises(UsageError, match="not finite"):
        features(tensor(pictures(1)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like torch-fidelity's, with random weights."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    batch = tensor(pictures(2, 32))
    own = InceptionFeatures(weights).eval()
    for found, expected in zip(own.both(batch), theirs(batch), strict=True):
        torch.testing.assert_close(found, expected)
    assert own.dim == own(batch).shape[1] == 2048 and len(own.fingerprint()) == 16


def test_inception_score_of_known_predictions():
    """Sure and evenly spread over k classes: the score is k; the same for all pictures: 1."""
    sure = torch.full((40, 8), -50.0).scatter_(1, torch.arange(40).view(-1, 1) % 4, 50.0)
    assert inception_score(sure, splits=1)[0] == pytest.approx(4, rel=1e-6)
    assert inception_score(torch.randn(1, 8).expand(40, 8), splits=2) == pytest.approx((1, 0), abs=1e-6)


def test_inception_weights_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no weights file"):
        find_weights(str(tmp_path / "none.pth"))
    monkeypatch.setattr("maskalign.evaluation.inception.hub_answers", lambda url: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="does not answer"):
        find_weights("download")
    torch.save({"conv": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="not torch-fidelity's file"):
        InceptionFeatures(tmp_path / "other.pth")

    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"conv": Code()}, tmp_path / "code.pth")
    with pytest.raises(UsageError, match="could run code"):
        InceptionFeatures(tmp_path / "code.pth")


@pytest.mark.slow
def test_fid_and_score_of_folders_are_torch_fidelitys(weights, tmp_path, data, command):
    """The whole command beside torch-fidelity's own, on the same pictures and weights."""
    import json

    from torch_fidelity import calculate_metrics

    from maskalign.evaluation.pictures import PictureDataSet

    real = torch.cat(list(PictureDataSet(data, 12).batches(12))).permute(0, 2, 3, 1).numpy()
    write_folder(tmp_path / "real", real)
    write_folder(tmp_path / "drawn", pictures(11))
    theirs = calculate_metrics(
        input1=str(tmp_path / "drawn"), input2=str(tmp_path / "real"), fid=True, isc=True, isc_splits=10, cuda=False,
        cache=False, verbose=False, feature_extractor_weights_path=str(weights), save_cpu_ram=True, batch_size=4,
    )  # fmt: skip
    status, out, err = command(
        "evaluate", tmp_path / "drawn", "--data", data, "--inception", weights, "--metrics", "none", "--reference", 12,
        "--allow-singular", "--out", tmp_path / "out", "--progress", "false",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert found["frechet[inception]"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3, abs=1e-6)
    assert found["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert "FID, Frechet distance (inception)" in out and np.isfinite(found["frechet[inception]"])
