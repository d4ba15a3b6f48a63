"""The step benchmark: its FLOP count against torch's counter, its memory count, and one small run of the whole."""

import csv
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.steps import clock, command
from benchmarks.steps.cases import OurCase
from benchmarks.steps.clock import saved_bytes, split_of
from benchmarks.steps.command import can_compile, main, parse
from benchmarks.steps.data import write_shards
from maskalign.config.presets import SIZES
from maskalign.errors import RunError
from maskalign.models import SiT
from maskalign.models.flops import forward_flops

TINY = dict(input_size=8, patch_size=2, depth=4, width=24, heads=3, teacher_dims=(10, 7), align_depth=2,
             projector_dim=12, mixer_hidden=6, num_classes=5, attention="math")  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """SiT-S with an eighth of its width, and a peak of small matrices: no test needs the speed of this machine."""
    monkeypatch.setitem(SIZES, "S", SIZES["S"] | dict(width=48))
    monkeypatch.setattr(command, "matmul_peak", partial(clock.matmul_peak, size=256))


@pytest.fixture
def threads():
    """Puts torch's number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings",
    [
        dict(mixer="none"),
        dict(mixer="none", route="none"),
        dict(mixer="token_mlp"),
        dict(mixer="token_mlp", route=(1, 3)),
        dict(mixer="attention"),
        dict(mixer="attention", mixer_layers=3, class_dim=9),
        dict(mixer="attention", mixer_layers=1, class_dim=9, route=(1, 3)),
        dict(mixer="attention", class_dim=9, route=(1, 3), restore="bypass"),
        dict(mixer="attention", class_dim=9, route="none"),
        dict(mixer="none", class_dim=9),
        dict(mixer="token_mlp", class_dim=9),
        dict(mixer="depthwise_conv", class_dim=9, route=(1, 3), restore="fuse"),
        dict(mixer="none", class_dim=9, route="none", projector="conv"),
        dict(mixer="none", route=(1, 3), restore="bypass", align_depth=1),
        dict(mixer="none", route=(1, 3), restore="bypass", align_depth=4),
        dict(mixer="token_mlp", route=(1, 3), restore="fuse"),
        dict(mixer="none", teacher_dims=()),
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [8, 16])
def test_flops_are_those_that_torch_counts(settings, kept):
    model = SiT(**{**TINY, **settings})
    subset = torch.arange(kept).expand(1, -1) if kept < 16 else None
    x, t, labels = torch.randn(1, 4, 8, 8), torch.rand(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x, t, labels, subset, class_token=torch.randn(1, 9) if model.class_dim else None)
    assert forward_flops(model, kept) == counter.get_total_flops()


def test_saved_bytes_follow_the_tokens():
    """The linear part of what is saved halves with the tokens; attention's maps fall faster."""
    full, half = (
        OurCase(recipe, "SiT-S/8", keep, 2, "fp32", "cpu") for recipe, keep in (("repa", None), ("maskalign-fast", 0.5))
    )
    assert 0.4 < saved_bytes(half) / saved_bytes(full) < 0.6
    parts = split_of(half, torch.device("cpu"), 1)
    assert all(parts[name] > 0 for name in ("draws", "forward", "backward", "optimizer"))


def test_batches_through_the_loader_and_a_teacher_in_the_loop(tmp_path):
    """What is read or computed in a step shows up as its own part, and not as a saved activation."""
    folder = write_shards(tmp_path, (4, 4), 64)
    settings = ("maskalign-fast", "SiT-S/8", 0.5, 2, "fp32", "cpu", False)
    plain, read = OurCase(*settings), OurCase(*settings, "shards", "cached", folder)
    online = OurCase(*settings, "memory", "online:efficientnet-lite0")
    batch, other = read.batches(), read.batches()
    assert batch.inputs.shape == (2, 8, 32, 32) and batch.teachers[0].shape == (2, 16, 768)
    assert batch.teachers[0].dtype == torch.int8 and not torch.equal(batch.inputs, other.inputs)
    assert online.batches().teachers[0].shape == (2, 16, 320)
    of = {name: split_of(case, torch.device("cpu"), 2) for name, case in
          {"plain": plain, "read": read, "online": online}.items()}  # fmt: skip
    assert of["read"]["data"] > 5 * of["plain"]["data"] and of["online"]["teacher"] > 20 * of["plain"]["teacher"]
    assert abs(saved_bytes(read) / saved_bytes(plain) - 1) < 0.1


