"""Write the tables and plots of docs/benchmarks.md and docs/figures.md from the CSVs in benchmarks/results.

    python -m benchmarks.report [--check] [--page docs/benchmarks.md] [--more docs/figures.md] [--results FOLDER]

This rewrites the part of both pages between the two `figures` markers, and the plots beside the CSVs. --check only
reports what would change (exit status 1). results/notes.json has the command and the conditions of each CSV under its
name. `"page": "more"` in a note puts the table on the second page, and `"renamed": {OLD: NEW}` maps names of recipes in
an earlier measurement to those of today. The files gpu-*.csv of `benchmarks.gpu` need no note: they contain the
conditions.
"""

import argparse
import csv
import hashlib
import json
import sys
import textwrap
from pathlib import Path

from benchmarks.convergence import beside_paper
from benchmarks.convergence import report as convergence_report
from benchmarks.steps import report as step_report
from maskalign.errors import UsageError

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
STEP_NAMES = {
    "repa": "REPA, all tokens", "reg": "REG, all tokens", "sit": "SiT, no alignment",
    "maskalign": "MaskAlign", "repa-maskalign": "REPA + MaskAlign",
    "reference": "the public REPA code", "reference-reg": "the public REG code",
}  # fmt: skip
# Suites of `benchmarks.convergence` that measure the paper's results. They have separate sections.
PAPER_SUITES = ("convergence-paper-", "convergence-ablations-", "convergence-rates-")


def read_csv(path):
    """The rows of a CSV as dicts; numbers become floats, and empty cells None."""
    with open(path, newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text):
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def markdown_table(head, lines):
    """A Markdown table from lists of str: the head and the lines."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def paragraph(text):
    """Text wrapped at 120 columns, as on the pages."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def step_name(case):
    """The name of a case of `benchmarks.steps` on the pages."""
    recipe, _, keep = case.partition("@")
    if recipe.startswith("reference"):
        code, _, precision = recipe.rpartition("-")
        return f"{STEP_NAMES[code]}, {precision}"
    if recipe in STEP_NAMES and not keep:
        return STEP_NAMES[recipe]
    name = "MaskAlign" + recipe.removeprefix("maskalign").replace("-", " ") if "maskalign" in recipe else recipe
    return f"{name}, keep {keep}" if keep else name


def renamed(names, note):
    """The current names of recipes ("name" or "name@keep"), as a list, according to "renamed" in a note."""
    of = note.get("renamed", {})
    parts = (name.partition("@") for name in names)
    return [of.get(recipe, recipe) + at + keep for recipe, at, keep in parts]


def with_names(rows, note, key):
    """The rows with the current names of recipes under `key`."""
    names = renamed([row[key] for row in rows], note)
    return [{**row, key: name} for row, name in zip(rows, names, strict=True)]


def names_then(note):
    """A sentence about recipes that had other names when they were measured, or ""."""
    pairs = [f"`{old}` is the recipe now called `{new}`" for old, new in note.get("renamed", {}).items()]
    return f" In the command and in this text, {' and '.join(pairs)}." if pairs else ""


def ratio(row, key):
    """A cell such as `2.01x`, with the 10th to 90th percentile if the CSV has it; bold for MaskAlign."""
    if row.get(key) is None:
        return "-"
    text = f"{row[key]:.2f}x"
    text = (
        f"**{text}**"
        if row["case"].startswith(("maskalign-fast@", "maskalign@")) or row["case"] == "maskalign"
        else text
    )
    low, high = row.get(f"{key}_p10"), row.get(f"{key}_p90")
    return text if low is None else f"{text} ({low:.2f}-{high:.2f})"


