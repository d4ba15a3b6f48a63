"""The rules between settings: alone, with the number of processes, and with the data set.

Each broken rule is one `UsageError` that says what, where and how to fix it. Nothing heavy is imported, so that a
mistake is found before torch is loaded.
"""

from dataclasses import dataclass
from typing import List, Optional, Tuple

from maskalign.config.ranges import check_ranges
from maskalign.config.schedules import as_schedule
from maskalign.config.settings import model_sizes
from maskalign.config.teacher_names import (
    INSTALLED_TEACHER,
    check_teacher_name,
    class_kind_of,
    no_class_tokens,
    parse_teachers,
)
from maskalign.errors import UsageError

LOGGERS = ("tensorboard", "wandb")
DEVICES = ("auto", "cpu", "cuda")


def validate(config):
    """Check the rules between settings; raises one UsageError with what, where and how to fix it."""
    _require(str(config.run_dir).strip(), "run_dir", repr(config.run_dir), "names no folder; give one for the run")
    check_ranges(config)
    sizes = model_sizes(config)
    depth, width, heads = sizes["depth"], sizes["width"], sizes["heads"]
    _require(width % heads == 0, "model.heads", heads, f"must divide model.width {width}")
    _require(width % 4 == 0, "model.width", width, "must be divisible by 4 (position embedding)")
    align_depth = sizes["align_depth"]
    _require(1 <= align_depth <= depth, "method.align_depth", align_depth, f"must be a block of the model, 1..{depth}")
    method = config.method
    if not isinstance(method.route, str):
        start, end = method.route
        _require(
            0 <= start < end <= depth, "method.route", [start, end], f"must satisfy 0 <= start < end <= depth {depth}"
        )
    for name in ("keep_ratio", "align_weight", "align_ratio"):
        _validate_schedule(f"method.{name}", getattr(method, name))
    if method.restore != "none" and method.route == "none":
        raise UsageError("method.restore: nothing is dropped with method.route none; set restore none or give a route")
    if config.model.projector == "conv":
        start, end = (0, depth) if method.route == "all" else (0, 0) if method.route == "none" else method.route
        inside = start < align_depth and (align_depth <= end or method.restore == "none")
        all_kept = set(as_schedule(method.keep_ratio).ends) == {1.0}
        if inside and not all_kept and method.route != "none":
            raise UsageError(
                f"model.projector: conv needs all tokens at block {align_depth}, which sees only the subset; "
                "choose mlp, move method.align_depth before the route, or set method.route none"
            )
    if config.model.class_token_dim is not None and not config.model.class_token:
        raise UsageError("model.class_token_dim: there is no class token; set model.class_token true, or leave it out")
    for key in ("preview.cls_cfg_scale", "evaluate.cls_cfg_scale"):
        if _get(config, key) is not None and not config.model.class_token:
            raise UsageError(f"{key}: there is no class token to guide; set model.class_token true, or leave it out")
    for name in config.training.loggers:
        _require(name in LOGGERS, "training.loggers", name, f"is not one of {', '.join(LOGGERS)}")
    device = config.training.device
    _require(device.split(":")[0] in DEVICES, "training.device", device, f"is not one of {', '.join(DEVICES)}, cuda:N")
    batch, parts = config.training.batch_size, config.training.accumulation
    _require(batch % parts == 0, "training.accumulation", parts, f"must divide training.batch_size {batch}")
    for key in ("evaluate.samples", "evaluate.reference"):
        _require(_get(config, key) == 0 or _get(config, key) >= 2, key, _get(config, key), "must be 0 or at least 2")
    if config.evaluate.every:
        check_teacher_name(config.evaluate.teacher)
    return sizes


def validate_with_ranks(config, world_size, local_world_size=None):
    """Check the settings against the number of processes, and on this node; needs no torch, so it can come first."""
    plan, batch, parts = config.parallel.plan, config.training.batch_size, config.training.accumulation
    if plan == "none" and world_size > 1:
        raise UsageError(
            f"parallel.plan: none runs in one process, but torchrun started {world_size}; set ddp, fsdp or hsdp"
        )
    _require(
        batch % (world_size * parts) == 0,
        "training.batch_size",
        batch,
        f"must be a multiple of ranks x training.accumulation = {world_size} x {parts} = {world_size * parts}",
    )
    shard_ranks(config.parallel, world_size, local_world_size)


def shard_ranks(parallel, world_size, local_world_size=None):
    """Ranks that share one copy of the weights: 1 for none and ddp, all for fsdp, for hsdp as set or those of a node.

    Raises:
        UsageError: where that does not divide the ranks.
    """
    if parallel.plan != "hsdp":
        return world_size if parallel.plan == "fsdp" else 1
    size = parallel.shard_size or local_world_size or world_size
    _require(world_size % size == 0, "parallel.shard_size", size, f"must divide the {world_size} ranks")
    return size


