"""Re-ranking: the first images of a text query, scored again by more than one cosine.

Three things are put together for each of them:

- the cosine with the mean of the image's vector and that of a second look at it, larger and
  mirrored (several crops and scales of a picture tell more than one: Krizhevsky et al. 2012);
- how popular the image is: the log-mean-exp of its cosines with captions of many
  images. What is near to every caption is near to this one for no good reason (inverted softmax,
  Smith et al. 2017; for retrieval by text, Bogolin et al. 2022);
- a matching score of the text's tokens and the image's patches, by a network that was learned.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmsearch.config import available_cores
from mmsearch.encoders.local import LocalEncoder, Looks, Tokens
from mmsearch.errors import DamageError, DecodeError
from mmsearch.media.isolated import Decoders
from mmsearch.search.learned import Arrays, read_learned, write_learned
from mmsearch.search.matchers import Floats, Kind, Matcher, matcher_of, popularity_of
from mmsearch.store.patches import pack_looks, unpack_looks
from mmsearch.store.paths import to_path
from mmsearch.store.reader import Reader
from mmsearch.store.rows import Item
from mmsearch.store.vector_index import dot_products
from mmsearch.types import IMAGE, Ids, Pixels, Term, Vectors

FILE_NAME = "rerank.safetensors"
NOT_LEARNED = (
    "nothing was learned to re-rank with for this index's model; 'mmsearch train rerank DATASET' "
    "learns it"
)
#: exp(TEMPERATURE * cosine) says how near a caption is.
TEMPERATURE = 20.0

_VERSION = "1"
_NEAREST = 10
_LOOKS = 16  # pictures that are looked at together
_BLOCK = 256  # images whose patches are in memory at once


@dataclass(frozen=True)
class Parts:
    """What speaks for each of n images, (n,) each."""

    cosine: Floats
    popularity: Floats
    """Less, the less the query is like the captions that it is measured with."""
    match: Floats


@dataclass(frozen=True)
class Mix:
    """How the parts make one score: cosine - popularity * popularity + match * match."""

    popularity: float
    match: float

    def of(self, parts: Parts) -> Floats:
        """The scores, (n,), in the units of a cosine."""
        found: Floats = parts.cosine - self.popularity * parts.popularity + self.match * parts.match
        return found


@dataclass(frozen=True)
class Reranker:
    """What was learned to re-rank with, for one space."""

    matcher: Matcher
    captions: Vectors
    """Captions like the queries to come, (m, dim): an image's popularity is with these."""
    mix: Mix
    familiar: tuple[float, float] = (-1.0, -1.0)
    """How near to those captions a query has to be for popularity to count at all, and in full."""

    @property
    def dim(self) -> int:
        return int(self.captions.shape[1])

    @cached_property
    def _popularity(self) -> Callable[[Floats], Floats]:
        return popularity_of(self.captions, TEMPERATURE)

    def parts(
        self, query: Vectors, texts: Sequence[tuple[float, Floats]], own: Vectors, looks: Looks
    ) -> Parts:
        """What speaks for n images.

        Args:
            query: the query's vector, (dim,).
            texts: each text's weight and its tokens, (l, dim).
            own: the images' vectors, (n, dim).
            looks: the second looks at them.
        """
        seen: Floats = own + looks.vectors
        seen = seen / np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-6)
        popularity = self._popularity(seen)
        low, high = self.familiar
        at = (nearness(query[None], self.captions)[0] - low) / max(high - low, 1e-6)
        total = sum(weight for weight, _ in texts)
        match = np.zeros(len(own), np.float32)
        for weight, rows in texts:
            match += np.float32(weight / total) * self.matcher(rows, looks.patches)
        return Parts(dot_products(query, seen), popularity * np.float32(np.clip(at, 0, 1)), match)

    def rescored(self, cosines: Floats, parts: Parts) -> Floats:
        """New scores, (n,), whose mean is that of the images' own cosines.

        So they can stand beside cosines in a fusion, which knows those of a whole index.
        """
        found = self.mix.of(parts)
        shifted: Floats = found - found.mean() + cosines.mean()
        return shifted


def nearness(queries: Vectors, captions: Vectors) -> Floats:
    """How near queries are to captions, (n,): the mean cosine with the nearest of them.

    An image that captions find too often is not one that other queries do: their own images would
    be pushed down for nothing.
    """
    count = min(_NEAREST, len(captions))
    near = dot_products(queries[0], captions)[None] if len(queries) == 1 else queries @ captions.T
    nearest = np.partition(near, -count, axis=1)[:, -count:]
    found: Floats = nearest.mean(axis=1)
    return found


def tokens_of(tokens: Tokens) -> list[Floats]:
    """Each text's tokens, (l, dim), without padding."""
    return [rows[there] for rows, there in zip(tokens.rows, tokens.there, strict=True)]


