"""The figures on the pages are those of the CSVs, and a change of either is noticed."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.report import BEGIN, END, draw, main, rewritten
from maskalign.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path):
    """Both pages and the results in a folder of their own, and the words that point to them."""
    shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path / "benchmarks.md")
    shutil.copy(ROOT / "docs" / "figures.md", tmp_path / "figures.md")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    names = {"--page": "benchmarks.md", "--more": "figures.md", "--results": "results"}
    return tmp_path, [word for key, name in names.items() for word in (key, str(tmp_path / name))]


def test_pages_and_plots_fit_the_csvs(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "page, stem",
    [("benchmarks.md", "steps-SiT-S-2-bf16-b8-compiled"), ("figures.md", "steps-SiT-S-2-fp32-b8-compiled")],
)
def test_a_changed_number_is_noticed_and_written_once(page, stem, copy, capsys):
    folder, words = copy
    before = (folder / page).read_text()
    path = folder / "results" / f"{stem}.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[1]["images_per_second"] = "123.456"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert main([*words, "--check"]) == 1
    assert f"{page} does not match" in capsys.readouterr().out and (folder / page).read_text() == before
    assert main(words) == 0
    after = (folder / page).read_text()
    assert "| 123.46 |" in after and "| 123.46 |" not in before
    assert after.split(BEGIN)[0] == before.split(BEGIN)[0] and after.split(END)[1] == before.split(END)[1]
    plot = path.with_suffix(".png").read_bytes()
    assert main(words) == 0 and main([*words, "--check"]) == 0  # the second time there is nothing left to do
    assert (folder / page).read_text() == after and path.with_suffix(".png").read_bytes() == plot


def test_times_on_a_gpu_stand_beside_those_of_pytorch(copy):
    folder, words = copy
    path = folder / "results" / "kernels.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    first = {row["provider"]: row for row in rows[:9] if row["direction"] == "backward"}
    first["kernel"] |= {"ms": "0.002", "of_same_copy": "0.5"}
    first["eager"]["ms"], first["compiled"]["ms"] = "0.010", "0.003"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert main(words) == 0
    assert "| 2.0 us (50%) | 5.0x | 1.5x |" in (folder / "figures.md").read_text()


def test_a_missing_plot_is_drawn_again(copy):
    folder, words = copy
    plot = folder / "results" / "steps-SiT-S-2-fp32-b8-compiled.png"
    plot.unlink()
    assert main([*words, "--check"]) == 1
    draw(plot.with_suffix(".csv"))
    assert main([*words, "--check"]) == 0 and Image.open(plot).size[0] > 1000


def test_figures_need_a_note_on_how_they_were_measured(copy):
    folder, words = copy
    notes = json.loads((folder / "results" / "notes.json").read_text())
    notes.pop("loader")
    (folder / "results" / "notes.json").write_text(json.dumps(notes))
    with pytest.raises(UsageError, match="no note.*loader"):
        main(words)


@pytest.mark.parametrize("text", ["no markers", f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_markers_are_needed(text):
    with pytest.raises(UsageError, match="markers"):
        rewritten(text, "new")
