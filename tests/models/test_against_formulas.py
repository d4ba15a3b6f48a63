"""An independent transcription of what REPA computes, in plain float64, against our model, objective and optimiser.

Nothing here calls maskalign for its expected values: weights come in as a dict of tensors by name, and everything from
the position embedding to the moving average is written out from the published formulas.
"""

import math

import pytest
import torch

from maskalign.config import OptimizerConfig
from maskalign.models import SiT
from maskalign.objective import Draws, lognormal_time, training_loss
from maskalign.training.optimizer import Optimizer

SIZES = dict(input_size=8, patch_size=2, in_channels=4, num_classes=6, depth=3, width=24, heads=3, align_depth=2,
             projector_dim=20, teacher_dims=(10, 7))  # fmt: skip
BATCH, TOKENS = 5, 16
LR, BETA1, BETA2, EPS, CLIP, DECAY = 1e-4, 0.9, 0.999, 1e-8, 1.0, 0.9999


# ---- The transcription -------------------------------------------------------------------------------------------


def position_embedding(width, side):
    """Row by row: half of the channels for the column, half for the row; in each, sines, then cosines."""
    quarter = width // 4
    table = torch.zeros(side * side, width, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for half, position in enumerate((column, row)):
                for i in range(quarter):
                    angle = position * 10000 ** (-i / quarter)
                    table[row * side + column, half * 2 * quarter + i] = math.sin(angle)
                    table[row * side + column, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalise(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def modulated(x, shift, scale):
    return normalise(x) * (1 + scale[:, None, :]) + shift[:, None, :]


def attention(w, name, x, heads):
    batch, count, width = x.shape
    head = width // heads
    q, k, v = linear(w, f"{name}.qkv", x).split(width, dim=-1)
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * head, (h + 1) * head)
        scores = torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) / math.sqrt(head)
        scores = torch.exp(scores - scores.amax(-1, keepdim=True))
        out[..., part] = (scores / scores.sum(-1, keepdim=True)) @ v[..., part]
    return linear(w, f"{name}.proj", out)


def forward(w, sizes, x, t, labels, subset=None):
    """(velocity by token (B, n, p*p*C), [projected tokens (B, n, Dz)]); with `subset` (B, K) on those tokens alone."""
    p, width, heads = sizes["patch_size"], sizes["width"], sizes["heads"]
    side = sizes["input_size"] // p
    kernel = w["x_embedder.proj.weight"]
    tokens = torch.zeros(len(x), side * side, width, dtype=x.dtype)
    for row in range(side):
        for column in range(side):
            patch = x[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens[:, row * side + column] = torch.einsum("bcij,dcij->bd", patch, kernel) + w["x_embedder.proj.bias"]
    tokens = tokens + position_embedding(width, side).to(x.dtype)

    angle = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
    c = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", features)))
    c = c + w["y_embedder.embedding_table.weight"][labels]

    if "mixer.fc1.weight" in w:
        shift, scale, gate = linear(w, "mixer.adaLN_modulation.1", silu(c)).split(width, dim=-1)
        u = modulated(tokens, shift, scale)
        hidden = gelu(torch.einsum("tn,bnd->btd", w["mixer.fc1.weight"], u) + w["mixer.fc1.bias"][:, None])
        mixed = torch.einsum("nt,btd->bnd", w["mixer.fc2.weight"], hidden) + w["mixer.fc2.bias"][:, None]
        tokens = tokens + gate[:, None] * mixed
    if subset is not None:
        tokens = torch.stack([tokens[b, rows] for b, rows in enumerate(subset)])

    projected = []
    for depth in range(sizes["depth"]):
        name = f"blocks.{depth}"
        parts = linear(w, f"{name}.adaLN_modulation.1", silu(c)).split(width, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        tokens = tokens + gate1[:, None] * attention(w, f"{name}.attn", modulated(tokens, shift1, scale1), heads)
        hidden = gelu(linear(w, f"{name}.mlp.fc1", modulated(tokens, shift2, scale2)))
        tokens = tokens + gate2[:, None] * linear(w, f"{name}.mlp.fc2", hidden)
        if depth + 1 == sizes["align_depth"]:
            for k in range(len(sizes["teacher_dims"])):
                h = silu(linear(w, f"projectors.{k}.0", tokens))
                projected.append(linear(w, f"projectors.{k}.4", silu(linear(w, f"projectors.{k}.2", h))))
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(c)).split(width, dim=-1)
    return linear(w, "final_layer.linear", modulated(tokens, shift, scale)), projected


def as_tokens(image, p):
    """(B, C, H, W) cut into rows of (p, p, C), token by token."""
    side = image.shape[-1] // p
    rows = []
    for row in range(side):
        for column in range(side):
            patch = image[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            rows.append(patch.permute(0, 2, 3, 1).reshape(len(image), -1))
    return torch.stack(rows, dim=1)


def loss_of(w, sizes, batch, path, subset=None):
    """(total, denoising, alignment, velocity by token, projected tokens)."""
    x, noise, labels, teachers = batch["x"], batch["noise"], batch["labels"], batch["teachers"]
    t = batch["t"][:, None, None, None]
    if path == "linear":
        x_t, target = (1 - t) * x + t * noise, noise - x
    else:
        a = math.pi / 2
        x_t = torch.cos(a * t) * x + torch.sin(a * t) * noise
        target = -a * torch.sin(a * t) * x + a * torch.cos(a * t) * noise
    velocity, projected = forward(w, sizes, x_t, batch["t"], labels, subset)
    target = as_tokens(target, sizes["patch_size"])
    if subset is not None:
        target = torch.stack([target[b, rows] for b, rows in enumerate(subset)])
    denoising = ((velocity - target) ** 2).mean()
    alignment = torch.zeros((), dtype=x.dtype)
    for z_student, z in zip(projected, teachers, strict=True):
        if subset is not None:
            z = torch.stack([z[b, rows] for b, rows in enumerate(subset)])
        cosine = (z_student * z).sum(-1) / (torch.sqrt((z_student**2).sum(-1)) * torch.sqrt((z**2).sum(-1)))
        alignment = alignment - cosine.mean() / len(teachers)
    return denoising + 0.5 * alignment, denoising, alignment, velocity, projected


class Training:
    """AdamW (no weight decay), clip by the global norm and moving average, tensor by tensor."""

    def __init__(self, w, fixed=("pos_embed",)):
        self.w = {name: value.clone() for name, value in w.items()}
        self.trained = [name for name in w if name not in fixed]
        self.first, self.second = ({name: torch.zeros_like(w[name]) for name in self.trained} for _ in range(2))
        self.ema = {name: value.clone() for name, value in w.items()}
        self.steps = 0

    def step(self, sizes, batch, path, subset=None):
        leaves = {name: self.w[name].clone().requires_grad_(name in self.trained) for name in self.w}
        total, *_ = loss_of(leaves, sizes, batch, path, subset)
        total.backward()
        grads = {name: leaves[name].grad for name in self.trained}
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
        factor = min(1.0, CLIP / (norm + 1e-6))
        self.steps += 1
        for name, grad in grads.items():
            grad = grad * factor
            self.first[name] = BETA1 * self.first[name] + (1 - BETA1) * grad
            self.second[name] = BETA2 * self.second[name] + (1 - BETA2) * grad**2
            mean = self.first[name] / (1 - BETA1**self.steps)
            root = torch.sqrt(self.second[name] / (1 - BETA2**self.steps))
            self.w[name] = self.w[name] - LR * mean / (root + EPS)
            self.ema[name] = DECAY * self.ema[name] + (1 - DECAY) * self.w[name]
        return total.detach(), norm


# ---- The comparison ----------------------------------------------------------------------------------------------


def make_model(seed, dtype, **settings):
    """Weights with nothing at zero; in float32 first, so that both precisions hold the same numbers."""
    model = SiT(**{**SIZES, "mixer": "none", **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model = model.to(dtype)
    # It is kept in float32, as REPA's: in float64 that rounding would be all that is left to see.
    model.pos_embed.copy_(position_embedding(SIZES["width"], SIZES["input_size"] // SIZES["patch_size"]))
    return model


def make_batch(seed, time="uniform", path="linear", scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, SIZES["in_channels"], SIZES["input_size"], SIZES["input_size"])
    x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t, normal = torch.rand(BATCH, generator=generator), torch.randn(BATCH, generator=generator)
    if time == "lognormal":
        sigma = [math.exp(n) for n in normal.tolist()]
        t = torch.tensor([s / (1 + s) if path == "linear" else 2 / math.pi * math.atan(s) for s in sigma])
        torch.testing.assert_close(lognormal_time(normal, path), t, rtol=1e-6, atol=0)
    labels = torch.randint(0, SIZES["num_classes"], (BATCH,), generator=generator)
    drop = torch.tensor([False, True, False, False, True])
    teachers = [torch.randn(BATCH, TOKENS, dim, generator=generator) for dim in SIZES["teacher_dims"]]
    subset = torch.stack([torch.randperm(TOKENS, generator=generator)[:7].sort().values for _ in range(BATCH)])
    ours = dict(x=scale * x, noise=noise, t=t, labels=labels, drop=drop, teachers=teachers, subset=subset)
    truth = dict(
        x=scale * x.double(),
        noise=noise.double(),
        t=t.double(),
        labels=torch.where(drop, SIZES["num_classes"], labels),
        teachers=[z.double() for z in teachers],
    )
    return ours, truth


def our_loss(model, batch, dtype, path, subset=None):
    draws = Draws(batch["t"], batch["noise"], batch["drop"], subset, None, None)
    teachers = [z.to(dtype) for z in batch["teachers"]]
    return training_loss(model, batch["x"].to(dtype), batch["labels"], teachers, draws, path=path)


def weights_of(model):
    return {name: value.detach().double() for name, value in model.state_dict().items()}


def distance(a, b):
    """||a - b|| / ||b||."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("attention", ["math", "sdpa"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_velocity_and_projections(dtype, attention, seed):
    model = make_model(seed, dtype, attention=attention).eval()
    batch, truth = make_batch(seed)
    labels = torch.tensor([0, 5, 6, 3, 6])
    out = model(batch["x"].to(dtype), batch["t"].to(dtype), labels)
    velocity, projected = forward(weights_of(model), SIZES, truth["x"], truth["t"], labels)
    assert distance(as_tokens(out.velocity, SIZES["patch_size"]), velocity) < TOLERANCE[dtype]
    assert len(out.aligned) == 2 and out.aligned_index is None
    for ours, theirs in zip(out.aligned, projected, strict=True):
        assert distance(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("width, side", [(24, 4), (384, 8), (1152, 3)])
def test_position_embedding(width, side):
    model = SiT(input_size=side, patch_size=1, width=width, heads=2, depth=1, align_depth=1, mixer="none")
    expected = position_embedding(width, side)
    assert float((model.pos_embed[0].double() - expected).abs().max()) < 6e-8  # float32's rounding of numbers up to 1


@pytest.mark.parametrize("time", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients(dtype, path, time, seed):
    model = make_model(seed, dtype)
    batch, truth = make_batch(seed, time, path)
    losses = our_loss(model, batch, dtype, path)
    losses.total.backward()
    leaves = {name: value.clone().requires_grad_() for name, value in weights_of(model).items()}
    total, denoising, alignment, *_ = loss_of(leaves, SIZES, truth, path)
    total.backward()
    for ours, theirs in zip(losses[:3], (total, denoising, alignment), strict=True):
        assert abs(ours.item() - theirs.item()) <= TOLERANCE[dtype] * abs(total.item())
    for name, parameter in model.named_parameters():
        scale = leaves[name].grad.norm()
        assert (parameter.grad.double() - leaves[name].grad).norm() <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("scale", [1.0, 32.0], ids=["free", "clipped"])
@pytest.mark.parametrize("method", ["repa", "maskalign"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_training_steps(dtype, method, scale, seed):
    """Three steps of loss, backward, clip, AdamW and EMA; for MaskAlign with the mixer and another subset each."""
    settings = dict(mixer="token_mlp", mixer_hidden=5) if method == "maskalign" else {}
    model = make_model(seed, dtype, **settings)
    reference = Training(weights_of(model))
    optimizer = Optimizer(model, OptimizerConfig(), dtype)
    for step in range(3):
        batch, truth = make_batch(seed + step, scale=scale)
        subset = batch["subset"] if method == "maskalign" else None
        losses = our_loss(model, batch, dtype, "linear", subset)
        losses.total.backward()
        norm, skipped = optimizer.step(LR, losses.total.detach().isfinite())
        total, expected_norm = reference.step(SIZES, truth, "linear", subset)
        assert not skipped
        assert losses.total.item() == pytest.approx(float(total), rel=TOLERANCE[dtype])
        assert float(norm) == pytest.approx(expected_norm, rel=TOLERANCE[dtype])
        assert (expected_norm > CLIP) or scale == 1.0
    for name, parameter in model.named_parameters():
        for ours, theirs in (
            (parameter.detach(), reference.w[name]),
            (optimizer.ema_state()[name], reference.ema[name]),
        ):
            if name.endswith("attn.qkv.bias"):
                # The keys' bias has no gradient but rounding, which AdamW turns into steps of up to the learning rate.
                keys = slice(SIZES["width"], 2 * SIZES["width"])
                assert float((ours[keys] - theirs[keys]).abs().max()) < 3.1 * LR
                ours, theirs = ours.clone(), theirs.clone()
                ours[keys] = theirs[keys] = 0
            assert distance(ours, theirs) < TOLERANCE[dtype], name
