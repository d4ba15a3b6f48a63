"""The results of an evaluation as a table of text, as JSON and as CSV."""

import csv
import io
import json
from pathlib import Path

from maskalign.errors import RunError
from maskalign.runtime.files import write_atomically

TITLES = {
    "frechet": "Frechet distance",
    "kernel": "Kernel distance x 1000",
    "precision": "Precision (k = 3)",
    "recall": "Recall (k = 3)",
    "density": "Density (k = 5)",
    "coverage": "Coverage (k = 5)",
    "inception_score": "Inception score",
}

# Columns of the losses by time: title, width, digits.
HELD_OUT = {
    "velocity_loss": ("velocity loss", 14, 5),
    "class_velocity_loss": ("class token's", 15, 5),
    "cosine": ("cosine", 10, 4),
}


def write_report(report, path):
    """Write `path` (.json) atomically, and the same numbers as rows of NAME-table.csv in the same folder.

    Args:
        report: dict with source, data, samples, metrics, held_out (dict metric -> {bin: value}, or None), settings.
        path: the .json file.

    Raises:
        RunError: a file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(str(path), (json.dumps(report, indent=1) + "\n").encode())
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["metric", "time", "value"])
        rows.writerows([name, "", f"{value:.8g}"] for name, value in report["metrics"].items())
        for name, values in (report["held_out"] or {}).items():
            rows.writerows([name, time, f"{value:.8g}"] for time, value in values.items())
        write_atomically(str(path.with_name(f"{path.stem}-table.csv")), text.getvalue().encode())
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from None


def table(report):
    """The report as lines of text."""
    compared = f" against {report['reference']:,} of {report['data']}" if report["reference"] else ""
    lines = [f"{report['source']}: {report['samples']:,} pictures{compared}", ""]
    lines += [f"{title:<46}{value}" for title, value in rows(report["metrics"])]
    held_out = report["held_out"]
    if held_out:
        columns = [(key, *form) for key, form in HELD_OUT.items() if key in held_out]
        lines += ["", f"{'time':<12}" + "".join(f"{title:>{width}}" for _, title, width, _ in columns)]
        for time in held_out["velocity_loss"]:
            cells = [f"{held_out[key][time]:>{width}.{digits}f}" for key, _, width, digits in columns]
            lines.append(f"{time:<12}{''.join(cells)}")
        metrics = report["metrics"]
        means = [f"{metrics[f'held_out_{key}']:>{width}.{digits}f}" for key, _, width, digits in columns]
        lines.append(f"{'mean':<12}{''.join(means)}")
        if "held_out_stability_gap" in metrics:
            gap, error = (metrics[f"held_out_stability_gap_matched{end}"] for end in ("", "_error"))
            left = 1 - report["settings"]["mask_ratio"]
            lines += [
                "",
                f"alignment loss on all tokens {metrics['held_out_align_loss']:+.4f}; stability gap {gap:+.5f} +- "
                f"{error:.5f}: how much higher it is where the model sees a random {left:.0%} of the patches",
            ]
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def rows(metrics):
    """Yield (title, number as text) for the upper part of the table."""
    for key, value in metrics.items():
        name, _, features = key.removesuffix("]").partition("[")
        if name not in TITLES:
            continue
        # These three have established names.
        title = "FDD, " if name == "frechet" and features.startswith("dinov2") else ""
        title = {"inception": "FID, ", "inception-spatial": "sFID, "}.get(features, title) if name == "frechet" else ""
        title += TITLES[name] + (f" ({features})" if features else "")
        deviation = metrics.get(key.replace(name, f"{name}_std", 1))
        scale = 1000 if name == "kernel" else 1
        text = f"{scale * value:.4f}" if value < 1000 else f"{value:.2f}"
        yield title, text + (f" +- {scale * deviation:.4f}" if deviation is not None else "")
