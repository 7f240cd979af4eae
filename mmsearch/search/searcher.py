"""From a query to hits."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmsearch.encoders.base import Encoder
from mmsearch.errors import DecodeError, UsageError
from mmsearch.search.candidates import CandidateScores, find_candidates
from mmsearch.search.compose import NOT_TRAINED, Composer, read_composer
from mmsearch.search.fusion import LEAST_CAPTIONS, Scores, Weights, fuse, read_weights
from mmsearch.store.paths import to_path
from mmsearch.store.reader import Reader
from mmsearch.store.rows import Item
from mmsearch.types import (
    IMAGE,
    TEXT,
    Compose,
    EncoderSpec,
    Filter,
    Fusion,
    Hit,
    Ids,
    Modality,
    Query,
    Term,
    Vectors,
)

if TYPE_CHECKING:
    from mmsearch.encoders.patch_encoder import PatchEncoder
    from mmsearch.media.sandbox import Decoders
    from mmsearch.search.rerank import PatchScorer, Reranker

log = logging.getLogger(__name__)

#: How many images each of image, captions and words brings to be fused.
DEPTH = 200


@dataclass(frozen=True)
class Trained:
    """What was trained for an index and its model, each read when it is needed."""

    weights: Callable[[], Weights | None] = lambda: None
    """Those of the fusion "trained"."""
    composer: Callable[[], Composer | None] = lambda: None
    """That of queries by a picture and a text."""
    reranker: Callable[[], Reranker | None] = lambda: None
    """What the first images are scored again with."""


def trained_for(folder: Path, spec: EncoderSpec) -> Trained:
    """What was trained for a space and lies in an index's folder or comes with its model."""

    def reranker() -> Reranker | None:
        from mmsearch.search.rerank import read_reranker

        return read_reranker(folder, spec.space)

    return Trained(
        weights=lambda: read_weights(folder, spec.space),
        composer=lambda: read_composer(folder, spec.space, spec.dim),
        reranker=reranker,
    )


@dataclass(frozen=True)
class Answer:
    """The items found for one query, best first."""

    scores: Sequence[float]
    ids: Sequence[int]
    items: Sequence[Item]