@dataclass(frozen=True)
class DataFacts:
    """What a run takes from its data set.

    Attributes:
        input_size, in_channels, num_classes: of the model.
        teachers: (name, cached) of every teacher that is aligned with.
        class_token: such a pair for the class token that is denoised too, or None.
    """

    input_size: int
    in_channels: int
    num_classes: int
    teachers: List[Tuple[str, bool]]
    class_token: Optional[Tuple[str, bool]] = None

    @property
    def sources(self):
        """(name, cached) of every teacher whose features a step needs."""
        return self.teachers or ([self.class_token] if self.class_token else [])


def validate_with_data(config, manifest, num_samples=None):
    """Check the settings against the data set's manifest; fills in `teacher.names` where none are given.

    Args:
        config: `Config`.
        manifest: of the data set; of any one where several are mixed.
        num_samples: of all data sets together; by default the manifest's.

    Returns:
        DataFacts.
    """
    sizes = model_sizes(config)
    if manifest.latent is not None:
        moments, height, _ = manifest.latent["shape"]
        input_size, in_channels = height, moments // 2
    else:
        input_size, in_channels = manifest.resolution, manifest.channels
    patch = sizes["patch_size"]
    rule = f"must divide the input size {input_size} of {config.data.path}"
    _require(input_size % patch == 0, "model.patch_size", patch, rule)
    batch, num_samples = config.training.batch_size, num_samples or manifest.num_samples
    _require(
        batch <= num_samples,
        "training.batch_size",
        batch,
        f"is larger than the {num_samples} samples of {config.data.path}",
    )
    aligned = max(as_schedule(config.method.align_weight).ends) > 0
    with_class = config.model.class_token
    names = []
    if aligned or with_class:
        config.teacher.names = names = parse_teachers(config.teacher.names or teachers_of(manifest, config.data.path))
    # The class token is denoised whether or not anything is aligned.
    needed = names if aligned else names[:1] if with_class else []
    sources = [(name, _is_cached(config, manifest, name)) for name in needed]
    if with_class:
        for name, cached in sources:
            _check_class_token(config, manifest, name, cached)
        _check_class_token_dim(config, manifest, names[0])
    return DataFacts(
        input_size=input_size,
        in_channels=in_channels,
        num_classes=len(manifest.class_names),
        teachers=sources if aligned else [],
        class_token=sources[0] if with_class else None,
    )


def teachers_of(manifest, path):
    """The teachers of a run that names none: the one whose features a data set has, else the one that is installed.

    Raises:
        UsageError: the data set has the features of several.
    """
    there = list(manifest.teachers)
    if len(there) > 1:
        raise UsageError(f"teacher.names: {path} has features of {', '.join(there)}; name one of them, or several")
    return there or [INSTALLED_TEACHER]


def _is_cached(config, manifest, name):
    """Whether a teacher's features are read from the shards, not computed; a UsageError where neither can be."""
    cached = name in manifest.teachers
    if config.teacher.mode == "cached" and not cached:
        there = ", ".join(manifest.teachers) or "none"
        raise UsageError(
            f"teacher.names: {config.data.path} has no features of {name!r} (it has {there}); run maskalign "
            f"data encode --data {config.data.path} --teacher {name}, or set teacher.mode online"
        )
    cached = cached and config.teacher.mode != "online"
    if not cached and manifest.image_format is None:
        raise UsageError(
            f"teacher.names: {name!r} needs images, and {config.data.path} has none; encode its features first"
        )
    return cached


def _check_class_token(config, manifest, name, cached):
    """A teacher's class token must be in the shards where its rows are read from them, or one that can be computed."""
    path, entry = config.data.path, manifest.teachers.get(name)
    if entry is not None and "class_token" in entry:
        return
    if cached:
        raise UsageError(f"model.class_token: {path}: {no_class_tokens(name, path)}")
    if class_kind_of(name) == "mean":
        add = " --class-token only" if entry is not None else ""
        raise UsageError(
            f"model.class_token: the class token of {name!r} is standardized with statistics of the data set, which "
            f"{path} does not have; run maskalign data encode --data {path} --teacher {name}{add}"
        )


def _check_class_token_dim(config, manifest, name):
    """The principal components that model.class_token_dim asks for must be in the manifest."""
    wanted, path = config.model.class_token_dim, config.data.path
    if wanted is None:
        return
    class_token = manifest.teachers.get(name, {}).get("class_token", {})
    stored = len(class_token.get("components", {}).get("basis", ()))
    if wanted <= stored:
        return
    most = class_token.get("dim")
    if most is not None and wanted > most:
        mend = f"the class token has {most} numbers; leave model.class_token_dim out, or set it lower"
    else:
        mend = (
            f"run maskalign data encode --data {path} --teacher {name} --class-components {wanted}"
            f"{' --class-token only' if name in manifest.teachers else ''}, or set it lower"
        )
    raise UsageError(
        f"model.class_token_dim: {wanted}, but {path} has {stored} principal components of the class tokens of "
        f"{name!r}; {mend}"
    )


def _get(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _require(condition, key, value, rule):
    if not condition:
        raise UsageError(f"{key}: {value} {rule}")


def _validate_schedule(key, value):
    if value is None:
        return
    schedule = as_schedule(value)
    _require(
        0 <= schedule.begin <= schedule.until <= 1,
        key,
        f"begin {schedule.begin}, until {schedule.until}",
        "must satisfy 0 <= begin <= until <= 1",
    )
