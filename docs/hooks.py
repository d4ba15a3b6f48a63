"""Hooks for mkdocs: add benchmarks/results, to which the pages link, although it is outside of docs/."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def on_files(files, config):
    """Add the plots and tables to the site, in the folder results/."""
    for path in sorted(RESULTS.glob("*.*")):
        if path.suffix in (".png", ".csv"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    """Change links to benchmarks/results into links to that folder."""
    return markdown.replace("](../benchmarks/results/", "](results/")
