"""`maskalign report`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from maskalign.cli.options import parse_options
from maskalign.config.option import option


@dataclass(kw_only=True)
class Report:
    """Compare runs on one HTML page that needs no network.

    It shows the settings that differ, curves, sample grids side by side, and what RUN/evaluation.json and RUN/analysis/
    hold.
    """

    EXAMPLES = ("maskalign report runs/repa runs/maskalign --out comparison.html",)

    runs: List[Path] = option(positional=True, metavar="RUN")
    """Run folders."""
    out: Path = option(Path("report.html"), metavar="FILE.html")
    """The HTML file to write."""
    title: Optional[str] = None
    """Heading of the page; by default the names of the runs."""


SETTINGS = Report


def run(argv, start):
    settings, _ = parse_options(Report, "report", argv)
    start()
    from maskalign.reporting.command import report

    path, notes = report(settings.runs, settings.out, title=settings.title)
    for note in notes:
        print(f"maskalign: left out: {note}", file=sys.stderr)
    print(path)
