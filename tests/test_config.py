"""Settings: what is read is what was written, and a wrong one is refused with its name, the rule and a way out."""

import math
import re
from pathlib import Path

import pytest

from maskalign.config import (
    Config,
    DataFacts,
    ModelConfig,
    Schedule,
    all_keys,
    dump_config,
    load_config,
    make_config_parser,
    model_sizes,
    parse_config,
    schedule_value,
    validate,
    validate_with_data,
)
from maskalign.config.ranges import range_of
from maskalign.data.format.manifest import Manifest, Shard
from maskalign.errors import UsageError

ROOT = Path(__file__).parents[1]
BASE = ["--model.preset", "SiT-S/2"]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def manifest(**changes):
    own = dict(num_samples=100, resolution=32, class_names=["a", "b", "c"], shards=[Shard("s.tar", 100, 1, "0" * 64)])
    return Manifest(**{**own, **changes})


def test_every_recipe_is_there():
    masked = {"maskalign", "repa-maskalign", "maskalign-fast", "maskalign-loss-only", "tread", "sprint"}
    names = {"sit", "repa", "reg", "deferred-masking", *masked}
    for size in ("b2", "l2", "xl2"):
        assert {path.stem for path in RECIPES if path.parent.name == size} == names
    assert (ROOT / "configs" / "quickstart.yaml") in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_are_valid_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    again = parse_config(["--config", str(path), "--training.max_steps", "7"])
    assert again.training.max_steps == 7 and again.model == config.model


def test_schedules_from_yaml_and_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {preset: SiT-S/2}\nmethod: {keep_ratio: {kind: step, start: 0.5, end: 1, begin: 0.5}}"
    )
    config = load_config(tmp_path / "c.yaml")
    assert isinstance(config.method.keep_ratio, Schedule)
    assert schedule_value(config.method.keep_ratio, 0.4) == 0.5 and schedule_value(config.method.keep_ratio, 0.6) == 1
    config = parse_config(["--config", str(tmp_path / "c.yaml"), "--method.keep_ratio", "0.25"])
    assert config.method.keep_ratio == 0.25
    config = parse_config([*BASE, "--method.align_weight", '{"kind": "cosine", "start": 0.5, "end": 0.0}'])
    assert schedule_value(config.method.align_weight, 1.0) == 0.0


def test_routes():
    assert parse_config([*BASE, "--method.route", "none"]).method.route == "none"
    assert tuple(parse_config([*BASE, "--method.route", "[2, 8]"]).method.route) == (2, 8)


WRONG = [
    (["--trainin.max_steps", "3"], ["trainin.max_steps", "did you mean 'training.max_steps'"]),
    (["--training.max_step", "3"], ["training.max_step", "training.max_steps"]),
    (["--training.max_steps", "many"], ["training.max_steps", "many"]),
    (["--training.max_steps", "0"], ["training.max_steps", "at least 1"]),
    (["--training.precision", "fp8"], ["training.precision", "bf16"]),
    (["--method.keep_ratio", "0"], ["method.keep_ratio", "(0, 1]"]),
    (["--method.keep_ratio", "1.5"], ["method.keep_ratio", "(0, 1]"]),
    (["--method.keep_ratio", "nan"], ["method.keep_ratio: nan is neither a number nor a schedule such as {kind"]),
    (["--method.keep_ratio", ".nan"], ["method.keep_ratio", "(0, 1]"]),
    (["--method.align_weight", "-1"], ["method.align_weight"]),
    (["--method.align_depth", "13"], ["method.align_depth", "1..12"]),
    (["--method.align_depth", "0"], ["method.align_depth"]),
    (["--method.route", "[4, 13]"], ["method.route", "12"]),
    (["--method.route", "[4, 4]"], ["method.route"]),
    (["--method.route", "some"], ["method.route: some is neither all nor none nor 2 numbers in brackets"]),
    (["--method.route", "none", "--method.restore", "fuse"], ["method.restore", "none"]),
    (["--model.projector", "conv"], ["model.projector", "all tokens"]),
    (["--model.preset", "SiT-G/2"], ["model.preset", "SiT-B/2"]),
    (["--model.heads", "7"], ["model.heads", "divide"]),
    (["--model.mixer", "mean"], ["model.mixer", "token_mlp"]),
    (["--optimizer.lr", "0"], ["optimizer.lr", "above 0"]),
    (["--optimizer.ema_decay", "1"], ["optimizer.ema_decay"]),
    (["--training.batch_size", "10", "--training.accumulation", "4"], ["training.accumulation", "divide"]),
    (["--parallel.plan", "zero3"], ["parallel.plan", "fsdp"]),
    (["--training.device", "tpu"], ["training.device: tpu is not one of auto, cpu, cuda"]),
    (["--preview.cfg_scale", "-3"], ["preview.cfg_scale", "at least 0"]),
    (["--run_dir", ""], ["run_dir", "names no folder"]),
    (["--config", "nowhere.yaml"], ["--config: nowhere.yaml does not exist"]),
    (["--config=nowhere.yaml"], ["--config: nowhere.yaml does not exist"]),
]


