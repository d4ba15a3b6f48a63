"""The rooms of maskalign/data: format imports neither of the others, and stream never imports build."""

import ast
from pathlib import Path

import pytest

import maskalign.data

ROOT = Path(maskalign.data.__file__).parent
FORBIDDEN = {"format": ("stream", "build"), "stream": ("build",), "build": ()}


def imported(path):
    """Names of modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_in_a_room():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py"}
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(FORBIDDEN)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_import_runs_back(room):
    forbidden = tuple(f"maskalign.data.{other}." for other in FORBIDDEN[room])
    paths = list((ROOT / room).glob("*.py"))
    assert paths
    wrong = [(path.name, name) for path in paths for name in imported(path) if f"{name}.".startswith(forbidden)]
    assert not wrong
