"""`maskalign analyze`."""

from dataclasses import dataclass
from pathlib import Path
from typing import List, Literal, Optional

from maskalign.analysis.settings import AnalysisSettings
from maskalign.checkpoints.sources import check_source
from maskalign.cli.options import parse_options, part
from maskalign.config.option import option
from maskalign.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Analyze(AnalysisSettings):
    """Measure where the alignment loss pulls on the patches, how stable that is, and the stability gap of subsets.

    Writes outcome.md, tables (shares, gap, positions, stability, concentration, agreement .csv) and pictures.
    """

    EXAMPLES = ("maskalign analyze runs/repa runs/maskalign --data datasets/openmoji32 --out analysis",)

    checkpoints: List[Path] = option(positional=True, metavar="RUN")
    """Run folders (all their kept checkpoints), checkpoints, .pt files or hf-hub:USER/NAME[@REVISION][:FILE], one
    or several."""
    data: str = option(path=True, metavar="DIR")
    """Folder or URL prefix of the data set."""
    out: Path = option(metavar="DIR")
    """Folder for the tables, the pictures and outcome.md."""
    most: int = 8
    """Checkpoints of a run, evenly spread, the last one among them."""
    weights: Literal["ema", "model"] = option("ema", group="model")
    """The moving average (ema) or the weights themselves (model)."""
    teacher: Optional[str] = option(None, group="model", metavar="NAMES")
    """Teachers with commas between them, for files that do not name their own."""
    device: str = option("auto", group="model", metavar="auto|cpu|cuda[:N]")
    """Where the networks run."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self):
        super().__post_init__()
        if self.most < 1:
            raise UsageError(f"--most: {self.most} must be at least 1")


SETTINGS = Analyze


def run(argv, start):
    settings, _ = parse_options(Analyze, "analyze", argv)
    for path in settings.checkpoints:
        check_source(path)
    from maskalign.config.teacher_names import parse_teachers

    teachers = tuple(parse_teachers(settings.teacher)) if settings.teacher else ()
    start()
    from maskalign.analysis.command import analyze

    print(
        analyze(
            settings.checkpoints,
            settings.data,
            settings.out,
            settings=part(AnalysisSettings, settings),
            ema=settings.weights == "ema",
            most=settings.most,
            teachers=teachers,
            device=settings.device,
            progress=settings.progress,
        )
    )