@dataclass(eq=False)
class Searcher:
    """Answers queries from one view of an index with the encoder of its space."""

    reader: Reader
    encoder: Encoder
    """That of the reader's space."""
    trained: Trained = field(default_factory=Trained)
    patch_encoder: Callable[[], PatchEncoder] | None = None
    """Gives patch embeddings; needed where there is a reranker."""
    decoders: Callable[[], Decoders] | None = None
    """Gives what reads image files; None is for searches that need none."""
    depth: int = DEPTH
    """How many images each of image, captions and words brings to be fused."""
    least_captions: int = LEAST_CAPTIONS
    """Fewer give no scale to put their scores on."""

    def search(self, query: Query) -> list[Hit]:
        """The hits, best first; at most `query.k`.

        Raises:
            UsageError: terms that cancel each other out, or an example that is not a usable image.
        """
        how = self.fusion_of(query)
        vector = self.embed(query.terms, self.compose_of(query, how))
        if query.rerank:
            self.reranker_of(query, how)
        return self._nearest(query, vector) if how == "image" else self._fused(query, vector, how)

    def fusion_of(self, query: Query) -> Fusion:
        """The fusion that answers a query: what "auto" comes to.

        That is the image alone where the index holds too few captions (under 30), where a term
        is a picture and where a least cosine is asked for; else trained weights, or equal ones.

        Raises:
            UsageError: a fusion that does not go with the query.
        """
        how = query.fusion
        if query.to != IMAGE and how not in ("auto", "image"):
            raise UsageError("fusion ranks images by their captions too: it goes with --to image")
        if how == "auto":
            if not _is_text_to_image(query) or query.min_score is not None:
                return "image"
            if not self.reader.has_captions(self.least_captions):
                return "image"
            return "trained" if self.trained.weights() is not None else "sum"
        if query.min_score is not None and how not in ("image", "caption"):
            raise UsageError(
                f"a least score is a cosine, and '{how}' ranks by something else; leave it out, or "
                "take --fusion image or caption"
            )
        if how == "words" and not _words_of(query.terms):
            raise UsageError("--fusion words needs a text to search for")
        return how

    def candidates(self, query: Query, vector: Vectors | None = None) -> CandidateScores:
        """The scores of the images near a query, to be fused.

        Args:
            vector: the terms' vector, shape (dim,), where it is known already.
        """
        return find_candidates(
            self.reader,
            self.embed(query.terms) if vector is None else vector,
            _words_of(query.terms),
            max(self.depth, query.k, query.rerank),
            query.filter,
            exact=query.exact,
        )

    def scores(
        self, query: Query, vector: Vectors, candidates: CandidateScores, how: Fusion
    ) -> tuple[Scores, Scores]:
        """One score for each of the candidates, (m,), and what is taken for the image's.

        With re-ranking, the first get another score for their image before they are fused
        again; what lies beyond them stays beyond.
        """
        weights = self.trained.weights() if how == "trained" else None
        scores = fuse(candidates, how, weights)
        if not query.rerank:
            return scores, candidates.image
        order = _best_first(scores, candidates.media)
        first, rest = np.split(order, [max(query.rerank, query.k)])
        image = candidates.image.copy()
        items = self._items(IMAGE, candidates.ids[first])
        image[first] = self.patch_scorer(query, how).scores(
            vector, query.terms, items, image[first]
        )
        again = fuse(dataclasses.replace(candidates, image=image), how, weights).copy()
        if len(rest):
            again[rest] = again[first].min() - 1.0 - np.arange(len(rest))
        return again, image

    def _fused(self, query: Query, vector: Vectors, how: Fusion) -> list[Hit]:
        found = self.candidates(query, vector)
        scores, image = self.scores(query, vector, found, how)
        chosen = _best_first(scores, found.media)
        if query.min_score is not None:
            chosen = chosen[scores[chosen] >= query.min_score]
        chosen = chosen[: query.k]
        parts = {"image": found.image, "caption": found.caption, "words": found.words}
        if query.rerank:
            parts["rerank"] = image
        parts = {name: values[chosen] for name, values in parts.items()}
        return _hits(IMAGE, self._items(IMAGE, found.ids[chosen]), scores[chosen], parts)

    def _items(self, modality: Modality, ids: Ids) -> list[Item]:
        found = self.reader.items(modality, ids.tolist())
        return [found[number] for number in ids.tolist()]

    def _nearest(self, query: Query, vector: Vectors) -> list[Hit]:
        k = max(query.k, query.rerank)
        answer = self.rank(vector[None, :], query.to, k, query.filter, exact=query.exact)[0]
        cosines = np.array(answer.scores, np.float64)
        if query.min_score is not None:  # the best are first
            cosines = cosines[cosines >= query.min_score]
        items = answer.items[: len(cosines)]
        if not query.rerank:
            return _hits(query.to, items, cosines, {})
        scores = self.patch_scorer(query).scores(vector, query.terms, items, cosines)
        order = np.argsort(-scores, kind="stable")[: query.k]
        parts = {"image": cosines[order], "rerank": scores[order]}
        return _hits(query.to, [items[row] for row in order.tolist()], scores[order], parts)

    # -- re-ranking ------------------------------------------------------------------------

    def reranker_of(self, query: Query, how: Fusion) -> Reranker:
        """What re-ranks a query.

        Args:
            how: the fusion that answers the query.

        Raises:
            UsageError: a query that cannot be re-ranked, or no re-ranker was trained.
        """
        if not _is_text_to_image(query):
            raise UsageError("--rerank is for texts that look for images: it matches their words")
        if how in ("caption", "words"):
            raise UsageError(f"--rerank scores images, and --fusion {how} does not")
        from mmsearch.search.rerank import NOT_TRAINED as NOTHING_TO_RERANK_WITH

        found = self.trained.reranker()
        if found is None:
            raise UsageError(NOTHING_TO_RERANK_WITH)
        if found.dim != self.encoder.spec.dim:
            raise UsageError(
                f"the re-ranker takes vectors of {found.dim} dimensions, not "
                f"{self.encoder.spec.dim}; 'mmsearch train rerank DATASET' trains another"
            )
        return found

    def patch_scorer(self, query: Query, how: Fusion = "image") -> PatchScorer:
        """What scores the patches of images for a query.

        Args:
            how: the fusion that answers the query.

        Raises:
            UsageError: a query that cannot be re-ranked, or no re-ranker was trained.
        """
        from mmsearch.search.rerank import PatchScorer

        assert self.patch_encoder is not None, "it is needed where there is a reranker"
        assert self.decoders is not None, "it too"
        reranker = self.reranker_of(query, how)
        return PatchScorer(self.reader, reranker, self.patch_encoder, self.decoders())

    # -- what they have in common ----------------------------------------------------------

    def rank(
        self,
        queries: Vectors,
        to: str,
        k: int,
        where: Filter | None = None,
        *,
        exact: bool = False,
    ) -> list[Answer]:
        """The best k items for each query vector, shape (q, dim), of each file the best.

        Raises:
            UsageError: the index's model embeds nothing of that modality.
        """
        modality = TEXT if to == "caption" else to
        found = self.reader.nearest(modality, queries, k, where, exact=exact, group_by_medium=True)
        items = self.reader.items(modality, sorted({n for _, ids in found for n in ids.tolist()}))
        return [
            Answer(scores.tolist(), ids.tolist(), [items[number] for number in ids.tolist()])
            for scores, ids in found
        ]

    def compose_of(self, query: Query, how: Fusion) -> Compose:
        """How a query's terms make one vector: what "auto" comes to.

        That is "early" for one picture and one text without weights that are to find images by
        what they show, where photos have shown that early fusion finds no less.

        Args:
            how: the fusion that answers the query.

        Raises:
            UsageError: "early" for other terms, or where it was not trained.
        """
        is_pair = sorted(term.text is None for term in query.terms) == [False, True]
        is_pair = is_pair and all(term.weight == 1 for term in query.terms)
        if query.compose == "early":
            if not is_pair:
                raise UsageError(
                    "--compose early is for one --image and one text, both of weight 1; "
                    "--compose sum takes any"
                )
            if self.trained.composer() is None:
                raise UsageError(NOT_TRAINED)
            return "early"
        if query.compose == "sum" or not is_pair or query.to != "image" or how != "image":
            return "sum"
        try:
            composer = self.trained.composer()
        except UsageError as error:  # nobody asked for it
            log.warning("%s", error)
            return "sum"
        return "early" if composer is not None and composer.is_for_photos else "sum"

    def embed(self, terms: Sequence[Term], compose: Compose = "sum") -> Vectors:
        """One unit vector, shape (dim,), for several terms.

        Args:
            compose: "sum" for their weighted sum, or "early" for one picture and one text.

        Raises:
            UsageError: nothing that is left of them, or an example that is not a usable image.
        """
        texts = [term.text for term in terms if term.text is not None]
        text_rows = self.encoder.encode("text", texts) if texts else np.empty((0, 0), np.float32)
        if compose == "early":
            composer = self.trained.composer()
            assert composer is not None, "compose_of has looked"
            image = next(self._embed_image(term) for term in terms if term.image is not None)
            total = composer(image[None], text_rows)[0]
        else:
            rows = iter(text_rows)
            total = np.zeros(self.encoder.spec.dim, dtype=np.float32)
            for term in terms:
                row = next(rows) if term.text is not None else self._embed_image(term)
                total += np.float32(term.weight) * row
        length = float(np.linalg.norm(total))
        if not np.isfinite(length) or length < 1e-6:
            raise UsageError("the terms cancel each other out: nothing is left to search for")
        found: Vectors = total / np.float32(length)
        return found

    def _embed_image(self, term: Term) -> Vectors:
        assert term.image is not None, "it has no text"
        path = os.fspath(term.image)
        if IMAGE not in self.encoder.spec.inputs:
            raise UsageError(f"'{self.encoder.spec.model}' takes no pictures")
        if not os.path.isfile(path):
            raise UsageError(f"{path}: no such image file")
        assert self.decoders is not None, "it is needed where a query has a picture"
        with self.decoders().open(os.fsencode(path)) as file:
            try:
                pixels = file.pixels(self.encoder.spec.inputs[IMAGE])
            except DecodeError as error:
                raise UsageError(f"{path}: {error}") from error
        found: Vectors = self.encoder.encode("image", pixels[None])[0]
        return found


