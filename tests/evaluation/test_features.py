"""Features of pictures for the distances: which part of each network they are, and whose preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

from maskalign.errors import UsageError
from maskalign.evaluation.distances import frechet_distance
from maskalign.evaluation.features import load_features
from maskalign.evaluation.inception import InceptionFeatures, find_weights, inception_score
from maskalign.teachers import load_teacher
from tests.on_disk import random_pictures, write_pictures


def tensor(arrays):
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def test_efficientnet_is_the_mean_token():
    batch = tensor(random_pictures(5, 32))
    features = load_features("efficientnet-lite0")
    assert features.dim == 320 and features(batch).shape == (5, 320)
    torch.testing.assert_close(features(batch), load_teacher("efficientnet-lite0")(batch).mean(dim=1))
    torch.testing.assert_close(features(batch[:1]), features(batch)[:1], rtol=1e-4, atol=1e-5)


def test_dinov2_is_the_class_token_prepared_as_for_fdd():
    """The field's FDD (arXiv 2306.04675) prepares a PIL image with torchvision: resize, scale, normalize."""
    arrays = random_pictures(2, 32, seed=1)
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
    batch = tensor(random_pictures(2, 32))
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
        features(tensor(random_pictures(1)))


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
    batch = tensor(random_pictures(2, 32))
    own = InceptionFeatures(weights).eval()
    out = own.outputs(batch)
    for found, expected in zip((out.pooled, out.logits), theirs(batch), strict=True):
        torch.testing.assert_close(found, expected)
    assert own.dim == own(batch).shape[1] == 2048 and len(own.fingerprint()) == 16


def test_spatial_features_are_those_of_adms_evaluator(weights):
    """The first 7 channels of `mixed_6/conv:0`, written out: a 1x1 convolution of what the block before gives, batch
    normalization and ReLU, in TensorFlow's order (row, column, channel)."""
    batch = tensor(random_pictures(3, 32, seed=1))
    own = InceptionFeatures(weights).eval()
    network = own.network
    # Other statistics than a fresh network's 0 and 1, or leaving the normalization out would hardly show.
    norm = network.Mixed_6d.branch1x1.bn
    generator = torch.Generator().manual_seed(0)
    for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    before = []
    handle = network.Mixed_6c.register_forward_hook(lambda module, inputs, output: before.append(output))
    out = own.outputs(batch)
    handle.remove()
    x = torch.cat(before).double()
    assert x.shape == (3, 768, 17, 17)
    kernel = network.Mixed_6d.branch1x1.conv.weight[:7, :, 0, 0].double()
    value = torch.einsum("bcyx,kc->byxk", x, kernel)
    scale = norm.weight[:7].double() / (norm.running_var[:7].double() + 1e-3).sqrt()
    expected = ((value - norm.running_mean[:7]) * scale + norm.bias[:7]).clamp(min=0).reshape(3, -1)
    assert out.spatial.shape == expected.shape == (3, 2023) and out.spatial.dtype == torch.float32
    torch.testing.assert_close(out.spatial.double(), expected, rtol=1e-3, atol=1e-5)
    assert 0.05 < (expected == 0).double().mean() < 0.95  # the ReLU is seen
    kind = own.spatial
    assert (kind.name, kind.dim) == ("inception-spatial", 2023) and kind.fingerprint() != own.fingerprint()
    torch.testing.assert_close(kind(batch[:1]), out.spatial[:1], rtol=1e-3, atol=1e-5)


def test_sfid_is_adms_distance():
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) with np.cov and SciPy's matrix root, as ADM's evaluator."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    # Like the spatial features: never negative, and neighbors are alike.
    mix = rng.normal(size=(9, 9))
    a, b = (np.maximum(rng.normal(shift, 1, (count, 9)) @ mix, 0) for shift, count in ((0.1, 70), (0.4, 50)))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    shift = a.mean(axis=0) - b.mean(axis=0)
    expected = (
        shift @ shift + sum(map(np.trace, covariances)) - 2 * np.trace(sqrtm(covariances[0] @ covariances[1])).real
    )
    assert frechet_distance(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(expected, rel=1e-5)


def test_references_of_two_kinds_come_from_one_pass(data, cache):
    from maskalign.evaluation.pictures import PictureDataSet
    from maskalign.evaluation.reference import load_reference, load_references

    class Kind:
        def __init__(self, name, dim):
            self.name, self.dim = name, dim

        def fingerprint(self):
            return self.name

        def __call__(self, batch):
            return batch.float().flatten(1)[:, : self.dim]

    kinds, passes = [Kind("a", 3), Kind("b", 5)], []

    def compute(batch):
        passes.append(len(batch))
        return [kind(batch) for kind in kinds]

    real = PictureDataSet(data, 20)
    first = load_references(real, kinds, compute, batch_size=8)
    assert sum(passes) == 20 and len(list(cache.iterdir())) == 2 and not first[0].cached
    again = load_references(real, kinds, compute)
    assert sum(passes) == 20 and again[1].cached
    for one, other, kind in zip(first, again, kinds, strict=True):
        np.testing.assert_array_equal(one.features, other.features)
        assert one.features.shape == (20, kind.dim)
        np.testing.assert_array_equal(load_reference(real, kind).features, one.features)
    (cache / next(file.name for file in cache.iterdir() if file.name.startswith("b-"))).unlink()
    assert not load_references(real, kinds, compute)[0].cached and sum(passes) == 40


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
    write_pictures(tmp_path / "real", real)
    write_pictures(tmp_path / "drawn", random_pictures(11))
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
    network = InceptionFeatures(weights).eval()
    spatial = [network.outputs(tensor(part)).spatial.numpy() for part in (random_pictures(11), np.asarray(real))]
    assert found["frechet[inception-spatial]"] == pytest.approx(frechet_distance(*spatial), rel=1e-5)
    assert "sFID, Frechet distance (inception-spatial)" in out and "precision[inception]" not in found
