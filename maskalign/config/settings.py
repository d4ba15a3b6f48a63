"""The settings as one tree of dataclasses, and values that follow from them alone.

The text under a field is its help line. checks.py has the rules that types cannot express, parsing.py reads the tree.
"""

from dataclasses import dataclass, field
from typing import Annotated, Dict, List, Literal, Optional, Tuple, Union, get_args

from maskalign.config.presets import preset_sizes
from maskalign.config.ranges import ABOVE_0, ABOVE_0_TO_1, AT_LEAST_0, AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1
from maskalign.config.schedules import Scheduled
from maskalign.errors import UsageError

PathName = Literal["linear", "cosine"]
PATHS = get_args(PathName)  # of the interpolant


@dataclass
class DataConfig:
    """The data set and how it is read."""

    path: Union[Dict[str, float], str] = "datasets/imagenet256"
    """Folder or URL prefix of the shards and their manifest.json; or several with weights, {PATH: WEIGHT, ...}."""
    num_workers: Annotated[int, AT_LEAST_0] = 0
    """Loader processes per rank; 0 reads in the training process."""
    max_bad_fraction: Annotated[float, FROM_0_TO_1] = 0.01
    """Share of bad samples above which the run stops."""
    cache_dir: Optional[str] = None
    """Local folder in which remote shards are kept."""
    allow_pipe: bool = False
    """Allow `pipe:` shard URLs, which run a shell command."""


@dataclass
class TeacherConfig:
    """The frozen encoders whose features the student is aligned with."""

    names: Union[List[str], str] = field(default_factory=lambda: ["dinov2-b"])
    """Teachers: dinov2-{s,b,l,g}, efficientnet-lite0[:16] or timm:MODEL; one name, or a list of them. [] is the one
    whose features the data set has, or efficientnet-lite0, computed in the loop, where it has none."""
    mode: Literal["auto", "cached", "online"] = "auto"
    """Features from the shards (cached), computed in the loop (online), or whichever the data set allows."""
    weights: Optional[str] = None
    """Weights for online teachers: a local file, hub, or random (for tests)."""
    normalize: Literal["none", "spatial"] = "none"
    """Normalization of online features; spatial is iREPA's, over the tokens of an image."""

    def __post_init__(self):
        if isinstance(self.names, str):
            self.names = [name.strip() for name in self.names.split(",") if name.strip()]


@dataclass
class ModelConfig:
    """The student."""

    preset: Optional[str] = None
    """SiT-{S,B,L,XL}/{2,4,8}; the sizes below override it."""
    depth: Optional[Annotated[int, AT_LEAST_1]] = None
    """Number of blocks."""
    width: Optional[Annotated[int, AT_LEAST_1]] = None
    """Width of a token."""
    heads: Optional[Annotated[int, AT_LEAST_1]] = None
    """Attention heads; they divide the width."""
    patch_size: Optional[Annotated[int, AT_LEAST_1]] = None
    """Side of a patch in pixels or latents; it divides the input size."""
    mlp_ratio: Annotated[float, ABOVE_0] = 4.0
    """Hidden width of a block's MLP over its width."""
    qk_norm: bool = False
    """LayerNorm on queries and keys."""
    attention: Literal["auto", "sdpa", "math", "flash_attn"] = "auto"
    """Attention: torch's fused kernel, plain operations, the faster of these, or the package flash-attn (GPUs)."""
    fused_adaln: bool = False
    """Fused kernels for norms and residuals of blocks; off: no GPU measurement shows them faster than torch.compile."""
    class_token: bool = False
    """Denoise the first teacher's class token together with the image, as one more token (REG, MaskAlign)."""
    class_token_dim: Optional[Annotated[int, AT_LEAST_1]] = None
    """Denoise this many leading principal components of the class token; for models narrower than the teacher."""
    mixer: Literal["token_mlp", "depthwise_conv", "attention", "none"] = "attention"
    """Layers that share information across all tokens before some are dropped."""
    mixer_layers: Annotated[int, AT_LEAST_1] = 2
    """SiT blocks of the attention mixer."""
    mixer_hidden: Annotated[int, AT_LEAST_1] = 64
    """Hidden number of tokens T of the token_mlp mixer."""
    projector: Literal["mlp", "conv"] = "mlp"
    """Projector to the teacher: REPA's MLP, or iREPA's 3x3 convolution (needs all tokens at the tap)."""
    projector_dim: Annotated[int, AT_LEAST_1] = 2048
    """Hidden width of the MLP projector."""


