"""Runs a job: what is missing, read and computed by workers, committed in batches.

The calling thread commits, in order, while the workers are at the next items. There are as many
workers as cores, and the runtime computes a worker's share on one core: decoding and encoding never
fight over cores, and none waits while there is anything left to do. What a batch committed stays,
whatever happens after it: a job's items are what its index lacks, so that the next run resumes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    # A search that needs no pictures does without both.
    from concurrent.futures import Future

    from mmsearch.media.sandbox import Decoders


#: Items that are committed together.
BATCH = 64
_AHEAD = 2  # batches that are read, and batches that are computed, before they are committed

Item = TypeVar("Item")
Read = TypeVar("Read")
Outcome = TypeVar("Outcome")


class Job(Protocol[Item, Read, Outcome]):
    """What a runner runs."""

    @property
    def size(self) -> int:
        """How many items are best computed together."""
        ...

    def missing(self) -> Iterator[Item]:
        """What is to be done, in order; asked for as the work goes on."""
        ...

    def read(self, item: Item) -> Read:
        """Reads what an item needs; called by worker threads."""
        ...

    def compute(self, reads: Sequence[Read]) -> Outcome:
        """Computes what some items need; called by worker threads."""
        ...

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Writes the outcomes of a batch, all together; called by the thread that runs the job."""
        ...


class Runner:
    """Workers, and the processes that decode files for them; jobs run one after the other."""

    def __init__(self, decoders: Decoders, workers: int, batch: int = BATCH) -> None:
        """Takes what decodes, how many threads there are to be, and how many items are a batch."""
        self.decoders = decoders
        self.workers = workers
        self.batch = batch

    def run(self, job: Job[Item, Read, Outcome], total: int) -> None:
        """Runs a job to its end. An error or Ctrl-C keeps what was committed.

        Args:
            total: how many items there are, about: few are spread over all workers.
        """
        size = max(1, min(job.size, total // (2 * self.workers)))
        items = iter(job.missing())
        reading: deque[Future[Read]] = deque()
        computing: deque[list[Future[Outcome]]] = deque()
        with self.decoders.threads(self.workers) as pool:
            while True:
                for item in islice(items, _AHEAD * self.batch - len(reading)):
                    reading.append(pool.submit(job.read, item))
                is_behind = not computing or (
                    len(computing) < _AHEAD and not all(one.done() for one in computing[0])
                )
                if reading and is_behind:
                    count = min(self.batch, len(reading))
                    reads = [reading.popleft().result() for _ in range(count)]
                    computing.append(
                        [pool.submit(job.compute, part) for part in parts(reads, size)]
                    )
                elif computing:
                    job.commit([one.result() for one in computing.popleft()])
                else:
                    return


def parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items, so many at a time."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
