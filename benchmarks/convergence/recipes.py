"""The recipes that `benchmarks.convergence` compares. A recipe is only settings on top of configs/convergence.yaml.

A suite is a list of recipes with seeds and shares of the budget. A share below 1 is a separate run whose schedules end
at this share. For example, a recipe with a full-token end phase is measured at 0.6 of the budget with a run that was
planned for 0.6.

`rates`, `paper` and `ablations` measure the results that the paper of MaskAlign reports (arXiv 2606.08788). The other
suites are the stages of the search for `maskalign-fast`, from the time before that paper was available.
"""

import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Optional

from maskalign.errors import UsageError

BASE = Path(__file__).resolve().parent.parent.parent / "configs" / "convergence.yaml"


def _step(start, end, begin):
    return f"{{kind: step, start: {start}, end: {end}, begin: {begin}}}"


def _masked(keep=0.5, begin=0.7, stop=0.5, mixer="token_mlp", **more):
    """Settings of `maskalign-fast` and its variants.

    Args:
        keep: the keep ratio before `begin`.
        begin: share of training after which all tokens are kept; None to use `keep` until the end.
        stop: share of training at which the alignment ends; None if it does not end, or if there is no alignment.
        mixer: `model.mixer`, with one layer.
        more: further settings.
    """
    settings = {"method.keep_ratio": keep if begin is None else _step(keep, 1.0, begin), "model.mixer": mixer}
    settings |= {"model.mixer_layers": 1} if mixer == "attention" else {}
    stopping = {} if stop is None else {"method.align_weight": _step(0.5, 0.0, stop)}
    return {**settings, **stopping, **more}


def _rise(begin, until):
    """The keep ratio that rises from a quarter to all tokens between two shares of training."""
    return {"method.keep_ratio": f"{{kind: linear, start: 0.25, end: 1.0, begin: {begin}, until: {until}}}"}


def _rising(begin, until, **more):
    return _masked(**_rise(begin, until), **more)


def _paper(keep=0.75, layers=2):
    """MaskAlign as in its paper without the class token: only a constant keep ratio and mixing layers."""
    mixer = {"model.mixer": "attention", "model.mixer_layers": layers} if layers else {"model.mixer": "none"}
    return {**mixer, "method.keep_ratio": keep}