@dataclass
class MethodConfig:
    """Which tokens are computed and which are aligned."""

    keep_ratio: Annotated[Scheduled, ABOVE_0_TO_1] = 0.75
    """Share of patch tokens that take the route: a number in (0, 1] or a schedule."""
    align_weight: Annotated[Scheduled, AT_LEAST_0] = 0.5
    """Weight of the alignment loss: a number or a schedule; 0 turns the alignment off."""
    class_weight: Annotated[float, AT_LEAST_0] = 0.03
    """Weight of the class token's velocity loss."""
    align_depth: Optional[int] = None
    """Block whose output is aligned, counted from 1; by default the preset's (B 4, L and XL 8), else a third."""
    align_ratio: Optional[Annotated[Scheduled, ABOVE_0_TO_1]] = None
    """Align an independently drawn share of the tokens present at the tap; by default all of them."""
    route: Union[Literal["all", "none"], Tuple[int, int]] = "all"
    """Blocks [start, end) that see only the subset; none: all blocks see all tokens (loss-only masking)."""
    restore: Literal["none", "bypass", "fuse"] = "none"
    """What happens to dropped tokens after the route: none, bypass (they return, TREAD) or fuse (SPRINT)."""
    subset: Literal["uniform", "grid", "block"] = "uniform"
    """How the subset is drawn."""
    keep_multiple: Annotated[int, AT_LEAST_1] = 8
    """The number of kept tokens is rounded to a multiple of this."""


@dataclass
class ObjectiveConfig:
    """The denoising objective."""

    path: PathName = "linear"
    """Interpolant between data (t = 0) and noise (t = 1)."""
    time: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of the time t."""
    label_dropout: Annotated[float, FROM_0_TO_1] = 0.1
    """Share of labels replaced by "no class", for classifier-free guidance."""


@dataclass
class OptimizerConfig:
    """AdamW, its schedule, and the moving average."""

    lr: Annotated[float, ABOVE_0] = 1e-4
    """Learning rate."""
    betas: Annotated[Tuple[float, float], FROM_0_BELOW_1] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: Annotated[float, ABOVE_0] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: Annotated[float, AT_LEAST_0] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps over which the learning rate rises linearly."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to zero at the end."""
    decay_from: Annotated[float, FROM_0_TO_1] = 0.0
    """Share of training at which the fall begins."""
    ema_decay: Annotated[float, FROM_0_BELOW_1] = 0.9999
    """Decay of the exponential moving average of the weights, every step."""
    ema_warmup: Annotated[float, AT_LEAST_0] = 0.0
    """Bound the average's half-life by this share of the steps done (EDM's ramp, there 0.05); 0 turns it off."""


@dataclass
class TrainingConfig:
    """The loop."""

    max_steps: Annotated[int, AT_LEAST_1] = 400_000
    """Optimizer steps."""
    max_seconds: Optional[Annotated[float, ABOVE_0]] = None
    """Stop, with every schedule complete, after this much training time if max_steps is not reached before."""
    batch_size: Annotated[int, AT_LEAST_1] = 256
    """Images per optimizer step, over all ranks."""
    accumulation: Annotated[int, AT_LEAST_1] = 1
    """Micro-batches per optimizer step; it divides the batch of a rank."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 where the processor has it, else fp32; master weights stay float32."""
    compile: bool = False
    """torch.compile every block."""
    cuda_graph: bool = True
    """On NVIDIA GPUs: replay a step as one CUDA graph, so that nothing waits for Python to launch kernels."""
    log_every: Annotated[int, AT_LEAST_1] = 50
    """Steps between rows of metrics.csv."""
    checkpoint_every: Annotated[int, AT_LEAST_1] = 10_000
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 3
    """How many of the newest checkpoints stay on disk."""
    keep_every: Annotated[int, AT_LEAST_0] = 0
    """Checkpoints at multiples of this many steps stay on disk permanently; 0 keeps the newest only."""
    async_checkpoint: bool = True
    """Copy to host memory and write in the background; else training waits for the disk."""
    timeout: Annotated[float, AT_LEAST_1] = 600.0
    """Seconds without progress after which a run on several ranks ends and names the rank and the step."""
    sample_every: Annotated[int, AT_LEAST_0] = 10_000
    """Steps between grids of EMA samples; 0 draws only the last one."""
    resume: str = "auto"
    """auto: from the newest checkpoint of run_dir; never: refuse a used run_dir; restart: set aside what run_dir holds
    and begin at step 0; or the path of a checkpoint."""
    init_from: Optional[str] = None
    """Start from the weights of this checkpoint (ours or REPA's), not from its step."""
    max_nonfinite: Annotated[int, AT_LEAST_1] = 10
    """Stop after this many steps in a row with a non-finite loss or gradient; each is skipped and counted."""
    device: str = "auto"
    """auto, cpu or cuda."""
    loggers: Union[List[str], str] = field(default_factory=lambda: ["tensorboard"])
    """Where curves and pictures go besides the run folder: tensorboard, wandb (Weights & Biases), both, or none: []."""
    tensorboard: bool = True
    """Older name: false leaves tensorboard out of training.loggers."""
    progress: bool = True
    """Show the progress bar."""

    def __post_init__(self):
        if isinstance(self.loggers, str):
            self.loggers = [name.strip() for name in self.loggers.split(",") if name.strip() not in ("", "none")]
        if not self.tensorboard:
            self.loggers = [name for name in self.loggers if name != "tensorboard"]


