"""The placement that settings give, and compiled blocks against eager ones."""

import pytest

from maskalign.config import TrainingConfig
from maskalign.errors import UsageError
from maskalign.training import parallel
from maskalign.training.logs import read_metrics


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "nothing"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UsageError, match=f"training.device: '{device}'"):
        parallel.make_placement(TrainingConfig(device=device))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="parallel.plan: none runs in one process, but torchrun started 2"):
        parallel.make_placement(TrainingConfig())


@pytest.mark.slow
def test_compiled_blocks_give_the_losses_of_eager_ones(run, tmp_path):
    schedule = '{"kind": "step", "start": 0.5, "end": 1.0, "begin": 0.5}'
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        run(name, training__compile=compiled, method__keep_ratio=schedule)
    eager, compiled = (read_metrics(tmp_path / name / "metrics.csv") for name in ("eager", "compiled"))
    for a, b in zip(eager, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["step"] == b["step"]
