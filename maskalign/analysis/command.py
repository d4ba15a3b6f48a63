"""The work of `maskalign analyze`: measure checkpoints, then write tables, pictures and outcome.md."""

from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from maskalign.analysis.agreement import agreement_work, measure_agreement
from maskalign.analysis.gap import check_mask_ratio, gap_work, measure_gap
from maskalign.analysis.images import Images
from maskalign.analysis.measure import measure_tokens, work_of
from maskalign.analysis.outcome import Conditions, MeasuredRun, write_outcome
from maskalign.analysis.pictures import draw_curves, draw_gaps, draw_maps, draw_series, draw_shares
from maskalign.analysis.settings import AnalysisSettings
from maskalign.analysis.subjects import find_checkpoints, load_subject
from maskalign.analysis.tables import (
    AGREEMENT_COLUMNS,
    CONCENTRATION_COLUMNS,
    GAP_COLUMNS,
    POSITION_COLUMNS,
    SHARE_COLUMNS,
    STABILITY_COLUMNS,
    agreement_rows,
    checkpoint_rows,
    concentration_row,
    gap_rows,
    position_rows,
    run_rows,
    share_rows,
    stability_rows,
    write_csv,
)
from maskalign.errors import RunError, UsageError
from maskalign.runtime.outputs import make_folder

TABLES = {
    "shares": SHARE_COLUMNS,
    "gap": GAP_COLUMNS,
    "positions": POSITION_COLUMNS,
    "stability": STABILITY_COLUMNS,
    "concentration": CONCENTRATION_COLUMNS,
    "agreement": AGREEMENT_COLUMNS,
}


def analyze(checkpoints, data, out, *, settings=None, ema=True, most=8, teachers=(), device="auto", progress=True):
    """Measure the alignment loss's gradients at the patches, how stable they are, and the stability gap.

    Args:
        checkpoints: run folders, checkpoint folders, REPA .pt or .safetensors files, see `subjects.find_checkpoints`.
        data: folder or URL prefix of the data set.
        out: folder for the tables, pictures and outcome.md.
        settings: `AnalysisSettings`.
        ema: use the moving average of the weights.
        most: maximum number of checkpoints per run.
        teachers: names of the teachers, for files that do not contain them.
        device: auto, cpu or cuda.
        progress: show progress bars.

    Returns:
        Path of outcome.md.

    Raises:
        UsageError: the checkpoints or the data do not fit.
        RunError: the results are not finite, or cannot be written.
    """
    settings, device = settings or AnalysisSettings(), _device(device)
    entries = find_checkpoints(checkpoints, most)
    out = make_folder(out)
    first = load_subject(entries[0], ema)
    read = {}  # class_dim -> Images; runs with and without a class token are compared on the same images

    def images_for(subject):
        if subject.model.class_dim not in read:
            with _bar(settings.images, "reading", " images", progress) as bar:
                read[subject.model.class_dim] = Images(
                    data, subject, settings.images, teachers=teachers, batch_size=settings.batch_size,
                    seed=settings.seed, device=device, progress=bar.update,
                )  # fmt: skip
        return read[subject.model.class_dim]

    images = images_for(first)
    settings = replace(settings, images=images.count)
    tables = {name: [] for name in TABLES}
    conditions = _conditions(data, images, settings, first, ema)
    series = {}
    work = len(entries) * sum(count(images, settings) for count in (work_of, gap_work, agreement_work))
    with _bar(work, "measuring", " batches", progress) as bar:
        for entry in entries:
            subject = load_subject(entry, ema)
            _check_alike(subject, first, settings)
            images = images_for(subject)
            subject.model = subject.model.to(device)
            found = measure_tokens(subject, images, settings, bar.update)
            _check_finite(subject, found)
            kept = check_mask_ratio(subject.model, settings.mask_ratio)
            losses = measure_gap(subject, images, settings, bar.update)
            agreement = measure_agreement(subject, images, settings, bar.update)
            tables["shares"] += share_rows(subject, found, settings)
            tables["gap"] += gap_rows(subject, losses, kept, settings)
            tables["positions"] += position_rows(subject, found, settings)
            tables["stability"] += stability_rows(subject, found, settings)
            tables["concentration"] += [concentration_row(subject, m, n, settings) for m, n in found.norms.items()]
            tables["agreement"] += agreement_rows(subject, agreement, min(settings.batch_size, images.count))
            subject.model = subject.model.cpu()
            series.setdefault(entry.run, []).append((subject, found))
            conditions.runs[entry.run] = MeasuredRun(
                settings=_describe(subject),
                kept=subject.kept(settings.keep_ratio),
                class_token=subject.model.class_dim is not None,
                steps=[member.step for member, _ in series[entry.run]],
            )
    for members in series.values():
        tables["stability"] += checkpoint_rows(*zip(*members, strict=True), settings)
    if len(series) > 1:
        tables["stability"] += run_rows(*zip(*(members[-1] for members in series.values()), strict=True), settings)
    return _write(out, tables, conditions, settings)


