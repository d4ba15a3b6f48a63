"""What is said of a wrong setting: in the product's words, with what to write instead."""

import pytest

from maskalign.config import parse_config
from maskalign.config.messages import nearest
from maskalign.errors import UsageError

BASE = ["--model.preset", "SiT-S/2"]


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--optimizer.lr", "1e-3x"], "optimizer.lr: 1e-3x is not a number"),
        (["--model.depth="], "model.depth: no value is given"),
        (["--training.max_steps"], "--training.max_steps: no value is given"),
        (["--training.compile", "maybe"], "training.compile: maybe is not true or false"),
        (["--optimizer.betas", "3"], "optimizer.betas: 3 is not a list of numbers in brackets"),
        (["--data", "DIR"], "did you mean --data.path DIR?"),
        (["--model", "SiT-S/2"], "did you mean --model.preset SiT-S/2?"),
        (["--parallel", "fsdp"], "did you mean --parallel.plan fsdp?"),
        (["--lr", "3"], "did you mean 'optimizer.lr'?"),
        (["--batch-size", "3"], "did you mean 'training.batch_size'?"),
        (["--model.lr", "3"], "did you mean 'optimizer.lr'?"),
        (["--model.mixer", "tokenmlp"], "did you mean token_mlp?"),
        (["--method.keep_ratio={kind: foo}"], "method.keep_ratio: in the schedule, kind: foo is not one of constant"),
        (["--method.keep_ratio={kind: step, strt: 3}"], "method.keep_ratio: a schedule has no 'strt'"),
        (["stray"], "'stray' is neither a known setting nor the value of one"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_settings(argv, line):
    with pytest.raises(UsageError) as error:
        parse_config([*BASE, *argv])
    said = str(error.value)
    assert line in said and "\n" not in said
    assert not any(word in said for word in ("Union", "<class", "Literal", "Parser key", "NoneType"))


def test_hyphens_are_taken_as_underscores():
    config = parse_config([*BASE, "--training.max-steps", "7", "--optimizer.ema-decay=0.5", "--run-dir", "x-y_z"])
    assert config.training.max_steps == 7 and config.optimizer.ema_decay == 0.5 and config.run_dir == "x-y_z"


@pytest.mark.parametrize(
    "text, names",
    [("dinov2-b", ["dinov2-b"]), ("dinov2-b,timm:x", ["dinov2-b", "timm:x"]), ("[a, b]", ["a", "b"])],
)
def test_one_teacher_needs_no_brackets(text, names, tmp_path):
    assert parse_config([*BASE, "--teacher.names", text]).teacher.names == names
    (tmp_path / "c.yaml").write_text(f"model: {{preset: SiT-S/2}}\nteacher:\n  names: {text}\n")
    assert parse_config(["--config", str(tmp_path / "c.yaml")]).teacher.names == names


def test_the_last_part_of_a_name_counts_first():
    names = ["model.depth", "method.align_depth", "optimizer.lr", "training.batch_size", "data.path"]
    assert nearest("depth", names) == "model.depth"
    assert nearest("method.depth", names) == "model.depth"
    assert nearest("train.batch-size", names) == "training.batch_size"
    assert nearest("zzz", names) is None
    assert nearest("cfg-scal", ["cfg_scale", "cls_cfg_scale"]) == "cfg_scale"
