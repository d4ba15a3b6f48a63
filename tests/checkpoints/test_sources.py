"""Runs and checkpoints by name: `hf-hub:`, from a hub on this machine, and the published weights."""

import hashlib
import io

import pytest
import torch

from maskalign.checkpoints import convert, load, load_model, sources
from maskalign.checkpoints.sources import PUBLISHED, HubName, check_source, locate, parse_hub_name
from maskalign.checkpoints.spec import ModelInfo
from maskalign.checkpoints.weight_files import repa_checkpoint, write_safetensors
from maskalign.errors import RunError, UsageError
from maskalign.models import SiT

TINY = dict(
    input_size=8, patch_size=2, in_channels=3, num_classes=3, depth=2, width=16, heads=2, teacher_dims=(5,),
    align_depth=1, projector_dim=8, mixer="none",
)  # fmt: skip


def weights(seed, ending=".safetensors", tmp_path=None, **known):
    """(a model, the bytes of a file with it)."""
    torch.manual_seed(seed)
    model = SiT(**TINY)
    if ending == ".pt":
        buffer = io.BytesIO()
        torch.save(repa_checkpoint(model, model, 9), buffer)
        return model, buffer.getvalue()
    write_safetensors(tmp_path / "made.safetensors", model, ModelInfo(step=9, **known))
    return model, (tmp_path / "made.safetensors").read_bytes()


def same(a, b):
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hf-hub:a/b", HubName("a/b")),
        ("hf-hub:a/b@v1.0", HubName("a/b", "v1.0")),
        ("hf-hub:a-b/c.d@refs/pr/3:sub/x.pt", HubName("a-b/c.d", "refs/pr/3", "sub/x.pt")),
        ("hf-hub:a/b:x.pt", HubName("a/b", None, "x.pt")),
        ("runs/a", None),
    ],
)
def test_names(text, expected):
    assert parse_hub_name(text) == expected


@pytest.mark.parametrize(
    "text",
    ["hf-hub:", "hf-hub:a", "hf-hub:a/b/c", "hf-hub:a/b@", "hf-hub:a/b:", "hf-hub:../b", "hf-hub:a/b:../../x.pt",
     "hf-hub:a/b@r@s", "hf-hub:a b/c"],
)  # fmt: skip
def test_names_that_are_none(text):
    with pytest.raises(UsageError, match="not the name of weights on the Hub; write hf-hub:USER/NAME"):
        check_source(text)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_weights_from_a_hub(ending, hub, tmp_path, seed):
    model, data = weights(seed, ending, tmp_path)
    hub.add("user/net", {"README.md": b"# net", "config.yaml": b"{}", f"weights{ending}": data})
    loaded = load("hf-hub:user/net")
    assert same(model, loaded.model) and loaded.info.label == "user/net, step 9" and loaded.kind == "file"
    # A second time from the cache: nothing large is fetched again.
    fetched = sum(path.startswith("/cdn/") for _, path in hub.requests)
    assert same(model, load_model(f"hf-hub:user/net:weights{ending}"))
    assert sum(path.startswith("/cdn/") for _, path in hub.requests) == fetched == 1
    line = convert("hf-hub:user/net", tmp_path / "own.safetensors")
    assert "2 heads" in line and same(model, load_model(tmp_path / "own.safetensors"))


def test_revisions_and_files(hub, tmp_path, seed):
    (one, first), (two, second) = (weights(seed + k, ".safetensors", tmp_path) for k in (0, 1))
    hub.add("user/net", {"a.safetensors": first, "b.safetensors": second})
    hub.add("user/net", {"model.safetensors": second, "other.pt": b"x"}, "v2")
    assert same(one, load_model("hf-hub:user/net:a.safetensors"))
    assert same(two, load_model("hf-hub:user/net@main:b.safetensors"))
    assert same(two, load_model("hf-hub:user/net@v2"))  # what push writes comes first
    assert same(one, load_model(f"hf-hub:user/net@{hub.commit('user/net', 'main')}:a.safetensors"))
    for name, message in {
        "hf-hub:user/net": "has 2 files of weights; add one as :FILE: a.safetensors, b.safetensors",
        "hf-hub:user/net@v3": "no revision 'v3'",
        "hf-hub:user/net:c.pt": "no file 'c.pt'; it has a.safetensors, b.safetensors",
        "hf-hub:user/none": "no such repository",
    }.items():
        with pytest.raises(UsageError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    hub.add("user/empty", {"README.md": b""})
    with pytest.raises(UsageError, match="no file of weights"):
        load("hf-hub:user/empty")
    hub.add("user/private", {"a.safetensors": first})
    hub.gated.add("user/private")
    with pytest.raises(UsageError, match="not public; for one of yours set HF_TOKEN"):
        load("hf-hub:user/private:a.safetensors")


def test_broken_downloads(hub, tmp_path, seed):
    model, data = weights(seed, ".safetensors", tmp_path)
    hub.add("user/net", {"model.safetensors": data})
    hub.cut = 100
    with pytest.raises(RunError, match="the download failed") as error:
        load("hf-hub:user/net")
    assert "\n" not in str(error.value)
    hub.cut, hub.corrupt = None, True
    with pytest.raises(RunError, match="checksum|failed"):
        locate("hf-hub:user/net")
    hub.corrupt = False
    for path in (tmp_path / "cache").rglob("*.incomplete"):
        path.unlink()  # of the attempt whose bytes were changed
    assert same(model, load_model("hf-hub:user/net"))
    blobs = [path for path in (tmp_path / "cache").rglob("blobs/*") if len(path.name) == 64]
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in blobs] == [path.name for path in blobs]


