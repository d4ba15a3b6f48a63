"""One typed tree of settings, read from YAML and the command line, checked before anything heavy is imported.

The text under a field is its help line. `validate` holds the rules that types cannot say; the ones that need the data
set's manifest are in `validate_with_data`.
"""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Dict, List, Literal, Optional, Tuple, Union

from maskalign.errors import UsageError
from maskalign.models.presets import preset_sizes
from maskalign.teachers.names import check_teacher_name, parse_teachers


@dataclass
class Schedule:
    """A value that changes over training."""

    kind: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the value goes from start to end."""
    start: float = 0.0
    """The value up to `begin`."""
    end: float = 0.0
    """The value from `until` on (`step` changes at `begin`)."""
    begin: float = 0.0
    """Share of training, in [0, 1], at which the change begins."""
    until: float = 1.0
    """Share of training, in [0, 1], at which the change is complete."""


Scheduled = Union[float, Schedule]


@dataclass
class DataConfig:
    """The data set and how it is read."""

    path: Union[Dict[str, float], str] = "datasets/imagenet256"
    """Folder or URL prefix of the shards and their manifest.json; or several with weights, {PATH: WEIGHT, ...}."""
    num_workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""
    max_bad_fraction: float = 0.01
    """Share of bad samples above which the run stops."""
    cache_dir: Optional[str] = None
    """Local folder in which remote shards are kept."""
    allow_pipe: bool = False
    """Allow `pipe:` shard URLs, which run a shell command."""


@dataclass
class TeacherConfig:
    """The frozen encoders whose features the student is aligned with."""

    names: List[str] = field(default_factory=lambda: ["dinov2-b"])
    """Teachers: dinov2-{s,b,l,g}, efficientnet-lite0[:16] or timm:MODEL."""
    mode: Literal["auto", "cached", "online"] = "auto"
    """Features from the shards (cached), computed in the loop (online), or whichever the data set allows."""
    weights: Optional[str] = None
    """Weights for online teachers: a local file, hub, or random (for tests)."""
    normalize: Literal["none", "spatial"] = "none"
    """Normalisation of online features; spatial is iREPA's, over the tokens of an image."""


@dataclass
class ModelConfig:
    """The student."""

    preset: Optional[str] = None
    """SiT-{S,B,L,XL}/{2,4,8}; the sizes below override it."""
    depth: Optional[int] = None
    """Number of blocks."""
    width: Optional[int] = None
    """Width of a token."""
    heads: Optional[int] = None
    """Attention heads; they divide the width."""
    patch_size: Optional[int] = None
    """Side of a patch in pixels or latents; it divides the input size."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over its width."""
    qk_norm: bool = False
    """LayerNorm on queries and keys."""
    attention: Literal["auto", "sdpa", "math", "flash_attn"] = "auto"
    """Attention: torch's fused kernel, plain operations, the faster of these, or the package flash-attn (GPUs)."""
    mixer: Literal["token_mlp", "depthwise_conv", "attention", "none"] = "token_mlp"
    """What shares information across all tokens before some are dropped."""
    mixer_hidden: int = 64
    """Hidden number of tokens T of the token_mlp mixer."""
    projector: Literal["mlp", "conv"] = "mlp"
    """Projector to the teacher: REPA's MLP, or iREPA's 3x3 convolution (needs all tokens at the tap)."""
    projector_dim: int = 2048
    """Hidden width of the MLP projector."""


@dataclass
class MethodConfig:
    """Which tokens are computed and which are aligned."""

    keep_ratio: Scheduled = 0.5
    """Share of tokens that take the route: a number in (0, 1] or a schedule."""
    align_weight: Scheduled = 0.5
    """Weight of the alignment loss: a number or a schedule; 0 turns the alignment off."""
    align_depth: Optional[int] = None
    """Block whose output is aligned, counted from 1; by default the preset's (B 4, L and XL 8), else a third."""
    align_ratio: Optional[Scheduled] = None
    """Align an independently drawn share of the tokens present at the tap; by default all of them."""
    route: Union[Literal["all", "none"], Tuple[int, int]] = "all"
    """Blocks [start, end) that see only the subset; none: all blocks see all tokens (loss-only masking)."""
    restore: Literal["none", "bypass", "fuse"] = "none"
    """What returns at the end of the route: nothing, the dropped tokens (TREAD), or a learned fusion (SPRINT)."""
    subset: Literal["uniform", "grid", "block"] = "uniform"
    """How the subset is drawn."""
    keep_multiple: int = 8
    """The number of kept tokens is rounded to a multiple of this."""