_constant = partial(_masked, begin=0.9, stop=None)
_rival = partial(_masked, 0.25, begin=0.9, stop=None)
NO_TEACHER = {"method.align_weight": 0}
# The teacher's class token has width 320 and the model has width 128, so the model's linear head can predict at most
# 128 dimensions of it. The 64 leading principal components, scaled to unit variance, are a token that it can predict.
CLASS = {"model.class_token": "true", "model.class_token_dim": 64}
BYPASS = {"method.route": "[2, 6]", "method.restore": "bypass"}
FUSE = {"method.route": "[2, 6]", "method.restore": "fuse"}
# All blocks except the first and the last. This saves nearly as much as route `all`, and the loss is on all tokens.
WIDE = {"method.route": "[1, 7]", "method.restore": "bypass"}
# The papers' recipes, and our own recipes under other names. In the paper's ablations, `maskalign-mask0` has no masking
# and `maskalign-layers0` has no mixing; a recipe with neither is `reg`.
PAPERS = {
    "repa": {},
    "reg": CLASS,
    "maskalign": {**CLASS, **_paper()},
    "repa-maskalign": _paper(),
    "maskalign-fast": _rising(0.4, 0.9),
    "maskalign-fast-attention": _rising(0.4, 0.9, mixer="attention"),
    "maskalign-fast-class": {**_rising(0.4, 0.9), **CLASS},
}
ABLATIONS = {
    "maskalign-mask0": {**CLASS, **_paper(1.0)},
    "maskalign-mask0.5": {**CLASS, **_paper(0.5)},
    "maskalign-mask0.75": {**CLASS, **_paper(0.25)},
    "maskalign-layers0": {**CLASS, **_paper(layers=0)},
    "maskalign-layers1": {**CLASS, **_paper(layers=1)},
    "maskalign-layers3": {**CLASS, **_paper(layers=3)},
}
# Competing methods as in their papers, scaled from 12 blocks to 8. The early variants of `maskalign-fast` are
# `maskalign-step` (half of the tokens until 0.7 of training, then all) with the changes in their names. `constant` is
# the recipe before the screening: it is aligned until the end, and keeps all tokens only in the last tenth.
RECIPES = {
    **PAPERS,
    **ABLATIONS,
    "sit": NO_TEACHER,
    "repa-early-stop": {"method.align_weight": _step(0.5, 0.0, 0.5)},
    "loss-only": {"method.keep_ratio": 0.5, "method.route": "none"},
    "tread": {"method.keep_ratio": 0.5, **BYPASS, **NO_TEACHER},
    "tread+repa": {"method.keep_ratio": 0.5, **BYPASS},
    "sprint": _rival(mixer="none", **FUSE, **NO_TEACHER),
    "sprint+repa": _rival(mixer="none", **FUSE),
    "deferred-masking": _rival(mixer="attention", **NO_TEACHER),
    "maskalign-rising0-0.7": _rising(0.0, 0.7),
    "maskalign-rising0.2-0.65": _rising(0.2, 0.65),
    "maskalign-rising0.2-0.8": _rising(0.2, 0.8),
    "maskalign-rising0.2-1": _rising(0.2, 1.0),
    "maskalign-rising0.5-1": _rising(0.5, 1.0),
    "maskalign-step": _masked(),
    "maskalign-no-end": _masked(begin=None),
    "maskalign-end0.9": _masked(begin=0.9),
    "maskalign-end0.5": _masked(begin=0.5),
    "maskalign-keep0.75": _masked(0.75),
    "maskalign-keep0.25": _masked(0.25),
    "maskalign-keep0.25-end0.9": _masked(0.25, begin=0.9),
    "maskalign-end0.9-stop0.3": _masked(begin=0.9, stop=0.3),
    "maskalign-constant": _masked(stop=None),
    "maskalign-end0.9-half-aligned": _masked(begin=0.9, **{"method.align_ratio": 0.5}),
    "maskalign-no-mixer": _masked(mixer="none"),
    "maskalign-conv-mixer": _masked(mixer="depthwise_conv"),
    "maskalign-attention-mixer": _masked(mixer="attention"),
    "maskalign-attention-keep0.25": _masked(0.25, mixer="attention"),
    "maskalign-attention": _masked(0.25, begin=0.9, mixer="attention"),
    "maskalign-mixer8": _masked(**{"model.mixer_hidden": 8}),
    "maskalign-mixer128": _masked(**{"model.mixer_hidden": 128}),
    "maskalign-grid": _masked(**{"method.subset": "grid"}),
    "maskalign-block": _masked(**{"method.subset": "block"}),
    "maskalign-bypass": _masked(**BYPASS),
    "maskalign-wide": _masked(**WIDE),
    "maskalign-fuse": _masked(**FUSE),
    "maskalign-depth2": _masked(**{"method.align_depth": 2}),
    "maskalign-depth5": _masked(**{"method.align_depth": 5}),
    "constant": _constant(),
    "constant-no-end": _constant(begin=None),
    "constant-keep0.25": _constant(0.25),
    "constant-ramp": {**_rise(0.0, 0.9), "model.mixer": "token_mlp"},
    "constant-conv-mixer": _constant(mixer="depthwise_conv"),
    "constant-weight0.25": _constant(**{"method.align_weight": 0.25}),
    "constant-weight1": _constant(**{"method.align_weight": 1.0}),
    "constant-wide": _constant(**WIDE),
}


@dataclass(frozen=True)
class Suite:
    """The runs of one command.

    Attributes:
        recipes, seeds: recipes and seeds of the runs.
        shares: dict from recipe to its shares of the budget; 1 for recipes that are not in it.
        features: the features for the distances of samples: `teacher`, or `classifier` (see classifier.py) if models
            have the teacher's class token in their input.
        rates: the source of the learning rates: None for the base settings and --set; `search` to run every recipe with
            each of --rates; `chosen` for the rate that the suite `rates` chose for each recipe; or the name of a
            recipe whose chosen rate is used for all.
        equal_steps: measure every run also after as many steps as the slowest recipe makes in total.
    """

    recipes: tuple
    seeds: tuple
    shares: dict = field(default_factory=dict)
    features: str = "teacher"
    rates: Optional[str] = None
    equal_steps: bool = False