def steps_section(path, note):
    """One table of `benchmarks.steps`."""
    rows = with_names(read_csv(path), note, "case")
    first = rows[0]
    code = "REG" if any(row["case"].startswith("reference-reg") for row in rows) else "REPA"
    head = ["case", "images/s", "against our REPA", f"against the public {code} code", "GFLOP per image",
            "of the matmul peak", "saved for the backward", "peak memory"]  # fmt: skip
    of_reg = any(row.get("passes_of_reg") is not None for row in rows)
    head += ["step time relative to our REG", "forward and backward relative to REG"] if of_reg else []
    lines = []
    for row in rows:
        if row["case"].startswith("maskalign-fast-no-mixer"):
            continue
        saved = f"{row['saved_mib']:.0f} MiB"
        saved += f" ({row['saved_x_repa']:.2f}x)" if row["saved_x_repa"] not in (None, 1) else ""
        peak = f"{row['share_of_matmul_peak']:.0%}"
        peak += (
            f", {row['share_of_peak_fwd_bwd']:.0%} in forward and backward" if "share_of_peak_fwd_bwd" in row else ""
        )
        lines.append([
            step_name(row["case"]), f"{row['images_per_second']:.2f}", ratio(row, "x_repa"), ratio(row, "x_reference"),
            f"{row['gflops_per_image']:.1f}", peak, saved,
            "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f} MiB",
            *([share_of_reg(row, "time_of_reg"), share_of_reg(row, "passes_of_reg")] if of_reg else []),
        ])  # fmt: skip
    if all(row["x_repa"] is None for row in rows):
        head, *lines = [[cell for k, cell in enumerate(line) if k != 2] for line in (head, *lines)]
        if all(row["x_reference"] is None for row in rows):
            head, *lines = [[cell for k, cell in enumerate(line) if k != 2] for line in (head, *lines)]
    elif all(row["x_reference"] is None for row in rows):
        head, *lines = [[cell for k, cell in enumerate(line) if k != 3] for line in (head, *lines)]
    tokens = int(str(first["tokens"]).split("/")[1])
    what = f"{first['preset']}, {first['precision']}, batch {first['batch_size']:.0f}, {tokens} tokens"
    what += ", torch.compile" * (first.get("compiled") == "True")
    whole = "-passes" not in path.stem
    step = "One training step (forward, backward, clip, AdamW, EMA)" if whole else "Forward and backward"
    clock = "CPU seconds" if first.get("clock") == "cpu" else "seconds"
    text = [
        paragraph(f"{step} of {what}; {first['machine']}; medians of {clock}. {note['conditions']}{names_then(note)}"),
        f"`{note['command']}`",
        markdown_table(head, lines),
    ]
    costs = {row["case"].partition("@")[2]: row["mixer_cost"] for row in rows if row.get("mixer_cost") is not None}
    if costs:
        words = ", ".join(f"{cost:.1%} of a step at keep {keep}" for keep, cost in costs.items())
        text.append(f"The mixer takes {words}.")
    return "\n\n".join(text)


def share_of_reg(row, key):
    """A cell such as `0.87 (0.85-0.90)`: a time relative to our REG, with the 10th and 90th percentile."""
    if row.get(key) is None:
        return "-"
    return f"{row[key]:.3f} ({row[f'{key}_p10']:.3f}-{row[f'{key}_p90']:.3f})"


def loader_section(path, note):
    """The table of `benchmarks.loader`."""
    rows = {(row["layout"], row["loader"], row["workers"]): row for row in read_csv(path)}
    workers = sorted({number for *_, number in rows})

    def rate(layout, loader, number, kind):
        row = rows[layout, loader, number]
        faster = "" if loader == "maskalign" else f" ({row[f'maskalign_times_as_fast_{kind}']:.1f}x)"
        return f"{row[f'{kind}_samples_per_second']:,.0f}{faster}"

    columns = [(number, kind) for number in workers for kind in ("warm", "cold")]
    lines = [
        [f"{layout}, {loader}", *(rate(layout, loader, *column) for column in columns)]
        for layout, loader, number in rows
        if number == workers[0]
    ]
    where = ["in the training process" if number == 0 else f"{number:g} processes" for number in workers]
    head = ["layout, loader", *(f"{cache}, {place}" for place in where for cache in ("page cache", "cold disk"))]
    text = paragraph(
        f"Samples per second; in parentheses, the speed of our loader relative to this one. {note['conditions']} "
        "docs/data.md compares the guarantees of the loaders."
    )
    table = markdown_table(head, lines)
    return "\n\n".join([text, f"`{note['command']}`", table])


