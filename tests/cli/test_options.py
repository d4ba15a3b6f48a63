"""A settings dataclass as options: what is read, how it is written, and what is said of a mistake."""

from dataclasses import dataclass
from pathlib import Path
from typing import List, Literal, Optional

import pytest

from maskalign.cli.main import COMMANDS, command_module
from maskalign.cli.options import help_texts, options_of, parse_options, part
from maskalign.config.option import option
from maskalign.errors import UsageError
from maskalign.sampling.settings import Sampling


def pair(text):
    return tuple(float(word) for word in text.split(","))


@dataclass(frozen=True)
class Base:
    """Of a lower room."""

    steps: int = 5
    """Number of steps."""
    interval: tuple = option((0.0, 1.0), parse=pair, metavar="LO,HI")
    """Two times."""
    inner: str = option("x", hidden=True)
    """Is no option."""


@dataclass(frozen=True, kw_only=True)
class Command(Base):
    """A command."""

    runs: List[Path] = option(positional=True, metavar="RUN")
    """Folders."""
    out: Path
    """A folder."""
    data: str = option("d", path=True)
    """A folder or a URL."""
    kind: Optional[Literal["a", "b"]] = None
    """The kind."""
    flip: bool = False
    """Whether to flip."""
    scale: Optional[float] = None
    """A 50% scale."""
    classes: Optional[str] = None
    """Labels."""


def parse(*argv):
    return parse_options(Command, "cmd", list(argv))


def test_values_defaults_and_what_was_given():
    settings, given = parse("r1", "r2", "--out", "o", "--interval=0.25,0.5", "--scale", "3", "--flip")
    assert settings == Command(runs=[Path("r1"), Path("r2")], out=Path("o"), interval=(0.25, 0.5), scale=3.0, flip=True)
    assert given == {"runs", "out", "interval", "scale", "flip"}
    assert parse("r", "--out", "o")[0].interval == (0.0, 1.0)
    assert part(Base, settings) == Base(interval=(0.25, 0.5)) and type(part(Base, settings)) is Base


@pytest.mark.parametrize("word", ["--flip", "--flip=true", "--flip true", "--flip True"])
def test_a_switch(word):
    assert parse("r", "--out", "o", *word.split())[0].flip is True
    assert parse("r", "--out", "o", "--flip", "false")[0].flip is False


def test_dashes_and_underscores_are_the_same():
    for word in ("--per-class", "--per_class"):
        settings, _ = parse_options(command_module("sample").SETTINGS, "sample", ["r", "--out", "o", word, "3"])
        assert settings.per_class == 3


def test_labels_with_blanks_between_them():
    assert parse("--classes", "0", "3", "5-8", "--out", "o", "r")[0].classes == "0,3,5-8"
    assert parse("--classes", "Flags", "r", "--out", "o")[0].classes == "Flags"
    assert parse("--classes=0,3", "r", "--out", "o")[0].classes == "0,3"


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings, _ = parse("~/r", "--out=~/o", "--data=~/d", "--classes=~x")
    assert settings.runs == [tmp_path / "r"] and settings.out == tmp_path / "o" and settings.data == f"{tmp_path}/d"
    assert settings.classes == "~x", "only paths have a home"


@pytest.mark.parametrize(
    "argv, line",
    [
        ([], "RUN and --out are missing"),
        (["r"], "--out is missing"),
        (["r", "--out", "o", "--steps", "big"], "--steps: big is not a whole number"),
        (["r", "--out", "o", "--scale", "1e-3x"], "--scale: 1e-3x is not a number"),
        (["r", "--out", "o", "--kind", "c"], "--kind: c is neither a nor b"),
        (["r", "--out", "o", "--steps="], "--steps: no value is given"),
        (["r", "--out", "o", "--steps"], "--steps: no value is given"),
        (["r", "--out", "o", "--step", "3"], "there is no option '--step'; did you mean '--steps'?"),
        (["r", "--out", "o", "--xyz", "3"], "there is no option '--xyz'"),
        (["r", "--out", "o", "--inner", "3"], "there is no option '--inner'"),
    ],
    ids=" ".join,
)
def test_mistakes(argv, line):
    with pytest.raises(UsageError) as error:
        parse(*argv)
    said = str(error.value)
    assert line in said and "maskalign cmd --help" in said and "\n" not in said
    assert not {"Union", "<class", "Literal", "Parser key", "NoneType"} & set(said.split())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_every_option_has_its_help(name):
    settings = command_module(name).SETTINGS
    texts = help_texts(settings)
    for entry in options_of(settings):
        assert texts.get(entry.name, "").endswith("."), (name, entry.name)


def test_the_settings_of_a_sampler_are_options_of_sample_and_evaluate():
    own = {entry.name for entry in options_of(Sampling)}
    for name in ("sample", "evaluate"):
        assert own <= {entry.name for entry in options_of(command_module(name).SETTINGS)}
