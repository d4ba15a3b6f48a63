"""For mkdocs: the pages link to benchmarks/results, which is outside docs/ but in the same repository."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def on_files(files, config):
    """Add the plots and tables under results/."""
    for path in sorted(RESULTS.glob("*.*")):
        if path.suffix in (".png", ".csv"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    """Point the links there."""
    return markdown.replace("](../benchmarks/results/", "](results/")