def convergence_section(path, note):
    """The table of one suite of `benchmarks.convergence`, and its plot."""
    rows = with_names(convergence_report.read_rows(path), note, "recipe")
    record = json.loads(path.with_suffix(".json").read_text())
    lines = convergence_report.summary(rows)
    names = {"velocity_loss": "held-out loss", "raw_velocity_loss": "not averaged", "frechet": "Frechet"}
    head = [names.get(key, key) for key in lines[0]]
    longest = max(row["seconds"] or 0 for row in rows)
    limit = f"{longest:.0f} s of training each ({record['clock']})" if longest else f"{rows[0]['run_steps']} steps each"
    what = f"Quality at equal cost on {rows[0]['data']}: {limit}, {record['images']:,} images; {record['machine']}."
    key = "Loss, cosine and distances are measured with all tokens and the averaged weights"
    if len({row["seed"] for row in rows}) > 1:
        key += (
            "; brackets show the lowest and the highest seed, and a star means that every seed is better than all of "
        )
        key += "REPA's"
    key += "."
    alt = "What each recipe reaches"
    if convergence_report.has_curves(rows):
        alt = "Quality against time and FLOPs"
        key += " `0.5 of the budget` is a separate run with this budget. Times are relative to REPA's run."
    return "\n\n".join([
        paragraph(f"{what} {note['conditions']} {key}{names_then(note)}"),
        f"`{record['command']}`",
        markdown_table(head, [[str(value) for value in line.values()] for line in lines]),
        f"![{alt}](../benchmarks/results/{path.stem}.png)",
    ])  # fmt: skip


def paper_section(path, note):
    """The table of a suite that measures the paper's results, and its plot."""
    rows = convergence_report.read_rows(path)
    record = json.loads(path.with_suffix(".json").read_text())
    rates = {name: settings.get("optimizer.lr", "") for name, settings in record["recipes"].items()}
    lines = beside_paper.summary(rows, rates)
    longest = max(row["seconds"] or 0 for row in rows)
    what = f"{rows[0]['data']}, {longest:.0f} s of training each ({record['clock']}), {record['images']:,} images; "
    what += f"{record['machine']}. Distances are between {record['samples']:,} samples without guidance and held-out "
    what += f"images, in the features of a small classifier with an accuracy of {record['classifier']['accuracy']:.1%} "
    what += f"on these; {record['samples']:,} training images have a Frechet distance of "
    what += f"{record['real']['frechet_cnn']:.1f}. "
    what += "`G_r` is the stability gap at mask ratio 0.25 with its standard error over images. `heat map's ratio` "
    what += "concerns the share of images in which a position is among the top 10% of alignment gradients: it is the "
    what += "largest share of a position divided by the smallest."
    if len({row["seed"] for row in rows}) > 1:
        what += " Brackets show the lowest and the highest seed."
    return "\n\n".join([
        paragraph(f"{what} {note['conditions']}"),
        f"`{record['command']}`",
        markdown_table(list(lines[0]), [[str(value) for value in line.values()] for line in lines]),
        f"![Distances by recipe](../benchmarks/results/{path.stem}.png)",
    ])  # fmt: skip


def beside_paper_section(path, note):
    """The paper's claims and our results, and the paper's tables; `path` is the CSV of the suite `paper`."""
    rows, record = convergence_report.read_rows(path), json.loads(path.with_suffix(".json").read_text())
    others = path.with_name(path.name.replace("convergence-paper-", "convergence-ablations-"))
    ablations = convergence_report.read_rows(others) if others.is_file() else None
    lines = beside_paper.comparison(rows, ablations, record["step_seconds"])
    head, published = beside_paper.published_table()
    guided_head, guided = beside_paper.guided_table()
    first = "The claims of the paper and our results at a small size, whether they agree or not. The paper trains B/2 "
    first += "and XL/2 on ImageNet latents for days on eight GPUs. We train a model of 8 blocks of width 128 on 32 px "
    first += "pictures for minutes on one thread. The order of recipes can be compared, the numbers cannot. *Not "
    first += "distinguishable* means that the ranges over seeds overlap, or that the difference is within two standard "
    first += "errors."
    second = "Published results of the paper, not ours: ImageNet at 256 px, FID of 50,000 images without guidance, by "
    second += "training iterations (arXiv 2606.08788)."
    return "\n\n".join([
        paragraph(first),
        markdown_table(["the claim", "the paper", "here", "as in the paper?"], [list(line) for line in lines]),
        paragraph(second),
        markdown_table(head, published),
        "Published results of the paper with guidance (XL/2):",
        markdown_table(guided_head, guided),
    ])  # fmt: skip


