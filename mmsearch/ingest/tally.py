"""What a run counts and how long its stages take."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Kept up by the thread that commits; seconds by any."""

    counts: Counter[str] = field(default_factory=Counter)
    stages: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds, added up over threads."""
    unread_sidecars: list[str] = field(default_factory=list)
    """Paths of sidecars that are no text."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds what its block takes to a stage, unless that fails."""
        started = time.perf_counter()
        yield
        with self._lock:
            self.stages[stage] += time.perf_counter() - started
