"""`maskalign convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from maskalign.cli.options import parse_options
from maskalign.config.option import option
from maskalign.errors import UsageError


@dataclass(kw_only=True)
class Convert:
    """Convert checkpoints: REPA's, REG's and SiT's .pt, ours, safetensors."""

    EXAMPLES = (
        "maskalign convert repa.pt repa.safetensors",
        "maskalign convert runs/maskalign maskalign.pt --to reg",
    )

    src: Path = option(positional=True)
    """The checkpoint to read: a run or checkpoint folder, a .pt or a .safetensors file."""
    dst: Path = option(positional=True)
    """The file to write."""
    to: Optional[Literal["repa", "reg", "safetensors"]] = None
    """The layout to write; by default that of the ending of DST, where .pt is REG's layout for a model with a class
    token and REPA's for others."""
    weights: Literal["ema", "model"] = "ema"
    """The set of weights that safetensors holds, averaged (ema) or not (model); a .pt holds both."""
    heads: Optional[int] = None
    """Attention heads of the model, for a .pt of sizes that no preset has and that does not say it."""


SETTINGS = Convert


def run(argv, start):
    settings, _ = parse_options(Convert, "convert", argv)
    if not settings.src.exists():
        raise UsageError(f"{settings.src} does not exist; give a run folder, a checkpoint or a .pt file")
    start()
    from maskalign.checkpoints.command import convert

    print(convert(settings.src, settings.dst, to=settings.to, weights=settings.weights, heads=settings.heads))
