"""Checkpoints: whole to the last bit or skipped, written beside the training, kept by two rules, for any plan."""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from maskalign.checkpoints.layout import (
    MARKER,
    PARTIAL,
    complete_checkpoints,
    file_digest,
    find,
    find_damage,
    newest_sound,
)
from maskalign.checkpoints.loading import load, load_model, load_tensors
from maskalign.errors import RunError, UsageError
from maskalign.training import saving
from maskalign.training.logs import read_metrics
from maskalign.training.saving import Saver, superfluous


def names(run_dir):
    return [path.name for path in complete_checkpoints(run_dir)]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 5), "b": (3,), "c": (), "d": (0, 4), "e": (1, 1, 9)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {
        "f": torch.randn(6, 4, generator=generator).t(),
        "g": torch.arange(5),
        "h": torch.ones(3).bfloat16(),
    }


def save(run_dir, step, tensors=None, **kwargs):
    saver = Saver(run_dir, **kwargs)
    saver.save(step, some_tensors(step) if tensors is None else tensors, {"step": step}, "seed: 0\n")
    saver.wait()


@pytest.mark.parametrize("background", [True, False])
def test_tensors_of_odd_shapes_come_back_to_the_bit(tmp_path, seed, background):
    tensors = some_tensors(seed)
    save(tmp_path, 1, tensors, background=background)
    (checkpoint,) = complete_checkpoints(tmp_path)
    read = {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}
    load_tensors(checkpoint, read)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    # Readable by everybody: the safetensors library itself gives the same.
    (file,) = checkpoint.glob("*.safetensors")
    theirs = load_file(file)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