def cpu_kernels_section(path, note):
    """The table of forward and backward of the two operations on a CPU, and the plot."""
    rows = [row for row in read_csv(path) if row["direction"] == "both"]
    table = {}
    for row in rows:
        table.setdefault((row["operation"], row["shape"]), {})[row["provider"]] = row
    others = {"eager": "plain PyTorch", "compiled": "plain PyTorch with torch.compile"}
    lines = [
        [operation, shape, f"{of['kernel']['ms']:.1f} ms"]
        + [f"{of[name]['x_kernel']:.2f}x ({of[name]['x_kernel_20']:.2f}-{of[name]['x_kernel_80']:.2f})"
           if name in of else "-" for name in others]
        for (operation, shape), of in table.items()
    ]  # fmt: skip
    head = ["operation", "shape", "ours", *others.values()]
    what = f"Forward and backward; {rows[0]['machine']}; medians of {rows[0]['rounds']:.0f} interleaved rounds. The "
    what += "times of the other implementations are multiples of ours, with the 20th and 80th percentile."
    return "\n\n".join([
        paragraph(f"{what} {note['conditions']}"),
        f"`{note['command']}`",
        markdown_table(head, lines),
        f"![Forward and backward on a CPU](../benchmarks/results/{path.stem}.png)",
    ])  # fmt: skip


def gpu_kernels_section(path, note):
    """The table of times of the two operations on a GPU, with those of plain PyTorch as multiples."""
    table = {}
    for row in read_csv(path):
        table.setdefault((row["operation"], row["shape"]), {})[row["provider"], row["direction"]] = row
        machine = row["machine"]
    lines = []
    for (operation, shape), of in table.items():
        cells = [operation, shape]
        for direction in ("forward", "backward"):
            ours = of["kernel", direction]
            cells.append(f"{1000 * ours['ms']:.1f} us ({ours['of_same_copy']:.0%})")
            cells += [
                f"{of[other, direction]['ms'] / ours['ms']:.1f}x" if (other, direction) in of else "-"
                for other in ("eager", "compiled")
            ]
        lines.append(cells)
    head = ["operation", "shape", "forward", "PyTorch", "compiled", "backward", "PyTorch", "compiled"]
    what = f"{machine}. Medians of CUDA graphs, with L2 cleared before each. Brackets show the bandwidth as a share of "
    what += "that of a copy of the same number of bytes. The next columns are the times of plain PyTorch, eager and "
    what += "with torch.compile, as multiples of ours."
    return "\n\n".join([
        paragraph(f"{what} {note['conditions']}"), f"`{note['command']}`", markdown_table(head, lines)
    ])  # fmt: skip


def plan_section(path, note):
    """The table of `benchmarks.plan`: estimates of the recipes for a cluster."""
    rows = read_csv(path)
    first = rows[0]
    head = ["model", "recipe", "parameters", "GFLOP per image", "kept for the backward", "memory of a rank",
            "largest batch", "a step", "waiting for links", "images/s", "MFU", "GPU-hours", "kWh"]  # fmt: skip
    lines = []
    for row in rows:
        least, most = row["kept_least_gib"], row["kept_most_gib"]
        kept = f"{most:.1f} GiB" if least == most else f"{least:.1f} GiB, {most:.1f} GiB at the end"
        lines.append([
            row["model"], row["recipe"], f"{row['parameters'] / 1e6:.0f} M", f"{row['gflops_per_image']:.0f}", kept,
            f"{row['memory_gib']:.1f} GiB", f"{row['largest_batch']:.0f}", f"{row['step_ms']:.0f} ms",
            f"{row['waiting_ms'] / row['step_ms']:.0%}", f"{row['images_per_second']:,.0f}", f"{row['mfu']:.0%}",
            f"{row['gpu_hours']:,.0f}", f"{row['energy_kwh']:,.0f}",
        ])  # fmt: skip
    ranks = f"{first['ranks']:.0f} x {first['device']}, {first['plan']}"
    what = f"Estimated, not measured: {first['images'] / 1e6:.1f} million images on {ranks}, "
    what += f"{first['batch_per_rank']:.0f} images per rank, matrix products at {first['efficiency']:.0%} of the peak."
    text = paragraph(f"{what} {note['conditions']}")
    return "\n\n".join([text, f"`{note['command']}`", markdown_table(head, lines)])