# Variants of the mixer, the subset, the route and the tapped block, with unchanged schedules.
STRUCTURE = (
    "no-mixer", "conv-mixer", "mixer8", "mixer128", "attention-mixer", "attention-keep0.25", "attention", "grid",
    "block", "bypass", "wide", "fuse", "depth2", "depth5",
)  # fmt: skip
RISING = ("rising0-0.7", "rising0.2-0.65", "rising0.2-0.8", "rising0.2-1", "rising0.5-1")
BOTH = ("maskalign-fast", "maskalign-attention")  # the two recipes that were in configs/imagenet256
EARLY = tuple(name for name in RECIPES if name not in {**PAPERS, **ABLATIONS} or name == "maskalign-fast")
VARIANTS = tuple(name for name in EARLY if name.startswith(("maskalign", "constant")))
MASK_RATIOS = ("maskalign-mask0", "maskalign", "maskalign-mask0.5", "maskalign-mask0.75")
LAYERS = ("maskalign-layers0", "maskalign-layers1", "maskalign", "maskalign-layers3")
SUITES = {
    "rates": Suite(tuple(PAPERS), (0,), features="classifier", rates="search"),
    "paper": Suite(tuple(PAPERS), (0, 1, 2), features="classifier", rates="chosen", equal_steps=True),
    "ablations": Suite(
        tuple(dict.fromkeys(("reg", *MASK_RATIOS, *LAYERS))), (0,), features="classifier", rates="maskalign",
        equal_steps=True,
    ),
    # Stages of one search: the results of each stage decided which recipes the next stage compared.
    "screening": Suite(("repa", "repa-early-stop", "sit", *VARIANTS), (0,), {}),
    "structure": Suite(("repa", "maskalign-step", *(f"maskalign-{name}" for name in STRUCTURE)), (0,), {}),
    "rivals": Suite(("repa", *(name for name in EARLY if name not in VARIANTS), "maskalign-step", *BOTH), (0,), {}),
    "short": Suite(("repa", "maskalign-step", *BOTH), (0, 1, 2), {}),
    # With the competing method that was best in the first stage.
    "contenders": Suite(
        ("repa", "maskalign-step", "maskalign-attention", "deferred-masking"), (0, 1, 2),
        dict.fromkeys(("maskalign-step", "maskalign-attention"), (1.0, 0.6)),
    ),
    "schedules": Suite(
        ("repa", "maskalign-step", "maskalign-end0.5", "maskalign-block", "maskalign-fast",
         *(f"maskalign-{name}" for name in RISING)), (0,), {},
    ),
    "final": Suite(("repa", "maskalign-fast"), (0, 1, 2), {"maskalign-fast": (1.0, 0.6)}),
}  # fmt: skip


def own_recipe(text):
    """Parse a recipe from the command line: `NAME: --section.key value ...`, or `NAME=OTHER: ...` on top of a recipe.

    Returns:
        (name, settings).
    """
    head, colon, words = text.partition(":")
    name, _, other = (part.strip() for part in head.partition("="))
    words = shlex.split(words)
    good = colon and name and len(words) % 2 == 0 and all(word.startswith("--") for word in words[::2])
    if not good or "/" in name:
        raise UsageError(f"--recipe {text!r}: write NAME: --section.key value ..., or NAME=OTHER: ...")
    if other and other not in RECIPES:
        raise UsageError(f"--recipe {text!r}: there is no recipe {other!r}; there are {', '.join(RECIPES)}")
    own = {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True)}
    return name, {**RECIPES.get(other, {}), **own}


def arguments(settings):
    """The settings as command-line arguments of `maskalign train`."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def recipe_config(settings, base=BASE, **more):
    """The validated `Config` of a recipe: the base, then `settings`, then `more` (with `__` for the dots in names)."""
    from maskalign.config import parse_config

    more = {key.replace("__", "."): value for key, value in more.items()}
    return parse_config(["--config", str(base), *arguments({**settings, **more})])
