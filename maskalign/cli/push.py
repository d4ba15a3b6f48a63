"""`maskalign push`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from maskalign.cli.options import parse_options
from maskalign.config.option import option


@dataclass(kw_only=True)
class Push:
    """Upload a run to the Hugging Face Hub: weights, settings, and a model card.

    The card has the settings, the metrics, the newest sample sheet and notes on licenses. Paths of this machine are
    left out. Needs a token that may write (HF_TOKEN, or hf auth login).
    """

    EXAMPLES = (
        "maskalign push runs/quickstart USER/NAME --dry-run",
        "maskalign push runs/xl2 USER/NAME --license apache-2.0 --private",
    )

    run: Path = option(positional=True)
    """A run folder, or one of its checkpoints."""
    repository: str = option(positional=True, metavar="USER/NAME")
    """The repository; it is created if it does not exist."""
    dry_run: bool = False
    """Leave the folder, and upload nothing."""
    out: Optional[Path] = option(None, metavar="DIR")
    """The folder; by default RUN/hub."""
    private: bool = False
    """Make a new repository private."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average (ema) or the weights themselves (model)."""
    samples: Optional[Path] = option(None, metavar="FILE.png")
    """The picture on the card; by default the newest sample sheet of the run."""
    license: Optional[str] = None
    """License of the weights, for the card, e.g. apache-2.0."""


SETTINGS = Push


def run(argv, start):
    settings, _ = parse_options(Push, "push", argv)
    start()
    from maskalign.reporting.push import push

    folder, url = push(
        settings.run,
        settings.repository,
        out=settings.out,
        dry_run=settings.dry_run,
        private=settings.private,
        ema=settings.weights == "ema",
        samples=settings.samples,
        license=settings.license,
    )
    print(folder if url is None else url)