@dataclass
class ObjectiveConfig:
    """The denoising objective."""

    path: Literal["linear", "cosine"] = "linear"
    """Interpolant between data (t = 0) and noise (t = 1)."""
    time: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of the time t."""
    label_dropout: float = 0.1
    """Share of labels replaced by "no class", for classifier-free guidance."""


@dataclass
class OptimizerConfig:
    """AdamW, its schedule, and the moving average."""

    lr: float = 1e-4
    """Learning rate."""
    betas: Tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to zero at the end."""
    decay_from: float = 0.0
    """Share of training at which the fall begins."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights, every step."""


@dataclass
class TrainingConfig:
    """The loop."""

    max_steps: int = 400_000
    """Optimiser steps."""
    max_seconds: Optional[float] = None
    """Stop, with every schedule complete, after this much training time if max_steps is not reached before."""
    batch_size: int = 256
    """Images per optimiser step, over all ranks."""
    accumulation: int = 1
    """Micro-batches per optimiser step; it divides the batch of a rank."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 where the processor has it, else fp32; master weights stay float32."""
    compile: bool = False
    """torch.compile every block."""
    log_every: int = 50
    """Steps between rows of metrics.csv."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay on disk."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps stay on disk for good; 0 keeps the newest only."""
    async_checkpoint: bool = True
    """Copy to host memory and write in the background; else training waits for the disk."""
    timeout: float = 600.0
    """Seconds without progress after which a run on several ranks ends and names the rank and the step."""
    sample_every: int = 10_000
    """Steps between grids of EMA samples; 0 draws only the last one."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of run_dir; never: refuse a used run_dir; or the path of a checkpoint."""
    init_from: Optional[str] = None
    """Start from the weights of this checkpoint (ours or REPA's), not from its step."""
    max_nonfinite: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient; each is skipped and counted."""
    device: str = "auto"
    """auto, cpu or cuda."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    progress: bool = True
    """Show the progress bar."""


@dataclass
class PreviewConfig:
    """The sample grids drawn during training."""

    classes: int = 10
    """Number of classes, a row each."""
    per_class: int = 8
    """Pictures per class."""
    steps: int = 50
    """Sampler steps."""
    cfg_scale: float = 2.0
    """Classifier-free guidance scale; 1 is none."""
    sampler: Literal["ode", "heun", "sde"] = "ode"
    """Sampler."""
    vae: Optional[str] = None
    """Decoder of latents: name or folder of an AutoencoderKL; by default the data set's, if it can be loaded."""


@dataclass
class EvaluateConfig:
    """The light evaluation of the averaged weights during training; maskalign evaluate is the thorough one."""

    every: int = 0
    """Steps between evaluations, written to evaluation.csv; 0 is none, else one is also made at the end."""
    data: Optional[str] = None
    """Held-out data set; by default data.path, whose images the run has seen."""
    images: int = 256
    """Held-out images for the velocity loss and the alignment cosine by time; 0 leaves these out."""
    samples: int = 500
    """Samples for the Frechet and the kernel distance; 0 leaves these out."""
    reference: int = 5000
    """Images of the data set that the samples are compared with; 0 for all."""
    teacher: str = "efficientnet-lite0"
    """Teacher in whose features the distances are."""
    steps: int = 50
    """Sampler steps."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale of the samples; 1 is none."""


@dataclass
class ParallelConfig:
    """How the work is spread over processes."""

    plan: Literal["none", "ddp", "fsdp", "hsdp"] = "none"
    """none: one process; ddp: a copy on every rank; fsdp: shards over all ranks; hsdp: over groups of ranks."""
    shard_size: Optional[int] = None
    """hsdp: ranks that share one copy of the weights; it divides the ranks; by default the ranks of a node."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free gathered weights between forward and backward (ZeRO-3), or keep them (ZeRO-2)."""
    prefetch: int = 1
    """fsdp, hsdp: blocks whose weights are gathered ahead of the one that computes."""
    recompute: Literal["none", "block", "selective"] = "none"
    """Activations made again in the backward: none, of all blocks, or as many as memory_budget asks for."""
    memory_budget: float = 0.5
    """selective: share of the blocks' activations that is kept, in [0, 1]."""
    ema_on_cpu: bool = False
    """Keep the moving average in host memory."""
    shard_teacher_above: float = 1024.0
    """fsdp, hsdp: MiB of weights above which an online teacher is sharded too."""


