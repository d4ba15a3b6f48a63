"""`maskalign sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from maskalign.checkpoints.sources import check_source
from maskalign.cli.options import parse_options, part
from maskalign.config.option import option
from maskalign.sampling.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Sample(Sampling):
    """Draw pictures from a trained model: a sheet by class, or a set of images for an evaluation.

    Under torchrun the ranks share the work, and the pictures are the same on any number of ranks.
    """

    EXAMPLES = (
        "maskalign sample runs/quickstart --out pictures --sampler heun --cfg-scale 3",
        "maskalign sample runs/xl2 --out samples --npz 50000 --preset paper",
        "maskalign sample runs/quickstart --out strip --classes Flags,0-3 --strip",
    )

    run: Path = option(positional=True)
    """A run folder, one of its checkpoints, a .pt or .safetensors file, hf-hub:USER/NAME[@REVISION][:FILE], or the name
    of published weights (maskalign convert --list)."""
    out: Path = option(metavar="DIR")
    """Folder for the pictures."""
    classes: Optional[str] = None
    """Labels, ranges or class names, e.g. 0,3,5-8 or Flags (name:2 or label:2 where it could be either); by default up
    to ten classes, with --npz all."""
    per_class: int = 8
    """Pictures per class on the sheet."""
    npz: Optional[int] = None
    """Draw this many images into OUT/samples_N.npz, as ADM's evaluator reads it; run the command again to continue
    after an interruption."""
    labels: Optional[Literal["balanced", "uniform"]] = None
    """Labels of --npz: equally many of every class, or drawn uniformly at random, as REG and REPA do. By default
    uniform, and balanced with --classes."""
    preset: Optional[Literal["paper"]] = option(None, group="sampler")
    """paper: the sampler, steps and guidance that the paper of the model's recipe evaluates with (REG for MaskAlign,
    REPA or SiT); options that are given too are kept."""
    cfg_scale: Optional[float] = option(None, group="sampler")
    """Classifier-free guidance scale, 1 is none; by default 2 for a sheet and 1 for --npz."""
    precision: Literal["auto", "fp32", "bf16"] = option("auto", group="sampler")
    """fp32, bf16, or bf16 where the processor has it (auto); the sampler's own state is float64."""
    interpolate: Literal["none", "noise", "class", "both"] = option("none", group="more pictures")
    """Also write interpolation.png, rows from one noise, class or both to another."""
    strip: bool = option(False, group="more pictures")
    """Also write strip.png, the first picture of each class on its way from noise to image."""
    animate: Literal["none", "gif", "webp", "apng"] = option("none", group="more pictures")
    """Also write the sheet on its way from noise to image, as denoising.gif, .webp or an animated .png."""
    frames: int = option(10, group="more pictures")
    """Columns of the strip."""
    weights: Literal["ema", "model"] = option("ema", group="model")
    """The moving average (ema) or the weights themselves (model)."""
    vae: Optional[str] = option(None, path=True, group="model")
    """Decoder of latents, a hub name or a folder; by default the one that the data set was encoded with."""
    device: str = option("auto", group="model", metavar="auto|cpu|cuda[:N]")
    """Where the model runs."""

    def __post_init__(self):
        if self.cfg_scale is None:
            object.__setattr__(self, "cfg_scale", 2.0 if self.npz is None else 1.0)
        super().__post_init__()


SETTINGS = Sample


def run(argv, start):
    settings, given = parse_options(Sample, "sample", argv)
    check_source(settings.run)
    start()
    from maskalign.sampling.command import sample

    paths = sample(
        settings.run,
        settings.out,
        classes=settings.classes,
        per_class=settings.per_class,
        settings=part(Sampling, settings),
        preset=settings.preset,
        given=given,
        npz=settings.npz,
        labels=settings.labels,
        interpolation=None if settings.interpolate == "none" else settings.interpolate,
        strip=settings.strip,
        animation=None if settings.animate == "none" else settings.animate,
        frames=settings.frames,
        ema=settings.weights == "ema",
        vae=settings.vae,
        device=settings.device,
    )
    for path in paths:
        print(path)
