"""The training step of the public REPA or REG code, in a separate process with torch's default settings.

`Reference` is the case of `benchmarks.steps`. It starts `python -m benchmarks.steps.reference`, which runs
`ReferenceCase` on request. A request and a reply are one line of JSON each.
"""

import contextlib
import importlib.util
import inspect
import json
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.steps.cases import recipe_settings
from benchmarks.steps.clock import Clock, saved_bytes, seconds_of, split_of
from benchmarks.steps.data import CLASSES, LATENT, Batches
from maskalign.config import model_sizes, parse_config
from maskalign.errors import RunError, UsageError
from maskalign.training.parallel import make_placement

FILES = ("models/sit.py", "loss.py")  # what is run of the public code
SETTINGS = ("reference", "preset", "batch_size", "reference_precision", "device", "data", "teacher", "shards", "update")


class Reference:
    """The public code as a case that takes turns with our cases.

    Its process has torch's default allocator settings and matmul precision. Our `tune_host` would make it 5 to 8 %
    faster than it is for users of that code.

    Args:
        options: the parsed options of `benchmarks.steps`.
    """

    recipe, keep, aligned = "reference", 1.0, True

    def __init__(self, options):
        settings = {name: getattr(options, name) for name in SETTINGS}
        words = [sys.executable, "-m", "benchmarks.steps.reference", json.dumps(settings), str(torch.get_num_threads())]
        here = Path(__file__).resolve().parent.parent.parent
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here)
        described = self._ask("description")
        self.name, self.code = described["name"], described["code"]
        with torch.device("meta"):
            projectors = [torch.nn.Linear(*size, bias=False) for size in described["projector"]]
        block = SimpleNamespace(mlp=SimpleNamespace(fc1=SimpleNamespace(out_features=described["hidden"])))
        self.model = SimpleNamespace(
            route=None, mixer=None, restore="none", in_channels=LATENT[0], blocks=[block],
            class_dim=described["class_dim"], projectors=[torch.nn.ModuleList(projectors)], **described["sizes"],
        )  # fmt: skip
        self.kept = self.model.num_tokens

    def _ask(self, what, **details):
        try:
            self.process.stdin.write(json.dumps({"what": what, **details}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RunError(f"the reference ended with status {self.process.wait()}; see its own message above")
        return json.loads(answer)

    def step_seconds(self, device, clock):
        """(seconds, loss, seconds of forward and backward) of one step."""
        return self._ask("step", clock=clock)

    def saved_bytes(self):
        return self._ask("saved")

    def split(self, device, steps, clock):
        return self._ask("split", steps=steps, clock=clock)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class ReferenceCase:
    """The public REPA or REG code (its model and loss) with the step of its train.py, from a local checkout.

    REG's code is recognized by its loss, which has an argument for the class token. The settings are those of our
    recipe with the same name.

    The step is that of the public code: float32, or bf16 by autocast around the model's forward as in accelerate, with
    the loss in float32; torch.optim.AdamW as in its train.py; clip; EMA in a loop over the parameters. There is one
    difference: the public S presets cannot be built (their decoder width is 768), so they get their own width.

    Attributes:
        code: `repa` or `reg`.
    """

    averages_inside = False

    def __init__(
        self, folder, preset, batch_size, precision, device, data="memory", teacher="cached", shards=None, update=True,
    ):  # fmt: skip
        sit, loss = (load_file(Path(folder) / name) for name in FILES)
        self.code = "reg" if "cls_token" in inspect.signature(loss.SILoss.__call__).parameters else "repa"
        self.name = f"reference-{precision}" if self.code == "repa" else f"reference-reg-{precision}"
        self.bf16, self.update = precision == "bf16", update
        config = parse_config(recipe_settings(self.code, preset, None))
        self.class_weight = config.method.class_weight
        sizes = model_sizes(config)
        width = {"decoder_hidden_size": sizes["width"]} if preset.startswith("SiT-S") else {}
        self.device = torch.device(make_placement(config.training).device if device == "auto" else device)
        grid = (LATENT[1] // sizes["patch_size"],) * 2
        class_token = self.code == "reg"
        self.batches = Batches(data, teacher, batch_size, self.device, grid, shards, class_token=class_token)
        torch.manual_seed(0)
        self.net = sit.SiT_models[preset](
            input_size=LATENT[1], num_classes=CLASSES, use_cfg=True, z_dims=self.batches.dims,
            encoder_depth=sizes["align_depth"], fused_attn=True, qk_norm=False, **width,
        ).to(self.device)  # fmt: skip
        self.ema = deepcopy(self.net).requires_grad_(False).eval() if update else None
        self.net.train()
        self.criterion = loss.SILoss(prediction="v", path_type="linear", encoders=[], weighting="uniform")
        self.adamw = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
        self.sizes = {"num_tokens": grid[0] * grid[1], **sizes}
        self.clock = None

    def _forward(self, *args, **kwargs):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            velocity, projected, *class_velocity = self.net(*args, **kwargs)
        return velocity.float(), [z.float() for z in projected], *(value.float() for value in class_velocity)

    def step(self, batch=None):
        part = self.clock or (lambda name: nullcontext())
        inputs, labels, teachers, prepare, class_token = batch or self.batches(self.clock)
        with part("forward"):
            inputs = inputs if prepare is None else prepare(inputs, torch.randn(len(inputs), *LATENT).to(inputs.device))
            teachers = [z.float() for z in teachers]
            given = {} if class_token is None else {"cls_token": class_token}
            loss, alignment, *more = self.criterion(self._forward, inputs, dict(y=labels), zs=teachers, **given)
            total = loss.mean() + 0.5 * alignment.mean()
            if class_token is not None:
                total = total + self.class_weight * more[-1].mean()
        with part("backward"):
            total.backward()
        if not self.update:
            self.adamw.zero_grad(set_to_none=True)
            return total.detach()
        with part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
        with part("ema"):
            self._update_ema()
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
    name = f"reference_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def serve(settings):
    """Answer requests until the input ends."""
    replies = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # text that the public code prints must not be read as a reply
        case = ReferenceCase(*(settings[name] for name in SETTINGS))
        for line in sys.stdin:
            request = json.loads(line)
            answer = respond(case, request.pop("what"), **request)
            print(json.dumps(answer), file=replies, flush=True)


def respond(case, what, clock="wall", steps=1):
    if what == "description":
        matrices = [p for net in case.net.projectors for p in net.parameters() if p.dim() > 1]
        hidden = case.net.blocks[0].mlp.fc1.out_features
        described = {"sizes": case.sizes, "hidden": hidden, "projector": [list(p.shape) for p in matrices]}
        return {**described, "name": case.name, "code": case.code, "class_dim": case.batches.class_dim}
    if what == "saved":
        return saved_bytes(case)
    if what == "split":
        return split_of(case, case.device, steps, clock)
    losses, taken = [], Clock(case.device, clock)
    # The passes are timed separately only if this needs no synchronization with the device.
    inside = case.timed(taken) if case.device.type == "cpu" else nullcontext()
    with inside:
        seconds = seconds_of(lambda: losses.append(case.step()), case.device, clock)
    passes = None
    if case.device.type == "cpu":
        passes = seconds - taken.seconds["optimizer"] - taken.seconds["ema"]
    return [seconds, float(losses[0]), passes]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    try:
        serve(json.loads(sys.argv[1]))
    except UsageError as error:
        print(f"benchmarks.steps: error: {error}", file=sys.stderr)
        sys.exit(2)
