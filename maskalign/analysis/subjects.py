"""The checkpoints to analyze, in order, with their settings of subsets and teachers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from maskalign.checkpoints.layout import complete_checkpoints, find
from maskalign.checkpoints.loading import load
from maskalign.checkpoints.sources import ENDINGS, locate
from maskalign.config import Config, TokenBudget, as_schedule, keep_count
from maskalign.errors import UsageError
from maskalign.models.mixer import NoMixer

DEFAULT_KEEP = 0.5  # keep ratio for runs that keep all tokens, and for files without settings


@dataclass(frozen=True)
class Entry:
    """A checkpoint to load: its path, and the run (the series) that it belongs to."""

    path: Path
    run: str


@dataclass
class Subject:
    """A loaded checkpoint.

    Attributes:
        model: `SiT` in eval mode.
        config: the run's `Config`; the defaults for a file without settings.
        run: name of the series.
        step: number of steps trained, or None if unknown.
        teachers: names of the teachers, () if unknown.
    """

    model: object
    config: Config
    run: str
    step: Optional[int]
    teachers: tuple

    @property
    def label(self):
        return self.run if self.step is None else f"{self.run}, step {self.step}"

    def kept(self, keep_ratio=None):
        """Number K of tokens in a subset: by `keep_ratio`, else by the run's smallest ratio if below 1, else a half."""
        if keep_ratio is None:
            if min(as_schedule(self.config.method.keep_ratio).ends) < 1:
                return self.budget.least
            keep_ratio = DEFAULT_KEEP
        return keep_count(keep_ratio, self.model.num_tokens, self.config.method.keep_multiple)

    def drawn(self, kept):
        """Number of patch tokens at the tap that are aligned if `kept` tokens are kept; None for all of them.

        A scheduled `method.align_ratio` is evaluated where the run keeps the fewest tokens, like `kept`.
        """
        return self.budget.drawn(self.budget.least_at, kept)

    @property
    def budget(self):
        """The run's `TokenBudget`."""
        return TokenBudget(self.config.method, self.model)

    @property
    def trained_on_subsets(self):
        """True if the blocks before the tap saw subsets in training."""
        lowest = min(as_schedule(self.config.method.keep_ratio).ends)
        route = self.model.route
        return lowest < 1 and route is not None and route[0] < self.model.align_depth


def find_checkpoints(paths, most=8):
    """Find the checkpoints at the given paths.

    Args:
        paths: run folders (all their checkpoints), checkpoint folders, REPA .pt or .safetensors files, or names that
            `checkpoints.sources.locate` knows.
        most: maximum number of checkpoints per run; they are evenly spread and include the first and the last.

    Returns:
        list of Entry: series in the given order, each ordered by step (files in the given order). A checkpoint that is
        given twice appears once.

    Raises:
        UsageError: a path has no checkpoint.
    """
    series = {}
    for source in paths:
        located = locate(source)
        path = located.path
        if located.name is not None:
            found, run = [path], Path(located.name)
        elif path.is_dir():
            found = complete_checkpoints(path)
            found = _spread(found, most) if found else [find(path)]
            run = found[0].parent.parent
        elif path.suffix not in ENDINGS:
            raise UsageError(f"{path}: cannot tell what this is; give a run folder, a checkpoint or a .pt file")
        else:
            found, run = [path], path.parent
        series.setdefault(run.resolve(), []).extend(found)
    entries = []
    for run, members in series.items():
        # Duplicates are found by the real path, but the given name is kept, because the Hub's cache has links to files
        # without an ending.
        unique = list({member.resolve(): Path(os.path.abspath(member)) for member in members}.values())
        name = run.name if [other.name for other in series].count(run.name) == 1 else f"{run.parent.name}/{run.name}"
        # A run's folders are sorted by step; files keep the given order, because their names have no order.
        unique.sort(key=lambda member: member.name if member.is_dir() else "")
        entries += [Entry(member, name) for member in unique]
    return entries


def load_subject(entry, ema=True):
    """Load the `Subject` of an entry.

    Raises:
        UsageError: the checkpoint cannot be read, or has no projectors and therefore no alignment loss.
    """
    loaded = load(entry.path, ema)
    model, config = loaded.model, loaded.config
    if config is None:
        config = Config()
        config.objective.path = loaded.info.path
        if isinstance(model.mixer, NoMixer):  # a file has no settings; with a mixer it was trained on subsets
            config.method.keep_ratio = 1.0
    if not model.projectors:
        raise UsageError(
            f"{entry.path}: has no projectors, so there is no alignment to analyze; it is a SiT, or was trained with "
            "method.align_weight 0"
        )
    return Subject(model, config, entry.run, loaded.info.step, tuple(loaded.info.teachers))


def _spread(items, most):
    """At most `most` of the items, evenly spread, always including the last one."""
    if len(items) <= most:
        return items
    if most == 1:
        return items[-1:]
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]
