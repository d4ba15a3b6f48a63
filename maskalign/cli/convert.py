"""`maskalign convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from maskalign.checkpoints.sources import check_source, published_table
from maskalign.cli.options import parse_options
from maskalign.config.option import option
from maskalign.errors import UsageError


@dataclass(kw_only=True)
class Convert:
    """Convert checkpoints: REPA's, REG's and SiT's .pt, ours, safetensors."""

    EXAMPLES = (
        "maskalign convert repa.pt repa.safetensors",
        "maskalign convert sit-xl2 sit-xl2.safetensors",
        "maskalign convert runs/maskalign maskalign.pt --to reg",
    )

    src: Optional[Path] = option(None, positional=True)
    """The checkpoint to read: a run or checkpoint folder, a .pt or a .safetensors file, hf-hub:USER/NAME with @REVISION
    and :FILE as needed, or the name of published weights."""
    dst: Optional[Path] = option(None, positional=True)
    """The file to write."""
    to: Optional[Literal["repa", "reg", "safetensors"]] = None
    """The layout to write; by default that of the ending of DST, where .pt is REG's layout for a model with a class
    token and REPA's for others."""
    weights: Literal["ema", "model"] = "ema"
    """The set of weights that safetensors holds, averaged (ema) or not (model); a .pt holds both."""
    heads: Optional[int] = None
    """Attention heads of the model, for a .pt of sizes that no preset has and that does not say it."""
    input_size: Optional[int] = None
    """Side of the latents that the model is for from now on, e.g. 64 to continue weights of 256 px at 512 px; the
    position embedding is resampled."""
    list: bool = False
    """List the published weights that are known by name, and what conversion they need."""


SETTINGS = Convert


def run(argv, start):
    settings, _ = parse_options(Convert, "convert", argv)
    if settings.list:
        print(published_table())
        return
    if settings.dst is None:
        raise UsageError("convert needs SRC and DST: what to read, and the file to write")
    check_source(settings.src)
    start()
    from maskalign.checkpoints.command import convert

    print(
        convert(
            settings.src,
            settings.dst,
            to=settings.to,
            weights=settings.weights,
            heads=settings.heads,
            input_size=settings.input_size,
        )
    )