@dataclass
class PreviewConfig:
    """The sample grids drawn during training."""

    classes: Annotated[int, AT_LEAST_1] = 10
    """Number of classes, a row each."""
    per_class: Annotated[int, AT_LEAST_1] = 8
    """Pictures per class."""
    steps: Annotated[int, AT_LEAST_1] = 50
    """Sampler steps."""
    cfg_scale: Annotated[float, AT_LEAST_0] = 2.0
    """Classifier-free guidance scale; 1 is none."""
    cls_cfg_scale: Optional[Annotated[float, AT_LEAST_0]] = None
    """Guidance scale of the class token, where there is one; by default the image's, 0 is none."""
    sampler: Literal["ode", "heun", "sde"] = "ode"
    """Sampler."""
    vae: Optional[str] = None
    """Decoder of latents: name or folder of an AutoencoderKL; by default the data set's, if it can be loaded."""


@dataclass
class EvaluateConfig:
    """A light evaluation during training; maskalign evaluate is the thorough one."""

    every: Annotated[int, AT_LEAST_0] = 0
    """Steps between evaluations, written to evaluation.csv; 0 is none, else one is also made at the end."""
    data: Optional[str] = None
    """Held-out data set; by default data.path, whose images the run has seen."""
    images: Annotated[int, AT_LEAST_0] = 256
    """Held-out images for the velocity loss and the alignment cosine by time; 0 leaves these out."""
    samples: Annotated[int, AT_LEAST_0] = 500
    """Samples for the Frechet and the kernel distance; 0 leaves these out."""
    reference: Annotated[int, AT_LEAST_0] = 5000
    """Images of the data set that the samples are compared with; 0 for all."""
    teacher: str = "efficientnet-lite0"
    """Teacher in whose features the distances are."""
    steps: Annotated[int, AT_LEAST_1] = 50
    """Sampler steps."""
    cfg_scale: Annotated[float, AT_LEAST_0] = 1.0
    """Classifier-free guidance scale of the samples; 1 is none."""
    cls_cfg_scale: Optional[Annotated[float, AT_LEAST_0]] = None
    """Guidance scale of the samples' class token, where there is one; by default the image's, 0 is none."""


@dataclass
class ParallelConfig:
    """How the work is spread over processes."""

    plan: Literal["none", "ddp", "fsdp", "hsdp"] = "none"
    """none: one process; ddp: a copy on every rank; fsdp: shards over all ranks; hsdp: over groups of ranks."""
    shard_size: Optional[Annotated[int, AT_LEAST_1]] = None
    """hsdp: ranks that share one copy of the weights; it divides the ranks; by default the ranks of a node."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free gathered weights between forward and backward (ZeRO-3), or keep them (ZeRO-2)."""
    prefetch: Annotated[int, AT_LEAST_0] = 1
    """fsdp, hsdp: blocks whose weights are gathered ahead of the one that computes."""
    recompute: Literal["none", "block", "selective"] = "none"
    """Activations that the backward recomputes: none, of all blocks, or as many as memory_budget requires."""
    memory_budget: Annotated[float, FROM_0_TO_1] = 0.5
    """selective: share of the blocks' activations that is kept, in [0, 1]."""
    ema_on_cpu: bool = False
    """Keep the moving average in host memory."""
    shard_teacher_above: Annotated[float, AT_LEAST_0] = 1024.0
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