def test_a_hub_that_has_gone(hub, tmp_path, seed, monkeypatch):
    model, data = weights(seed, ".safetensors", tmp_path)
    hub.add("user/net", {"model.safetensors": data})
    load("hf-hub:user/net")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same(model, load_model("hf-hub:user/net"))  # the cache has it
    for name, message in {
        "hf-hub:user/other": "not in the local cache, and the hub .* does not answer",
        "hf-hub:user/net:b.pt": "b.pt cannot be fetched: the hub .* does not answer",
        "hf-hub:user/net@v9": "cannot be fetched|no revision",
    }.items():
        with pytest.raises(UsageError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value)


def test_published_weights(hub, tmp_path, seed, monkeypatch, caplog):
    """What they are on a hub here: SiT's file with its variance, REG's and REPA's own."""
    core, _ = weights(seed, ".safetensors", tmp_path)
    official = {name: value for name, value in core.state_dict().items() if not name.startswith("projectors.")}
    for name in ("weight", "bias"):
        official[f"final_layer.linear.{name}"] = torch.randn_like(
            torch.cat([official[f"final_layer.linear.{name}"]] * 2)
        )
    buffer = io.BytesIO()
    torch.save(official, buffer)
    hub.add("nyu-visionx/SiT-collections", {"SiT-XL-2-256.pt": buffer.getvalue(), "SiT-B-2-256.pt": b"x"})
    loaded = load("sit-xl2", heads=2)
    assert loaded.info.vae == PUBLISHED["sit-xl2"].vae and loaded.info.name == "sit-xl2"
    assert torch.equal(
        loaded.model.final_layer.linear.bias, -official["final_layer.linear.bias"].view(4, 6)[:, :3].flatten()
    )
    assert not caplog.records  # known weights leave no doubt
    with pytest.raises(UsageError, match="reg-xl2|Martinser/REG"):
        load("reg-xl2")
    monkeypatch.setattr(sources, "hub_answers", lambda url: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(UsageError, match="repa-xl2: .*does not answer and .* is not there; fetch the file elsewhere"):
        load("repa-xl2")
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    torch.save(dict(core.state_dict()), tmp_path / "torch/hub/checkpoints/maskalign-repa-xl2.pt")
    assert same(core, load("repa-xl2", heads=2).model)


def test_a_path_comes_before_a_published_name(tmp_path, seed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = weights(seed, ".safetensors", tmp_path)
    del model, data
    with pytest.raises(UsageError, match="did you mean the published weights 'sit-xl2'"):
        check_source("sit-xl")
    (tmp_path / "sit-xl2").mkdir()
    with pytest.raises(UsageError, match="no complete checkpoint"):
        load("sit-xl2")


def test_the_command_line(hub, tmp_path, seed, capsys):
    from maskalign.cli import main

    model, data = weights(seed, ".safetensors", tmp_path, class_names=["a", "b", "c"])
    hub.add("user/net", {"model.safetensors": data})

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words)])
        captured = capsys.readouterr()
        return ended.value.code, captured.out + captured.err

    code, text = call("sample", "hf-hub:user/net", "--out", tmp_path / "out", "--steps", 2, "--per-class", 1)
    assert code == 0 and (tmp_path / "out" / "grid.png").exists()
    code, text = call("convert", "hf-hub:user/net", tmp_path / "own.pt")
    assert code == 0 and (tmp_path / "own.pt").exists()
    code, text = call("convert", "--list")
    assert code == 0 and all(name in text for name in ("repa-xl2", "reg-xl2", "sit-xl2", "the direction of time"))
    code, text = call("convert", "hf-hub:user/net")
    assert code == 2 and "needs SRC and DST" in text
    code, text = call("sample", "hf-hub:user/none", "--out", tmp_path / "out")
    assert code == 2 and text.count("\n") == 1 and "no such repository" in text


def test_evaluation_analysis_and_init_from_take_names(hub, tmp_path, seed):
    from maskalign.analysis.subjects import find_checkpoints, load_subject
    from maskalign.evaluation.subject import is_model
    from maskalign.training.transfer import _load

    model, data = weights(seed, ".safetensors", tmp_path)
    hub.add("user/net", {"model.safetensors": data})
    assert is_model("hf-hub:user/net") and is_model("reg-xl2")
    (entry,) = find_checkpoints(["hf-hub:user/net"])
    assert entry.run == "net" and same(model, load_subject(entry).model)
    loaded, knows_heads = _load("hf-hub:user/net", 2)
    assert same(model, loaded.model) and knows_heads
