"""`maskalign evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from maskalign.checkpoints.sources import check_source
from maskalign.cli.options import parse_options, part
from maskalign.config.option import option
from maskalign.evaluation.settings import EvaluationSettings
from maskalign.sampling.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluationSettings, Sampling):
    """Compare a model's samples, or existing pictures, with real ones; and measure a model's held-out losses.

    Prints a table and, for a run or with --out, writes evaluation.json and evaluation-table.csv. The defaults are a
    quick look that takes minutes on a CPU; published numbers are of 50,000 samples, all real images and the sampler of
    the paper: --samples 50000 --reference 0 --preset paper. Features of the real images are kept in the user's cache
    folder (MASKALIGN_CACHE).
    """

    EXAMPLES = (
        "maskalign evaluate runs/quickstart --data datasets/openmoji32",
        "maskalign evaluate samples_50000.npz --data datasets/imagenet256 --reference 0 --inception download",
    )

    source: Path = option(positional=True)
    """A run, checkpoint or weights file to draw from, hf-hub:USER/NAME[@REVISION][:FILE], or the name of published
    weights; or pictures: a folder, an .npz, a data set."""
    data: str = option(path=True, metavar="DIR")
    """Folder or URL prefix of the data set with the real images."""
    out: Optional[Path] = option(None, metavar="DIR")
    """Folder for the report; by default the run's."""
    classes: Optional[str] = None
    """Labels, ranges or class names: compare these alone, on both sides."""
    teacher: str = option("efficientnet-lite0", group="networks")
    """Network in whose features the distances are measured; several with commas. dinov2-l gives the field's FDD."""
    teacher_weights: Optional[str] = option(None, path=True, group="networks")
    """hub, random (for tests) or a file."""
    inception: Optional[str] = option(None, path=True, group="networks")
    """torch-fidelity's weights file for FID, sFID and Inception score, or download; without it they are left out."""
    held_out: Optional[str] = option(None, path=True, group="losses", metavar="DIR")
    """Data set for the velocity loss and the alignment cosine by time; by default --data."""
    steps: int = option(20, group="sampler")
    """Steps of the sampler; Heun evaluates the model twice per step."""
    preset: Optional[Literal["paper"]] = option(None, group="sampler")
    """paper: the sampler, steps and guidance that the paper of the model's recipe evaluates with (REG for MaskAlign,
    REPA or SiT); options that are given too are kept."""
    labels: Literal["reference", "uniform"] = option("reference", group="sampler")
    """Labels of the samples: those of the real images in turn, or drawn uniformly at random, as REG and REPA do."""
    precision: Literal["auto", "fp32", "bf16"] = option("auto", group="sampler")
    """Precision of the samples: fp32, bf16, or bf16 where the processor has it (auto). Features are always fp32."""
    weights: Literal["ema", "model"] = option("ema", group="model")
    """The moving average (ema) or the weights themselves (model)."""
    vae: Optional[str] = option(None, path=True, group="model")
    """Decoder of latents, a hub name or a folder; by default the one that the data set was encoded with."""
    device: str = option("auto", group="model", metavar="auto|cpu|cuda[:N]")
    """Where the networks run."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self):
        Sampling.__post_init__(self)
        EvaluationSettings.__post_init__(self)


SETTINGS = Evaluate


def run(argv, start):
    settings, given = parse_options(Evaluate, "evaluate", argv)
    check_source(settings.source, what="a run, a checkpoint, a folder of pictures or an .npz")
    from maskalign.config.teacher_names import parse_teachers

    parse_teachers(settings.teacher)
    start()
    from maskalign.evaluation.command import evaluate
    from maskalign.evaluation.report import table

    report = evaluate(
        settings.source,
        settings.data,
        out=settings.out,
        settings=part(EvaluationSettings, settings),
        sampling=part(Sampling, settings),
        preset=settings.preset,
        given=given,
        labels=settings.labels,
        teacher=settings.teacher,
        teacher_weights=settings.teacher_weights,
        inception=settings.inception,
        classes=settings.classes,
        held_out=settings.held_out,
        ema=settings.weights == "ema",
        vae=settings.vae,
        device=settings.device,
        progress=settings.progress,
    )
    print(table(report))
