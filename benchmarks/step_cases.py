"""What `benchmarks.steps` runs: our training step under a recipe's settings, and the public REPA code's."""

import importlib.util
import sys
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.step_data import CLASSES, LATENT, Batches
from maskalign.config import as_schedule, model_sizes, parse_config
from maskalign.errors import UsageError
from maskalign.models.routing import keep_count
from maskalign.training import step as step_module
from maskalign.training.build import build_model
from maskalign.training.compiling import compile_model
from maskalign.training.optimizer import Optimizer
from maskalign.training.parallel import place

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "imagenet256"
# Recipes by name; "maskalign-no-mixer" is there to state what the mixer costs.
RECIPES = (
    "repa",
    "maskalign",
    "maskalign-no-mixer",
    "maskalign-loss-only",
    "sit",
    "tread",
    "sprint",
    "deferred-masking",
)


def recipe_settings(recipe, preset, keep):
    """The `Config` of a recipe's YAML file for a preset, at one keep ratio (None: the file's own)."""
    folder = CONFIGS / {"S": "b2", "B": "b2", "L": "l2", "XL": "xl2"}[preset.split("-")[1].split("/")[0]]
    argv = ["--config", str(folder / f"{recipe.removesuffix('-no-mixer')}.yaml"), "--model.preset", preset]
    if keep is not None:
        argv += ["--method.keep_ratio", str(keep)]
    if recipe.endswith("-no-mixer"):
        argv += ["--model.mixer", "none"]
    return argv


