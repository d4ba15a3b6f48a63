"""Output of a plan as text, as a CSV of its scaling table, and as a figure."""

import csv

from maskalign.planning.estimate import SAME_GLOBAL, SAME_PER_RANK

MEMORY_KINDS = ("parameters", "gradients", "optimizer", "ema", "activations", "buffers")
FLOP_PARTS = ("student", "mixer", "projector", "teacher", "recomputed")
SCALING = (
    ("ranks", "ranks", "{:,}"), ("global_batch", "global batch", "{:,}"), ("batch_per_rank", "per rank", "{:,}"),
    ("memory_gib", "GiB", "{:.1f}"), ("step_ms", "ms/step", "{:,.1f}"), ("link_ms", "on links", "{:,.1f}"),
    ("waiting_ms", "waiting", "{:,.1f}"), ("sent_mib", "MiB sent", "{:,.0f}"),
    ("images_per_second", "images/s", "{:,.0f}"), ("mfu", "MFU", "{:.1%}"), ("hours", "hours", "{:,.2f}"),
    ("gpu_hours", "GPU-hours", "{:,.1f}"), ("energy_kwh", "kWh", "{:,.0f}"),
)  # fmt: skip


def aligned(lines):
    """Format rows of cells as text, with the first column left-aligned and the others right-aligned."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def title(estimate):
    """A line that describes the planned run."""
    config, options = estimate.config, estimate.options
    model = config.model.preset or f"width {config.model.width}, depth {config.model.depth}"
    precision = "fp32" if str(estimate.dtype) == "torch.float32" else "bf16"
    ranks = f"{options.world_size:,} x {options.device.name}"
    return f"{config.run_dir.rstrip('/').split('/')[-1]}: {model} on {ranks}, {config.parallel.plan}, {precision}"


def text(estimate):
    """The whole plan as text."""
    return "\n\n".join(
        [
            title(estimate),
            "assumed:\n" + "\n".join(f"  - {line}" for line in [*estimate.assumed, _source(estimate)]),
            "parameters, millions\n" + _parameters(estimate),
            "GFLOP per image\n" + _flops(estimate),
            f"GiB on a rank at the peak of a step, {estimate.asked['batch_per_rank']:,} images\n" + _memory(estimate),
            _largest(estimate),
            "communication of a step, per rank\n" + _communication(estimate),
            *_alternatives(estimate),
            _launching(estimate),
            *_scaling(estimate),
        ]
    )


def _source(estimate):
    device = estimate.options.device
    return f"{device.name}: {device.source or 'from a file'}"


def _parameters(estimate):
    lines = [[*estimate.parameters, *estimate.teachers], []]
    counts = [*estimate.parameters.values(), *(frozen.parameters for frozen in estimate.teachers.values())]
    lines[1] = [f"{count / 1e6:.2f}" for count in counts]
    return aligned(lines)


def _flops(estimate):
    lines = [["kept tokens", "share of steps", *FLOP_PARTS, "training step"]]
    for phase in estimate.phases:
        cells = [f"{phase['kept']}/{estimate.tokens}", f"{phase['share']:.1%}"]
        cells += [f"{phase[part] / 1e9:.2f}" for part in FLOP_PARTS]
        lines.append([*cells, f"{phase['step'] / 1e9:.2f}"])
    shown = lines if len(lines) <= 7 else [*lines[:4], ["..."] * len(lines[0]), *lines[-3:]]
    notes = ["student, mixer, projector: one forward; a training step is three forwards and the recomputation"]
    cached = [name for name, is_cached in estimate.facts.teachers if is_cached]
    once = [f"{name} {estimate.teachers[name].flops / 1e9:.1f}" for name in cached]
    if estimate.vae_flops is not None:
        once.append(f"the VAE's encoder {estimate.vae_flops / 1e9:.1f}")
    if once:
        notes.append("once per image of the data set, not in every step: " + ", ".join(once))
    return "\n".join([aligned(shown), *notes])


def _memory(estimate):
    lines = [["kept tokens", *MEMORY_KINDS, "together", "kept for the backward"]]
    for phase, peak in sorted(estimate.peaks.items(), key=lambda item: item[0].kept):
        values = [getattr(peak, kind) for kind in MEMORY_KINDS] + [peak.total, peak.kept]
        lines.append([f"{phase.kept}/{estimate.tokens}", *(f"{value / 2**30:.2f}" for value in values)])
    return aligned(lines)


def _largest(estimate):
    options = estimate.options
    usable = f"{options.limit / 2**30:.1f} of {options.device.memory_gib:g} GiB"
    return f"largest batch per rank (and micro-batch) that fits {usable}: {estimate.largest:,}"


def _communication(estimate):
    if not estimate.collectives:
        return "none"
    lines = [["collective", "times", "ranks", "MiB each", "ms each", "stage"]]
    options = estimate.options
    for c in estimate.collectives:
        each = c.seconds(options.device, options.link_efficiency)
        cells = [c.operation, f"{c.times:,}", f"{c.ranks:,}", f"{c.size / 2**20:.1f}", f"{1e3 * each:.3f}", c.stage]
        lines.append(cells)
    return aligned(lines)


def _alternatives(estimate):
    if not estimate.alternatives:
        return []
    lines = [["plan", "MiB sent", "ms on links", "ms waiting"]]
    for other in estimate.alternatives:
        lines.append(
            [other["plan"], f"{other['sent_mib']:,.0f}", f"{other['link_ms']:,.1f}", f"{other['waiting_ms']:,.1f}"]
        )
    return ["communication of other plans in a step on these ranks\n" + aligned(lines)]


def _launching(estimate):
    """A sentence about whether Python's launches limit the speed, and what helps."""
    row, training = estimate.asked, estimate.config.training
    busy = row["step_ms"] - row["python_ms"]
    what = f"a step launches {estimate.launches:,.0f} operations, for which Python takes {row['launching_ms']:,.1f} ms"
    compute = f"the device is busy for {busy:,.1f} ms"
    if estimate.captured:
        helps = "; without the graph Python would be the limit" if row["launching_ms"] > busy else ""
        return f"{what}; with a CUDA graph it launches none of them, and {compute}{helps}"
    if row["python_ms"] <= 0:
        return f"{what}; {compute}, which is longer"
    helps = "training.cuda_graph true captures the step, which then takes as long as the device does"
    if not estimate.options.device.captures:
        helps = "more images per rank, or training.compile, help; steps are not captured on AMD's devices"
        if training.compile:
            helps = "more images per rank help; steps are not captured on AMD's devices"
    return f"Python is the limit: {what}, while {compute}; {helps}"


