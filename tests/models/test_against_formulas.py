"""REPA, REG and MaskAlign transcribed in plain float64, against our model, objective, optimizer and sampler.

Nothing here calls maskalign for its expected values: weights come in as a dict of tensors by REPA's and REG's names,
and everything from the position embedding to the moving average is written out from the published formulas.
"""

import math

import pytest
import torch

from maskalign.checkpoints import from_repa, to_reg, to_repa
from maskalign.config import OptimizerConfig
from maskalign.models import SiT
from maskalign.objective import Draws, lognormal_time, training_loss
from maskalign.sampling import euler_maruyama
from maskalign.training.optimizer import Optimizer

SIZES = dict(input_size=8, patch_size=2, in_channels=4, num_classes=6, depth=3, width=24, heads=3, align_depth=2,
             projector_dim=20, teacher_dims=(10, 7))  # fmt: skip
BATCH, TOKENS = 5, 16
LR, BETA1, BETA2, EPS, CLIP, DECAY = 1e-4, 0.9, 0.999, 1e-8, 1.0, 0.9999
CLASS_WEIGHT = 0.03


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


def normalize(x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-6)


def modulated(x, shift, scale):
    return normalize(x) * (1 + scale[:, None, :]) + shift[:, None, :]


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


def block(w, name, tokens, c, heads):
    parts = linear(w, f"{name}.adaLN_modulation.1", silu(c)).split(tokens.shape[-1], dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    tokens = tokens + gate1[:, None] * attention(w, f"{name}.attn", modulated(tokens, shift1, scale1), heads)
    hidden = gelu(linear(w, f"{name}.mlp.fc1", modulated(tokens, shift2, scale2)))
    return tokens + gate2[:, None] * linear(w, f"{name}.mlp.fc2", hidden)


def forward(w, sizes, x, t, labels, subset=None, class_token=None):
    """(velocity by patch (B, n, p*p*C), [projected tokens (B, n or 1 + n, Dz)], class velocity (B, Dc) or None).

    With `subset` (B, K) on those patches alone; a class token (B, Dc) comes first, and always stays.
    """
    p, width, heads = sizes["patch_size"], sizes["width"], sizes["heads"]
    side = sizes["input_size"] // p
    kernel = w["x_embedder.proj.weight"]
    tokens = torch.zeros(len(x), side * side, width, dtype=x.dtype)
    for row in range(side):
        for column in range(side):
            patch = x[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens[:, row * side + column] = torch.einsum("bcij,dcij->bd", patch, kernel) + w["x_embedder.proj.bias"]
    tokens = tokens + position_embedding(width, side).to(x.dtype)
    first = 0 if class_token is None else 1
    if class_token is not None:  # REG: one more token in front, whose position is zero
        assert torch.equal(w["pos_embed"][:, 0], torch.zeros(1, width, dtype=x.dtype))
        token = normalize(linear(w, "cls_projectors2", class_token)) * w["wg_norm.weight"] + w["wg_norm.bias"]
        tokens = torch.cat([token[:, None], tokens], dim=1)

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
    layer = 0
    while f"mixer.layers.{layer}.attn.qkv.weight" in w:  # MaskAlign: on all tokens, before patches are dropped
        tokens = block(w, f"mixer.layers.{layer}", tokens, c, heads)
        layer += 1
    if subset is not None:
        kept = [[*range(first), *(first + row for row in rows.tolist())] for rows in subset]
        tokens = torch.stack([tokens[b, rows] for b, rows in enumerate(kept)])

    projected = []
    for depth in range(sizes["depth"]):
        tokens = block(w, f"blocks.{depth}", tokens, c, heads)
        if depth + 1 == sizes["align_depth"]:
            for k in range(len(sizes["teacher_dims"])):
                h = silu(linear(w, f"projectors.{k}.0", tokens))
                projected.append(linear(w, f"projectors.{k}.4", silu(linear(w, f"projectors.{k}.2", h))))
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(c)).split(width, dim=-1)
    tokens = modulated(tokens, shift, scale)
    class_velocity = linear(w, "final_layer.linear_cls", tokens[:, 0]) if first else None
    return linear(w, "final_layer.linear", tokens[:, first:]), projected, class_velocity


def as_tokens(image, p):
    """(B, C, H, W) cut into rows of (p, p, C), token by token."""
    side = image.shape[-1] // p
    rows = []
    for row in range(side):
        for column in range(side):
            patch = image[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            rows.append(patch.permute(0, 2, 3, 1).reshape(len(image), -1))
    return torch.stack(rows, dim=1)


def noised(x, noise, t, path):
    """(x_t, target velocity); t is of x's rank."""
    if path == "linear":
        return (1 - t) * x + t * noise, noise - x
    a = math.pi / 2
    x_t = torch.cos(a * t) * x + torch.sin(a * t) * noise
    return x_t, -a * torch.sin(a * t) * x + a * torch.cos(a * t) * noise


def loss_of(w, sizes, batch, path, subset=None):
    """(total, denoising of the patches, alignment, denoising of the class token)."""
    x, noise, labels, teachers = batch["x"], batch["noise"], batch["labels"], batch["teachers"]
    x_t, target = noised(x, noise, batch["t"][:, None, None, None], path)
    token_t, has_token = None, "class_token" in batch
    if has_token:
        token_t, token_target = noised(batch["class_token"], batch["class_noise"], batch["t"][:, None], path)
    velocity, projected, class_velocity = forward(w, sizes, x_t, batch["t"], labels, subset, token_t)
    target = as_tokens(target, sizes["patch_size"])
    if subset is not None:
        target = torch.stack([target[b, rows] for b, rows in enumerate(subset)])
    denoising = ((velocity - target) ** 2).mean()
    alignment = torch.zeros((), dtype=x.dtype)
    for z_student, z in zip(projected, teachers, strict=True):
        if subset is not None:
            patches = torch.stack([z[b, has_token + rows] for b, rows in enumerate(subset)])
            z = torch.cat([z[:, :has_token], patches], dim=1)
        cosine = (z_student * z).sum(-1) / (torch.sqrt((z_student**2).sum(-1)) * torch.sqrt((z**2).sum(-1)))
        alignment = alignment - cosine.mean() / len(teachers)
    of_class = ((class_velocity - token_target) ** 2).mean() if has_token else torch.zeros_like(alignment)
    return denoising + 0.5 * alignment + CLASS_WEIGHT * of_class, denoising, alignment, of_class


def trajectory(w, sizes, x, token, labels, noises, scale, class_scale, interval, path="linear"):
    """REG's Euler-Maruyama of image and class token in float64, guided where low <= t <= high.

    Args:
        noises: [(noise of the image, noise of the class token)] of all steps but the last, which has none.
        scale, class_scale: guidance of the two; class_scale 0 leaves the class token's conditional velocity.
    """
    steps = len(noises) + 1
    times = [1 + (0.04 - 1) * k / (steps - 1) for k in range(steps)] + [0.0]
    null = torch.full_like(labels, sizes["num_classes"])
    for k in range(steps):
        now, then = times[k], times[k + 1]
        drifts = []
        for those in (labels, null):
            t = torch.full((len(x),), now, dtype=x.dtype)
            velocity, _, class_velocity = forward(w, sizes, x, t, those, class_token=token)
            pair = []
            for state, v in ((x, as_image(velocity, x.shape, sizes["patch_size"])), (token, class_velocity)):
                if path == "linear":
                    ratio, sigma, d_sigma = -(1 - now), now, 1.0
                else:
                    a = math.pi / 2
                    ratio, sigma, d_sigma = -1 / (a * math.tan(a * now)), math.sin(a * now), a * math.cos(a * now)
                score = (ratio * v - state) / (sigma**2 - ratio * d_sigma * sigma)
                pair.append(v - now * score)
            drifts.append(pair)
        guided = interval[0] <= now <= interval[1]
        (drift, class_drift), (null_drift, null_class_drift) = drifts
        if guided:
            drift = null_drift + scale * (drift - null_drift)
        if guided and class_scale > 0:
            class_drift = null_class_drift + class_scale * (class_drift - null_class_drift)
        x, token = x + (then - now) * drift, token + (then - now) * class_drift
        if k < steps - 1:
            spread = math.sqrt(2 * now * (now - then))
            x, token = x + spread * noises[k][0], token + spread * noises[k][1]
    return x, token


def as_image(rows, shape, p):
    """The inverse of `as_tokens`."""
    image, side = torch.zeros(shape, dtype=rows.dtype), shape[-1] // p
    for k in range(side * side):
        row, column = k // side, k % side
        patch = rows[:, k].reshape(-1, p, p, shape[1]).permute(0, 3, 1, 2)
        image[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p] = patch
    return image


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
    """Weights with nothing at zero, read from REPA's or REG's layout; both precisions hold the same numbers."""
    model = SiT(**{**SIZES, "mixer": "none", **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    layout = to_repa if model.class_dim is None else to_reg
    model = from_repa(layout(model.to(dtype)))
    # It is kept in float32, as REPA's: in float64 that rounding would be all that is left to see.
    model.pos_embed.copy_(position_embedding(SIZES["width"], SIZES["input_size"] // SIZES["patch_size"]))
    return model


def make_batch(seed, time="uniform", path="linear", scale=1.0, class_dim=None):
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
    if class_dim:
        token, class_noise = (torch.randn(BATCH, class_dim, generator=generator) for _ in range(2))
        of_class = [torch.randn(BATCH, 1, dim, generator=generator) for dim in SIZES["teacher_dims"]]
        teachers = [torch.cat(both, dim=1) for both in zip(of_class, teachers, strict=True)]
    ours = dict(x=scale * x, noise=noise, t=t, labels=labels, drop=drop, teachers=teachers, subset=subset)
    truth = dict(
        x=scale * x.double(),
        noise=noise.double(),
        t=t.double(),
        labels=torch.where(drop, SIZES["num_classes"], labels),
        teachers=[z.double() for z in teachers],
    )
    if class_dim:
        ours |= dict(class_token=token, class_noise=class_noise)
        truth |= dict(class_token=token.double(), class_noise=class_noise.double())
    return ours, truth


def our_loss(model, batch, dtype, path, subset=None):
    draws = Draws(batch["t"], batch["noise"], batch["drop"], subset, None, None, batch.get("class_noise"))
    teachers = [z.to(dtype) for z in batch["teachers"]]
    token = batch["class_token"].to(dtype) if "class_token" in batch else None
    return training_loss(model, batch["x"].to(dtype), batch["labels"], teachers, draws, path=path, class_token=token)


def weights_of(model):
    layout = to_repa if model.class_dim is None else to_reg
    return {name: value.double() for name, value in layout(model).items()}


def parameters_of(weights):
    """Weights by REPA's and REG's names as a dict by ours."""
    return dict(from_repa(weights, heads=SIZES["heads"], align_depth=SIZES["align_depth"]).named_parameters())


def distance(a, b):
    """||a - b|| / ||b||."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


METHODS = {
    "repa": dict(),
    "reg": dict(class_dim=10),
    "repa-maskalign": dict(mixer="attention", mixer_layers=2),
    "maskalign": dict(class_dim=10, mixer="attention", mixer_layers=2),
    "maskalign-fast": dict(mixer="token_mlp", mixer_hidden=5),
}


@pytest.mark.parametrize("attention", ["math", "sdpa"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_velocity_and_projections(dtype, method, attention, seed):
    model = make_model(seed, dtype, attention=attention, **METHODS[method]).eval()
    batch, truth = make_batch(seed, class_dim=model.class_dim)
    labels = torch.tensor([0, 5, 6, 3, 6])
    token = batch["class_token"].to(dtype) if model.class_dim else None
    out = model(batch["x"].to(dtype), batch["t"].to(dtype), labels, class_token=token)
    velocity, projected, class_velocity = forward(
        weights_of(model), SIZES, truth["x"], truth["t"], labels, class_token=truth.get("class_token")
    )
    assert distance(as_tokens(out.velocity, SIZES["patch_size"]), velocity) < TOLERANCE[dtype]
    assert len(out.aligned) == 2 and out.aligned_index is None
    for ours, theirs in zip(out.aligned, projected, strict=True):
        assert distance(ours, theirs) < TOLERANCE[dtype]
    if model.class_dim:
        assert distance(out.class_velocity, class_velocity) < TOLERANCE[dtype]
    else:
        assert out.class_velocity is None and class_velocity is None


@pytest.mark.parametrize("width, side", [(24, 4), (384, 8), (1152, 3)])
def test_position_embedding(width, side):
    model = SiT(input_size=side, patch_size=1, width=width, heads=2, depth=1, align_depth=1, mixer="none")
    expected = position_embedding(width, side)
    assert float((model.pos_embed[0].double() - expected).abs().max()) < 6e-8  # float32's rounding of numbers up to 1


@pytest.mark.parametrize("time", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("method", ["repa", "reg", "maskalign"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients(dtype, method, path, time, seed):
    model = make_model(seed, dtype, **METHODS[method])
    batch, truth = make_batch(seed, time, path, class_dim=model.class_dim)
    subset = batch["subset"] if method == "maskalign" else None
    losses = our_loss(model, batch, dtype, path, subset)
    losses.total.backward()
    leaves = {name: value.clone().requires_grad_(name != "pos_embed") for name, value in weights_of(model).items()}
    expected = loss_of(leaves, SIZES, truth, path, subset)
    expected[0].backward()
    for ours, theirs in zip(losses, expected, strict=True):
        assert abs(ours.item() - theirs.item()) <= TOLERANCE[dtype] * abs(expected[0].item())
    grads = parameters_of(
        {name: value.detach() if value.grad is None else value.grad for name, value in leaves.items()}
    )
    for name, parameter in model.named_parameters():
        assert (parameter.grad.double() - grads[name]).norm() <= TOLERANCE[dtype] * grads[name].norm(), name


@pytest.mark.parametrize("scale", [1.0, 32.0], ids=["free", "clipped"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_training_steps(dtype, method, scale, seed):
    """Three steps of loss, backward, clip, AdamW and EMA; where patches are dropped, another subset each time."""
    model = make_model(seed, dtype, **METHODS[method])
    reference = Training(weights_of(model))
    optimizer = Optimizer(model, OptimizerConfig(), dtype)
    for step in range(3):
        batch, truth = make_batch(seed + step, scale=scale, class_dim=model.class_dim)
        subset = batch["subset"] if "maskalign" in method else None
        losses = our_loss(model, batch, dtype, "linear", subset)
        losses.total.backward()
        norm, skipped = optimizer.step(LR, losses.total.detach().isfinite())
        total, expected_norm = reference.step(SIZES, truth, "linear", subset)
        assert not skipped
        assert losses.total.item() == pytest.approx(float(total), rel=TOLERANCE[dtype])
        assert float(norm) == pytest.approx(expected_norm, rel=TOLERANCE[dtype])
        assert (expected_norm > CLIP) or scale == 1.0
    trained, averaged = parameters_of(reference.w), parameters_of(reference.ema)
    for name, parameter in model.named_parameters():
        for ours, theirs in ((parameter, trained[name]), (optimizer.ema_state()[name], averaged[name])):
            ours, theirs = ours.detach(), theirs.detach()
            if name.endswith("attn.qkv.bias"):
                # The keys' bias has no gradient but rounding, which AdamW turns into steps of up to the learning rate.
                keys = slice(SIZES["width"], 2 * SIZES["width"])
                assert float((ours[keys] - theirs[keys]).abs().max()) < 3.1 * LR
                ours, theirs = ours.clone(), theirs.clone()
                ours[keys] = theirs[keys] = 0
            assert distance(ours, theirs) < TOLERANCE[dtype], name


@pytest.mark.parametrize("class_scale", [2.3, 1.4, 0.0])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("method", ["reg", "maskalign"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ten_guided_steps_of_image_and_class_token(dtype, method, path, class_scale, seed):
    """The packed state of image and class token goes through our solver; the model is called as it stands."""
    model, scale, interval, steps = make_model(seed, dtype, **METHODS[method]).eval(), 2.3, (0.0, 0.85), 10
    generator = torch.Generator().manual_seed(seed)
    shape, labels = (BATCH, SIZES["in_channels"], 8, 8), torch.tensor([0, 5, 2, 3, 1])
    x, token = torch.randn(shape, generator=generator), torch.randn(BATCH, 10, generator=generator)
    noises = [
        (torch.randn(shape, generator=generator).double(), torch.randn(BATCH, 10, generator=generator).double())
        for _ in range(steps - 1)
    ]
    expected = trajectory(
        weights_of(model), SIZES, x.double(), token.double(), labels, noises, scale, class_scale, interval, path
    )

    def pack(image, token):
        return torch.cat([image.flatten(1), token], dim=1)

    def call(state, t, labels):
        image, token = state[:, :-10].reshape(shape), state[:, -10:]
        out = model(image, t, labels, align=False, class_token=token)
        return out.velocity.double(), out.class_velocity.double()

    def velocity(state, t):
        (v, v_token), guided = call(state, t, labels), interval[0] <= float(t[0]) <= interval[1]
        if guided:
            null, null_token = call(state, t, torch.full_like(labels, SIZES["num_classes"]))
            v = null + scale * (v - null)
            v_token = null_token + class_scale * (v_token - null_token) if class_scale else v_token
        return pack(v, v_token)

    ahead = iter(noises)
    state = euler_maruyama(velocity, pack(x, token).to(dtype), steps, path=path, randn=lambda state: pack(*next(ahead)))
    assert state.dtype == torch.float64
    assert distance(state[:, :-10].reshape(shape), expected[0]) < TOLERANCE[dtype]
    assert distance(state[:, -10:], expected[1]) < TOLERANCE[dtype]