def _write(out, tables, conditions, settings):
    try:
        for name, columns in TABLES.items():
            write_csv(out / f"{name}.csv", columns, tables[name])
        draw_shares(tables["positions"], tables["shares"], out / "shares.png", settings.top)
        if tables["gap"]:
            draw_gaps(tables["gap"], out / "gap.png")
        for name, run in conditions.runs.items():
            stem, own = name.replace("/", "-"), [row for row in tables["positions"] if row["run"] == name]
            last = [row for row in own if row["step"] == run.steps[-1]]
            title = name if run.steps[-1] is None else f"{name}, step {run.steps[-1]}"
            draw_maps(last, out / f"maps-{stem}.png", settings.top, title)
            if len(set(run.steps)) > 1:
                draw_series(own, out / f"training-{stem}.png", name)
        draw_curves(tables["positions"], tables["stability"], tables["agreement"], out / "curves.png")
        path = out / "outcome.md"
        path.write_text(write_outcome(tables, conditions))
    except OSError as error:
        raise RunError(f"cannot write to {out} ({error.strerror or error}); choose another --out") from None
    return path


def _conditions(data, images, settings, subject, ema):
    source = images.manifest.source
    return Conditions(
        data=Path(str(data)).name if not source else f"{source} ({images.manifest.resolution} px)",
        images=images.count,
        times=settings.times,
        draws=settings.draws,
        top=settings.top,
        seed=settings.seed,
        weights="moving average (EMA)" if ema else "the weights themselves, not averaged",
        tokens=subject.model.num_tokens,
        teachers=images.names,
        group_size=min(settings.batch_size, images.count),
    )


def _describe(subject):
    """The settings of a run that affect the measurements, as text for the table of conditions."""
    model, method = subject.model, subject.config.method
    words = f"{model.depth} blocks of width {model.width}, tap after block {model.align_depth}"
    if model.class_dim is not None:
        words += f", class token of {model.class_dim}"
    if subject.step is None or not subject.teachers:
        return words
    keep = method.keep_ratio
    if hasattr(keep, "kind"):
        keep = f"{keep.start:g} to {keep.end:g} ({keep.kind} from {keep.begin:g})"
    mixer = subject.config.model.mixer
    layers = len(model.mixing_layers)
    mixer += f" of {layers} layer{'s' if layers > 1 else ''}" if layers else ""
    trained = "trained on subsets" if subject.trained_on_subsets else "trained with all tokens up to the tap"
    return f"{words}, mixer {mixer}, keep ratio {keep}, {trained}, EMA decay {subject.config.optimizer.ema_decay:g}"


def _check_alike(subject, first, settings):
    one, other = subject.model, first.model
    for what, here, there in (
        ("input", (one.in_channels, one.input_size), (other.in_channels, other.input_size)),
        ("token grid", one.grid, other.grid),
        ("teachers", subject.teachers, first.teachers),
        ("teacher widths", one.teacher_dims, other.teacher_dims),
    ):
        if here != there:
            raise UsageError(
                f"{subject.label}: has another {what} ({here}) than {first.label} ({there}); analyze them in two calls"
            )
    if one.num_classes != other.num_classes:
        raise UsageError(f"{subject.label}: has {one.num_classes} classes, {first.label} {other.num_classes}")
    check_mask_ratio(one, settings.mask_ratio)
    kept = subject.kept(settings.keep_ratio)
    if kept >= one.num_tokens:
        raise UsageError(
            f"--keep-ratio: {kept} of {one.num_tokens} tokens would be kept (numbers of tokens are rounded to "
            f"multiples of {subject.config.method.keep_multiple}); give a smaller one"
        )


def _check_finite(subject, found):
    for mode, norms in found.norms.items():
        # With all tokens aligned every norm is finite; otherwise NaN means "not in the subset".
        if (mode == "full" and not (norms >= 0).all()) or (norms == float("inf")).any():
            raise RunError(f"{subject.label}: its alignment gradients are not finite; choose an earlier checkpoint")


def _device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no GPU here; use --device cpu")
    if not name.startswith(("cuda", "cpu")):
        raise UsageError(f"--device: {name!r} is not auto, cpu or cuda")
    return torch.device(name)


def _bar(total, name, unit, shown):
    return tqdm(total=total, desc=name, unit=unit, disable=not shown)
