"""The command `plan`: what it prints and writes, and what it refuses, a line each."""

import csv
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from maskalign.checkpoints.build import build_model
from maskalign.cli import main
from maskalign.errors import UsageError
from maskalign.objective import draw, training_loss
from maskalign.planning.communication import Collective
from maskalign.planning.devices import DEVICES, load_device
from maskalign.planning.estimate import SAME_GLOBAL, SAME_PER_RANK, exposed_seconds, plan_run
from maskalign.planning.facts import find_facts
from maskalign.planning.options import Options
from maskalign.planning.report import text
from maskalign.planning.trace import Launches, trace_step
from maskalign.planning.work import Phase
from maskalign.runtime.accelerators import peak_tflops

H100 = DEVICES["h100"]
SMALL = (
    "plan --data.path not-there --model.depth 2 --model.width 32 --model.heads 2 --model.patch_size 2 "
    "--method.align_weight 0 --training.batch_size 64"
)
OWN = dict(
    name="mine", memory_gib=16, bandwidth_gbs=500, bf16_tflops=100, fp32_tflops=50, intra_node_gbs=30,
    inter_node_gbs=10, watts=200,
)  # fmt: skip


def run(words, capsys):
    """(exit status, stdout, stderr) of a command line."""
    with pytest.raises(SystemExit) as end:
        main([*SMALL.split(), *words.split()])
    return end.value.code, *capsys.readouterr()


