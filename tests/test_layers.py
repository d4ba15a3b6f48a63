"""Imports of maskalign's packages run one way, as docs/architecture.md shows; read off the source with `ast`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top to the bottom. A package may import those of lower layers, and in its own layer those named beside it.
LAYERS = [
    {"cli": ()},
    {"training": (), "analysis": (), "planning": ("training",), "reporting": ()},
    {"evaluation": ("sampling",), "sampling": ()},
    {"checkpoints": ("models",), "data": ("teachers",), "objective": ("models",), "teachers": (), "models": ()},
    {"config": ("runtime",), "runtime": ()},
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
EVERYWHERE = {"errors", "_lazy", "__version__"}
# Names that moved to `checkpoints` and stay importable from where they were.
KEPT = {("models", "checkpoints")}


def imports(path):
    """(line, dotted name) of what a file imports, inside functions too, and of what `lazy_exports` loads."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert path.is_relative_to(ROOT / "kernels") or not node.level, f"{path}:{node.lineno}: relative import"
            if node.level:
                continue
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name == "__init__.py":
            if node.value.startswith("."):
                yield node.lineno, "maskalign" + node.value


def fault(own, other):
    """What is wrong with an import of package `other` in package `own`; None if nothing."""
    if own not in LEVEL or other == own or other in EVERYWHERE:
        return None
    if other not in LEVEL:
        return f"{other} is in no layer"
    if LEVEL[other] < LEVEL[own]:
        return f"{other} is above {own}"
    if LEVEL[other] == LEVEL[own] and other not in LAYERS[LEVEL[own]][own] and (own, other) not in KEPT:
        return f"{other} is beside {own}"
    return None


def test_no_arrow_runs_up():
    faults, packages = [], set()
    for path in sorted((ROOT / "maskalign").glob("*/**/*.py")):
        parts = path.relative_to(ROOT / "maskalign").parts
        packages.add(parts[0])
        for line, name in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}: {name}"
            words = name.split(".")
            if words[0] == "maskalign" and (found := fault(parts[0], words[1])):
                faults.append(f"{where}: {found}")
            if parts[:2] in (("data", "stream"), ("data", "format")) and name.startswith("maskalign.data.build"):
                faults.append(f"{where}: the hot path imports what makes data sets")
    assert packages <= set(LEVEL), "a package without a layer"
    assert not faults, "\n".join(faults)


def test_kernels_import_nothing_of_maskalign():
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        names = [f"{path}:{line}: {name}" for line, name in imports(path) if name.split(".")[0] == "maskalign"]
        assert not names, names


@pytest.mark.parametrize(
    "own, other, allowed",
    [
        ("training", "sampling", True),
        ("sampling", "training", False),
        ("evaluation", "sampling", True),
        ("sampling", "evaluation", False),
        ("analysis", "training", False),
        ("data", "teachers", True),
        ("teachers", "data", False),
        ("config", "models", False),
        ("sampling", "errors", True),
        ("sampling", "somewhere", False),
    ],
)
def test_the_rule_itself(own, other, allowed):
    assert (fault(own, other) is None) == allowed
