"""What a report shows, what it leaves out, and that nothing from a file becomes markup."""

import html.parser
import json
import re
import shutil

import pytest
from PIL import Image

from maskalign.cli import main
from maskalign.errors import UsageError
from maskalign.reporting.command import report
from maskalign.reporting.figures import MOST_POINTS, better, curves, duration, evaluation_table, held_out_charts
from maskalign.reporting.page import render
from maskalign.reporting.pictures import read_picture
from maskalign.reporting.run import MOST_SAMPLES, Run, names_of, read_run
from maskalign.reporting.settings import compare
from maskalign.reporting.text import to_html


class Page(html.parser.HTMLParser):
    """Tags, attributes and the text of the elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        # Elements that are never closed (meta, img) lie on top of the one that is.
        while self.open:
            if self.open.pop() == tag:
                break

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data.strip()))

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self):
        return " ".join(data for tag, data in self.texts if tag not in ("script", "style") and data)

    def numbers(self):
        return json.loads(next(data for tag, data in self.texts if tag == "script" and data.startswith("{")))


def test_two_runs_side_by_side(two_runs, tmp_path):
    out, notes = report(two_runs, tmp_path / "new" / "report.html")
    assert not notes and [file.name for file in out.parent.iterdir()] == ["report.html"]
    page = Page(out.read_text())
    text = page.text()
    assert "2 runs compared" in text and "maskalign" in text and "repa" in text
    # Only what differs stands in the first table, and the rest behind it; the run's own folder is no setting.
    assert "method.keep_ratio" in text and "step 0.5 → 1 at 0.9" in text and "run_dir" not in text
    differing, equal = compare([read_run(path).settings for path in two_runs])
    assert differing == [("method.keep_ratio", ["step 0.5 → 1 at 0.9", "1"])]
    assert ("model.width", ["16", "16"]) in equal
    assert "40" not in text.split("Evaluation")[0] and "36" in text and "44" in text
    assert "The set is stable" in text.replace("  ", " ")
    images = page.of("img")
    assert len(images) == 3 + 2 + 1 and sum("hidden" in image for image in images) == 3
    assert all(image["src"].startswith("data:image/webp;base64,") and image["alt"] for image in images)
    (slider,) = (attributes for attributes in page.of("input") if attributes["type"] == "range")
    assert slider["data-steps"] == "100,200,300"
    numbers = page.numbers()
    assert numbers["runs"] == ["maskalign", "repa"]
    cosine = next(chart for chart in numbers["charts"] if chart["id"] == "align_loss")
    assert cosine["series"][0]["value"][-1] == pytest.approx(0.59) and cosine["series"][0]["time"][-1] == 120
    assert "lr" not in {chart["id"] for chart in numbers["charts"]}, "a constant is no curve"


def test_the_page_asks_no_network(two_runs):
    text = render([read_run(path) for path in two_runs])
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|<link(?! rel=.icon. href=.data:,.)", text)
    (policy,) = (meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy.split("script-src")[1]


HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(1)>"'&lt;{{ 7*7 }}"""


def test_nothing_from_a_file_becomes_markup(tmp_path, write_run):
    hostile = tmp_path / "a<b onmouseover=alert(1)>&"
    run = write_run(hostile, notes=HOSTILE)
    links = "[a](javascript:alert(1)) ![b](http://example.org/x.png) <http://example.org>\n\n[c]: javascript:x\n[c]\n"
    text = f"{HOSTILE}\n\n{links}"
    (run / "analysis" / "outcome.md").write_text(text)
    (run / "analysis" / "more.txt").write_text(text)
    clean = Page(render([read_run(write_run(tmp_path / "clean"))]))
    page = Page(render([read_run(run)], title=HOSTILE))
    assert len(page.of("script")) == len(clean.of("script")) == 2
    assert len(page.of("img")) == len(clean.of("img"))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags} | {"pre", "p"}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert all(link["href"].startswith("#") for link in page.of("a"))
    assert "{{ 7*7 }}" in page.text(), "a template in a file is text"
    assert page.numbers()["runs"] == [hostile.name]


