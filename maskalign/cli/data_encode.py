"""`maskalign data encode`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

from maskalign.cli.options import parse_options
from maskalign.config.option import option


@dataclass(kw_only=True)
class DataEncode:
    """Add teacher features, rows and class tokens, or VAE moments to the shards of a data set.

    ImageNet (1,281,167 images) with DINOv2-B takes 252 GB as int8 and 504 GB as float16. The command can be stopped at
    any moment; run it again to continue. Under torchrun the ranks share the shards.
    """

    EXAMPLES = (
        "maskalign data encode --data datasets/photos64 --teacher efficientnet-lite0",
        "maskalign data encode --data datasets/imagenet256 --teacher dinov2-b",
        "maskalign data encode --data datasets/imagenet256 --latents stabilityai/sd-vae-ft-mse",
    )

    data: str = option(path=True, metavar="DIR")
    """Folder of the data set."""
    teacher: Optional[str] = option(None, metavar="NAMES")
    """dinov2-{s,b,l,g}, efficientnet-lite0[:16] or timm:MODEL; several with commas between them."""
    latents: Optional[str] = option(None, path=True, metavar="VAE")
    """Name or local folder of a diffusers AutoencoderKL, e.g. stabilityai/sd-vae-ft-mse."""
    out: Optional[Path] = option(None, metavar="DIR")
    """Another folder for the result; by default the shards are replaced, all at once, at the end."""
    dry_run: bool = False
    """Only print the size of what would be stored."""
    weights: Optional[str] = option(None, path=True, group="teacher")
    """hub, random or a file, one for all teachers or one each with commas; by default the hub."""
    dtype: Literal["int8", "float16"] = option("int8", group="teacher")
    """How teacher features are stored."""
    normalize: Literal["none", "spatial", "mean"] = option("none", group="teacher")
    """none, spatial (iREPA: per image over its tokens) or mean (minus the mean token of the data set)."""
    grid: Optional[int] = option(None, group="teacher")
    """Side of the token grid that features are resampled to; by default the teacher's own."""
    hflip: bool = option(False, group="teacher")
    """Also store the features of the mirrored images; training draws one of the two."""
    class_token: Literal["both", "only", "none"] = option("both", group="teacher")
    """both stores rows and class tokens, only adds class tokens to existing rows, none omits them."""
    class_components: int = option(64, group="teacher")
    """Principal components of the class tokens in the manifest, for model.class_token_dim; 0 for none."""
    batch_size: Optional[int] = option(None, group="work")
    """Images at a time; by default 8 on CPUs and 64 on GPUs."""
    workers: Optional[int] = option(None, group="work")
    """Processes; by default one per GPU, or one that uses all CPU cores."""
    device: str = option("auto", group="work", metavar="auto|cpu|cuda[:N]")
    """Where the networks run."""


SETTINGS = DataEncode


def run(argv, start):
    settings, _ = parse_options(DataEncode, "data encode", argv)
    start()
    from maskalign.data.build.encoding import encode

    options = asdict(settings)
    encode(options.pop("data"), **options)
