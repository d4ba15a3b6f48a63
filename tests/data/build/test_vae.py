"""VAE moments through a small random AutoencoderKL that is saved as diffusers saves it."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from maskalign.data.build import encode
from maskalign.data.build.vae import latent_entry, load_vae, vae_moments
from maskalign.data.format.manifest import Manifest
from maskalign.data.format.tar_shards import read_shard, write_shard
from maskalign.errors import UsageError


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=2,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder, safe_serialization=True)
    return str(folder)


def images(count, size, seed):
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_moments_are_mean_and_standard_deviation(vae_folder, seed):
    vae = load_vae(vae_folder)
    batch = images(3, 16, seed)
    moments = vae_moments(vae, batch)
    with torch.no_grad():
        hidden = vae.quant_conv(vae.encoder(batch / 255 * 2 - 1))
    mean, log_variance = hidden.chunk(2, dim=1)
    want = torch.cat([mean, log_variance.clamp(-30, 20).exp().sqrt()], dim=1)
    assert moments.shape == (3, 8, 4, 4)
    assert torch.allclose(moments, want, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in vae.parameters()) and not vae.training


def test_encode_stores_them_and_the_manifest_says_how_to_use_them(vae_folder, tmp_path, seed):
    folder = tmp_path / "data"
    folder.mkdir()
    pictures = images(5, 16, seed)

    def samples():
        for i, picture in enumerate(pictures):
            buffer = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            yield f"{i:08d}", {"cls": b"0", "png": buffer.getvalue()}

    Manifest(5, 16, ["a"], [write_shard(folder / "shard-000000.tar", samples())]).save(folder)
    settings = {"latents": vae_folder, "device": "cpu", "quiet": True, "hflip": True}
    manifest = encode(folder, teacher="timm:test_vit", weights="random", **settings)
    assert manifest.latent == {
        "scale": 0.18215,
        "bias": 0.0,
        "shape": [8, 4, 4],
        "dtype": "float16",
        "name": vae_folder,
    }
    vae = load_vae(vae_folder)
    with open(folder / "shard-000000.tar", "rb") as file:
        for i, (_, members) in enumerate(read_shard(file)):
            plain = ["moments.npy", "timm-test_vit.npy", "timm-test_vit.class.npy"]
            assert list(members) == ["cls", "png", *plain, *(f"flip.{ending}" for ending in plain)]
            for ending, picture in (("moments.npy", pictures[i]), ("flip.moments.npy", pictures[i].flip(-1))):
                moments = np.load(io.BytesIO(members[ending]), allow_pickle=False)
                assert moments.dtype == np.float16 and moments.shape == (8, 4, 4)
                want = vae_moments(vae, picture[None])[0].numpy()
                assert np.allclose(moments, want, rtol=2e-3, atol=2e-3)
    stamp = os.stat(folder / "manifest.json").st_mtime_ns
    encode(folder, **settings)  # is there already
    assert os.stat(folder / "manifest.json").st_mtime_ns == stamp


def test_what_is_decoded_is_what_the_vae_decodes(vae_folder, seed):
    from maskalign.sampling.pictures import Decoder

    vae = load_vae(vae_folder)
    entry = latent_entry(vae, vae_folder, 16)
    mean = vae_moments(vae, images(3, 16, seed))[:, :4]
    decoded = Decoder(vae, entry["scale"], entry["bias"], chunk=2)(mean * entry["scale"] + entry["bias"])
    with torch.no_grad():
        assert torch.allclose(decoded, vae.decode(mean).sample, atol=1e-4)


def test_a_shifted_vae_gives_a_bias(vae_folder):
    vae = load_vae(vae_folder)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    entry = latent_entry(vae, "shifted", 16)
    assert (entry["scale"], entry["bias"]) == (0.5, -0.125)  # (z - 0.25) * 0.5
    with pytest.raises(UsageError, match="factor 4 does not divide"):
        latent_entry(vae, "odd", 18)


def test_a_pipelines_folder_will_do(vae_folder, tmp_path):
    os.symlink(vae_folder, tmp_path / "vae")
    assert load_vae(tmp_path).config.latent_channels == 4


def test_unusable_vaes_are_one_line(vae_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(open(os.path.join(vae_folder, "config.json")).read())
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    cases = {
        str(tmp_path / "missing"): "no such folder",
        str(tmp_path / "empty"): "no config.json",
        str(pickled): "safetensors",
        "stabilityai/sd-vae-ft-mse": "does not answer; give a local path",
    }
    for name, words in cases.items():
        with pytest.raises(UsageError, match=words) as caught:
            load_vae(name)
        assert "\n" not in str(caught.value)


def test_without_diffusers_the_way_to_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("maskalign.data.build.recipe.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install diffusers"):
        load_vae("stabilityai/sd-vae-ft-mse")


STATISTICS = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [0.5, 2.0, 1.0, 0.25]}


def with_config(vae_folder, path, **changes):
    """A copy of the VAE whose config.json has other entries."""
    shutil.copytree(vae_folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return str(path)


def test_a_vae_that_standardizes_its_channels(vae_folder, tmp_path, seed):
    """What diffusers' pipelines compute: (z - mean) / std * scaling_factor there, and the other way back."""
    from maskalign.sampling.pictures import load_decoder

    name = with_config(vae_folder, tmp_path / "vae", scaling_factor=0.5, **STATISTICS)
    vae, plain, batch = load_vae(name), load_vae(vae_folder), images(3, 16, seed)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in STATISTICS.values())
    raw = plain.encode(batch / 127.5 - 1).latent_dist
    moments = vae_moments(vae, batch)
    assert torch.allclose(moments[:, :4], (raw.mean - mean) / std, atol=1e-4)
    assert torch.allclose(moments[:, 4:], raw.std / std, atol=1e-4)
    entry = latent_entry(vae, name, 16)
    assert (entry["mean"], entry["std"]) == tuple(STATISTICS.values()) and (entry["scale"], entry["bias"]) == (0.5, 0.0)
    # A draw of the posterior as a model sees it, and back to pictures.
    noise = torch.randn(raw.mean.shape, generator=torch.Generator().manual_seed(seed))
    latent = (moments[:, :4] + moments[:, 4:] * noise) * entry["scale"] + entry["bias"]
    z = raw.mean + raw.std * noise
    assert torch.allclose(latent, (z - mean) / std * 0.5, atol=1e-4)
    with torch.no_grad():
        expected = plain.decode(z).sample
    for decoder in (load_decoder(name, latent=entry, channels=4), load_decoder(name)):
        assert (decoder(latent) - expected).norm() / expected.norm() < 1e-3
    # A data set that was encoded without the statistics is decoded without them.
    old = {key: value for key, value in entry.items() if key not in ("mean", "std")}
    with torch.no_grad():
        assert torch.allclose(load_decoder(name, latent=old)(z * 0.5), expected, atol=1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents_mean": [0.0] * 4}, "latents_std of its config is None, not 4"),
        ({**STATISTICS, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "above 0"),
        ({**STATISTICS, "latents_mean": [0.0] * 3}, "latents_mean of its config is .* not 4"),
        ({**STATISTICS, "latents_mean": [0.0, 1.0, None, 1.0]}, "latents_mean of its config"),
        ({**STATISTICS, "shift_factor": 0.1}, "both latents_mean and shift_factor"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(vae_folder, tmp_path, changes, message, seed):
    from maskalign.sampling.pictures import load_decoder

    name = with_config(vae_folder, tmp_path / "vae", **changes)
    for use in (lambda: vae_moments(load_vae(name), images(1, 16, seed)), lambda: load_decoder(name)):
        with pytest.raises(UsageError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


def test_a_decoder_of_other_latents_is_refused(vae_folder):
    from maskalign.sampling.pictures import load_decoder

    with pytest.raises(UsageError, match="decodes latents of 4 channels, and these have 8"):
        load_decoder(vae_folder, channels=8)