class OurCase:
    """Our training step: `maskalign.training.step.TrainStep` as the trainer calls it.

    Args:
        recipe, preset, keep: see `recipe_settings`.
        batch_size, precision, device, compiled: of the run.
        data, teacher, folder: see `step_data.Batches`.
    """

    def __init__(
        self, recipe, preset, keep, batch_size, precision, device, compiled=False, data="memory", teacher="cached",
        folder=None,
    ):  # fmt: skip
        overrides = ["--training.precision", precision, "--training.device", device]
        overrides += ["--training.batch_size", str(batch_size)]
        self.config = parse_config(recipe_settings(recipe, preset, keep) + overrides)
        self.name = recipe if keep is None else f"{recipe}@{keep:g}"
        self.recipe, self.keep = recipe, 1.0 if keep is None else keep
        self.placement = place(self.config.training)
        aligned = as_schedule(self.config.method.align_weight).start > 0
        grid = (LATENT[1] // model_sizes(self.config)["patch_size"],) * 2
        self.batches = Batches(data, teacher, batch_size, self.placement.device, grid, folder, aligned)
        torch.manual_seed(0)
        facts = {"input_size": LATENT[1], "in_channels": LATENT[0], "num_classes": CLASSES}
        self.model = build_model(self.config, {**facts, "teacher_dims": self.batches.dims})
        self.model.to(self.placement.device)
        self.optimizer = Optimizer(self.model, self.config.optimizer, self.placement.dtype)
        self.train_step = step_module.TrainStep(self.model, self.optimizer, self.config, self.placement)
        if compiled:
            compile_model(self.model)
        self.kept = keep_count(self.keep, self.model.num_tokens, self.config.method.keep_multiple)
        self.count, self.clock = 0, None

    def step(self, batch=None):
        """One optimiser step, on the next batch or the given one; returns the loss, a 0-d tensor."""
        self.count += 1
        inputs, labels, teachers, prepare = batch or self.batches(self.clock)
        return self.train_step(self.count, 0.0, inputs, labels, teachers, prepare=prepare).loss

    def weights(self):
        return [*self.model.parameters(), *self.model.buffers()]

    @contextmanager
    def timed(self, clock):
        """Inside, the parts of a step report to `clock` (name -> context)."""
        self.clock = clock
        with (
            wrapped(step_module, "draw", clock("draws")),
            wrapped(step_module, "training_loss", clock("forward")),
            wrapped(torch.Tensor, "backward", clock("backward")),
            wrapped(self.optimizer, "step", clock("optimiser")),
            wrapped(torch, "_foreach_lerp_", clock("ema")),
        ):
            try:
                yield
            finally:
                self.clock = None


class ReferenceCase:
    """The public REPA code (its model and loss) with the step of its train.py, from a local checkout.

    Its own precision: float32, or bf16 by autocast around the model's forward, as accelerate does, with the loss in
    float32; torch.optim.AdamW as its train.py makes it; clip; EMA in a loop over the parameters. Differences: its S
    presets cannot be built (a decoder width of 768), so they are given their own width; and it shares this process's
    allocator, which our `tune_host` has set and which makes it faster than it is alone.
    """

    recipe, keep = "reference", 1.0

    def __init__(self, folder, preset, batch_size, precision, device, data="memory", teacher="cached", shards=None):
        sit, loss = (load_file(Path(folder) / name) for name in ("models/sit.py", "loss.py"))
        self.name = f"reference-{precision}"
        self.bf16 = precision == "bf16"
        config = parse_config(recipe_settings("repa", preset, None))
        sizes = model_sizes(config)
        width = {"decoder_hidden_size": sizes["width"]} if preset.startswith("SiT-S") else {}
        self.device = torch.device(place(config.training).device if device == "auto" else device)
        grid = (LATENT[1] // sizes["patch_size"],) * 2
        self.batches = Batches(data, teacher, batch_size, self.device, grid, shards)
        torch.manual_seed(0)
        self.net = sit.SiT_models[preset](
            input_size=LATENT[1], num_classes=CLASSES, use_cfg=True, z_dims=self.batches.dims,
            encoder_depth=sizes["align_depth"], fused_attn=True, qk_norm=False, **width,
        ).to(self.device)  # fmt: skip
        self.ema = deepcopy(self.net).requires_grad_(False).eval()
        self.net.train()
        self.criterion = loss.SILoss(prediction="v", path_type="linear", encoders=[], weighting="uniform")
        self.adamw = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
        self.model = SimpleNamespace(
            num_tokens=grid[0] * grid[1], route=None, mixer=None, restore="none", in_channels=LATENT[0],
            blocks=self.net.blocks, projectors=self.net.projectors, **sizes,
        )  # fmt: skip
        self.kept = self.model.num_tokens
        self.clock = None

    def _forward(self, *args, **kwargs):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            velocity, projected = self.net(*args, **kwargs)
        return velocity.float(), [z.float() for z in projected]

    def step(self, batch=None):
        part = self.clock or (lambda name: nullcontext())
        # Its train.py leaves matmul precision as torch sets it.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            inputs, labels, teachers, prepare = batch or self.batches(self.clock)
            with part("forward"):
                inputs = (
                    inputs if prepare is None else prepare(inputs, torch.randn(len(inputs), *LATENT).to(inputs.device))
                )
                teachers = [z.float() for z in teachers]
                loss, alignment = self.criterion(self._forward, inputs, dict(y=labels), zs=teachers)
                total = loss.mean() + 0.5 * alignment.mean()
            with part("backward"):
                total.backward()
            with part("optimiser"):
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                self.adamw.step()
                self.adamw.zero_grad(set_to_none=True)
            with part("ema"):
                self._update_ema()
        finally:
            torch.set_float32_matmul_precision(before)
        return total.detach()

    @torch.no_grad()
    def _update_ema(self):
        averages = OrderedDict(self.ema.named_parameters())
        for name, parameter in OrderedDict(self.net.named_parameters()).items():
            averages[name].mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)

    def weights(self):
        return [*self.net.parameters(), *self.net.buffers()]

    @contextmanager
    def timed(self, clock):
        self.clock = clock
        try:
            yield
        finally:
            self.clock = None


def load_file(path):
    """A module from one file of a checkout, without putting the checkout on the path."""
    if not path.is_file():
        raise UsageError(f"--reference: {path} does not exist; give the root of a checkout of the public REPA code")
    name = f"repa_reference_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def wrapped(owner, name, context):
    """`owner.name` runs inside `context` (a function that makes one) until the end of the block."""
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
