"""The wheel is complete: in a fresh environment it runs quickstart's steps outside the checkout."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRAW = """
from pathlib import Path
from maskalign.data.build.openmoji import draw_emoji, font_path, list_emoji
font, _ = font_path()
for number, (name, text, group) in enumerate(list_emoji()[:12]):
    folder = Path("pictures", "even" if number % 2 else "odd")
    folder.mkdir(parents=True, exist_ok=True)
    draw_emoji(text, 32, font).save(folder / f"{number}.png")
"""
SMALL = ["--model.width", "32", "--model.heads", "2", "--model.depth", "2", "--method.align_depth", "1"]
SHORT = ["--training.max_steps", "3", "--training.batch_size", "4", "--preview.classes", "2", "--preview.steps", "2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("maskalign", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("maskalign-*.whl"))


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a program of a fresh environment, which has the wheel and sees the packages that are installed here."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    others = [path for path in sys.path if path.endswith("site-packages")]
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}

    def call(program, *words):
        command = [str(environment / "bin" / program), *words]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    call.folder = folder
    return call


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {}
    for folder, package in (
        ("maskalign", "maskalign"),
        ("kernels", "maskalign_kernels"),
        ("configs", "maskalign_configs"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                expected[f"{package}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    assert sorted(set(expected) - names) == []
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]


@pytest.mark.slow
def test_quickstart_runs_from_the_wheel_outside_the_checkout(run):
    where = run("python", "-c", "import maskalign, maskalign_kernels as k; print(maskalign.__file__, k.__file__)")
    assert all(Path(path).is_relative_to(run.folder) for path in where.split())
    assert "commands:" in run("maskalign", "--help")
    assert "run_dir: runs/quickstart" in run("maskalign", "train", "--config", "quickstart", "--print_config")
    run("python", "-c", DRAW)
    run("maskalign", "data", "build", "pictures", "--out", "data", "--size", "32")
    run("maskalign", "data", "encode", "--data", "data", "--teacher", "efficientnet-lite0", "--normalize", "mean")
    run("maskalign", "train", "--config", "quickstart", "--data.path", "data", "--run_dir", "run", *SMALL, *SHORT)
    assert len((run.folder / "run" / "metrics.csv").read_text().splitlines()) > 1
    run("maskalign", "sample", "run", "--out", "drawn", "--per-class", "2", "--steps", "2")
    assert len(list((run.folder / "drawn").rglob("*.png"))) >= 4
    run("maskalign", "report", "run", "--out", "report.html")
    assert "<html" in (run.folder / "report.html").read_text()
