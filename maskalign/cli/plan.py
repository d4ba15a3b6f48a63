"""`maskalign plan`: the settings of `maskalign train`, and a few of its own."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from maskalign.cli.options import (
    add_options,
    build_settings,
    description_of,
    epilog_of,
    normalize,
    options_of,
    shown_name,
)
from maskalign.config.option import option


@dataclass(kw_only=True)
class Plan:
    """Estimate memory, time, GPU-hours and energy of a run, without its hardware and without its data.

    The settings of the run are those of `maskalign train`.
    """

    EXAMPLES = ("maskalign plan --config imagenet256/xl2/maskalign --world-size 8 --parallel.plan fsdp",)

    world_size: int = option(group="plan")
    """Number of ranks, one accelerator each."""
    device: str = option("h100", group="plan", path=True)
    """a100, h100, h200, b200, mi300x, or a .yaml file with the fields of maskalign/planning/devices.py."""
    out: Optional[Path] = option(None, group="plan", metavar="DIR")
    """Folder for plan.csv, plan.png and plan.txt."""
    efficiency: float = option(0.4, group="plan")
    """Share of the device's peak that matrix products reach."""
    link_efficiency: float = option(0.8, group="plan")
    """Share of the links' bandwidth that collectives reach."""
    headroom: float = option(0.1, group="plan")
    """Share of the device's memory that is left to the driver, communication and fragmentation."""
    launch_us: float = option(58.0, group="plan")
    """Microseconds that Python takes to launch an operation; 58 were measured on the host of an H200."""
    image_size: Optional[int] = option(None, group="plan")
    """Side of the images in pixels, where data.path does not exist; by default the
    number at the end of its name (imagenet512), or 256."""
    num_classes: Optional[int] = option(None, group="plan")
    """Number of classes, where data.path does not exist; by default ImageNet's 1000."""


SETTINGS = Plan


def run(argv, start):
    from maskalign.config.parsing import config_of, make_config_parser

    own = [entry.name for entry in options_of(Plan)]
    parser = make_config_parser(
        own,
        lambda key: shown_name(Plan, key),
        prog="maskalign plan",
        usage="maskalign plan --config FILE.yaml|RECIPE --world-size N [options] [--section.key VALUE ...]",
        description=description_of(Plan),
        epilog=epilog_of(Plan),
    )
    add_options(parser, Plan)
    values = parser.parse_args(normalize(Plan, argv))
    settings = asdict(build_settings(Plan, values))
    config = config_of(parser.instantiate(values))
    start()
    from maskalign.planning.command import plan

    plan(config, **settings)
