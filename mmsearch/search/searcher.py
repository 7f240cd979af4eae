"""From a query to hits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmsearch.encoders.base import Encoder
from mmsearch.errors import DecodeError, UsageError
from mmsearch.media.image import MAX_FILE_BYTES, decode, fit
from mmsearch.store.paths import to_path
from mmsearch.store.store import Answer, Store
from mmsearch.types import Filter, Hit, Modality, Query, Term, Vectors


class Searcher:
    """Answers queries from one index with the encoder of its space."""

    def __init__(self, store: Store, encoder: Encoder) -> None:
        self._store = store
        self._encoder = encoder

    def search(self, query: Query) -> list[Hit]:
        """The hits, best first; at most `query.k`.

        Raises:
            UsageError: a query without terms, terms that cancel each other out, or an example
                that is not a usable image.
            SpaceError: the index's space is not the encoder's.
        """
        if query.k < 1:
            raise UsageError(f"k is a whole number from 1, not {query.k}")
        vector = self.embed(query.terms)
        answer = self.rank(vector[None, :], query.to, query.k, query.filter)[0]
        hits = [
            Hit(
                rank=place + 1,
                score=score,
                path=to_path(item.path),
                modality=query.to,
                caption=item.caption,
                media_id=item.media_id,
            )
            for place, (score, item) in enumerate(zip(answer.scores, answer.items, strict=True))
        ]
        if query.min_score is not None:
            hits = [hit for hit in hits if hit.score >= query.min_score]
        return hits

    def rank(
        self, queries: Vectors, to: Modality, k: int, where: Filter | None = None
    ) -> list[Answer]:
        """The best k items for each query vector, shape (q, dim): what every search runs on."""
        return self._store.search(self._encoder.spec.space, queries, to, k, where)

    def embed(self, terms: Sequence[Term]) -> Vectors:
        """One unit vector, shape (dim,), for several terms: their weighted sum.

        Raises:
            UsageError: no terms, a sum of nothing, or an example that is not a usable image.
        """
        if not terms:
            raise UsageError("nothing to search for: give a text or --image FILE")
        texts = [term.text for term in terms if term.text is not None]
        text_rows = iter(self._encoder.encode_texts(texts)) if texts else iter(())
        total = np.zeros(self._encoder.spec.dim, dtype=np.float32)
        for term in terms:
            row = next(text_rows) if term.text is not None else self._embed_image(term)
            total += np.float32(term.weight) * row
        length = float(np.linalg.norm(total))
        if not np.isfinite(length) or length < 1e-6:
            raise UsageError("the terms cancel each other out: nothing is left to search for")
        return total / np.float32(length)

    def _embed_image(self, term: Term) -> Vectors:
        if term.image is None:
            raise UsageError("a term is a text or an image")
        how = self._encoder.spec.preprocess
        try:
            pixels = fit(decode(_content(Path(term.image)), at_least=how.size).image, how)
        except DecodeError as error:
            raise UsageError(f"{term.image}: {error}") from error
        found: Vectors = self._encoder.encode_images(pixels[None])[0]
        return found


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such image file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: too large to be an image to search with")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
