"""Re-ranking: the first images of a text query, scored again by more than one cosine.

Three things are put together for each of them:

- the cosine with the mean of the image's vector and that of a larger, mirrored view of it
  (test-time augmentation: Krizhevsky et al. 2012);
- the image's hubness: the log-mean-exp of its cosines with captions of many images. What is near
  to every caption is near to this one for no good reason (inverted softmax, Smith et al. 2017; for
  retrieval by text, Bogolin et al. 2022);
- a matching score of the text's tokens and the image's patches, by a trained network.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmsearch.config import available_cores
from mmsearch.encoders.openvino import Graph
from mmsearch.encoders.patch_encoder import PatchEmbeddings, PatchEncoder, Tokens
from mmsearch.errors import DamageError
from mmsearch.media.sandbox import Decoders
from mmsearch.search.trained import Network, read_trained, write_trained
from mmsearch.store.patches import pack_patches, unpack_patches
from mmsearch.store.paths import to_path
from mmsearch.store.reader import Reader
from mmsearch.store.rows import Item
from mmsearch.store.vector_index import dot_products
from mmsearch.types import IMAGE, Ids, Term, Vectors

FILE_NAME = "rerank.safetensors"
NOT_TRAINED = (
    "no re-ranker was trained for this index's model; 'mmsearch train rerank DATASET' trains one, "
    "for tiny and open_clip models"
)
Kind = Literal["interaction", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Floats = NDArray[np.float32]
Scoring = Callable[[Floats, Floats, Vectors, Vectors], Sequence[Floats]]
"""From a text's tokens (l, dim), and images' patches (n, p, dim) and vectors (n, dim), and captions
(m, dim) to each image's matching score and hubness, (n,) both."""

_NEAREST = 10
_PICTURES = 16  # that are embedded together


@dataclass(frozen=True)
class Parts:
    """What speaks for each of n images, (n,) each."""

    cosine: Floats
    hubness: Floats
    """Less, the less the query is like the captions that it is measured with."""
    match: Floats


@dataclass(frozen=True)
class Mix:
    """How the parts make one score: cosine - hubness * hubness + match * match."""

    hubness: float
    match: float

    def of(self, parts: Parts) -> Floats:
        """The scores, (n,), in the units of a cosine."""
        found: Floats = parts.cosine - self.hubness * parts.hubness + self.match * parts.match
        return found


@dataclass(frozen=True)
class Reranker:
    """A trained re-ranker, for one space."""

    network: Scoring
    captions: Vectors
    """Captions like the queries to come, (m, dim): what hubness is measured with."""
    mix: Mix
    familiar: tuple[float, float] = (-1.0, -1.0)
    """How near to those captions a query has to be for hubness to count at all, and in full."""
    nearest: int = _NEAREST
    """How many captions tell how near a query is."""

    @property
    def dim(self) -> int:
        return int(self.captions.shape[1])

    def parts(
        self,
        query: Vectors,
        texts: Sequence[tuple[float, Floats]],
        own: Vectors,
        patches: PatchEmbeddings,
    ) -> Parts:
        """What speaks for n images.

        Args:
            query: the query's vector, (dim,).
            texts: each text's weight and its tokens, (l, dim).
            own: the images' vectors, (n, dim).
            patches: their patch embeddings.
        """
        seen: Floats = own + patches.vectors
        seen = seen / np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-6)
        low, high = self.familiar
        at = (nearness(query[None], self.captions, self.nearest)[0] - low) / max(high - low, 1e-6)
        total = sum(weight for weight, _ in texts)
        match, hubness = np.zeros((2, len(own)), np.float32)
        for weight, rows in texts:
            score, hubness = self.network(rows, patches.patches, seen, self.captions)
            match += np.float32(weight / total) * score
        return Parts(dot_products(query, seen), hubness * np.float32(np.clip(at, 0, 1)), match)

    def rescored(self, cosines: Floats, parts: Parts) -> Floats:
        """New scores, (n,), whose mean is that of the images' own cosines.

        So they can stand beside cosines in a fusion, which knows those of a whole index.
        """
        found = self.mix.of(parts)
        shifted: Floats = found - found.mean() + cosines.mean()
        return shifted


def nearness(queries: Vectors, captions: Vectors, nearest: int = _NEAREST) -> Floats:
    """How near queries are to captions, (n,): the mean cosine with the nearest of them.

    An image that captions find too often is not one that other queries do: their own images would
    be pushed down for nothing.
    """
    count = min(nearest, len(captions))
    near = dot_products(queries[0], captions)[None] if len(queries) == 1 else queries @ captions.T
    found: Floats = np.partition(near, -count, axis=1)[:, -count:].mean(axis=1)
    return found


def tokens_of(tokens: Tokens) -> list[Floats]:
    """Each text's tokens, (l, dim), without padding."""
    return [rows[there] for rows, there in zip(tokens.rows, tokens.there, strict=True)]


