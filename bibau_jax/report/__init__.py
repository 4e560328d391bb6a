"""What a reader sees of a run: tables, figures and one page, read from records; nothing is computed or trained here."""

import importlib


def __getattr__(name: str):
    """`report.html` and `report.tables` on first use, so that either can also be run with `python -m`."""
    if name in ("html", "tables"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
