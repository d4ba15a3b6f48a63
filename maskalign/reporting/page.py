"""One HTML page that contains its styles, script, numbers and images, and makes no network request."""

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from maskalign import __version__
from maskalign.reporting import figures
from maskalign.reporting.settings import compare, flatten
from maskalign.reporting.text import to_html

PALETTE = 8  # colors in page.css; further runs reuse them with dashed lines


def render(runs, title="MaskAlign report", made=""):
    """The page as text.

    Args:
        runs: list of `run.Run`, at least one.
        title: heading of the page.
        made: the time at which the page was made, as text.

    Returns:
        str, a complete HTML document. All text from the runs' files is escaped. A content security policy in the page
        allows only its own script and `data:` addresses.
    """
    script, style = (files("maskalign.reporting").joinpath(name).read_text() for name in ("page.js", "page.css"))
    environment = Environment(
        loader=PackageLoader("maskalign.reporting", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    differing, equal = compare([run.settings for run in runs]) if len(runs) > 1 else ([], [])
    if len(runs) == 1:
        equal = [(name, [text]) for name, text in flatten(runs[0].settings).items()]
    charts, held_out = figures.curves(runs), figures.held_out_charts(runs)
    texts = [[(name, Markup(to_html(text, plain=name.endswith(".txt")))) for name, text in run.texts] for run in runs]
    return environment.get_template("page.html").render(
        title=title,
        made=made,
        version=__version__,
        runs=runs,
        cards=[figures.card(run) for run in runs],
        colors=[f"c{index % PALETTE}" for index in range(len(runs))],
        differing=differing,
        equal=equal,
        charts=charts,
        held_out=held_out,
        metrics=figures.evaluation_table(runs),
        steps=sorted({step for run in runs for step, _ in run.samples}),
        texts=texts,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        numbers={
            "runs": [run.name for run in runs],
            "charts": charts,
            "heldOut": [{key: value for key, value in chart.items() if key != "rows"} for chart in held_out],
        },
    )
