"""Clip, AdamW and EMA against the formulas written out in float64, and the guard against non-finite steps."""

import copy

import pytest
import torch

from maskalign.config import OptimizerConfig
from maskalign.training import fused_update
from maskalign.training.flat_buffers import norm_of
from maskalign.training.optimizer import Optimizer


def problem(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3)).to(dtype)


@pytest.mark.parametrize("clip, decay", [(1.0, 0.0), (0.05, 0.1), (0.0, 0.0)])
def test_steps_follow_the_formulas(clip, decay, seed):
    own = OptimizerConfig(lr=1e-2, weight_decay=decay, grad_clip=clip, ema_decay=0.9, betas=(0.8, 0.95))
    model = problem(seed)
    w = [p.detach().clone() for p in model.parameters()]
    m, v, ema = [x * 0 for x in w], [x * 0 for x in w], [x.clone() for x in w]
    optimizer = Optimizer(model, own, torch.float64)
    for step in range(1, 6):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).double()
        model(x).square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        norm, skipped = optimizer.step(1e-2, torch.tensor(True))
        expected = torch.cat([g.flatten() for g in grads]).norm()
        torch.testing.assert_close(norm, expected)
        assert not skipped
        scale = min(1.0, clip / (float(expected) + 1e-6)) if clip else 1.0
        for i, g in enumerate(grads):
            g = g * scale
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            w[i] = w[i] * (1 - 1e-2 * decay)
            w[i] = w[i] - 1e-2 * (m[i] / (1 - 0.8**step)) / ((v[i] / (1 - 0.95**step)).sqrt() + 1e-8)
            ema[i] = 0.9 * ema[i] + 0.1 * w[i]
    for p, average, want, want_ema in zip(model.parameters(), optimizer.ema, w, ema, strict=True):
        torch.testing.assert_close(p, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(average, want_ema, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("poison", ["gradient", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_step_changes_nothing(poison, dtype, seed):
    model = problem(seed, torch.float32)
    optimizer = Optimizer(model, OptimizerConfig(lr=0.1), dtype)
    x = torch.randn(4, 5).to(dtype)
    model(x).square().sum().backward()
    optimizer.step(0.1, torch.tensor(True))
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items() if not name.startswith("ema")}
    copies = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    if poison == "gradient":
        next(model.parameters()).grad[0, 0] = float("nan")
    _, skipped = optimizer.step(0.1, torch.tensor(poison != "loss"))
    assert skipped
    for name, tensor in optimizer.tensors().items():
        assert name.startswith("ema") or torch.equal(tensor, before[name]), name
    assert all(torch.equal(p, copy) for p, copy in zip(model.parameters(), copies, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_copies_follow_float32_masters(seed):
    model = problem(seed, torch.float32)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-5), torch.bfloat16)
    x = torch.randn(4, 5)
    for _ in range(20):
        model(x.bfloat16()).float().square().sum().backward()
        optimizer.step(1e-5, torch.tensor(True))
    for p, master, first in zip(model.parameters(), optimizer.masters, start, strict=True):
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16())
        # Twenty updates of 1e-5 each are far below bfloat16's step and must not be lost.
        assert (master - first).abs().max() > 1e-4


@pytest.mark.skipif(fused_update.library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_the_fused_pass_follows_the_plain_one(clip, dtype, seed):
    """Through clipped steps, a skipped one, a parameter without a gradient, and a change of the learning rate; with
    a tensor of several blocks and one that does not fill its last vector."""
    own = OptimizerConfig(weight_decay=0.1, grad_clip=clip, ema_decay=0.9, betas=(0.8, 0.95))
    torch.manual_seed(seed)
    first = torch.nn.Sequential(problem(seed, torch.float32), torch.nn.Linear(173, 211))
    models = [first, copy.deepcopy(first)]
    plain, fused = (Optimizer(m, own, dtype, fused=f) for m, f in zip(models, (False, True), strict=True))
    assert fused.fused_update and not plain.fused_update
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator).to(dtype) for p in models[0].parameters()]
        grads[2] = None if step == 2 else grads[2]
        for model in models:
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = None if grad is None else grad.clone()
        lr, healthy = 1e-2 / (1 + step), torch.tensor(step != 3)
        (norm, skipped), (other, also) = plain.step(lr, healthy), fused.step(lr, healthy)
        torch.testing.assert_close(norm, other, rtol=1e-5, atol=0)
        assert skipped == also == (step == 3) and all(p.grad is None for p in models[1].parameters())
        for (name, want), got in zip(plain.tensors().items(), fused.tensors().values(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, msg=name)
    for p, master in zip(models[1].parameters(), fused.masters, strict=True):
        assert torch.equal(p, master.to(dtype))


@pytest.mark.skipif(fused_update.library() is None, reason="no C compiler")
def test_the_fused_pass_is_the_same_with_any_number_of_threads(seed):
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(seed)
            model = torch.nn.Sequential(torch.nn.Linear(173, 211), torch.nn.Linear(211, 7))
            optimizer = Optimizer(model, OptimizerConfig(grad_clip=0.1), torch.bfloat16, fused=True)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            norm, _ = optimizer.step(1e-2, torch.tensor(True))
            results.append([norm, *(t.clone() for t in optimizer.tensors().values())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_without_a_compiler_the_optimizer_takes_several_passes(monkeypatch, tmp_path, seed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setattr("maskalign.training.optimizer.library", fused_update.library.__wrapped__)
    assert Optimizer(problem(seed, torch.float32), OptimizerConfig(), torch.bfloat16, fused=True).fused_update is None


def test_tensors_have_one_layout_before_and_after_a_step(seed):
    model = problem(seed)
    optimizer = Optimizer(model, OptimizerConfig(), torch.float64)
    before = {name: (t.shape, t.dtype) for name, t in optimizer.tensors().items()}
    model(torch.randn(2, 5).double()).sum().backward()
    optimizer.step(1e-3, torch.tensor(True))
    after = optimizer.tensors()
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == before
    assert float(after["step/0.weight"]) == 1


def dispatched(function):
    """How many operations a call dispatches, nested ones included, as torch's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum("::" in event.name for event in profile.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_few_operations_however_many_parameters(dtype, seed):
    """A view of each gradient, and some dozens for all of them together: before, it was 19 for every parameter."""
    counts = {}
    for layers in (2, 40):
        model = torch.nn.Sequential(*[torch.nn.Linear(5, 5) for _ in range(layers)])
        optimizer = Optimizer(model, OptimizerConfig(ema_decay=0.9), dtype)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            counts[layers] = dispatched(lambda optimizer=optimizer: optimizer.step(1e-3, torch.tensor(True)))
    per_parameter = (counts[40] - counts[2]) / (2 * 38)
    print(counts, per_parameter)
    assert per_parameter <= 1.1 and counts[2] < 100


def test_parameters_without_gradients_keep_their_own_count_of_steps(seed):
    """Against torch's AdamW, tensor by tensor, as parameters come and go; and after a checkpoint of all that."""
    own = OptimizerConfig(lr=1e-2, weight_decay=0.1, grad_clip=0.0, ema_decay=0.9)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(4)])
    reference = copy.deepcopy(model)
    optimizer = Optimizer(model, own)
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1, betas=tuple(own.betas), eps=own.eps)
    absent = [(), (2, 3), (2, 3), (0, 5, 7), (), (6,)]
    for step, missing in enumerate(absent):
        generator = torch.Generator().manual_seed(step)
        for k, (p, q) in enumerate(zip(model.parameters(), reference.parameters(), strict=True)):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad, q.grad = (None, None) if k in missing else (gradient, gradient.clone())
        if step == 4:  # resume in another process
            saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
            fresh = copy.deepcopy(model)
            gradients = [p.grad for p in model.parameters()]
            model, optimizer = fresh, Optimizer(fresh, own)
            for name, tensor in optimizer.tensors().items():
                tensor.copy_(saved[name])
            optimizer.after_load()
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
        optimizer.step(1e-2, torch.tensor(True))
        adamw.step()
        for name, p, q in zip(optimizer.names, model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            done = sum(optimizer.names.index(name) not in missing for missing in absent[: step + 1])
            assert float(optimizer.tensors()[f"step/{name}"]) == done


def test_the_norm_of_a_long_buffer_is_as_exact_as_tensor_by_tensor(seed):
    flat = torch.randn(3 * 4096 + 77, generator=torch.Generator().manual_seed(seed)) + 3
    for part in (flat, flat[:50], flat[:4096], flat[:1]):
        exact = part.double().square().sum().sqrt()
        assert abs(float(norm_of(part)) / float(exact) - 1) < 1e-6