@dataclass
class Config:
    """All settings of a training run."""

    seed: int = 0
    """Seed of every random draw."""
    run_dir: str = "runs/run"
    """Folder of the run: settings, metrics, samples, checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def as_schedule(value):
    """A scheduled setting as a `Schedule`; a plain number is constant."""
    if isinstance(value, Schedule):
        return value
    return Schedule(kind="constant", start=float(value), end=float(value))


def model_sizes(config):
    """Depth, width, heads, patch size and alignment depth that the settings add up to.

    Raises:
        UsageError: where neither a preset nor a size gives one of them.
    """
    model = config.model
    sizes = preset_sizes(model.preset) if model.preset else {}
    for name in ("depth", "width", "heads", "patch_size"):
        value = getattr(model, name)
        if value is not None:
            sizes[name] = value
        elif name not in sizes:
            raise UsageError(f"model.{name} is missing: set it, or model.preset (e.g. SiT-B/2)")
    if config.method.align_depth is not None:
        sizes["align_depth"] = config.method.align_depth
    elif not model.preset or model.depth is not None:
        sizes["align_depth"] = max(1, round(sizes["depth"] / 3))
    return sizes


def validate(config):
    """Check the rules between settings; raises one UsageError with what, where and how to mend it."""
    sizes = model_sizes(config)
    for name in ("depth", "width", "heads", "patch_size"):
        _require(sizes[name] >= 1, f"model.{name}", sizes[name], "must be at least 1")
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
    _validate_schedule("method.keep_ratio", method.keep_ratio, 0, 1, "must be in (0, 1]", open_low=True)
    _validate_schedule("method.align_weight", method.align_weight, 0, float("inf"), "must be at least 0")
    if method.align_ratio is not None:
        _validate_schedule("method.align_ratio", method.align_ratio, 0, 1, "must be in (0, 1]", open_low=True)
    if method.restore != "none" and method.route == "none":
        raise UsageError("method.restore: nothing is dropped with method.route none; set restore none or give a route")
    if config.model.projector == "conv":
        start, end = (0, depth) if method.route == "all" else (0, 0) if method.route == "none" else method.route
        inside = start < align_depth and (align_depth <= end or method.restore == "none")
        all_kept = set(_values(as_schedule(method.keep_ratio))) == {1.0}
        if inside and not all_kept and method.route != "none":
            raise UsageError(
                f"model.projector: conv needs all tokens at block {align_depth}, which sees only the subset; "
                "choose mlp, move method.align_depth before the route, or set method.route none"
            )
    at_least = {
        "method.keep_multiple": 1,
        "model.mixer_hidden": 1,
        "model.projector_dim": 1,
        "training.max_steps": 1,
        "training.batch_size": 1,
        "training.accumulation": 1,
        "training.log_every": 1,
        "training.checkpoint_every": 1,
        "training.keep_checkpoints": 1,
        "training.keep_every": 0,
        "training.timeout": 1,
        "training.sample_every": 0,
        "training.max_nonfinite": 1,
        "data.num_workers": 0,
        "parallel.prefetch": 0,
        "parallel.shard_teacher_above": 0,
        "optimizer.warmup_steps": 0,
        "optimizer.grad_clip": 0,
        "optimizer.weight_decay": 0,
        "preview.classes": 1,
        "preview.per_class": 1,
        "preview.steps": 1,
        "evaluate.every": 0,
        "evaluate.images": 0,
        "evaluate.samples": 0,
        "evaluate.reference": 0,
        "evaluate.steps": 1,
        "evaluate.cfg_scale": 0,
    }
    for key, low in at_least.items():
        value = _get(config, key)
        _require(value >= low, key, value, f"must be at least {low}")
    for key in ("optimizer.lr", "optimizer.eps", "model.mlp_ratio"):
        _require(_get(config, key) > 0, key, _get(config, key), "must be above 0")
    for key in ("data.max_bad_fraction", "optimizer.decay_from", "objective.label_dropout", "parallel.memory_budget"):
        _require(0 <= _get(config, key) <= 1, key, _get(config, key), "must be in [0, 1]")
    for key in ("optimizer.ema_decay",):
        _require(0 <= _get(config, key) < 1, key, _get(config, key), "must be in [0, 1)")
    for beta in config.optimizer.betas:
        _require(0 <= beta < 1, "optimizer.betas", list(config.optimizer.betas), "must be in [0, 1)")
    seconds = config.training.max_seconds
    _require(seconds is None or seconds > 0, "training.max_seconds", seconds, "must be above 0")
    batch, parts = config.training.batch_size, config.training.accumulation
    _require(batch % parts == 0, "training.accumulation", parts, f"must divide training.batch_size {batch}")
    for key in ("evaluate.samples", "evaluate.reference"):
        _require(_get(config, key) == 0 or _get(config, key) >= 2, key, _get(config, key), "must be 0 or at least 2")
    if config.evaluate.every:
        check_teacher_name(config.evaluate.teacher)
    shard_size = config.parallel.shard_size
    _require(shard_size is None or shard_size >= 1, "parallel.shard_size", shard_size, "must be at least 1")
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


def validate_with_data(config, manifest, num_samples=None):
    """Check the settings against the data set's manifest.

    Args:
        config: `Config`.
        manifest: of the data set; of any one where several are mixed.
        num_samples: of all data sets together; by default the manifest's.

    Returns:
        dict with what the model takes from the data: input_size, in_channels, num_classes, and `teachers`, a list of
        (name, cached) pairs.
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
    teachers = []
    if max(_values(as_schedule(config.method.align_weight))) > 0:
        names = parse_teachers(config.teacher.names or None)
        if not names:
            raise UsageError("teacher.names: the alignment needs a teacher; name one, or set method.align_weight 0")
        for name in names:
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
            teachers.append((name, cached))
    return {
        "input_size": input_size,
        "in_channels": in_channels,
        "num_classes": len(manifest.class_names),
        "teachers": teachers,
    }


