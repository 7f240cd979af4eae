"""The engine: an index, what serves it, and everything that is done with them.

>>> from mmsearch import Engine
>>> with Engine.open("photos.index", model="tiny") as engine:   # doctest: +SKIP
...     engine.index(["~/Pictures"])
...     for hit in engine.search("a dog on the beach", k=3):
...         print(f"{hit.score:.3f} {hit.path}")
"""

from __future__ import annotations

from mmsearch.engine.facade import Engine

__all__ = ["Engine"]
