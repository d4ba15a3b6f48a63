"""`maskalign data show`."""

from dataclasses import dataclass
from pathlib import Path

from maskalign.cli.options import parse_options
from maskalign.config.option import option


@dataclass(kw_only=True)
class DataShow:
    """Write a contact sheet of a data set, with its labels and the teachers' features as colors."""

    EXAMPLES = ("maskalign data show datasets/photos64 --out contact_sheet.png",)

    data: str = option(positional=True, path=True)
    """Folder or URL prefix of the data set."""
    out: Path = option(metavar="FILE.png")
    """The PNG file to write."""
    columns: int = 8
    """Samples per class."""
    rows: int = 12
    """Classes to show."""


SETTINGS = DataShow


def run(argv, start):
    settings, _ = parse_options(DataShow, "data show", argv)
    start()
    from maskalign.data.build.showing import show

    show(settings.data, settings.out, columns=settings.columns, rows=settings.rows)
