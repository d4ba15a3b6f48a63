"""The command as a user meets it: quick help, one line and a status for every mistake, before torch is imported."""

import subprocess
import sys

import pytest

from maskalign.cli.main import COMMANDS

IN_PROCESS = """
import sys
from maskalign.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("heavy:", *({"torch", "numpy", "jsonargparse"} & set(sys.modules)), file=sys.stderr)
    sys.exit(end.code)
"""


def run(*argv):
    """(finished process, its modules among torch, numpy and jsonargparse) of a command."""
    done = subprocess.run([sys.executable, "-c", IN_PROCESS, *argv], capture_output=True, text=True, timeout=120)
    *lines, heavy = done.stderr.strip().splitlines()
    return done.returncode, done.stdout, lines, set(heavy.split()[1:])


def test_the_overview_lists_every_command_and_imports_nothing_heavy():
    for argv in ([], ["--help"], ["help"], ["data"]):
        status, out, lines, heavy = run(*argv)
        assert status == 0 and not lines and not heavy
        assert all(f"maskalign {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_torch(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, lines, heavy = run(*name.split(), "--help")
    assert status == 0 and not lines and "torch" not in heavy
    assert f"usage: maskalign {name}" in out and "examples:" in out
    shown, _, examples = out.partition("examples:")
    long = [line for line in shown.splitlines()[1:] if len(line) > 80]
    assert not long, "the help is for 80 columns"
    assert f"maskalign {name}" in examples


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trian"], ["trian", "did you mean 'train'"]),
        (["train", "--model.preset", "SiT-S/2", "--data.path", "nowhere"], ["nowhere"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--model.preset", "SiT-S/2", "--method.keep_ratio", "2"], ["method.keep_ratio"]),
        (["train", "--modle.preset", "SiT-S/2"], ["modle.preset", "model.preset"]),
        (["data", "build", "nowhere", "--out", "x"], ["nowhere"]),
        (["data", "build"], ["SOURCE and --out are missing"]),
        (["data", "check", "nowhere"], ["nowhere"]),
        (["sample", "nowhere", "--out", "x"], ["nowhere does not exist"]),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_status_2_without_torch(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, lines, heavy = run(*argv)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("maskalign: error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert "torch" not in heavy


def test_print_config_is_a_config(tmp_path):
    status, out, _, _ = run("train", "--model.preset", "SiT-S/2", "--print_config")
    assert status == 0
    (tmp_path / "c.yaml").write_text(out)
    assert run("train", "--config", str(tmp_path / "c.yaml"), "--print_config")[1] == out


def test_version():
    from maskalign import __version__

    assert run("--version")[1].strip() == __version__
