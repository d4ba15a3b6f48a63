"""Lazy package exports (PEP 562), so that `maskalign --help` and a rejected setting never wait for torch."""

from importlib import import_module


def lazy_exports(package, exports):
    """Make the `__getattr__`, `__dir__` and `__all__` of a package whose names load on first use.

    Args:
        package: the package's `__name__`.
        exports: dict from public name to the submodule that defines it, or `.package.module` beside this package.

    Returns:
        `(__getattr__, __dir__, __all__)` for the package to bind.
    """

    def __getattr__(name):
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{exports[name]}", package), name)

    def __dir__():
        return sorted(exports)

    return __getattr__, __dir__, sorted(exports)
