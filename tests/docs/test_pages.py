"""The pages fit the code: generated ones are up to date, every variable is documented, every named path exists."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from docs import generate

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{1,}")
VALUES = {"ON", "OFF", "YES", "NO", "TRUE", "FALSE"}
# Variables that only libraries read.
OF_LIBRARIES = {"HF_HOME"}


def test_configuration_page_is_up_to_date(capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_configuration_page_has_every_setting_and_a_stale_one_is_noticed(tmp_path, capsys):
    from maskalign.config import all_keys

    text = generate.PAGE.read_text(encoding="utf-8")
    assert [key for key in all_keys() if f"| `{key}` |" not in text] == []
    stale = tmp_path / "configuration.md"
    stale.write_text(text.replace("Seed of every random draw.", "Seed."), encoding="utf-8")
    assert generate.main(["--check", "--page", str(stale)]) == 1
    assert "run python -m docs.generate" in capsys.readouterr().out
    assert generate.main(["--page", str(stale)]) == 0
    assert stale.read_text(encoding="utf-8") == text


def variables_of(source):
    """Names of environment variables in statements that use `environ` or `getenv`, module constants resolved."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = set()
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.stmt) or hasattr(statement, "body"):
            # Of a compound statement, only its own condition or context.
            parts = [getattr(statement, name, None) for name in ("test", "iter")]
            parts += [item.context_expr for item in getattr(statement, "items", [])]
            parts = [part for part in parts if isinstance(part, ast.AST)] if isinstance(statement, ast.stmt) else []
        else:
            parts = [statement]
        for part in parts:
            nodes = list(ast.walk(part))
            if not any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in nodes):
                continue
            nodes += [
                inner for node in nodes if isinstance(node, ast.Name) and node.id in constants
                for inner in ast.walk(constants[node.id])
            ]  # fmt: skip
            words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            found |= {word for word in words if VARIABLE.fullmatch(word) and word not in VALUES}
    return found


def test_variables_are_found_in_code():
    source = """
import os
CHOICES = ("FIRST_ONE", "SECOND_ONE")
if "THIRD" in os.environ:
    other = "NOT_ONE"
chosen = any(name in os.environ for name in CHOICES)
rank = [int(os.environ.get(name, default)) for name, default in (("FOURTH", 0), ("FIFTH", 1))]
text = os.getenv("SIXTH", "on")
"""
    assert variables_of(source) == {"FIRST_ONE", "SECOND_ONE", "THIRD", "FOURTH", "FIFTH", "SIXTH"}


def test_environment_page_has_every_variable_of_the_code_and_no_other():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    code = [path for folder in ("maskalign", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    used = {name: path for path in code for name in variables_of(path.read_text(encoding="utf-8"))}
    missing = {name: str(path.relative_to(ROOT)) for name, path in used.items() if name not in documented}
    assert not missing, f"docs/environment.md lacks {missing}"
    texts = [path.read_text(encoding="utf-8") for path in [*code, *ROOT.glob("tests/**/*.py")]]
    texts += [path.read_text(encoding="utf-8") for path in [ROOT / "configs/slurm/train.sbatch", ROOT / ".ci/run"]]
    gone = {name for name in documented - OF_LIBRARIES if not any(name in text for text in texts)}
    assert not gone, f"docs/environment.md has variables that nothing reads: {gone}"


def anchors_of(path):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/kernels.md"])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    roots = (ROOT, ROOT / "maskalign", ROOT / "kernels")
    folders = {path.name for root in roots for path in root.iterdir() if path.is_dir()} - {"runs", "datasets"}
    named = {name for name in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if name.split("/")[0] in folders}
    assert [name for name in sorted(named) if not any((root / name).exists() for root in roots)] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_files_whose_types_are_checked_exist():
    included = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]["include"]
    assert [name for name in included if not (ROOT / name).exists()] == []