def test_markdown_keeps_its_form_and_loses_its_links():
    out = to_html(
        "# Head\n\na **b** `x < y & z` [t](http://e.org)\n\n- one\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> q\n"
    )
    assert "<h3>Head</h3>" in out and "<strong>b</strong>" in out and "<code>x &lt; y &amp; z</code>" in out
    assert "<li>one</li>" in out and "<td>1</td>" in out and "<blockquote>" in out
    assert "<a" not in out and "[t](http://e.org)" in out
    assert to_html("# <b>", plain=True) == "<pre># &lt;b&gt;</pre>"


def test_missing_pieces_are_left_out(tmp_path, write_run):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("seed: 1\n")
    page = Page(render([read_run(bare)]))
    text = page.text()
    assert "no metrics.csv yet" in text and "seed" in text
    for absent in ("Curves", "Samples", "Evaluation", "Analysis", "Parts that could not be read"):
        assert absent not in text, absent
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(write_run(tmp_path / "full") / "metrics.csv", only)
    text = Page(render([read_run(only), read_run(bare)])).text()
    assert "Curves" in text and "Samples" not in text


def test_what_is_damaged_is_named_and_left_out(tmp_path, capsys, write_run):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [1\n")
    (run / "evaluation.json").write_text("[1, 2")
    (run / "samples" / "step_00000100.png").write_bytes(b"no picture")
    (run / "samples" / "step_final.png").write_bytes(b"another name")
    with open(run / "metrics.csv", "a") as file:
        file.write("305,1")  # a line that was cut off: its step is known, and nothing else
    read = read_run(run)
    assert len(read.notes) == 3 and [step for step, _ in read.samples] == [200, 300]
    assert read.metrics["step"][-1] == 305 and read.metrics["velocity_loss"][-1] is None
    text = Page(render([read])).text()
    assert (
        "Parts that could not be read" in text
        and "evaluation.json cannot be read" in text
        and "step_00000100.png" in text
    )
    with pytest.raises(SystemExit) as end:
        main(["report", str(run), "--out", str(tmp_path / "r.html")])
    out, err = capsys.readouterr()
    assert not end.value.code and out.strip() == str(tmp_path / "r.html")
    assert len(err.strip().splitlines()) == 3 and "left out" in err


def test_odd_numbers_and_shapes_do_not_break_the_page(tmp_path, write_run):
    run = write_run(tmp_path / "run", rows=3)
    lines = (run / "metrics.csv").read_text().splitlines()
    lines[2] = lines[2].replace(",1.0,", ",nan,").replace("1.5", "inf")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run / "evaluation.json").write_text(
        '{"metrics": {"a": "x", "b": NaN, "c": 3, "d": null}, "held_out": [1], "samples": {"x": 1}}'
    )
    (run / "config.yaml").write_text("model: 3\nmethod: [1]\n2: {x: 1}\n")
    read = read_run(run)
    page = Page(render([read]))
    assert [row["name"] for row in evaluation_table([read])] == ["c"] and held_out_charts([read]) == []
    json.dumps(page.numbers(), allow_nan=False)
    (run / "config.yaml").write_text("- a list\n")
    assert "has an unexpected form" in read_run(run).notes[0]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path, ["no such folder"]),
        (lambda path: path.mkdir() or path, ["holds neither config.yaml nor metrics.csv"]),
        (lambda path: path.write_text("x") and path, ["no such folder"]),
        (lambda path: (path.mkdir(), (path / "COMPLETE").write_text("{}")) and path, ["is a checkpoint"]),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(make, words, tmp_path, capsys):
    path = make(tmp_path / "x")
    with pytest.raises(SystemExit) as end:
        main(["report", str(path), "--out", str(tmp_path / "r.html")])
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(err) == 1 and all(word in err[0] for word in [str(path), *words])
    assert not (tmp_path / "r.html").exists()