SECTIONS = (
    ("### Steps", "steps-*.csv", steps_section),
    ("### The paper's claims and our results", "convergence-paper-*.csv", beside_paper_section),
    ("### The paper's recipes at equal cost", "convergence-paper-*.csv", paper_section),
    ("### The paper's ablations", "convergence-ablations-*.csv", paper_section),
    ("### Learning rates", "convergence-rates-*.csv", paper_section),
    ("### Search for maskalign-fast", "convergence-*.csv", convergence_section),
    ("### Loading", "loader.csv", loader_section),
    ("### Kernels on a GPU", "kernels.csv", gpu_kernels_section),
    ("### Kernels on a CPU", "kernels-cpu.csv", cpu_kernels_section),
    ("### Planned", "plan-*.csv", plan_section),
)


def figures(results, page="main"):
    """The tables and plots of one page (`main` or `more`) as Markdown, with paths relative to docs/."""
    path = results / "notes.json"
    notes = json.loads(path.read_text()) if path.is_file() else {}
    parts = []
    for title, pattern, section in SECTIONS:
        found = sorted(results.glob(pattern))
        if section is convergence_section:
            found = [path for path in found if not path.name.startswith(PAPER_SUITES)]
        missing = [path.stem for path in found if path.stem not in notes]
        if missing:
            raise UsageError(f"{path}: has no note on {missing[0]}; add its command and conditions")
        found = [path for path in found if notes[path.stem].get("page", "main") == page]
        parts += [title, *(section(path, notes[path.stem]) for path in found)] if found else []
    if page == "main":
        from benchmarks.gpu import report as gpu_report  # imported here, because it imports this module

        parts += ["### On a GPU", gpu_report.section(results)]
    return "\n\n".join(parts)


def rewritten(text, new):
    """A page's text with `new` between its markers.

    Raises:
        UsageError: the page does not have both markers, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"docs/benchmarks.md and docs/figures.md need the markers {BEGIN} and {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def digest(path):
    """SHA-256 of a plot's data: the CSV, the JSON beside it for a convergence plot, and "renamed" in the note."""
    data = path.read_bytes()
    side = path.with_suffix(".json")
    names = note_of(path).get("renamed")
    data += (side.read_bytes() if side.is_file() else b"") + (json.dumps(names).encode() if names else b"")
    return hashlib.sha256(data).hexdigest()


def note_of(path):
    """The note on a CSV in notes.json, or {}."""
    notes = path.with_name("notes.json")
    return json.loads(notes.read_text()).get(path.stem, {}) if notes.is_file() else {}


def stale_plots(results):
    """CSVs whose plot is missing or was drawn from other data (a plot's metadata has the digest of its data)."""
    from PIL import Image

    stale = []
    for path in [*sorted(results.glob("steps-*.csv")), *sorted(results.glob("convergence-*.csv"))]:
        plot = path.with_suffix(".png")
        if not plot.is_file() or Image.open(plot).text.get("Source") != digest(path):
            stale.append(path)
    return stale


def draw(path):
    """Draw the plot of one CSV beside it."""
    plot, metadata = path.with_suffix(".png"), {"Source": digest(path)}
    if path.stem.startswith("steps-"):
        rows = with_names(read_csv(path), note_of(path), "case")
        step_report.draw(rows, rows[0]["machine"], plot, metadata=metadata)
    else:
        record = json.loads(path.with_suffix(".json").read_text())
        title = f"{record['command']}\n{record['machine']}"
        rows = with_names(convergence_report.read_rows(path), note_of(path), "recipe")
        convergence_report.draw(rows, title, plot, metadata=metadata)


def main(argv=None):
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where something differs")
    parser.add_argument("--page", type=Path, default=root / "docs" / "benchmarks.md")
    parser.add_argument("--more", type=Path, default=root / "docs" / "figures.md")
    parser.add_argument("--results", type=Path, default=root / "benchmarks" / "results")
    options = parser.parse_args(argv)
    pages = {options.page: figures(options.results), options.more: figures(options.results, "more")}
    texts = {path: rewritten(path.read_text(), new) for path, new in pages.items()}
    texts = {path: text for path, text in texts.items() if text != path.read_text()}
    stale = stale_plots(options.results)
    differing = [str(path) for path in texts] + [str(path.with_suffix(".png")) for path in stale]
    if options.check:
        for name in differing:
            print(f"{name} does not match the CSVs; run python -m benchmarks.report")
        return 1 if differing else 0
    for path, text in texts.items():
        path.write_text(text)
    for path in stale:
        draw(path)
    print("\n".join(f"written: {name}" for name in differing) or "nothing to do: pages and plots fit the CSVs")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        sys.exit(2)
