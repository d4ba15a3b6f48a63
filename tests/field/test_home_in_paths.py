"""`~` in every command's paths: a shell leaves it alone behind `=`, inside quotes and in files of settings."""

from dataclasses import MISSING, replace
from pathlib import Path

import pytest

from maskalign.cli.main import COMMANDS, command_module
from maskalign.cli.options import build_settings, options_of
from maskalign.config import dump_config, load_config, parse_config
from maskalign.config.settings import Config
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError
from maskalign.runtime.home import expand_home

PATHS = {"source", "data", "out", "run", "runs", "checkpoints", "vae", "held_out", "inception", "teacher_weights"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_what_is_a_path_of_home_and_what_is_not(home):
    assert (
        expand_home("~/x") == f"{home}/x" and expand_home("~") == str(home) and expand_home(Path("~/x")) == home / "x"
    )
    assert expand_home("~/a.pt,hub,~/b.pt") == f"{home}/a.pt,hub,{home}/b.pt"
    assert expand_home({"~/a": 3, "s3://b/~c": 1}) == {f"{home}/a": 3, "s3://b/~c": 1}
    assert expand_home([Path("~"), "x~", None, 3]) == [home, "x~", None, 3]
    with pytest.raises(UsageError, match="there is no user 'nobody-here'"):
        expand_home("~nobody-here/x")


def test_build_show_and_check(home, command, on_disk, tmp_path):
    on_disk.folder("home/set", {"cat/1.png": on_disk.png(), "dog/1.png": on_disk.png()})
    assert command("data", "build", "~/set", "--out=~/out", "--size", 8)[0] == 0
    assert (home / "out" / "manifest.json").exists() and not (tmp_path / "~").exists()
    assert Manifest.load("~/out").num_samples == 2
    assert command("data", "check", "~/out")[0] == 0
    assert command("data", "show", "~/out", "--out=~/sheet.png")[0] == 0
    assert (home / "sheet.png").exists()
    on_disk.tar("home/s.tar", {"0.png": on_disk.png(), "0.cls": b"0"})
    (home / "names.txt").write_text("cat\n")
    words = ["data", "build", "~/s*.tar", "--out=~/out2", "--size", 8, "--class_names=~/names.txt"]
    assert command(*words)[0] == 0
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "completion")])
def test_every_path_of_every_command_is_expanded(name, home):
    """Also those of commands to come: an option that reads like a path must be marked as one."""
    settings = command_module(name).SETTINGS
    values = {}
    for entry in options_of(settings):
        text = ["~/x"] if str(entry.type).startswith("typing.List") else "~/x"
        path = entry.name in PATHS or "Path" in str(entry.type)
        values[entry.name] = text if path else 1 if entry.default is MISSING else entry.default
    built = build_settings(settings, values)
    for key, value in values.items():
        if value in ("~/x", ["~/x"]):
            found = getattr(built, key)
            assert (str(found[0]) if isinstance(found, list) else str(found)) == f"{home}/x", (name, key)


def test_settings_of_train(home):
    words = [
        "--model.preset=SiT-B/2",
        "--run_dir=~/run",
        "--data.path={~/a: 3, ~/b: 1}",
        "--teacher.weights=~/t.pt",
        "--preview.vae=~/vae",
    ]
    config = parse_config([*words, "--training.init_from=~/run0", "--data.cache_dir=~/cache"])
    assert config.run_dir == f"{home}/run" and config.data.path == {f"{home}/a": 3, f"{home}/b": 1}
    assert config.teacher.weights == f"{home}/t.pt" and config.preview.vae == f"{home}/vae"
    assert config.training.init_from == f"{home}/run0" and config.data.cache_dir == f"{home}/cache"
    assert "~" not in dump_config(config)


@pytest.mark.parametrize("how", [["--config=~/c.yaml"], ["--config", "~/c.yaml"]])
def test_files_of_settings(home, how):
    (home / "c.yaml").write_text("model:\n  preset: SiT-B/2\nrun_dir: ~/run\ndata:\n  path: ~/set\n")
    config = parse_config(how)
    assert config.run_dir == f"{home}/run" and config.data.path == f"{home}/set"
    assert load_config("~/c.yaml").run_dir == f"{home}/run"


def test_settings_without_a_home_are_as_they_were():
    config = parse_config(["--model.preset=SiT-B/2"])
    assert config == replace(Config(), model=config.model)


def test_sample_and_evaluate_look_in_home(home, command):
    for words in (
        ["sample", "~/run", "--out=~/o"],
        ["evaluate", "~/run", "--data=~/d"],
        ["convert", "~/a.pt", "~/b.pt"],
    ):
        status, _, err = command(*words)
        assert status == 2 and f"{home}/" in err[0] and "does not exist" in err[0]
    status, _, err = command("train", "--model.preset=SiT-B/2", "--data.path=~/none")
    assert status == 2 and f"data set {home}/none does not exist" in err[0]
    status, _, err = command("data", "encode", "--data=~/none", "--teacher=efficientnet-lite0")
    assert status == 2 and f"{home}/none" in err[0], err


def test_a_reference_cache_in_home(home, monkeypatch):
    monkeypatch.setenv("MASKALIGN_CACHE", "~/cache")
    from maskalign.evaluation.reference import cache_folder

    assert cache_folder() == home / "cache" / "references"
