"""The cases of `benchmarks.steps` that run our code: the training step with a recipe's settings."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from benchmarks.steps.clock import Clock, saved_bytes, seconds_of, split_of
from benchmarks.steps.data import CLASSES, LATENT, Batches
from maskalign.checkpoints.build import build_model
from maskalign.checkpoints.spec import ModelSpec
from maskalign.config import as_schedule, keep_count, model_sizes, parse_config
from maskalign.training import step as step_module
from maskalign.training.compiling import compile_model
from maskalign.training.optimizer import Optimizer
from maskalign.training.parallel import make_placement
from maskalign.training.plans import Plan

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs" / "imagenet256"
# These recipes run with the keep ratio of their YAML file, the others with those of --keep-ratios.
OWN_RATIO = ("sit", "repa", "reg", "maskalign", "repa-maskalign", "maskalign-fused")
# Names of recipes. "maskalign-fast-no-mixer" is for measuring the cost of the mixer; "-fused" sets `model.fused_adaln`.
RECIPES = (
    *OWN_RATIO,
    "maskalign-fast",
    "maskalign-fast-no-mixer",
    "maskalign-loss-only",
    "tread",
    "sprint",
    "deferred-masking",
)


def recipe_settings(recipe, preset, keep):
    """The command-line arguments of a recipe for a preset, with a keep ratio (None for that of the YAML file)."""
    folder = CONFIGS / {"S": "b2", "B": "b2", "L": "l2", "XL": "xl2"}[preset.split("-")[1].split("/")[0]]
    file = recipe.removesuffix("-no-mixer").removesuffix("-fused")
    argv = ["--config", str(folder / f"{file}.yaml"), "--model.preset", preset]
    if keep is not None:
        argv += ["--method.keep_ratio", str(keep)]
    if recipe.endswith("-no-mixer"):
        argv += ["--model.mixer", "none"]
    if recipe.endswith("-fused"):
        argv += ["--model.fused_adaln", "true"]
    return argv


class OurCase:
    """Our training step: `maskalign.training.step.TrainStep`, called as in the trainer.

    Args:
        recipe, preset, keep: see `recipe_settings`.
        batch_size, precision, device, compiled: settings of the run.
        data, teacher, folder: see `benchmarks.steps.data.Batches`.
        update: if False, a step has only forward and backward and no optimizer, and needs a fifth of the memory.
        plan: `parallel.plan`; plans other than none need the environment of torchrun.
    """

    averages_inside = True  # the optimizer's step includes the moving average

    def __init__(
        self, recipe, preset, keep, batch_size, precision, device, compiled=False, data="memory", teacher="cached",
        folder=None, update=True, plan="none",
    ):  # fmt: skip
        overrides = ["--training.precision", precision, "--training.device", device, "--parallel.plan", plan]
        overrides += ["--training.batch_size", str(batch_size)]
        self.config = parse_config(recipe_settings(recipe, preset, keep) + overrides)
        self.name = recipe if keep is None else f"{recipe}@{keep:g}"
        self.recipe, self.keep = recipe, as_schedule(self.config.method.keep_ratio).start
        self.placement = make_placement(self.config.training, self.config.parallel)
        aligned = as_schedule(self.config.method.align_weight).start > 0
        grid = (LATENT[1] // model_sizes(self.config)["patch_size"],) * 2
        self.aligned = aligned
        with_class = self.config.model.class_token
        self.batches = Batches(data, teacher, batch_size, self.placement.device, grid, folder, aligned, with_class)
        torch.manual_seed(0)
        spec = ModelSpec(LATENT[1], LATENT[0], CLASSES, self.batches.dims, self.batches.class_dim)
        self.model = build_model(self.config, spec)
        self.model.to(self.placement.device)
        spread = Plan(self.model, self.config, self.placement)
        if update:
            self.optimizer = Optimizer(self.model, self.config.optimizer, self.placement.dtype, fused=True)
        else:
            self.optimizer = NoUpdate(self.model, self.placement.dtype)
        self.train_step = step_module.TrainStep(
            self.model, self.optimizer, self.config, self.placement, spread, self.batches.latent
        )
        if compiled:
            compile_model(self.model)
        self.kept = keep_count(self.keep, self.model.num_tokens, self.config.method.keep_multiple)
        self.count, self.clock = 0, None

    def step(self, batch=None):
        """One optimizer step, on the next batch or the given one; returns the loss, a 0-d tensor."""
        self.count += 1
        inputs, labels, teachers, _, class_token = batch or self.batches(self.clock)
        return self.train_step(self.count, 0.0, inputs, labels, teachers, class_token=class_token).loss

    def step_seconds(self, device, clock):
        """(seconds, loss, seconds without the optimizer's step) of one step; the last is None for a captured step."""
        losses, update = [], Clock(device, clock)
        inside = wrapped(self.optimizer, "step", update("optimizer")) if device.type == "cpu" else nullcontext()
        with inside:
            seconds = seconds_of(lambda: losses.append(self.step()), device, clock)
        passes = seconds - update.seconds["optimizer"] if device.type == "cpu" else None
        return seconds, float(losses[0]), passes

    def saved_bytes(self):
        with self.kernel_by_kernel():
            return saved_bytes(self)

    @contextmanager
    def kernel_by_kernel(self):
        """Context in which a step on a GPU is not captured as a graph, so that its parts can be timed."""
        graphs, self.train_step.graphs = self.train_step.graphs, None
        try:
            yield
        finally:
            self.train_step.graphs = graphs

    def split(self, device, steps, clock):
        return split_of(self, device, steps, clock)

    def close(self):
        """Release a captured graph and the resources of a plan."""
        self.train_step.close()

    def weights(self):
        return [*self.model.parameters(), *self.model.buffers()]

    @contextmanager
    def timed(self, clock):
        """Context in which the parts of a step are timed by `clock` (name -> context)."""
        self.clock = clock
        with (
            self.kernel_by_kernel(),
            wrapped(step_module, "draw", clock("draws")),
            wrapped(step_module, "training_loss", clock("forward")),
            wrapped(torch.Tensor, "backward", clock("backward")),
            wrapped(self.optimizer, "step", clock("optimizer")),
            wrapped(torch, "_foreach_lerp_", clock("ema")),
        ):
            try:
                yield
            finally:
                self.clock = None


class NoUpdate:
    """A replacement of the optimizer for timing forward and backward alone. It only frees the gradients.

    Args:
        model: the `SiT`; its parameters are cast to `dtype`.
        dtype: float32 or bfloat16.
    """

    def __init__(self, model, dtype):
        self.params = list(model.parameters())
        for p in self.params:
            p.data = p.data.to(dtype)

    def set_step(self, step):
        """Do nothing: there is no moving average."""

    def step(self, lr, healthy):
        for p in self.params:
            p.grad = None
        return torch.zeros(()), ~healthy

    def average_on_host(self):
        """Do nothing: there is no moving average."""


@contextmanager
def wrapped(owner, name, context):
    """Context in which every call of `owner.name` runs inside a context from the function `context`."""
    original = getattr(owner, name)

    def run(*args, **kwargs):
        with context:
            return original(*args, **kwargs)

    had = name in vars(owner)
    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, original) if had else delattr(owner, name)
