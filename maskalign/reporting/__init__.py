"""Reports: one self-contained HTML page that compares runs."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"report": "command", "read_run": "run", "render": "page"})
