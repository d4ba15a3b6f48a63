"""The command as a user meets it: fast help, one line and a status for every mistake."""

import subprocess
import sys
import time

import pytest


def run(*argv, timeout=60):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "maskalign", *argv], capture_output=True, text=True, timeout=timeout)
    return done, time.perf_counter() - start


COMMANDS = [
    *("data build", "data encode", "data check", "data show"),
    *("train", "sample", "report", "analyze", "plan", "convert"),
]


def test_help_lists_every_command_quickly():
    times = []
    for _ in range(3):
        done, seconds = run("--help")
        times.append(seconds)
        assert done.returncode == 0 and all(f"maskalign {name}" in done.stdout for name in COMMANDS)
    assert min(times) < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_torch(name):
    code = (
        "import sys\nfrom maskalign.cli import main\n"
        f"try: main({name.split() + ['--help']!r})\nexcept SystemExit as e: status = e.code\n"
        "assert not status and 'torch' not in sys.modules, (status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: maskalign " + name in done.stdout and "--help" in done.stdout


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trian"], ["trian", "did you mean 'train'"]),
        (["train", "--model.preset", "SiT-S/2", "--data.path", "nowhere"], ["nowhere"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--model.preset", "SiT-S/2", "--method.keep_ratio", "2"], ["method.keep_ratio"]),
        (["train", "--modle.preset", "SiT-S/2"], ["modle.preset", "model.preset"]),
        (["data", "build", "nowhere", "--out", "x"], ["nowhere"]),
        (["data", "build"], ["source"]),
        (["data", "check", "nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_are_one_line_status_2_in_under_3_seconds(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done, seconds = run(*argv)
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("maskalign: error: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert seconds < 3


def test_print_config_is_a_config(tmp_path):
    done, _ = run("train", "--model.preset", "SiT-S/2", "--print_config")
    assert done.returncode == 0
    (tmp_path / "c.yaml").write_text(done.stdout)
    again, _ = run("train", "--config", str(tmp_path / "c.yaml"), "--print_config")
    assert again.stdout == done.stdout


def test_version():
    from maskalign import __version__

    assert run("--version")[0].stdout.strip() == __version__