@dataclass(frozen=True)
class PatchScorer:
    """Scores the images of an index by their patches: those that are kept, or of their files."""

    reader: Reader
    reranker: Reranker
    patch_encoder: Callable[[], PatchEncoder]
    decoders: Decoders
    block: int = 256  # images whose patches are in memory at once

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
            scores[seen] = self.reranker.rescored(cosines[seen].astype(np.float32), parts)
        return scores

    def parts(
        self, query: Vectors, terms: Sequence[Term], items: Sequence[Item]
    ) -> tuple[Ids, Parts]:
        """What speaks for the images of some items, for one query.

        Args:
            query: the query's vector, (dim,).
            terms: its terms; the texts that are wanted are matched.

        Returns the places of those that have patches, (m,), and what speaks for these.
        """
        encoder = self.patch_encoder()
        wanted = [term for term in terms if term.text is not None and term.weight > 0]
        tokens = tokens_of(encoder.tokens([term.text or "" for term in wanted]))
        texts = [(term.weight, rows) for term, rows in zip(wanted, tokens, strict=True)]
        places: list[int] = []
        found: list[Parts] = []
        for start in range(0, len(items), self.block):
            own, patches, there = self._patches(encoder, items[start : start + self.block])
            if there:
                places += [start + place for place in there]
                found.append(self.reranker.parts(query, texts, own, patches))
        return np.array(places, np.int64), _joined(found)

    def _patches(
        self, encoder: PatchEncoder, items: Sequence[Item]
    ) -> tuple[Vectors, PatchEmbeddings, list[int]]:
        """The vectors of some images, their patch embeddings, and the places of these images."""
        dim = self.reranker.dim
        ids = [item.media_id for item in items]
        kept = self.reader.patches(ids)
        missing = {item.media_id: to_path(item.path) for item in items if item.media_id not in kept}
        if missing:
            kept |= embed_patches(encoder, missing, self.decoders)
        there = [place for place, number in enumerate(ids) if number in kept]
        if not there:
            nothing = np.empty((0, dim), np.float32)
            return nothing, PatchEmbeddings(nothing, nothing[:, None]), there
        try:
            patches = PatchEmbeddings(*unpack_patches([kept[ids[place]] for place in there], dim))
        except ValueError as error:
            raise DamageError(
                f"the patches of the index cannot be read ({error}); drop them with 'mmsearch "
                "index --no-patches', and embed them again with --patches"
            ) from error
        return self.reader.vectors(IMAGE, np.array(ids)[there]), patches, there


def _joined(found: Sequence[Parts]) -> Parts:
    nothing = np.empty(0, np.float32)
    columns = ("cosine", "hubness", "match")
    return Parts(
        *(np.concatenate([nothing, *(getattr(one, name) for one in found)]) for name in columns)
    )


def embed_patches(
    encoder: PatchEncoder, files: Mapping[int, Path], decoders: Decoders
) -> dict[int, bytes]:
    """The patch embeddings of the image files that can be read, by id, packed by `pack_patches`."""
    how = dataclasses.asdict(encoder.preprocess)
    pixels = decoders.pixels_of(map(os.fsencode, files.values()), how, available_cores())
    good = {n: one for n, one in zip(files, pixels, strict=True) if one is not None}
    found: dict[int, bytes] = {}
    for start in range(0, len(good), _PICTURES):
        some = list(good)[start : start + _PICTURES]
        patches = encoder.encode(np.stack([good[number] for number in some]))
        found.update(zip(some, pack_patches(patches.vectors, patches.patches), strict=True))
    return found


def write_reranker(folder: Path, network: Network, reranker: Reranker, space: str) -> None:
    """Keeps a re-ranker beside an index, in half precision.

    Args:
        network: the reranker's own, exported.
    """
    low, high = reranker.familiar
    metadata = {
        "hubness": repr(reranker.mix.hubness), "match": repr(reranker.mix.match),
        "familiar": f"{low!r} {high!r}",
    }  # fmt: skip
    captions = {"captions": reranker.captions}
    write_trained(folder / FILE_NAME, network, space, metadata, captions)


def read_reranker(folder: Path, space: str) -> Reranker | None:
    """The re-ranker for a space, in a folder or with a bundled model, if there is one.

    Raises:
        UsageError: the file is damaged, or of another program.
    """
    return read_trained(folder, FILE_NAME, space, _build, "mmsearch train rerank DATASET")


def _build(network: Network, arrays: Mapping[str, Floats], metadata: Mapping[str, str]) -> Reranker:
    mix = Mix(float(metadata["hubness"]), float(metadata["match"]))
    low, high = map(float, metadata["familiar"].split())
    graph = Graph.of_network(network.graph, network.weights)
    return Reranker(graph, np.ascontiguousarray(arrays["captions"]), mix, (low, high))