def _hits(
    modality: Modality, items: Sequence[Item], scores: Scores, parts: Mapping[str, Scores]
) -> list[Hit]:
    """Items as hits, the best first, with their scores and what these were made of."""
    return [
        Hit(
            rank=row + 1,
            score=float(scores[row]),
            path=to_path(item.path),
            modality=modality,
            caption=item.caption,
            media_id=item.media_id,
            scores={
                name: float(values[row]) for name, values in parts.items()
                if np.isfinite(values[row])
            },
            start_ms=item.start_ms,
            end_ms=item.end_ms,
        )
        for row, item in enumerate(items)
    ]  # fmt: skip


def _best_first(scores: Scores, media: Ids) -> Ids:
    """The rows of what was found, (n,), the best first, of equals the one that came first."""
    order = np.lexsort((media, -np.nan_to_num(scores, nan=-np.inf)))
    return order[np.isfinite(scores[order])]


def _words_of(terms: Sequence[Term]) -> str:
    """What captions should hold words of: all that is wanted, and nothing that is not."""
    return " ".join(term.text for term in terms if term.text is not None and term.weight > 0)


def _is_text_to_image(query: Query) -> bool:
    """Whether images are looked for by texts alone, of which one at least is wanted."""
    by_text = all(term.text is not None for term in query.terms)
    return query.to == IMAGE and by_text and bool(_words_of(query.terms))
