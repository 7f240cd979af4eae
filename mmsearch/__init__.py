"""Cross-modal semantic search: find pictures by text, by example or by both, and measure it."""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it; `typing` takes a while
if TYPE_CHECKING:
    from mmsearch.engine import Engine
    from mmsearch.types import Filter, Hit, IngestReport, Query, Term

__version__ = "0.1.0"
__all__ = ["Engine", "Filter", "Hit", "IngestReport", "Query", "Term", "__version__"]


def __getattr__(name: str) -> object:
    # Imported on first use: `mmsearch --help` should not wait for NumPy and SQLAlchemy.
    if name == "Engine":
        from mmsearch.engine import Engine

        return Engine
    if name in __all__:
        import mmsearch.types

        return getattr(mmsearch.types, name)
    raise AttributeError(f"module 'mmsearch' has no attribute '{name}'")