def test_other_mistakes(two_runs, tmp_path):
    with pytest.raises(UsageError, match="given twice"):
        report([two_runs[0], two_runs[0] / ".." / two_runs[0].name], tmp_path / "r.html")
    with pytest.raises(UsageError, match="is a folder"):
        report(two_runs, tmp_path)


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert names_of(paths) == ["a/run", "b/run", "c"]


def test_long_runs_stay_small(tmp_path, write_run):
    count = 5000
    metrics = {"step": list(map(float, range(count))), "time": [2.0 * k for k in range(count)]}
    metrics["velocity_loss"] = [float(k % 10) for k in range(count)]
    (chart,) = curves([Run(tmp_path, "x", metrics=metrics)])
    (line,) = chart["series"]
    assert len(line["value"]) == len(line["step"]) == MOST_POINTS
    assert line["step"][-1] == count - 1 and line["time"][-1] == 2 * (count - 1)
    assert sum(line["value"]) / MOST_POINTS == pytest.approx(4.5, abs=0.1)
    run = write_run(tmp_path / "run", steps=range(10, 10 * (3 * MOST_SAMPLES + 1), 10))
    steps = [step for step, _ in read_run(run).samples]
    assert len(steps) == MOST_SAMPLES and steps[0] == 10 and steps[-1] == 10 * 3 * MOST_SAMPLES


def test_pictures_are_pixels_and_nothing_else(tmp_path, write_png):
    import base64
    import io

    write_png(tmp_path / "a.png", 77, size=(3200, 40))
    picture = read_picture(tmp_path / "a.png")
    with Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1]))) as image:
        assert image.format == "WEBP" and image.size == (picture.width, picture.height) == (1600, 20)
        assert image.convert("RGB").getpixel((5, 5)) == (77, 77, 77)


def test_the_better_number_is_marked():
    runs = [
        Run(None, name, evaluation={"metrics": {"FDD": fdd, "precision": p}})
        for name, fdd, p in [("a", 9, 0.5), ("b", 7, 0.4)]
    ]
    fdd, precision = evaluation_table(runs)
    assert fdd["cells"] == [("9", False), ("7", True)] and precision["cells"] == [("0.5", True), ("0.4", False)]
    known = {"frechet[dinov2-b]": -1, "coverage[x]": 1, "inception_score": 1, "kernel_std[precision]": 0, "FDD": -1}
    assert {name: better(name) for name in known} == known
    deviations = [Run(None, "a", evaluation={"metrics": {"kernel_std[x]": value}}) for value in (1, 2)]
    (row,) = evaluation_table(deviations)
    assert row["name"] == "kernel std [x]" and row["cells"] == [("1", False), ("2", False)]
    assert [duration(seconds) for seconds in (42, 430, 12_000, 400_000)] == [
        "42 s",
        "7 min 10 s",
        "3 h 20 min",
        "4.6 days",
    ]


def test_held_out_losses_with_and_without_a_class_token_are_not_ranked():
    def run(name, class_token, loss):
        return Run(
            path=name, name=name, settings={"model": {"class_token": class_token}},
            evaluation={
                "metrics": {"frechet[x]": loss, "held_out_velocity_loss": loss},
                "held_out": {"velocity_loss": {"0.0-0.5": loss}},
            },
        )  # fmt: skip

    alike = [run("a", False, 1.0), run("b", False, 2.0)]
    mixed = [run("a", False, 1.0), run("b", True, 2.0)]
    best = {row["name"]: [cell[1] for cell in row["cells"]] for row in evaluation_table(alike)}
    assert best == {"frechet [x]": [True, False], "held out velocity loss": [True, False]}
    best = {row["name"]: [cell[1] for cell in row["cells"]] for row in evaluation_table(mixed)}
    assert best == {"frechet [x]": [True, False], "held out velocity loss": [False, False]}
    (chart,) = held_out_charts(mixed)
    assert "not comparable" in chart["title"] and not any(cell[1] for row in chart["rows"] for cell in row["cells"])
    (chart,) = held_out_charts(alike)
    assert "not comparable" not in chart["title"]
