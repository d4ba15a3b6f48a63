"""`maskalign data check`."""

from dataclasses import dataclass
from typing import Optional

from maskalign.cli.options import parse_options
from maskalign.config.option import option


@dataclass(kw_only=True)
class DataCheck:
    """Verify every shard of a data set against its manifest.

    The exit status is 1, and the bad shards are listed, where one is bad.
    """

    EXAMPLES = ("maskalign data check datasets/photos64",)

    data: str = option(positional=True, path=True)
    """Folder or URL prefix of the data set."""
    decode: bool = False
    """Decode every image in full, instead of reading its header."""
    workers: Optional[int] = None
    """Processes; by default one per CPU core."""


SETTINGS = DataCheck


def run(argv, start):
    settings, _ = parse_options(DataCheck, "data check", argv)
    start()
    from maskalign.data.build import checking

    checking.report(checking.check(settings.data, workers=settings.workers, decode=settings.decode), settings.data)
