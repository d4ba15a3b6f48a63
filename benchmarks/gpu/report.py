"""The tables of `benchmarks.gpu`, from its CSVs: goals and measurements, and the result of every part."""

import collections

from benchmarks.report import markdown_table, paragraph, read_csv, step_name
from maskalign.errors import UsageError

MISSING = "not measured on a GPU"
FILES = ("parts", "tests", "kernels", "steps-b2", "steps-xl2", "steps-ddp", "steps-fsdp", "steps-reference", "profile")
# The goals on one H200: (description, file, {column: value} of the row, column of the measurement, goal).
GOALS = [
    ("SiT-B/2, all tokens (`repa`), images/s", "steps-b2", {"case": "repa"}, "images_per_second", 3200),
    ("SiT-B/2, keep 0.75, two mixing layers (`maskalign`), images/s", "steps-b2", {"case": "maskalign"},
     "images_per_second", 3500),
    ("SiT-B/2, keep 0.5 (`maskalign-fast`), images/s", "steps-b2", {"case": "maskalign-fast@0.5"},
     "images_per_second", 6000),
    ("SiT-XL/2, all tokens (`repa`), images/s", "steps-xl2", {"case": "repa"}, "images_per_second", 650),
    ("SiT-XL/2, keep 0.75 (`maskalign`), images/s", "steps-xl2", {"case": "maskalign"}, "images_per_second", 780),
    *(
        (f"`{operation}`, {direction}, share of a copy's speed", "kernels",
         {"operation": operation, "direction": direction, "provider": "kernel"}, "of_same_copy", goal)
        for operation, goal in (("subset_cosine_alignment", 0.9), ("mix_and_drop", 0.8))
        for direction in ("forward", "backward")
    ),
]  # fmt: skip


def read_results(folder):
    """Read the CSVs of a folder: {name in FILES: rows}, without files that do not exist.

    Raises:
        UsageError: a file is the result of a rehearsal.
    """
    found = {}
    for name in FILES:
        path = folder / f"gpu-{name}.csv"
        if not path.is_file():
            continue
        rows = read_csv(path)
        if any(row.get("rehearsal") for row in rows):
            raise UsageError(f"{path} is the result of a rehearsal, not a measurement; remove it from the results")
        if rows:
            found[name] = rows
    return found


def section(folder):
    """The Markdown of the section, from the CSVs in a folder."""
    found = read_results(folder)
    tables = [_head(found), goals_table(found)]
    for name, table in (
        ("parts", parts_table), ("tests", tests_table), ("steps", steps_table), ("kernels", kernels_table),
        ("profile", profile_tables),
    ):  # fmt: skip
        rows = [row for key, rows in found.items() if key == name or key.startswith(f"{name}-") for row in rows]
        if rows:
            tables.append(table(rows))
    return "\n\n".join(tables)


def _head(found):
    if not found:
        text = "Not measured on a GPU: `python -m benchmarks.gpu` has not run on one yet. It runs the tests that need "
        text += "a GPU, the kernels at XL/2's sizes, steps as CUDA graphs, ddp and fsdp on one rank and a profile "
        text += "within eight minutes. Its results will appear here. The goals for one H200 are:"
        return paragraph(text)
    machines = dict.fromkeys(row["machine"] for rows in found.values() for row in rows if row.get("machine"))
    started = next((row["started"] for row in found.get("parts", [])), "")
    return paragraph(
        f"Measured {started} by `python -m benchmarks.gpu`; {'; '.join(machines)}. The goals are for an H200."
    )


def goals_table(found):
    """The table of goals with the measurements, and whether they are reached."""
    lines = []
    for what, file, wanted, column, goal in GOALS:
        rows = [row for row in found.get(file, []) if all(row.get(key) == value for key, value in wanted.items())]
        value = next((row[column] for row in rows if isinstance(row.get(column), float)), None)
        form = "{:,.0f}" if goal > 1 else "{:.2f}"
        reached = "" if value is None else "yes" if value >= goal else f"no, {value / goal:.0%} of it"
        lines.append([what, form.format(goal), MISSING if value is None else form.format(value), reached])
    return markdown_table(["goal", "at least", "measured", "reached"], lines)