@pytest.mark.parametrize("argv, words", WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_settings_are_one_clear_line(argv, words):
    with pytest.raises(UsageError) as error:
        parse_config([*BASE, *argv])
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_no_size_at_all():
    with pytest.raises(UsageError, match="model.depth is missing"):
        parse_config([])


def test_a_misspelt_key_in_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {preset: SiT-S/2}\nmethod: {keep_ration: 0.5}\n")
    with pytest.raises(UsageError, match="method.keep_ratio"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"model: {preset: [\n", "is not valid YAML in line 2"),
        (b"\x96\xff\x00", "is not a text file"),
        (b"", "holds no settings"),
        (b"- model\n- data\n", "holds no settings"),
        (b"trainin: {max_steps: 3}\n", "there is no setting 'trainin.max_steps'; did you mean 'training.max_steps'"),
    ],
)
def test_broken_yaml(content, words, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message and words in message and (str(path) in message or "setting" in words), message


def test_the_data_set_decides_what_the_model_sees():
    config = parse_config([*BASE, "--training.batch_size", "8", "--method.align_weight", "0"])
    facts = validate_with_data(config, manifest())
    assert facts == DataFacts(input_size=32, in_channels=3, num_classes=3, teachers=[], class_token=None)
    latent = dict(shape=[8, 16, 16], scale=0.18215, bias=0.0, dtype="float16", name="vae")
    facts = validate_with_data(config, manifest(resolution=128, latent=latent))
    assert facts.input_size == 16 and facts.in_channels == 4


@pytest.mark.parametrize(
    "argv, changes, words",
    [
        (["--model.patch_size", "5"], {}, ["model.patch_size", "32"]),
        (["--training.batch_size", "101"], {}, ["training.batch_size", "100"]),
        (["--teacher.mode", "cached"], {}, ["dinov2-b", "data encode"]),
        (["--teacher.names", "[]"], dict(image_format=None), ["efficientnet-lite0", "needs images"]),
        (
            ["--teacher.names", "[]", "--teacher.mode", "cached"],
            {},
            ["has no features", "--teacher efficientnet-lite0"],
        ),
        (["--teacher.names", "[dinov3]"], {}, ["dinov3", "dinov2-b"]),
        ([], dict(image_format=None), ["teacher.names", "images"]),
    ],
)
def test_settings_that_do_not_fit_the_data(argv, changes, words):
    config = parse_config([*BASE, "--training.batch_size", "8", *argv])
    with pytest.raises(UsageError) as error:
        validate_with_data(config, manifest(**changes))
    assert all(word in str(error.value) for word in words), error.value


def rows(dim=8, class_token=True, components=4, kind="prefix"):
    """A teacher's entry in the manifest."""
    entry = dict(tokens=4, dim=dim, grid=[2, 2], dtype="int8", normalize="none")
    if class_token:
        basis = [[float(i == j) for j in range(dim)] for i in range(components)]
        statistics = dict(mean=[0.0] * dim, std=[1.0] * dim)
        entry["class_token"] = dict(dim=dim, dtype="float16", kind=kind, **statistics)
        if components:
            entry["class_token"]["components"] = dict(mean=[0.0] * dim, basis=basis, scale=[1.0] * components)
    return entry


def test_without_a_name_the_teacher_is_the_one_in_the_data_set():
    def found(teachers, *argv):
        config = parse_config([*BASE, "--training.batch_size", "8", "--teacher.names", "[]", *argv])
        facts = validate_with_data(config, manifest(teachers=teachers))
        assert config.teacher.names == [name for name, _ in facts.teachers]  # what the run's config.yaml will say
        return facts.teachers

    assert found({"dinov2-s": rows()}) == [("dinov2-s", True)]
    assert found({"dinov2-s": rows()}, "--teacher.mode", "online") == [("dinov2-s", False)]
    assert found({}) == [("efficientnet-lite0", False)]
    assert found({"dinov2-s": rows()}, "--method.align_weight", "0") == []
    with pytest.raises(UsageError, match="has features of dinov2-s, dinov2-b; name one of them"):
        found({"dinov2-s": rows(), "dinov2-b": rows()})


@pytest.mark.parametrize("side, tokens", [(32, 64), (64, 256), (128, 256)])
def test_recipes_for_pictures_of_ones_own_need_only_the_data_set(side, tokens):
    config = parse_config(["--data.path", "datasets/mine", "--config", f"pixels{side}"])
    there = manifest(resolution=side, teachers={"timm:resnet18": rows()})
    facts = validate_with_data(config, there)
    assert config.data.path == "datasets/mine" and facts.teachers == [("timm:resnet18", True)]
    assert (facts.input_size // model_sizes(config)["patch_size"]) ** 2 == tokens


CLASS = [*BASE, "--training.batch_size", "8", "--model.class_token", "true"]


@pytest.mark.parametrize(
    "argv, teachers, want",
    [
        ([], {"dinov2-b": rows()}, ([("dinov2-b", True)], ("dinov2-b", True))),
        (["--method.align_weight", "0"], {"dinov2-b": rows()}, ([], ("dinov2-b", True))),
        (["--teacher.mode", "online"], {"dinov2-b": rows()}, ([("dinov2-b", False)], ("dinov2-b", False))),
        # DINOv2 needs no statistics, so its class token can be computed though none is stored.
        (["--teacher.mode", "online"], {}, ([("dinov2-b", False)], ("dinov2-b", False))),
        (["--teacher.mode", "online"], {"dinov2-b": rows(class_token=False)}, ([("dinov2-b", False)],) * 2),
        ([], {}, ([("dinov2-b", False)], ("dinov2-b", False))),
        (["--model.class_token_dim", "4"], {"dinov2-b": rows()}, ([("dinov2-b", True)], ("dinov2-b", True))),
        (
            ["--teacher.names", "[dinov2-s,dinov2-b]"],
            {"dinov2-b": rows(), "dinov2-s": rows()},
            ([("dinov2-s", True), ("dinov2-b", True)], ("dinov2-s", True)),
        ),
        (
            ["--teacher.names", "[dinov2-s,dinov2-b]", "--method.align_weight", "0"],
            {"dinov2-b": rows(class_token=False), "dinov2-s": rows()},
            ([], ("dinov2-s", True)),
        ),
        (
            ["--teacher.names", "[efficientnet-lite0]", "--teacher.mode", "online"],
            {"efficientnet-lite0": rows(kind="mean")},
            ([("efficientnet-lite0", False)], ("efficientnet-lite0", False)),
        ),
    ],
)
def test_where_the_class_token_comes_from(argv, teachers, want):
    facts = validate_with_data(parse_config([*CLASS, *argv]), manifest(teachers=teachers))
    expected = want[0][0] if isinstance(want[1], list) else want[1]
    assert facts.teachers == want[0] and facts.class_token == expected


ONLY = "maskalign data encode --data datasets/imagenet256 --teacher dinov2-b --class-token only"


@pytest.mark.parametrize(
    "argv, changes, words",
    [
        (["--teacher.names", "[]", "--method.align_weight", "0"], {}, ["efficientnet-lite0", "is standardized with"]),
        ([], dict(teachers={"dinov2-b": rows(class_token=False)}), ["rows of 'dinov2-b'", ONLY]),
        (
            ["--method.align_weight", "0", "--teacher.mode", "cached"],
            dict(teachers={"dinov2-b": rows(class_token=False)}),
            [ONLY],
        ),
        (
            ["--teacher.names", "[dinov2-s,dinov2-b]"],
            dict(teachers={"dinov2-s": rows(), "dinov2-b": rows(class_token=False)}),
            [ONLY],
        ),
        (["--teacher.mode", "cached", "--method.align_weight", "0"], {}, ["dinov2-b", "data encode"]),
        (["--method.align_weight", "0"], dict(image_format=None), ["teacher.names", "images"]),
        (["--teacher.names", "[efficientnet-lite0]"], {}, ["statistics", "--teacher efficientnet-lite0"]),
        (
            ["--teacher.names", "[efficientnet-lite0]", "--teacher.mode", "online"],
            dict(teachers={"efficientnet-lite0": rows(class_token=False)}),
            ["statistics", "--teacher efficientnet-lite0 --class-token only"],
        ),
        (
            ["--model.class_token_dim", "5"],
            dict(teachers={"dinov2-b": rows()}),
            ["model.class_token_dim: 5", "has 4 principal components", "--class-components 5 --class-token only"],
        ),
        (
            ["--model.class_token_dim", "9"],
            dict(teachers={"dinov2-b": rows()}),
            ["model.class_token_dim: 9", "the class token has 8 numbers"],
        ),
        (
            ["--model.class_token_dim", "2"],
            dict(teachers={"dinov2-b": rows(components=0)}),
            ["has 0 principal components", "--class-components 2"],
        ),
        (["--model.class_token_dim", "2"], {}, ["has 0 principal components", "--class-components 2, or"]),
    ],
)
def test_class_tokens_that_are_not_there_are_one_line(argv, changes, words):
    with pytest.raises(UsageError) as error:
        validate_with_data(parse_config([*CLASS, *argv]), manifest(**changes))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_every_setting_has_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"], prog="maskalign train")
    text = " ".join(capsys.readouterr().out.split())
    for key in all_keys():
        assert f"--{key} " in text, key

    def fields(cls):
        for name, entry in cls.__dataclass_fields__.items():
            nested = entry.default_factory
            yield from fields(nested) if hasattr(nested, "__dataclass_fields__") else [(cls, name)]

    import inspect

    for cls, name in fields(Config):
        source = inspect.getsource(cls)
        line = source.split(f"    {name}:")[1].split('"""')[1]
        assert line.strip().endswith("."), (cls, name)
        assert " ".join(line.split())[:40] in text, (cls, name)


def test_packaged_recipes_are_found_by_name(tmp_path, monkeypatch):
    """From any folder, with and without the ending; a file of that path wins."""
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet256/b2/maskalign", "imagenet256/b2/maskalign.yaml", "configs/imagenet256/b2/maskalign.yaml"):
        config = load_config(name)
        assert config.model.preset == "SiT-B/2" and config.model.class_token and config.method.keep_ratio == 0.75
    (tmp_path / "quickstart.yaml").write_text("model: {preset: SiT-L/2}\n")
    assert load_config("quickstart.yaml").model.preset == "SiT-L/2"
    with pytest.raises(UsageError, match="--config: imagenet256/b2/maskaling does not exist; did you mean"):
        load_config("imagenet256/b2/maskaling")
    with pytest.raises(UsageError, match="--config: no file is given"):
        parse_config(["--config"])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_options_win_over_files_wherever_they_stand(place, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("model: {preset: SiT-S/2}\ntraining: {max_steps: 6000}\nseed: 5\n")
    words = [["--training.max_steps", "3"], ["--seed=7"]]
    words.insert(place, ["--config", str(path)])
    config = parse_config([word for part in words for word in part])
    assert (config.training.max_steps, config.seed, config.model.preset) == (3, 7, "SiT-S/2")


@pytest.mark.parametrize("size", ["b2", "l2", "xl2"])
def test_the_papers_recipes_are_the_papers(size):
    """PAPER.md, to the digit; nothing else is set."""
    paper = {
        "reg": dict(token=True, mixer="none", keep=1.0),
        "maskalign": dict(token=True, mixer="attention", keep=0.75),
        "repa-maskalign": dict(token=False, mixer="attention", keep=0.75),
        "repa": dict(token=False, mixer="none", keep=1.0),
    }
    for name, expected in paper.items():
        config = load_config(f"imagenet256/{size}/{name}")
        assert (config.model.class_token, config.model.mixer) == (expected["token"], expected["mixer"]), name
        assert config.method.keep_ratio == expected["keep"] and config.model.mixer_layers == 2
        assert config.method.align_weight == 0.5 and config.method.class_weight == 0.03
        assert config.method.route == "all" and config.method.restore == "none" and config.method.subset == "uniform"
        assert model_sizes(config)["align_depth"] == (4 if size == "b2" else 8)
        o = config.optimizer
        assert (o.lr, tuple(o.betas), o.weight_decay, o.decay, o.grad_clip) == (1e-4, (0.9, 0.999), 0, "constant", 1.0)
        assert (o.ema_decay, config.training.batch_size, config.objective.path) == (0.9999, 256, "linear")


@pytest.mark.parametrize(
    ("section", "name", "bad", "good"),
    [
        ("training", "batch_size", (0, -8), (1, 256)),
        ("training", "max_seconds", (0.0, -1.0, math.nan), (None, 0.1, math.inf)),
        ("training", "keep_every", (-1,), (0,)),
        ("optimizer", "lr", (0.0, -1e-4, math.nan), (1e-9,)),
        ("optimizer", "ema_decay", (1.0, -0.1), (0.0, 0.9999)),
        ("optimizer", "betas", ((0.9, 1.0), (-0.1, 0.9)), ((0.0, 0.999),)),
        ("optimizer", "decay_from", (-0.01, 1.01, math.nan), (0.0, 1.0)),
        ("method", "keep_ratio", (0.0, 1.01, Schedule("linear", 0.0, 1.0), Schedule("linear", 0.5, 1.5)), (1.0,)),
        ("method", "keep_ratio", (Schedule("constant", 0.0, 0.5),), (Schedule("constant", 0.5, 7.0),)),
        ("method", "align_weight", (-0.5, Schedule("step", 0.5, -0.5, 0.5)), (0.0, 50.0)),
        ("method", "align_ratio", (0.0, 2.0), (None, 0.5)),
        ("model", "depth", (0,), (None, 12)),
    ],
)
def test_a_config_made_in_python_is_checked_like_one_that_is_read(section, name, bad, good):
    for value in good:
        config = Config(model=ModelConfig(preset="SiT-B/2"))
        setattr(getattr(config, section), name, value)
        validate(config)
    for value in bad:
        config = Config(model=ModelConfig(preset="SiT-B/2"))
        setattr(getattr(config, section), name, value)
        with pytest.raises(UsageError, match=rf"^{section}\.{name}: .* must be "):
            validate(config)


def test_every_number_has_a_range():
    """Any seed is good; all other numbers have a range in their types, or a rule between settings."""
    ruled = {"seed", "method.align_depth"}
    open_ended = []
    for key in all_keys():
        section, _, name = key.rpartition(".")
        owner = Config.__dataclass_fields__[section].type if section else Config
        annotation = owner.__dataclass_fields__[name].type
        if re.search(r"\b(int|float)\b", str(annotation)) and range_of(annotation) is None and key not in ruled:
            open_ended.append(key)
    assert open_ended == ["data.path", "method.route"]  # weights of data sets, and blocks: rules between settings


def test_the_help_names_the_range(capsys):
    with pytest.raises(SystemExit):
        make_config_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(type: int, at least 1, default: 256)" in text
    assert "(type: Tuple[float, float], in [0, 1), default: (0.9, 0.999))" in text
    assert "Annotated" not in text


def test_configs_read_one_after_another_share_nothing():
    """The parser is kept, and what it has read is not."""
    words = ["--model.preset", "SiT-S/2"]
    first = parse_config(words)
    untouched = dump_config(first)
    first.teacher.names.append("another")
    first.training.loggers.clear()
    first.model.preset = "SiT-B/2"
    assert dump_config(parse_config(words)) == untouched
    assert parse_config([*words, "--training.max_steps", "7"]).training.max_steps == 7
    assert dump_config(parse_config(words)) == untouched