def test_nothing_in_a_checkpoint_is_a_pickle(run, tmp_path):
    run(training__max_steps=2)
    files = [path for path in complete_checkpoints(tmp_path / "run")[-1].iterdir()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml", ""}
    for path in files:
        with pytest.raises((pickle.UnpicklingError, UnicodeDecodeError, ValueError, KeyError, IndexError, EOFError)):
            pickle.loads(path.read_bytes())


def test_every_bit_counts(tmp_path, seed):
    save(tmp_path, 1)
    (checkpoint,) = complete_checkpoints(tmp_path)
    assert find_damage(checkpoint) is None
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for place in torch.randint(len(whole), (12,), generator=generator).tolist():
            flip(path, place)
            assert find_damage(checkpoint) is not None, (path, place)
            path.write_bytes(whole)
        for length in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert find_damage(checkpoint) is not None, (path, length)
        path.unlink()
        assert find_damage(checkpoint) is not None, path
        path.write_bytes(whole)
    assert find_damage(checkpoint) is None


def test_ranks_that_look_at_a_share_each_find_what_one_would(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    flip(tmp_path / "checkpoints" / "step_00000002" / "config.yaml", 3)
    found = [find_damage(tmp_path / "checkpoints" / "step_00000002", part, 3) for part in range(3)]
    assert sum(problem is not None for problem in found) == 1
    chosen, line = newest_sound(tmp_path)
    assert chosen.name == "step_00000001" and "config.yaml" in line


@pytest.mark.parametrize("how", ["flip", "cut", "no marker", "no file", "marker of nonsense", "no folder"])
def test_a_damaged_checkpoint_is_passed_over_and_named(run, tmp_path, capsys, how):
    own = dict(training__checkpoint_every=2, training__keep_checkpoints=1)
    run("whole", **own, training__max_steps=6)
    run(**own | dict(training__keep_checkpoints=2), training__max_steps=4)
    newest = complete_checkpoints(tmp_path / "run")[-1]
    file = next(newest.glob("*.safetensors"))
    if how == "flip":
        flip(file, -50)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "no marker":
        (newest / MARKER).unlink()
    elif how == "no file":
        file.unlink()
    elif how == "marker of nonsense":
        (newest / MARKER).write_text("[1]")
    elif how == "no folder":
        os.rename(newest, newest.with_name(PARTIAL + newest.name))
    capsys.readouterr()
    assert run(**own, training__max_steps=6)["step"] == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if "step_00000004" in line]
    assert len(lines) == 1 and "resuming from step_00000002" in lines[0]
    # keep 1 leaves the newest of this course, not the damaged one of a later step; and the run is the undisturbed one.
    assert names(tmp_path / "run") == ["step_00000006"]
    losses = [{r["step"]: r["loss"] for r in read_metrics(tmp_path / p / "metrics.csv")} for p in ("whole", "run")]
    assert losses[0] == losses[1]


def test_damage_is_told_where_a_model_is_loaded(run, tmp_path):
    run(training__max_steps=4, training__checkpoint_every=2)
    old, new = complete_checkpoints(tmp_path / "run")
    flip(next(new.glob("*.safetensors")), -50)
    with pytest.raises(UsageError, match="damaged .*another checksum"):
        load_model(new)
    assert load(tmp_path / "run").info.step == 2
    flip(next(old.glob("*.safetensors")), -50)
    with pytest.raises(UsageError, match="no complete checkpoint"):
        find(tmp_path / "run")


def test_checkpoints_without_checksums_are_still_read(run, tmp_path):
    run(training__max_steps=2)
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    marked = json.loads((checkpoint / MARKER).read_text())
    (checkpoint / MARKER).write_text(json.dumps({name: entry["size"] for name, entry in marked.items()}))
    assert load(checkpoint).info.step == 2


def test_which_checkpoints_stay(run, tmp_path):
    own = dict(training__max_steps=9, training__checkpoint_every=1)
    run(**own, training__keep_checkpoints=2, training__keep_every=4)
    assert names(tmp_path / "run") == [f"step_{step:08d}" for step in (4, 8, 9)]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3


def test_the_rule_of_what_stays(tmp_path):
    paths = [tmp_path / f"step_{step:08d}" for step in (10, 15, 20, 25, 30)]
    assert superfluous(paths, 1) == paths[:4]
    assert superfluous(paths, 2, keep_every=10) == [paths[1]]
    assert superfluous(paths, 9) == []


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(run, tmp_path):
    own = dict(training__checkpoint_every=1, training__keep_checkpoints=2)
    run(**own, training__max_steps=4)
    first = tmp_path / "run" / "checkpoints" / "step_00000003"
    run(**own, training__max_steps=5, training__resume=first)
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert there == ["aside_step_00000004", "step_00000004", "step_00000005"]


def test_training_changes_nothing_that_is_being_written(tmp_path, monkeypatch):
    tensors = some_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    go, own = threading.Event(), saving.ShardWriter.write_data

    def slow(self, plan, planner):
        assert go.wait(20)
        return own(self, plan, planner)

    monkeypatch.setattr(saving.ShardWriter, "write_data", slow)
    saver = Saver(tmp_path)
    saver.save(1, tensors, {}, "")
    for tensor in tensors.values():
        tensor.zero_()
    assert names(tmp_path) == []  # not committed
    go.set()
    saver.wait()
    read = {name: torch.full_like(tensor, 77) for name, tensor in before.items()}
    load_tensors(complete_checkpoints(tmp_path)[0], read)
    assert all(torch.equal(read[name], tensor) for name, tensor in before.items())


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_ends_in_one_line_that_names_what_is_left(run, tmp_path, monkeypatch, background):
    own = dict(training__checkpoint_every=2, training__async_checkpoint=background)
    run(**own, training__max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(saving.ShardWriter, "write_data", full_disk)
        with pytest.raises(
            RunError, match="step_00000004 cannot be written .*No space left.*step_00000002 is the newest"
        ):
            run(**own, training__max_steps=8)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert run(**own, training__max_steps=4)["step"] == 4


def test_a_writer_that_crashes_is_told_at_the_end_at_the_latest(run, monkeypatch):
    def crash(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(saving.ShardWriter, "write_data", crash)
    with pytest.raises(RunError, match="step_00000006 cannot be written .MemoryError"):
        run(training__max_steps=6)


def test_a_full_file_system_and_a_folder_that_takes_no_files(tmp_path):
    """For real: a file system of 256 KiB, and a file where the folder of checkpoints should be."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)]).returncode == 0
    if mounted:  # needs root; without it the file below stands for both
        try:
            save(small, 1)
            with pytest.raises(RunError, match="No space left.*step_00000001 is the newest complete one"):
                save(small, 2, {"a": torch.zeros(100_000)})
            assert names(small) == ["step_00000001"]
            subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
            with pytest.raises(RunError, match="Read-only file system.*step_00000001 is the newest complete one"):
                save(small, 3)
            assert newest_sound(small) == (complete_checkpoints(small)[0], None)
        finally:
            subprocess.run(["umount", str(small)], check=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(RunError, match="cannot be written .*there is no complete one yet"):
        save(tmp_path / "run", 1)


SLOW_SAVE = """
import sys, time
from maskalign.cli import main
from maskalign.training import saving
own = saving.ShardWriter.write_data
def slow(self, plan, planner):
    result = own(self, plan, planner)
    if "step_00000004" in str(self.path):
        print("<saving>", flush=True)
        time.sleep(60)
    return result
saving.ShardWriter.write_data = slow
main(["train", *sys.argv[1:]])
"""


def test_killed_in_the_middle_of_a_save(command, run, tmp_path, capsys):
    argv = command(training__max_steps=100_000, training__checkpoint_every=2)
    process = subprocess.Popen([sys.executable, "-c", SLOW_SAVE, *argv], stdout=subprocess.PIPE, text=True)
    # The training prints at the same time, perhaps into the same line.
    assert any("<saving>" in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names(tmp_path / "run") == ["step_00000002"]
    run(training__max_steps=5)
    err = capsys.readouterr().err
    assert "the save of step_00000004 was cut off; resuming from step_00000002" in err
    assert names(tmp_path / "run") == ["step_00000002", "step_00000005"]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def age(checkpoint):
    """Make a checkpoint what it was before mixing layers could be counted and a class token could be denoised."""
    for path in checkpoint.glob("*.safetensors"):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = data[8 : 8 + size].rstrip(b" ").replace(b"mixer.layers.0.", b"mixer.block.")
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    for name in ("class_token", "class_token_dim", "mixer_layers"):
        del config["model"][name]
    del config["method"]["class_weight"]
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    state = json.loads((checkpoint / "state.json").read_text())
    state["facts"].pop("class_dim")
    (checkpoint / "state.json").write_text(json.dumps(state))
    files = {name: file_digest(checkpoint / name) for name in json.loads((checkpoint / MARKER).read_text())}
    (checkpoint / MARKER).write_text(json.dumps(files))


def test_runs_of_one_unnamed_mixing_layer_are_loaded_and_continued(run, tmp_path):
    own = dict(model__mixer="attention", model__mixer_layers=1, training__checkpoint_every=3)
    run("whole", **own, training__max_steps=6)
    run(**own, training__max_steps=3)
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    before = load_model(checkpoint)
    age(checkpoint)
    with safe_open(next(checkpoint.glob("*.safetensors")), "pt") as file:
        assert "exp_avg/mixer.block.attn.qkv.weight" in file.keys()
    assert "mixer_layers" not in (checkpoint / "config.yaml").read_text()
    loaded = load(checkpoint)
    assert loaded.config.model.mixer_layers == 1 and len(loaded.model.mixing_layers) == 1
    assert repr(loaded.model) == repr(before)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), before.parameters(), strict=True))
    with pytest.raises(UsageError, match=r"model.mixer_layers 1 \(now 2\)"):
        run(**own | dict(model__mixer_layers=2), training__max_steps=6)
    # The state of the optimizer comes back, too: the run ends like an undisturbed one.
    assert run(**own, training__max_steps=6)["step"] == 6
    whole, run_model = load_model(tmp_path / "whole"), load_model(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), run_model.parameters(), strict=True))


def test_starting_from_other_weights_says_what_is_fresh_and_what_is_unused(run, tmp_path, capsys):
    from maskalign.checkpoints import to_repa

    repa = dict(model__mixer="none", training__max_steps=2)
    run("repa", **repa)
    capsys.readouterr()
    run("more", training__init_from=tmp_path / "repa", model__mixer="attention", training__max_steps=1)
    assert "starting fresh: mixer\n" in capsys.readouterr().out
    run("less", training__init_from=tmp_path / "more", **repa)
    assert "not used: mixer\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"model.depth 2 \(here 1\)"):
        run("shallow", training__init_from=tmp_path / "repa", model__depth=1, **repa)
    wider = {
        name.replace("mixer.", "mixer._orig_mod."): w for name, w in to_repa(load_model(tmp_path / "more")).items()
    }
    torch.save({"module." + name: value for name, value in wider.items()}, tmp_path / "wrapped.pt")
    run("again", training__init_from=tmp_path / "wrapped.pt", model__mixer="attention", training__max_steps=1)
    assert "fresh" not in capsys.readouterr().out


def test_a_run_with_a_class_token_becomes_regs_file_and_starts_another_run(run, data_set_of, tmp_path, capsys):
    from maskalign.checkpoints import convert, to_reg
    from maskalign.checkpoints.weight_files import read_file

    data_set_of("classes", class_token=True)
    own = dict(data__path=tmp_path / "classes", model__class_token="true", model__mixer="none", training__max_steps=2)
    run("reg", **own)
    assert ": reg," in convert(tmp_path / "reg", tmp_path / "reg.pt")
    whole = read_file(tmp_path / "reg.pt")
    for kind, ema in (("ema", True), ("model", False)):
        expected = to_reg(load_model(tmp_path / "reg", ema=ema))
        assert whole[kind].keys() == expected.keys() and whole["steps"] == 2
        assert all(torch.equal(whole[kind][name], value) for name, value in expected.items())
    capsys.readouterr()
    maskalign = own | dict(model__mixer="attention", training__max_steps=1)
    for source in ("reg", "reg.pt"):
        run(f"from_{source}", training__init_from=tmp_path / source, **maskalign)
        assert "starting fresh: mixer\n" in capsys.readouterr().out
    # A class token is added to REPA's weights, and left out again.
    run("repa", model__mixer="none", training__max_steps=1)
    run("added", training__init_from=tmp_path / "repa", **own)
    assert "starting fresh: class_embedder, final_layer.class_linear\n" in capsys.readouterr().out
    run("removed", training__init_from=tmp_path / "reg.pt", model__mixer="none", training__max_steps=1)
    assert "not used: class_embedder, final_layer.class_linear\n" in capsys.readouterr().out


def launch(argv, ranks):
    if ranks == 1:
        command = [sys.executable, "-m", "maskalign"]
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "maskalign"]
        command = [sys.executable, *torchrun]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "train", *argv], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.distributed
def test_saved_by_two_ranks_and_continued_by_one_and_by_two(command, run, tmp_path):
    own = dict(training__checkpoint_every=3, training__keep_checkpoints=9)
    launch(command("whole", **own, training__max_steps=6, parallel__plan="fsdp"), 2)
    whole = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "whole" / "metrics.csv")}
    at_three = tmp_path / "whole" / "checkpoints" / "step_00000003"
    assert len(list(at_three.glob("*.safetensors"))) == 2
    # The same layout: bit for bit, in all that a checkpoint holds.
    shutil.copytree(at_three, tmp_path / "again" / "checkpoints" / at_three.name)
    launch(command("again", **own, training__max_steps=6, parallel__plan="fsdp"), 2)
    last = "checkpoints/step_00000006"
    for name in ("shard-00001.safetensors", "shard-00002.safetensors"):
        files = [tmp_path / run_dir / last / name for run_dir in ("whole", "again")]
        with safe_open(files[0], "pt") as a, safe_open(files[1], "pt") as b:
            assert set(a.keys()) == set(b.keys())
            assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())
    states = [json.loads((tmp_path / run_dir / last / "state.json").read_text()) for run_dir in ("whole", "again")]
    assert states[0]["stream"] == states[1]["stream"]
    # One rank, another plan.
    shutil.copytree(at_three, tmp_path / "one" / "checkpoints" / at_three.name)
    run("one", **own, training__max_steps=6)
    one = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "one" / "metrics.csv")}
    assert one.keys() == {4, 5, 6}
    assert all(one[step] == pytest.approx(whole[step], rel=1e-5) for step in one)
    whole = load(tmp_path / "whole")
    single = load_model(tmp_path / "one")
    assert whole.info.step == 6
    for a, b in zip(whole.model.parameters(), single.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
def test_one_to_four_ranks_and_every_plan_go_on_from_each_other(command, tmp_path):
    own = dict(training__checkpoint_every=2, training__keep_checkpoints=9)
    launch(command("whole", **own, training__max_steps=8), 1)
    whole = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "whole" / "metrics.csv")}
    layouts = [
        (1, dict(parallel__plan="none")),
        (4, dict(parallel__plan="hsdp", parallel__shard_size=2)),
        (2, dict(parallel__plan="ddp")),
        (4, dict(parallel__plan="fsdp")),
    ]
    for number, (ranks, plan) in enumerate(layouts):
        launch(command("moved", **own, **plan, training__max_steps=2 * number + 2), ranks)
        newest = complete_checkpoints(tmp_path / "moved")[-1]
        # Copies are written once: the files together are no larger than one process's.
        tensors = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
        alone = next((tmp_path / "whole" / "checkpoints" / newest.name).glob("*.safetensors")).stat().st_size
        assert tensors < 1.5 * alone + 20_000 * ranks
        assert load(tmp_path / "moved").info.step == 2 * number + 2
    moved = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "moved" / "metrics.csv")}
    assert moved.keys() == whole.keys()
    assert all(moved[step] == pytest.approx(whole[step], rel=1e-5) for step in whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_on_one_two_and_four_ranks_it_ends_like_an_undisturbed_run(data_set, tmp_path, seed):
    from benchmarks.kill_and_resume import campaign

    start = time.time()
    result = campaign(data_set, tmp_path / "kills", steps=40, kills=4, seed=seed)
    print(result, f"{time.time() - start:.0f} s")
    assert result["kills"] >= 3 and not result["wrong"]
