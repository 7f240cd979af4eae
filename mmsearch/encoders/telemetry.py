"""Imports OpenVINO and NNCF without what reports their use to their makers over the network."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAME = "openvino_telemetry"
_lock = threading.Lock()


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Around an import: finding no `openvino_telemetry`, they fall back to stubs of their own."""
    modules: dict[str, Any] = sys.modules
    with _lock:
        before = {_NAME: modules[_NAME]} if _NAME in modules else {}
        modules[_NAME] = None  # Python's own way to say that there is no such module
        try:
            yield
        finally:
            del modules[_NAME]
            modules.update(before)
