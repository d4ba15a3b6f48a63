"""Read the contents of a report from a run's folder. Missing parts are skipped, and unreadable parts give a note."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from maskalign.errors import UsageError, one_line
from maskalign.reporting.pictures import read_picture

MOST_SAMPLES = 16
TEXTS = (".md", ".txt")


@dataclass
class Run:
    """The contents of one run in a report.

    Attributes:
        path: folder of the run.
        name: name on the page.
        settings: the tree of config.yaml; {} if it does not exist.
        metrics: column of metrics.csv -> list of float or None, all of one length; {} if it does not exist.
        samples: list of (step, `Picture`), ascending.
        evaluation: dict of evaluation.json; {} if it does not exist.
        pictures: list of (file name, `Picture`) of the analysis.
        texts: list of (file name, text) of the analysis.
        notes: lines about parts that could not be read.
    """

    path: Path
    name: str
    settings: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    samples: list = field(default_factory=list)
    evaluation: dict = field(default_factory=dict)
    pictures: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def last(self, column):
        """The last finite value of a column of metrics.csv, or None."""
        return next((value for value in reversed(self.metrics.get(column, [])) if value is not None), None)


def read_run(path, name=None):
    """Read a run folder.

    Args:
        path: the folder; it must have a config.yaml or a metrics.csv.
        name: name in the report; by default the last part of the path.

    Returns:
        Run.

    Raises:
        UsageError: the folder does not exist, or is not a run.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such folder; give run folders of maskalign train")
    if (path / "COMPLETE").exists():
        raise UsageError(f"{path}: is a checkpoint; give the folder of its run, {path.parent.parent}")
    if not (path / "config.yaml").is_file() and not (path / "metrics.csv").is_file():
        raise UsageError(f"{path}: holds neither config.yaml nor metrics.csv; give a run folder of maskalign train")
    run = Run(path, name or path.resolve().name)
    run.settings = _read(run, "config.yaml", lambda file: yaml.safe_load(file.read_text()), dict) or {}
    run.metrics = _read(run, "metrics.csv", read_columns, dict) or {}
    run.evaluation = _read(run, "evaluation.json", lambda file: json.loads(file.read_text()), dict) or {}
    run.samples = _samples(run)
    for file in sorted((path / "analysis").glob("*")):
        if file.suffix == ".png":
            run.pictures += [(file.name, picture) for picture in [_picture(run, file)] if picture]
        elif file.suffix in TEXTS:
            text = _read(run, f"analysis/{file.name}", lambda file: file.read_text(), str)
            run.texts += [(file.name, text)] if text else []
    return run


def _read(run, name, read, kind):
    """The result of `read` for a file of the run; None, with a note, if it fails or the result has another type."""
    file = run.path / name
    if not file.is_file():
        return None
    try:
        content = read(file)
    except (OSError, ValueError, yaml.YAMLError, csv.Error) as error:
        run.notes.append(f"{name} cannot be read ({one_line(error)[:120]})")
        return None
    if content is not None and not isinstance(content, kind):
        run.notes.append(f"{name} has an unexpected form and is left out")
        return None
    return content


def read_columns(path):
    """metrics.csv as column -> list of float or None, without rows that have no step (a half-written last line)."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or [] if name]
        rows = [row for row in reader if number(row.get("step")) is not None]
    return {name: [number(row.get(name)) for row in rows] for name in names}


def number(value):
    """The value as a finite float, or None."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _samples(run):
    """The sample grids of a run, at most MOST_SAMPLES of them, evenly spread."""
    found = []
    for file in (run.path / "samples").glob("step_*.png"):
        digits = file.stem.removeprefix("step_")
        if digits.isdecimal():
            found.append((int(digits), file))
    found.sort()
    if len(found) > MOST_SAMPLES:
        found = [found[round(k * (len(found) - 1) / (MOST_SAMPLES - 1))] for k in range(MOST_SAMPLES)]
    pictures = [(step, _picture(run, file)) for step, file in found]
    return [(step, picture) for step, picture in pictures if picture]


def _picture(run, file):
    try:
        return read_picture(file)
    except (OSError, ValueError, SyntaxError) as error:
        run.notes.append(f"{file.relative_to(run.path)} cannot be read ({one_line(error)[:120]})")
        return None


def names_of(paths):
    """A name for each run: the last part of its path, and as many parts before it as are needed to be unique."""
    paths = [Path(path).resolve() for path in paths]
    names = []
    for number, path in enumerate(paths):
        others = [other.parts for k, other in enumerate(paths) if k != number and other != path]
        length = 1
        while length < len(path.parts) and any(other[-length:] == path.parts[-length:] for other in others):
            length += 1
        names.append("/".join(path.parts[-length:]))
    return names