def make_config_parser(**kwargs):
    """A jsonargparse parser of `--config FILE.yaml` and `--section.key value`."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class ConfigParser(ArgumentParser):
        def error(self, message, ex=None):
            raise UsageError(_with_suggestion(" ".join(str(message).split())))

    parser = ConfigParser(allow_abbrev=False, **kwargs)
    parser.add_argument("--config", action="config", help="YAML file of settings; later options override it.")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def parse_config(argv, **kwargs):
    """Read a command line into a checked `Config`.

    Args:
        argv: `--config FILE.yaml` and `--section.key value`, in any order; later ones win.
        kwargs: those of jsonargparse's ArgumentParser.

    Raises:
        UsageError: an unknown key, a bad value or a rule of `validate`.
    """
    parser = make_config_parser(**kwargs)
    config = parser.instantiate(parser.parse_args(argv))
    config = Config(**{name: getattr(config, name) for name in Config.__dataclass_fields__})
    validate(config)
    return config


def load_config(path):
    """A checked `Config` from a YAML file."""
    return parse_config(["--config", str(path)])


def dump_config(config):
    """All settings as YAML that `load_config` reads back."""
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False, default_flow_style=None, width=120)


def _plain(value):
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def all_keys(cls=Config, prefix=""):
    """Every dotted name of a setting."""
    keys = []
    for name, entry in cls.__dataclass_fields__.items():
        nested = entry.default_factory if hasattr(entry.default_factory, "__dataclass_fields__") else None
        keys += all_keys(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def _with_suggestion(message):
    """Add the nearest setting's name to a message about an unknown key."""
    patterns = (
        r"nrecognized arguments: --([\w.]+)",
        r"[Kk]ey '([\w.]+)' is not expected",
        r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    )
    match = next((found for pattern in patterns if (found := re.search(pattern, message))), None)
    if not match:
        return message
    wrong = ".".join(match.groups())
    near = get_close_matches(wrong, all_keys(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no setting {wrong!r}{hint}; maskalign train --help lists them"


def _get(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _require(condition, key, value, rule):
    if not condition:
        raise UsageError(f"{key}: {value} {rule}")


def _values(schedule):
    return (schedule.start,) if schedule.kind == "constant" else (schedule.start, schedule.end)


def _validate_schedule(key, value, low, high, rule, open_low=False):
    schedule = as_schedule(value)
    for number in _values(schedule):
        _require((number > low if open_low else number >= low) and number <= high, key, number, rule)
    _require(
        0 <= schedule.begin <= schedule.until <= 1,
        key,
        f"begin {schedule.begin}, until {schedule.until}",
        "must satisfy 0 <= begin <= until <= 1",
    )
