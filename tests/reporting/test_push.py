"""A run on a hub of this machine: what is uploaded, what its card says, and what it keeps to itself."""

import json

import pytest
import torch
import yaml
from PIL import Image

from maskalign.checkpoints import load, load_model
from maskalign.cli import main
from maskalign.errors import RunError, UsageError
from maskalign.reporting.push import push
from tests.made_runs import make_run


@pytest.fixture
def run(tmp_path, seed):
    """A run with metrics, an evaluation and two sample sheets."""
    folder, _, _ = make_run(tmp_path / "secret" / "net", seed, **{"data.path": str(tmp_path / "secret" / "flowers")})
    (folder / "config.yaml").write_text((folder / "checkpoints" / "step_00000002" / "config.yaml").read_text())
    (folder / "metrics.csv").write_text("step,loss,velocity_loss,align_loss\n1,0.9,0.8,-0.1\n2,0.75,0.5,-0.2\n")
    (folder / "evaluation.json").write_text(json.dumps({"samples": 200, "metrics": {"FDD | <b>": 12.3456789}}))
    (folder / "samples").mkdir()
    for step, level in ((1, 10), (2, 200)):
        Image.new("RGB", (8, 8), (level,) * 3).save(folder / "samples" / f"step_{step:08d}.png")
    return folder


def test_a_dry_run_leaves_the_folder(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["push", str(run), "user/net", "--dry-run", "--license", "apache-2.0"])
    assert ended.value.code == 0
    folder = run / "hub"
    assert capsys.readouterr().out.strip() == str(folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.yaml", "model.safetensors", "samples.png"}
    assert Image.open(folder / "samples.png").getpixel((0, 0))[0] == 200  # the newest sheet
    there, here = load(folder / "model.safetensors"), load(run)
    assert there.info.class_names == here.info.class_names and there.info.path == "cosine"
    assert all(torch.equal(a, b) for a, b in zip(there.model.parameters(), here.model.parameters(), strict=True))
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0" and head["library_name"] == "maskalign"
    for words in (
        "hf-hub:user/net", "4 blocks, width 24, 3 heads", "cats, dogs, flags", "| loss | 0.75 |", "12.3457",
        "200 samples", "`objective.path` | cosine", "EfficientNet-Lite0 (teacher): Apache-2.0", 'path="cosine"',
        "![samples](samples.png)",
    ):  # fmt: skip
        assert words in text, words
    assert "<b>" not in text and "FDD \\| &lt;b>" in text
    # Nothing of this machine.
    for name in ("README.md", "config.yaml"):
        assert "secret" not in (folder / name).read_text() and str(tmp_path) not in (folder / name).read_text()
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["data"]["path"] == "flowers" and settings["run_dir"] == "net"
    # Once more, without pictures: the old one does not stay.
    for path in (run / "samples").iterdir():
        path.unlink()
    push(run, "user/net", dry_run=True)
    assert not (folder / "samples.png").exists() and "![samples]" not in (folder / "README.md").read_text()


def test_an_upload_comes_back(run, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    folder, url = push(run, "user/net")
    assert url == f"{hub.url}/user/net"
    assert set(hub.files["user/net"]["main"]) == {"README.md", "config.yaml", "model.safetensors", "samples.png"}
    for name, data in hub.files["user/net"]["main"].items():
        assert data == (folder / name).read_bytes(), name
    again = load_model("hf-hub:user/net")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), load_model(run).parameters(), strict=True))
    # Another one takes its place, and a stranger's file in the folder is not uploaded.
    (folder / "notes.txt").write_text("mine")
    push(run, "user/net", ema=False)
    assert "notes.txt" not in hub.files["user/net"]["main"]
    raw = load_model(f"hf-hub:user/net@{hub.commit('user/net', 'main')}")
    own = load_model(run, ema=False)
    assert all(torch.equal(a, b) for a, b in zip(raw.parameters(), own.parameters(), strict=True))


def test_what_cannot_be_pushed(run, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for source, name, message in (
        (run, "net", "not the name of weights|USER/NAME"),
        (run, "user/net@v1", "write USER/NAME"),
        (tmp_path / "none", "user/net", "not a run"),
        (run, "user/net", "needs a token .* --dry-run"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            push(source, name)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="--samples"):
        push(run, "user/net", dry_run=True, samples=tmp_path / "none.png")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_test")
    with pytest.raises((UsageError, RunError), match="refuses the token|upload failed") as error:
        push(run, "user/net")  # the client itself has none to send
    assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="does not answer; --dry-run"):
        push(run, "user/net")
    assert "user/net" not in hub.files
