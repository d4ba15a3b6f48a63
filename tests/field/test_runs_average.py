# ruff: noqa: F401, F811 (fixtures are imported)
"""A moving average that is too slow for a short run: a warning, and EDM's ramp as a setting."""

import pytest
import torch
from safetensors.torch import load_file

from maskalign.checkpoints.layout import complete_checkpoints
from maskalign.config import OptimizerConfig
from maskalign.errors import UsageError
from maskalign.training.optimizer import Optimizer, average_decay
from maskalign.training.starting import initial_share, warn_of_short_average
from tests.tiny_runs import command, data_set, data_set_of, run

SLOW = "optimizer.ema_decay: after"


@pytest.mark.parametrize(
    "decay, steps, warned",
    [(0.9999, 1000, True), (0.9999, 22_000, True), (0.9999, 24_000, False), (0.999, 6000, False), (0.0, 1, False)],
)
def test_a_run_too_short_for_its_average_is_warned_of(caplog, decay, steps, warned):
    assert warn_of_short_average(OptimizerConfig(ema_decay=decay), steps) == warned
    assert (SLOW in caplog.text) == warned
    if warned:
        share = initial_share(OptimizerConfig(ema_decay=decay), steps)
        assert f"is {100 * share:.0f} % initial weights" in caplog.text and "ema_warmup" in caplog.text
    assert not warn_of_short_average(OptimizerConfig(ema_decay=decay, ema_warmup=0.05), steps)


def test_the_warning_comes_once_before_the_first_step_or_where_time_has_ended_the_run(run, caplog):
    run(training__max_steps=2)
    assert caplog.text.count(SLOW) == 1
    caplog.clear()
    run("timed", training__max_steps=1_000_000, training__max_seconds=0.5)
    assert caplog.text.count(SLOW) == 1
    caplog.clear()
    run("timed", training__max_steps=1_000_000, training__max_seconds=0.5)  # complete
    assert SLOW not in caplog.text
    run("fast", training__max_steps=4, optimizer__ema_decay=0.5)
    assert SLOW not in caplog.text


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_ramp_is_edms(share):
    """As in EDM's training loop: a half-life in images, bounded by a share of the images seen before the step."""
    config, batch = OptimizerConfig(ema_decay=0.9999, ema_warmup=share), 256
    half_life = (
        batch * torch.log(torch.tensor(0.5, dtype=torch.float64)) / torch.log(torch.tensor(0.9999, dtype=torch.float64))
    )
    for step in [0, 1, 7, 1000, 13_000, 140_000, 10**7]:
        seen = step * batch
        expected = 0.5 ** (batch / max(min(float(half_life), seen * share), 1e-8))
        assert average_decay(config, step) == pytest.approx(expected, rel=1e-12), step
    assert average_decay(OptimizerConfig(ema_decay=0.999), 0) == 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("on_tensor", [False, True])
def test_the_average_follows_the_ramp(dtype, fused, on_tensor, seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(7, 5)
    config = OptimizerConfig(lr=0.1, ema_decay=0.9, ema_warmup=0.3)
    optimizer = Optimizer(model, config, dtype, fused=fused)
    if on_tensor:  # as on a GPU, where a recorded step reads it
        if optimizer.fused_update:
            pytest.skip("the fused pass takes a number")
        optimizer.pull_tensor = torch.tensor(0.0)
    expected = None
    for step in range(8):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.set_step(step)
        optimizer.step(0.1, torch.tensor(True))
        now = [master.detach().double().clone() for master in optimizer.masters]
        decay = min(0.9, 0.5 ** (1 / (0.3 * step))) if step else 0.0
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected or now, now, strict=True)]
        for average, right in zip(optimizer.ema, expected, strict=True):
            assert torch.allclose(average.double(), right, atol=1e-6)


@pytest.mark.parametrize("plan", ["none", "fsdp"])
def test_a_short_run_with_the_ramp_samples_what_it_has_learned_and_resumes(run, data_set_of, tmp_path, plan):
    data_set_of("classes", class_token=True)
    own = dict(optimizer__ema_warmup=0.2, data__path=tmp_path / "classes", parallel__plan=plan)
    own |= dict(model__class_token="true", model__mixer="attention")
    run("whole", **own, training__max_steps=6)
    run("parts", **own, training__max_steps=2)
    run("parts", **own, training__max_steps=6)
    tensors = []
    for name in ("whole", "parts"):
        files = complete_checkpoints(tmp_path / name)[-1].glob("*.safetensors")
        tensors.append({key: value for file in files for key, value in load_file(file).items()})
    whole, parts = tensors
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    weights = [name for name in whole if name.startswith("model/blocks") and name.endswith("weight")]
    gaps = [float((whole[name] - whole[name.replace("model/", "ema/")]).norm()) for name in weights]
    moves = 6 * 0.003 * sum(whole[name].numel() for name in weights) ** 0.5
    assert 0 < sum(gap**2 for gap in gaps) ** 0.5 < moves / 2


def test_the_ramp_is_off_by_default_and_cannot_be_negative(run):
    assert OptimizerConfig().ema_warmup == 0
    with pytest.raises(UsageError, match="optimizer.ema_warmup"):
        run(optimizer__ema_warmup=-0.1)
