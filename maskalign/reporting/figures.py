"""The numbers of the report: curves, evaluation tables, and the numbers on a run's card."""

from maskalign.reporting.run import number

MOST_POINTS = 600

# Schedules are not smoothed, because smoothing would round their steps.
EXACT = ("lr", "keep_ratio")
NOT_ALIKE = " (not comparable: with and without a class token)"
# column of metrics.csv -> title, unit, factor, logarithmic axis, which end is better (-1 low, 1 high, 0 neither)
CURVES = {
    "velocity_loss": ("Velocity loss", "", 1, False, -1),
    "align_loss": ("Alignment, mean cosine", "", -1, False, 1),
    "grad_norm": ("Gradient norm", "", 1, True, 0),
    "images_per_second": ("Speed", "images/s", 1, False, 1),
    "lr": ("Learning rate", "", 1, False, 0),
    "keep_ratio": ("Keep ratio", "", 1, False, 0),
}
HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage", "score", "cosine")


def curves(runs):
    """Charts of the metrics of all runs: list of dict(id, title, unit, log, exact, series), for the page's script.

    A series is dict(run, step, time, value). Long series are averaged down to MOST_POINTS points. Metrics without
    values, and metrics that have the same value everywhere, are not included.
    """
    charts = []
    for column, (title, unit, factor, log, _) in CURVES.items():
        series = []
        for index, run in enumerate(runs):
            values = run.metrics.get(column)
            if values and any(value is not None for value in values):
                series.append({"run": index, **thin(run.metrics, values, factor)})
        different = {value for line in series for value in line["value"] if value is not None}
        if len(different) > 1:
            exact = column in EXACT
            charts.append({"id": column, "title": title, "unit": unit, "log": log, "exact": exact, "series": series})
    return charts


def thin(metrics, values, factor=1):
    """dict(step, time, value) of at most MOST_POINTS points, which are means over equal numbers of rows."""
    steps, times = metrics["step"], metrics.get("time") or [None] * len(values)
    count = min(len(values), MOST_POINTS)
    out = {"step": [], "time": [], "value": []}
    for k in range(count):
        rows = range(k * len(values) // count, (k + 1) * len(values) // count)
        known = [values[row] for row in rows if values[row] is not None]
        out["step"].append(_short(steps[rows[-1]]))
        out["time"].append(_short(times[rows[-1]]))
        out["value"].append(_short(factor * sum(known) / len(known)) if known else None)
    return out


def _short(value):
    return None if value is None else float(f"{value:.6g}")


def evaluation_table(runs):
    """Rows of the evaluations: dict(name, cells, better); a run's cell is (text, is best), or None without a value."""
    metrics, alike = [_numbers(run.evaluation.get("metrics")) for run in runs], same_input(runs)
    names = dict.fromkeys(name for m in metrics for name in m)
    return [
        _row(name, [m.get(name) for m in metrics], marked=alike or not name.startswith("held_out")) for name in names
    ]


def same_input(runs):
    """True if all or none of the models have a class token.

    A class token is a feature of the true image. Held-out losses of models with and without one cannot be compared.
    """
    models = [run.settings.get("model") for run in runs]
    return len({bool(isinstance(model, dict) and model.get("class_token")) for model in models}) < 2


def held_out_charts(runs):
    """Held-out metrics by time-step bin: list of dict(id, title, bins, series, rows) for the page and its script."""
    held = [run.evaluation.get("held_out") for run in runs]
    held = [h if isinstance(h, dict) else {} for h in held]
    charts, alike = [], same_input(runs)
    for metric in dict.fromkeys(name for h in held for name in h):
        values = [_numbers(h.get(metric)) for h in held]
        bins = sorted(dict.fromkeys(name for v in values for name in v), key=_bin_order)
        if bins:
            words = metric.replace("_", " ")
            series = [{"run": index, "value": [v.get(name) for name in bins]} for index, v in enumerate(values) if v]
            rows = [_row(name, [v.get(name) for v in values], metric, marked=alike) for name in bins]
            title = f"Held-out {words} by time" + ("" if alike else NOT_ALIKE)
            charts.append({"id": f"held-{len(charts)}", "title": title, "bins": bins, "series": series, "rows": rows})
    return charts


def _numbers(table):
    """dict from name to number, without values that are not finite numbers."""
    table = table if isinstance(table, dict) else {}
    return {str(name): number(value) for name, value in table.items() if number(value) is not None}


def _bin_order(name):
    digits = name.strip("[]() ").replace(",", " ").replace("-", " ").split()
    first = number(digits[0]) if digits else None
    return (first is None, first or 0.0, name)


def better(name):
    """1 if higher is better, -1 if lower is better, 0 for a standard deviation; `[features]` in a name are ignored."""
    words = name.lower().partition("[")[0].replace("_", " ").split()
    if "std" in words:
        return 0
    return 1 if any(known in words for known in HIGHER_IS_BETTER) else -1


def _row(name, values, metric=None, marked=True):
    """One row of a table; the best of two or more numbers is marked if they can be compared."""
    side = better(metric or name) if marked else 0
    known = [value for value in values if value is not None]
    best = max(known, key=lambda value: side * value) if side and len(set(known)) > 1 else None
    cells = [None if value is None else (f"{value:.4g}", value == best) for value in values]
    return {"name": name.replace("_", " ").replace("[", " ["), "cells": cells, "better": side}


def card(run):
    """The content of a run's card: dict(model, facts), where facts are (number as text, words)."""
    facts = []
    for column, words, form in (
        ("velocity_loss", "velocity loss", "{:.4f}"),
        ("align_loss", "alignment cosine", "{:.3f}"),
        ("step", "steps", "{:,.0f}"),
        ("time", "of training", None),
        ("images_per_second", "images/s", "{:,.1f}"),
        ("peak_memory_mib", "peak memory", None),
    ):
        value = run.last(column)
        if column == "images_per_second":
            value = _median(run.metrics.get(column, []))
        if column == "align_loss" and value is not None:
            value = -value
        if value is None or (column == "align_loss" and value == 0):
            continue
        if column == "time":
            text = duration(value)
        elif column == "peak_memory_mib":
            text = f"{value / 1024:.1f} GiB" if value >= 1024 else f"{value:.0f} MiB"
        else:
            text = form.format(value)
        facts.append((text, words))
    return {"model": model_words(run.settings), "facts": facts}


def model_words(settings):
    """A line about the model and the method, from the settings that exist."""
    model, method = (settings.get(key) if isinstance(settings.get(key), dict) else {} for key in ("model", "method"))
    from maskalign.reporting.settings import as_text

    words = []
    if model.get("preset"):
        words.append(str(model["preset"]))
    elif model.get("depth") and model.get("width"):
        words.append(f"depth {model['depth']}, width {model['width']}, patch {model.get('patch_size')}")
    if model.get("mixer") not in (None, "none"):
        words.append(f"{str(model['mixer']).replace('_', ' ')} mixer")
    if method.get("keep_ratio") is not None:
        words.append(f"keep {as_text(method['keep_ratio'])}")
    if method.get("align_weight") is not None:
        words.append(f"align {as_text(method['align_weight'])}")
    return " · ".join(words)


def _median(values):
    values = sorted(value for value in values if value is not None)
    return values[len(values) // 2] if values else None


def duration(seconds):
    """A duration as text: `3 h 20 min`, `7 min 10 s`, `42 s`."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