class SecondLooks:
    """Looks at the images of an index for a query, by what was kept of them or by their files."""

    def __init__(
        self,
        reader: Reader,
        reranker: Reranker,
        local: Callable[[], LocalEncoder],
        decoders: Decoders,
    ) -> None:
        self._reader = reader
        self._decoders = decoders
        self._reranker = reranker
        self._local = local

    def scores(
        self,
        query: Vectors,
        terms: Sequence[Term],
        items: Sequence[Item],
        cosines: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """New scores for the images of some items, (n,): their cosines where none can be had."""
        seen, parts = self.parts(query, terms, items)
        scores = cosines.copy()
        if len(seen):
            scores[seen] = self._reranker.rescored(cosines[seen].astype(np.float32), parts)
        return scores

    def parts(
        self, query: Vectors, terms: Sequence[Term], items: Sequence[Item]
    ) -> tuple[Ids, Parts]:
        """What speaks for the images of some items, for one query.

        Args:
            query: the query's vector, (dim,).
            terms: its terms; the texts that are wanted are matched.

        Returns the places of those that could be looked at, (m,), and what speaks for these.
        """
        local = self._local()
        wanted = [term for term in terms if term.text is not None and term.weight > 0]
        tokens = tokens_of(local.tokens([term.text or "" for term in wanted]))
        texts = [(term.weight, rows) for term, rows in zip(wanted, tokens, strict=True)]
        places: list[int] = []
        found: list[Parts] = []
        for start in range(0, len(items), _BLOCK):
            own, looks, there = self._looks(local, items[start : start + _BLOCK])
            if there:
                places += [start + place for place in there]
                found.append(self._reranker.parts(query, texts, own, looks))
        return np.array(places, np.int64), _joined(found)

    def _looks(
        self, local: LocalEncoder, items: Sequence[Item]
    ) -> tuple[Vectors, Looks, list[int]]:
        """The vectors of some images, the second looks at them, and the places of these images."""
        dim = self._reranker.dim
        ids = [item.media_id for item in items]
        kept = self._reader.patches(ids)
        missing = {item.media_id: to_path(item.path) for item in items if item.media_id not in kept}
        if missing:
            kept |= look_at(local, missing, self._decoders)
        there = [place for place, number in enumerate(ids) if number in kept]
        if not there:
            nothing = np.empty((0, dim), np.float32)
            return nothing, Looks(nothing, nothing[:, None]), there
        try:
            looks = Looks(*unpack_looks([kept[ids[place]] for place in there], dim))
        except ValueError as error:
            raise DamageError(
                f"the patches of the index cannot be read ({error}); drop them with 'mmsearch "
                "index --no-patches', and keep them anew with --patches"
            ) from error
        return self._reader.vectors(IMAGE, np.array(ids)[there]), looks, there


def _joined(found: Sequence[Parts]) -> Parts:
    nothing = np.empty(0, np.float32)
    columns = ("cosine", "popularity", "match")
    return Parts(
        *(np.concatenate([nothing, *(getattr(one, name) for one in found)]) for name in columns)
    )


def look_at(local: LocalEncoder, files: Mapping[int, Path], decoders: Decoders) -> dict[int, bytes]:
    """Second looks at the image files that can be read, by id, as `pack_looks` has them."""
    how = dataclasses.asdict(local.preprocess)

    def opened(path: Path) -> Pixels | None:
        with decoders.open(os.fsencode(path)) as file:
            try:
                return file.pixels(how)
            except DecodeError:
                return None

    with decoders.threads(available_cores()) as pool:
        pixels = dict(zip(files, pool.map(opened, files.values()), strict=True))
    good = {number: one for number, one in pixels.items() if one is not None}
    found: dict[int, bytes] = {}
    for start in range(0, len(good), _LOOKS):
        some = list(good)[start : start + _LOOKS]
        looks = local.looks(np.stack([good[number] for number in some]))
        found.update(zip(some, pack_looks(looks.vectors, looks.patches), strict=True))
    return found


def write_reranker(
    folder: Path, kind: Kind, weights: Arrays, heads: int, reranker: Reranker, space: str
) -> None:
    """Keeps what was learned beside an index, in half precision.

    Args:
        weights: those of the reranker's network, by their names in torch.
    """
    low, high = reranker.familiar
    remarks = {
        "version": _VERSION, "space": space, "kind": kind, "heads": str(heads),
        "popularity": repr(reranker.mix.popularity), "match": repr(reranker.mix.match),
        "familiar": f"{low!r} {high!r}",
    }  # fmt: skip
    write_learned(folder / FILE_NAME, {**weights, "captions": reranker.captions}, remarks)


def read_reranker(folder: Path, space: str) -> Reranker | None:
    """What was learned for a space, in a folder or with a bundled model, if there is something.

    Raises:
        UsageError: the file is damaged, or of a newer program.
    """
    return read_learned(folder, FILE_NAME, space, _VERSION, _build, "mmsearch train rerank DATASET")


def _build(weights: Arrays, remarks: Mapping[str, str]) -> Reranker:
    rest = {name: value for name, value in weights.items() if name != "captions"}
    mix = Mix(float(remarks["popularity"]), float(remarks["match"]))
    matcher = matcher_of(remarks["kind"], rest, int(remarks["heads"]))
    captions = weights["captions"]
    if captions.ndim != 2 or captions.shape[1] != rest["token.weight"].shape[1]:
        raise ValueError(f"captions of the shape {captions.shape}")
    low, high = map(float, remarks["familiar"].split())
    return Reranker(matcher, np.ascontiguousarray(captions), mix, (low, high))