def test_a_plan_is_printed_written_and_drawn(tmp_path, capsys):
    device = tmp_path / "mine.yaml"
    device.write_text(yaml.safe_dump({**OWN, "per_node": 4}))
    words = f"--world-size 8 --device {device} --parallel.plan hsdp --num-classes 5 --image-size 128 --out {tmp_path}/p"
    status, out, error = run(words, capsys)
    assert (status, error) == (0, "")
    for part in (
        "not-there does not exist: ImageNet is assumed",
        "128 px, 5 classes",
        "largest batch per rank",
        "8 x mine",
    ):
        assert part in out
    assert (tmp_path / "p" / "plan.txt").read_text().strip() in out
    assert Image.open(tmp_path / "p" / "plan.png").size[0] > 1000
    with open(tmp_path / "p" / "plan.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["batch"], int(row["ranks"])): row for row in rows}
    assert set(found) == {
        *((SAME_GLOBAL, ranks) for ranks in (1, 8, 64)), *((SAME_PER_RANK, ranks) for ranks in (1, 8, 64, 512, 4096))
    }  # fmt: skip
    weak, strong = found[SAME_PER_RANK, 64], found[SAME_GLOBAL, 64]
    assert (weak["global_batch"], strong["global_batch"]) == ("512", "64") and weak["shards"] == "4"
    assert float(weak["energy_kwh"]) == pytest.approx(float(weak["gpu_hours"]) * 0.2, rel=1e-4)
    images = 400_000 * 64
    hours = images / float(weak["images_per_second"]) / 3600
    assert float(weak["gpu_hours"]) == pytest.approx(64 * hours, rel=1e-4)
    total = sum(float(weak[f"{part}_ms"]) for part in ("compute", "update", "waiting", "python"))
    assert float(weak["step_ms"]) == pytest.approx(total, rel=1e-4)


def test_a_run_that_does_not_fit_ends_in_a_line_after_its_tables(tmp_path, capsys):
    device = tmp_path / "tiny.yaml"
    device.write_text(yaml.safe_dump({**OWN, "memory_gib": 0.02}))
    status, out, error = run(f"--world-size 1 --device {device}", capsys)
    assert status == 1 and error.count("\n") == 1 and "does not fit" in error and "images per micro-batch fit" in error
    largest = int(out.split("that fits")[1].split(":")[1].split()[0].replace(",", ""))
    assert 0 < largest < 64 and f"at most {largest} " in error
    status, _, error = run(f"--world-size 1 --device {device} --training.batch_size {largest}", capsys)
    assert (status, error) == (0, "")


@pytest.mark.parametrize(
    "words, line",
    [
        ("", "--world-size is missing"),
        ("--world-size 0", "--world-size: 0 must be at least 1"),
        ("--world-size 2", "none runs in one process, not on 2 ranks"),
        ("--world-size 3 --parallel.plan ddp", "training.batch_size: 64 must be a multiple of ranks"),
        ("--world-size 8 --parallel.plan hsdp --parallel.shard_size 3", "parallel.shard_size: 3 must divide"),
        ("--world-size 1 --out setup.py", "--out: setup.py cannot be written to (it is a file)"),
        ("--world-size 1 --device h10", "did you mean 'h100'?"),
        ("--world-size 1 --device nothing.yaml", "nothing.yaml cannot be read"),
        ("--world-size 1 --efficiency 1.5", "--efficiency: 1.5 must be in (0, 1]"),
        ("--world-size 1 --headroom 1", "--headroom: 1.0 must be in [0, 1)"),
        ("--world-size 1 --image-size 100", "--image-size: 100 must be a multiple of 8"),
        ("--world-size 1 --num-classes 0", "--num-classes: 0 must be at least 1"),
        ("--world-size 1 --model.patch_size 5", "model.patch_size: 5 must divide"),
        ("--world-size 1 --model.dept 3", "model.dept"),
    ],
)
def test_what_cannot_be_planned_ends_in_one_line(words, line, capsys):
    status, out, error = run(words, capsys)
    assert status == 2 and error.count("\n") == 1 and line in error and out == ""


@pytest.mark.parametrize(
    "content, line",
    [
        ("- 1", "must contain `name: value` lines"),
        ("{", "is not valid YAML"),
        (yaml.safe_dump({**OWN, "memory": 3}), "no field 'memory'; did you mean 'memory_gib'"),
        (yaml.safe_dump({key: value for key, value in OWN.items() if key != "watts"}), "lacks watts"),
        (yaml.safe_dump({**OWN, "watts": 0}), "watts is 0, must be a number above 0"),
        (yaml.safe_dump({**OWN, "watts": "many"}), "watts is 'many'"),
        (yaml.safe_dump({**OWN, "per_node": 1.5}), "per_node is 1.5, must be an integer"),
    ],
)
def test_a_wrong_device_file_is_told_in_a_line(tmp_path, content, line):
    path = tmp_path / "device.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"^--device: ") as error:
        load_device(path)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_class_token_is_planned_for(settings):
    """Its parameters, its place in memory, and a teacher that runs in every step although nothing is aligned."""
    words = "--model.class_token true --method.align_weight 0 --teacher.names [dinov2-s] --method.keep_ratio 0.5"
    cached = plan_run(settings(*words.split()), Options(1, H100))
    online = plan_run(settings(*words.split(), "--teacher.mode", "online"), Options(1, H100))
    assert (
        cached.parameters["class token"] == 384 * 64 + 3 * 64 + (64 + 1) * 384 and cached.parameters["projector"] == 0
    )
    assert any("class tokens of dinov2-s are cached as float16" in line for line in cached.assumed)
    (here,), (there,) = cached.phases, online.phases
    assert here["teacher"] == 0 and there["teacher"] == online.teachers["dinov2-s"].flops > 0
    assert here["kept"] == 128 and here["aligned"] == 0
    without = plan_run(settings("--method.align_weight", "0", "--method.keep_ratio", "0.5"), Options(1, H100))
    assert here["student"] > without.phases[0]["student"] and here["mixer"] > without.phases[0]["mixer"]
    (peak,), (less,) = cached.peaks.values(), without.peaks.values()
    assert peak.kept > less.kept
    unnamed = find_facts(settings("--model.class_token", "true", "--teacher.names", "[]"))
    assert any("class tokens of dinov2-b are cached" in line for line in unnamed.assumed)


@pytest.mark.parametrize(
    "key, driver, bf16, fp32",
    [
        ("a100", "NVIDIA A100-SXM4-80GB", 312, 156),
        ("h100", "NVIDIA H100 80GB HBM3", 989, 494),
        ("h200", "NVIDIA H200", 989, 494),
        ("b200", "NVIDIA B200", 2250, 1125),
        ("mi300x", "AMD Instinct MI300X", 1307, 163),
        (None, "NVIDIA H100 PCIe", 756, 378),
        (None, "NVIDIA GH200 480GB", 989, 494),
    ],
)
def test_peaks_are_those_of_the_data_sheets(key, driver, bf16, fp32):
    assert peak_tflops(driver) == (bf16, fp32)
    if key is not None:
        assert (DEVICES[key].bf16_tflops, DEVICES[key].fp32_tflops) == (bf16, fp32) and DEVICES[key].source
    assert peak_tflops("NVIDIA GeForce GTX 1080") is None


def test_links_of_a_node_and_between_nodes():
    size = 1e9
    inside = Collective("all_gather", size, 8, 1, 1, "forward").seconds(H100, 1.0)
    assert inside == pytest.approx(size * 7 / 8 / 450e9, rel=0.05)
    # All ports of a node carry a ring of whole nodes; a ring of one GPU per node has one port.
    across = Collective("all_gather", size, 64, 1, 1, "forward").seconds(H100, 1.0)
    assert across == pytest.approx(size * 63 / 64 / 400e9, rel=0.15)
    single = Collective("all_reduce", size, 8, 8, 1, "backward").seconds(H100, 1.0)
    assert single == pytest.approx(2 * size * 7 / 8 / 50e9, rel=0.05)
    assert Collective("all_reduce", size, 1, 1, 1, "backward").seconds(H100, 1.0) == 0


def test_links_hide_behind_the_computation_of_their_stage_only():
    options = Options(8, H100)
    gather = Collective("all_gather", 1e9, 8, 1, 10, "forward", exposed=1)
    each = gather.seconds(H100, options.link_efficiency)
    assert exposed_seconds([gather], 1e3, 1, options) == pytest.approx(each)
    assert exposed_seconds([gather], 0.0, 1, options) == pytest.approx(10 * each)
    assert exposed_seconds([gather], 3 * 4 * each, 1, options) == pytest.approx((1 + 9 - 4) * each)
    reduce = Collective("reduce_scatter", 1e9, 8, 1, 10, "backward")
    some = reduce.seconds(H100, options.link_efficiency)
    # With two micro-batches only the last one's backward, a third of the computation, is there to hide behind.
    assert exposed_seconds([reduce], 9 * some, 1, options) == pytest.approx(4 * some)
    assert exposed_seconds([reduce], 9 * some, 2, options) == pytest.approx(7 * some)


def test_more_efficient_products_and_fewer_tokens_make_a_faster_plan(settings):
    def rate(*words, **options):
        config = settings("--model.depth", "2", "--model.mixer", "none", "--method.align_weight", "0", *words)
        return plan_run(config, Options(1, H100, **options)).asked["images_per_second"]

    full = rate("--method.keep_ratio", "1")
    assert rate("--method.keep_ratio", "1", efficiency=0.8) > full < rate("--method.keep_ratio", "0.5")


def test_a_data_set_that_is_there_is_believed(settings, tmp_path):
    from maskalign.data.format.manifest import Manifest, Shard

    shard = Shard("0.tar", 100, 1, "0" * 64)
    Manifest(num_samples=100, resolution=32, class_names=["a", "b"], shards=[shard]).save(str(tmp_path))
    words = ["--data.path", str(tmp_path), "--method.align_weight", "0"]
    facts = find_facts(settings(*words))
    assert (facts.input_size, facts.in_channels, facts.num_classes, facts.images) == (32, 3, 2, 100)
    assert not facts.latent and not facts.assumed
    with pytest.raises(UsageError, match="the manifest of .* defines both"):
        find_facts(settings(*words), num_classes=3)


SMALL_BATCH = ["--model.preset", "SiT-S/2", "--model.depth", "2", "--method.align_depth", "1", "--training.batch_size"]


def test_small_batches_wait_for_python_unless_steps_are_captured(settings):
    """The step's time against launches times their cost, and against the device's own, at both ends of the batch."""

    def planned(batch, *words, device=H100, **options):
        words = ["--training.precision", "bf16", "--method.align_weight", "0", *SMALL_BATCH, str(batch), *words]
        estimate = plan_run(settings(*words), Options(1, device, **options))
        return estimate, estimate.asked, text(estimate)

    launched = ["--training.cuda_graph", "false"]
    estimate, small, said = planned(2, *launched, launch_us=50.0)
    assert small["step_ms"] == small["launching_ms"] == pytest.approx(estimate.launches * 0.05)
    busy = small["compute_ms"] + small["waiting_ms"] + small["update_ms"]
    assert small["python_ms"] == pytest.approx(small["step_ms"] - busy) and busy < 0.2 * small["step_ms"]
    assert "Python is the limit" in said and "training.cuda_graph true captures the step" in said
    _, captured, said = planned(2, launch_us=50.0)
    assert captured["step_ms"] == pytest.approx(busy) and captured["python_ms"] == 0
    assert "with a CUDA graph" in said and "without the graph Python would be the limit" in said
    _, large, said = planned(32768, *launched, launch_us=50.0)
    assert large["python_ms"] == 0 and "which is longer" in said and "is the limit" not in said
    _, amd, said = planned(2, device=DEVICES["mi300x"], launch_us=50.0)
    assert amd["python_ms"] > 0 and "Python is the limit" in said and "AMD" in said
    compiled, _, _ = planned(2, *launched, "--training.compile", "true", "--training.accumulation", "2")
    assert 0.8 * estimate.launches < compiled.launches < 1.6 * estimate.launches


def test_compiled_blocks_have_fewer_launches_and_every_micro_batch_has_its_own():
    launches = Launches(products=10, others=35, outside=7, update=5)
    assert launches.total(1, compiled=False) == 57 and launches.total(3, compiled=False) == 3 * 52 + 5
    assert launches.total(2, compiled=True) == 2 * (20 + 7) + 5


def test_launches_are_those_that_torch_dispatches(settings, spec):
    """An eager step's operations, counted by a mode of its own that leaves out views and allocations."""

    class Count(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.split("::")[1]
            self.count += not (
                func.is_view or name in ("detach", "empty", "empty_like", "empty_strided", "_unsafe_view")
            )
            return func(*args, **(kwargs or {}))

    config = settings("--method.align_weight", "0", "--model.attention", "sdpa", "--model.mixer", "none")
    trace = trace_step(config, replace(spec, teacher_dims=[]), Phase(32, 0, 1.0), 2)
    model = build_model(config, replace(spec, teacher_dims=[]))
    draws = draw(0, 0, 0, 2, shape=(4, 16, 16), grid=model.grid, keep=32)
    with Count() as counted:
        losses = training_loss(model, torch.randn(2, 4, 16, 16), torch.zeros(2, dtype=torch.int64), [], draws)
        losses.total.backward()
    launches = trace.launches
    found = launches.products + launches.others + launches.outside
    print(launches, counted.count)
    assert 0.9 * counted.count < found < 1.1 * counted.count + 20
    assert launches.products >= 4 * 15, "five linears and an attention in each block, forward and backward"


@pytest.mark.parametrize("words", ["--launch-us -1", "--launch-us inf"])
def test_a_wrong_cost_of_launching_is_told(words, capsys):
    status, _, error = run("--world-size 1 " + words, capsys)
    assert status == 2 and "--launch-us" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("datasets/imagenet512", 512),
        ("datasets/imagenet256", 256),
        ("data/imagenet-64", 64),
        ("datasets/imagenet", 256),
        ("datasets/photos2512", 256),  # 512 is the end of another number
        ("s3://bucket/imagenet512", 512),
    ],
)
def test_a_data_set_that_does_not_exist_has_the_size_in_its_name(settings, path, size):
    facts = find_facts(settings("--data.path", path))
    assert facts.image_size == size and facts.input_size == size // 8
    assert f"images of {size} px" in facts.assumed[0]
    assert find_facts(settings("--data.path", path), image_size=128).image_size == 128