def _scaling(estimate):
    parts = []
    images = estimate.config.training.max_steps * estimate.config.training.batch_size
    for regime in (SAME_GLOBAL, SAME_PER_RANK):
        rows = [row for row in estimate.rows if row["batch"] == regime]
        if regime == SAME_PER_RANK and len(rows) < 2:
            continue
        lines = [[name for _, name, _ in SCALING] + [""]]
        for row in rows:
            marks = "" if row["fits"] else "does not fit"
            lines.append([form.format(row[key]) for key, _, form in SCALING] + [marks])
        parts.append(f"the run, {images:,} images, at the {regime}\n{aligned(lines)}")
    return parts


def write_csv(estimate, path):
    """Write the scaling table and the properties of the run, with a row per number of ranks and batch regime."""
    peak = max(estimate.peaks.values(), key=lambda entry: entry.total)
    common = {
        "run": title(estimate).split(":")[0],
        "model": estimate.config.model.preset or "",
        "device": estimate.options.device.name,
        "plan": estimate.config.parallel.plan,
        "parameters": sum(estimate.parameters.values()),
        "efficiency": estimate.options.efficiency,
        "gflops_per_image": sum(phase["share"] * phase["step"] for phase in estimate.phases) / 1e9,
        "largest_batch": estimate.largest,
        **{f"{kind}_gib": getattr(peak, kind) / 2**30 for kind in (*MEMORY_KINDS, "kept")},
    }
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*common, *estimate.rows[0]])
        writer.writeheader()
        for row in estimate.rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in {**common, **row}.items()})


def draw(estimate, path):
    """Draw memory by kind, the parts of a step, and images per second against ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    phases = sorted(estimate.peaks.items(), key=lambda item: item[0].kept)
    names = [f"{phase.kept}/{estimate.tokens} tokens" for phase, _ in phases]
    bottom = [0.0] * len(phases)
    for kind in MEMORY_KINDS:
        values = [getattr(peak, kind) / 2**30 for _, peak in phases]
        left.bar(names, values, 0.6, bottom=bottom, label="EMA" if kind == "ema" else kind)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    left.axhline(estimate.options.limit / 2**30, color="#333333", linestyle="--", label="usable")
    left.set_ylabel("GiB on a rank at the peak")
    left.legend(fontsize=8)
    rows = [row for row in estimate.rows if row["batch"] == SAME_PER_RANK]
    ticks = [f"{row['ranks']:,}" for row in rows]
    bottom = [0.0] * len(rows)
    for key, label in (
        ("compute_ms", "computing"),
        ("waiting_ms", "waiting for links"),
        ("update_ms", "updating"),
        ("python_ms", "waiting for Python"),
    ):
        middle.bar(ticks, [row[key] for row in rows], bottom=bottom, label=label)
        bottom = [a + row[key] for a, row in zip(bottom, rows, strict=True)]
    middle.set_xlabel(f"ranks, {estimate.asked['batch_per_rank']:,} images each")
    middle.set_ylabel("ms per step")
    middle.legend(fontsize=8)
    for regime, style in ((SAME_PER_RANK, "o-"), (SAME_GLOBAL, "s--")):
        some = [row for row in estimate.rows if row["batch"] == regime]
        right.loglog([row["ranks"] for row in some], [row["images_per_second"] for row in some], style, label=regime)
    right.set_xlabel("ranks")
    right.set_ylabel("images per second")
    right.legend(fontsize=8)
    figure.suptitle(f"{title(estimate)}; an estimate, not measured", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