def parts_table(rows):
    """The table of parts with the result of each."""
    lines = [
        [row["part"], str(row["status"]), f"{row['seconds']:.0f} of {row['seconds_given']:.0f} s", f"{row['rows']:.0f}",
         str(row["note"] or "")]
        for row in rows
    ]  # fmt: skip
    return markdown_table(["part", "ended", "time", "rows", "note"], lines)


def tests_table(rows):
    """The numbers of tests by outcome, and a list of those that failed."""
    counts = collections.Counter(row["outcome"] for row in rows)
    text = "Tests on the GPU: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + "."
    failed = [f"- `{row['test']}`: {row['message']}" for row in rows if row["outcome"] == "failed"]
    return "\n".join([text, *([""] + failed if failed else [])])


def steps_table(rows):
    """The table of steps for every size and plan, relative to `repa` of the same size and plan."""
    lines = []
    for row in rows:
        name = f"{row['preset']}, {step_name(str(row['case']))}" + ("" if row["plan"] == "none" else f", {row['plan']}")
        if row.get("error"):
            lines.append([name, "", f"failed: {row['error']}", "", "", "", ""])
            continue
        beside = [r for r in rows if r["case"] == "repa" and (r["preset"], r["plan"]) == (row["preset"], row["plan"])]
        times = (
            f"{row['images_per_second'] / beside[0]['images_per_second']:.2f}x"
            if beside and not beside[0].get("error")
            else "-"
        )
        spread = f"{row['step_ms']:.1f} ms ({row['step_ms_low']:.1f}-{row['step_ms_high']:.1f})"
        peak = "-" if row["share_of_matmul_peak"] is None else f"{row['share_of_matmul_peak']:.0%}"
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib'] / 1024:.1f} GiB"
        way = "CUDA graph" if row["graph"] else "launched by Python"
        lines.append([name, f"{row['batch_size']:.0f}", f"{row['images_per_second']:,.0f}", times, spread, peak,
                      f"{memory}, {way}"])  # fmt: skip
    head = ["case", "batch", "images/s", "of REPA", "step (least to most)", "of the matmul peak", "peak memory"]
    return markdown_table(head, lines)


def kernels_table(rows):
    """The table of kernel times in microseconds, with other implementations as multiples; wrong results are marked."""
    table = {}
    for row in rows:
        table.setdefault((row["operation"], row["shape"]), {})[row["provider"], row["direction"]] = row
    lines = []
    for (operation, shape), of in table.items():
        for direction in ("forward", "backward"):
            ours = of.get(("kernel", direction))
            if ours is None:
                wrong = any(key[0] == "kernel" and "wrong" in key[1] for key in of)
                cells = ["wrong result, not timed" if wrong else MISSING, "", "", ""]
            else:
                others = [of.get((name, direction)) for name in ("compiled", "eager")]
                cells = [f"{1000 * ours['ms']:.1f} us", f"{ours['of_same_copy']:.0%}"]
                cells += ["-" if other is None else f"{other['ms'] / ours['ms']:.2f}x" for other in others]
            lines.append([f"`{operation}` {shape}", direction, *cells])
    head = ["operation", "direction", "ours", "of a copy's speed", "torch.compile takes", "plain PyTorch takes"]
    return markdown_table(head, lines)


def profile_tables(rows):
    """The kernels that take most time, a table for each case."""
    texts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        first, lines = mine[0], []
        for row in mine:
            speed = [f"{row['tflops']:.0f} TFLOP/s"] if row["tflops"] else []
            speed += [f"{row['gb_per_s']:,.0f} GB/s"] if row["gb_per_s"] else []
            share = f"{row['share_of_ceiling']:.0%} of the {row['ceiling']}" if row["ceiling"] else "-"
            lines.append([f"`{row['kernel']}`", f"{row['launches']:.0f}", f"{row['us']:,.0f} us", f"{row['share']:.1%}",
                          ", ".join(speed) or "-", share])  # fmt: skip
        what = f"The kernels of a step of {step_name(case)} ({first['preset']}, batch {first['batch_size']:.0f}): "
        what += f"{first['kernels_us'] / 1000:.1f} ms of kernels; ceilings: {first['matmul_tflops']:.0f} TFLOP/s, "
        what += f"{first['copy_gb_per_s']:,.0f} GB/s."
        head = ["kernel", "launches", "time", "share", "speed", "of the ceiling"]
        texts.append(f"{paragraph(what)}\n\n{markdown_table(head, lines)}")
    return "\n\n".join(texts)