def test_a_small_run(tmp_path, capsys):
    recipes = "repa,reg,maskalign,maskalign-fast,maskalign-fast-no-mixer"
    main(["--preset", "SiT-S/8", "--batch-size", "1", "--keep-ratios", "0.5", "--rounds", "1", "--warmup", "1",
          "--split-steps", "1", "--no-peak", "--device", "cpu", "--no-compile", "--out", str(tmp_path),
          "--recipes", recipes])  # fmt: skip
    lines = capsys.readouterr().out.strip().splitlines()
    cases = ["repa", "reg", "maskalign", "maskalign-fast@0.5", "maskalign-fast-no-mixer@0.5"]
    assert [line.split()[0] for line in lines[-6:]] == ["case", *cases]
    with open(tmp_path / "steps-SiT-S-8-fp32-b1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and all(float(rows[0][key]) == 1 for key in ("x_repa", "x_repa_p10", "x_repa_p90"))
    by_case = {row["case"]: row for row in rows}
    assert all(float(by_case["reg"][key]) == 1 for key in ("time_of_reg", "passes_of_reg_p10"))
    for row in rows:
        assert 0 < float(row["passes_ms"]) < float(row["step_ms"])  # forward and backward are a part of the step
        share = float(row["passes_ms"]) / float(by_case["reg"]["passes_ms"])
        assert float(row["passes_of_reg"]) == pytest.approx(share, rel=1e-4)
    assert by_case["maskalign"]["tokens"] == "16/16"  # 12, to a multiple of 8
    assert rows[3]["mixer_cost"] and not rows[2]["mixer_cost"]
    assert {(row["device"], row["compiled"], row["data"], row["teacher"]) for row in rows} == {
        ("cpu", "False", "memory", "cached")
    }
    assert all(float(row["data_ms"]) >= 0 and float(row["backward_ms"]) > 0 for row in rows)
    assert all(float(row["images_per_second"]) > 0 and row["machine"] for row in rows)
    assert float(rows[3]["gflops_per_image"]) < 0.6 * float(rows[0]["gflops_per_image"])
    assert (tmp_path / "steps-SiT-S-8-fp32-b1.png").stat().st_size > 10_000


# A stand-in for the public code's two files: what `step_reference` needs of them, and nothing that learns.
REFERENCE_MODEL = """
from types import SimpleNamespace
import torch
class Net(torch.nn.Module):
    def __init__(self, z_dims, **settings):
        super().__init__()
        block = torch.nn.Module()
        block.mlp = torch.nn.Module()
        block.mlp.fc1 = torch.nn.Linear(4, 16)
        self.blocks = torch.nn.ModuleList([block])
        self.projectors = torch.nn.ModuleList([torch.nn.Linear(16, z_dims[0])])
        print("a line that is no reply")
    def forward(self, x, t, y):
        hidden = self.blocks[0].mlp.fc1(x.flatten(2).transpose(1, 2))
        return hidden.mean(-1).unflatten(1, (32, 32)).unsqueeze(1), [self.projectors[0](hidden)]
SiT_models = {"SiT-S/8": Net}
"""
REFERENCE_LOSS = """
import torch
class SILoss:
    def __init__(self, **settings): pass
    def __call__(self, model, x, kwargs, zs):
        velocity, (z,) = model(x, torch.rand(len(x)), **kwargs)
        return (velocity - x).square().mean((1, 2, 3)), -torch.cosine_similarity(z[:, :16], zs[0], dim=-1).mean(1)
"""


# The same of the public REG code: a class token in, and its velocity out.
REG_MODEL = REFERENCE_MODEL.replace("def forward(self, x, t, y):", "def forward(self, x, t, y, cls_token):").replace(
    "[self.projectors[0](hidden)]", "[self.projectors[0](hidden)], 0.5 * cls_token + hidden.mean()"
)
REG_LOSS = """
import torch
class SILoss:
    def __init__(self, **settings): pass
    def __call__(self, model, x, kwargs, zs, cls_token=None):
        velocity, (z,), token = model(x, torch.rand(len(x)), **kwargs, cls_token=cls_token)
        alignment = -torch.cosine_similarity(z[:, :17], zs[0], dim=-1).mean(1)
        times = torch.rand(len(x))
        return (velocity - x).square().mean((1, 2, 3)), alignment, times, x, (token - cls_token).square().mean(1)
"""


def test_the_reference_takes_turns_from_a_process_of_its_own(tmp_path, threads):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sit.py").write_text(REFERENCE_MODEL)
    (tmp_path / "loss.py").write_text(REFERENCE_LOSS)
    main(["--preset", "SiT-S/8", "--batch-size", "2", "--recipes", "repa", "--rounds", "1", "--warmup", "1",
          "--threads", "1", "--clock", "cpu", "--split-steps", "1", "--no-peak", "--device", "cpu",
          "--precision", "fp32", "--reference-precision", "bf16", "--reference", str(tmp_path),
          "--no-compile", "--out", str(tmp_path)])  # fmt: skip
    with open(tmp_path / "steps-SiT-S-8-fp32-b2-reference-bf16.csv", newline="") as file:
        ours, reference = csv.DictReader(file)
    assert reference["case"] == "reference-bf16" and reference["clock"] == "cpu"
    assert float(reference["step_ms"]) > 0 and float(reference["saved_mib"]) > 0 and float(reference["forward_ms"]) > 0
    assert float(ours["x_reference"]) == pytest.approx(float(reference["step_ms"]) / float(ours["step_ms"]), rel=1e-4)


def test_the_public_reg_code_is_told_by_its_loss(tmp_path, threads):
    """In the memory of one case at a time, and without an optimizer: nothing but its time is forward and backward."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sit.py").write_text(REG_MODEL)
    (tmp_path / "loss.py").write_text(REG_LOSS)
    main(["--preset", "SiT-S/8", "--batch-size", "2", "--recipes", "reg", "--rounds", "2", "--warmup", "1",
          "--threads", "1", "--split-steps", "1", "--no-peak", "--device", "cpu", "--precision", "fp32", "--reference",
          str(tmp_path), "--no-compile", "--out", str(tmp_path), "--one-at-a-time", "--passes-only",
          "--steps-per-turn", "3"])  # fmt: skip
    with open(tmp_path / "steps-SiT-S-8-fp32-b2-beside-reg-passes.csv", newline="") as file:
        ours, reference = csv.DictReader(file)
    assert ours["case"] == "reg" and reference["case"] == "reference-reg-fp32"
    assert ours["x_repa"] == "" and float(ours["time_of_reg"]) == 1 and float(reference["passes_of_reg"]) > 0
    assert float(ours["optimizer_ms"]) < 0.2 * float(ours["backward_ms"]) and float(reference["optimizer_ms"]) == 0
    # The stand-in has other layers; what is counted of ours is REG's: 17 tokens, and a class token in and out.
    assert float(ours["gflops_per_image"]) > 0 and float(ours["x_reference"]) > 0


def test_a_step_without_an_optimizer_has_the_same_loss():
    """What `--passes-only` times is the step's own forward and backward, and no gradient is left of it."""
    settings = ("maskalign", "SiT-S/8", None, 2, "fp32", "cpu", False, "memory", "cached", None)
    whole, passes = OurCase(*settings), OurCase(*settings, False)
    assert float(whole.step()) == float(passes.step())
    assert all(p.grad is None for p in passes.model.parameters())


def test_a_peak_is_measured_on_smaller_matrices_where_it_would_take_long(monkeypatch):
    monkeypatch.setattr(clock, "seconds_of", lambda *_: 1.0)
    peaks = [clock.matmul_peak(torch.device("cpu"), "fp32", size=64, tries=2, patience=p) for p in (128, 127)]
    assert peaks == [2 * 64**3, 2 * 16**3]


def test_a_reference_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--recipes", "repa", "--reference", str(tmp_path)])
    assert "has no models/sit.py; give a checkout of the public REPA or REG" in capsys.readouterr().err


def test_a_reference_that_does_not_run(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sit.py").write_text("raise OSError('a library is missing')")
    (tmp_path / "loss.py").write_text("")
    with pytest.raises(RunError, match="the reference ended with status"):
        main(["--preset", "SiT-S/8", "--recipes", "repa", "--no-compile", "--reference", str(tmp_path)])


def test_blocks_are_compiled_where_there_is_a_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not can_compile(torch.device("cpu"))
    compiler = tmp_path / "g++"
    compiler.write_text("")
    compiler.chmod(0o755)
    assert can_compile(torch.device("cpu"))
    assert [parse(words).compile for words in ([], ["--compile"], ["--no-compile"])] == [None, True, False]


@pytest.mark.parametrize(
    "words, match",
    [
        (["--teacher", "live"], "neither cached"),
        (["--recipes", "repo"], "no recipe"),
        (["--keep-ratios", "half"], "keep-ratios"),
        (["--rounds", "0"], "rounds"),
        (["--clock", "cpu", "--threads", "2"], "--threads 1"),
    ],
)
def test_wrong_options(words, match, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and match in capsys.readouterr().err
