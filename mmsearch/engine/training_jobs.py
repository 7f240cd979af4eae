"""Trains what an index's searches use: fusion weights, composed queries, re-ranking."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmsearch.datasets.labelled import LabelledSet
from mmsearch.encoders.openvino import Graph
from mmsearch.engine.benchmark import Labels, index_listed, scratch_index
from mmsearch.engine.open_index import OpenIndex
from mmsearch.errors import UsageError
from mmsearch.evaluation import comparison
from mmsearch.search.compose import write_composer
from mmsearch.search.fusion import write_weights
from mmsearch.search.rerank import Kind, Mix, Reranker, write_reranker
from mmsearch.search.searcher import Trained
from mmsearch.store.rows import SpaceRow
from mmsearch.training import compose, rerank
from mmsearch.training.fusion import TrainedFusion, train_weights
from mmsearch.training.sets import embed_set, embed_texts, merge_copies, splits_of
from mmsearch.types import OnProgress, Progress, Query, Term

_QUERIES = 4000  # held-out captions that three weights are trained on: more tell nothing new


def train_fusion(
    opened: OpenIndex,
    labels: Labels,
    *,
    hold_out: int,
    keep: bool,
    seed: int,
    on_progress: OnProgress,
) -> tuple[TrainedFusion, bool]:
    """`Engine.train_fusion`."""
    own = opened.space
    with scratch_index(opened, labels, on_progress, own.spec.model) as trial:
        asked = comparison.hold_out(trial.opened.store, hold_out)
        if len(asked) > _QUERIES:
            rows = np.random.default_rng(seed).permutation(len(asked))[:_QUERIES]
            asked = [asked[row] for row in rows]
        with trial.opened.searcher() as searcher:
            found_for = comparison.candidates_of(searcher, asked, on_progress)
            candidates = [one for _, _, one in found_for]
        found = train_weights(candidates, asked, seed)
    is_kept = keep or found.overall.is_gain
    if is_kept:
        with _keeping(opened, own):
            write_weights(opened.folder, found.weights, own.spec.space)
    return found, is_kept


def train_compose(
    opened: OpenIndex,
    labels: Labels,
    *,
    keep: bool,
    seed: int,
    on_progress: OnProgress,
    recipe: compose.Recipe | None,
) -> tuple[compose.TrainedComposer, bool]:
    """`Engine.train_compose`."""
    own = opened.space
    with _keeping(opened, own):  # what cannot be kept is not trained first
        pass
    encoder = opened.encoder_to_add()
    photos = None
    if labels.dataset is not None:
        images = labels.read(opened.notify).images
        folder, cache = labels.folder_of(list(images)), opened.settings.cache_folder() / "views"
        photos = embed_set(encoder, folder, images, cache, seed, on_progress, opened.notify)
    found = compose.train_composer(encoder, photos, seed, on_progress, recipe)
    is_kept = keep or found.is_gain
    if is_kept:
        with _keeping(opened, own):
            write_composer(
                opened.folder, found.network, own.spec.dim, own.spec.space,
                is_for_photos=found.is_for_photos,
            )  # fmt: skip
    return found, is_kept


def train_rerank(
    opened: OpenIndex,
    labels: Labels,
    *,
    kind: Kind,
    keep: bool,
    seed: int,
    on_progress: OnProgress,
    recipe: rerank.Recipe | None,
) -> tuple[rerank.TrainedReranker, bool]:
    """`Engine.train_rerank`."""
    own = opened.space
    with _keeping(opened, own):  # what cannot be kept is not trained first
        pass
    labelled = labels.read(opened.notify)
    folder = labels.folder_of(list(labelled.images))
    captioned = [image for image in labelled.images if image.captions]
    images = merge_copies(folder, captioned, opened.notify)
    splits = splits_of([image.split for image in images], seed)
    parts = {
        split: [image for image, name in zip(images, splits, strict=True) if name == split]
        for split in ("train", "val", "test")
    }
    encoder, patch_encoder = opened.encoder_to_add(), opened.patch_encoder()
    cache = opened.settings.cache_folder() / "views"
    photos = rerank.embed_photos(
        encoder, patch_encoder, [folder / image.file for image in parts["train"]],
        [image.captions for image in parts["train"]], cache, seed, on_progress,
        (recipe or rerank.RECIPES[kind]).views,
    )  # fmt: skip
    network = rerank.fit_network(photos, kind, seed, recipe, on_progress)
    exported = rerank.export_scoring(network, encoder.spec.dim)
    chosen = np.random.default_rng(seed).permutation(len(photos.captions))[: rerank.CAPTIONS]
    captions = photos.captions[np.sort(chosen)].astype(np.float16).astype(np.float32)
    # What is measured is what is kept: half precision.
    scoring = Graph.of_network(exported.graph, exported.weights)
    asked = [text for image in parts["val"] for text in image.captions]
    queries = embed_texts(encoder, asked, cache, "embedding captions", on_progress)
    familiar = rerank.familiar_from(queries, captions)
    reranker = Reranker(scoring, captions, Mix(0.0, 0.0), familiar)
    val, test = (
        candidates_of(opened, folder, LabelledSet(labelled.name, tuple(parts[split])), reranker,
                      on_progress) for split in ("val", "test")
    )  # fmt: skip
    reranker = replace(reranker, mix=rerank.choose_mix(val))
    recalls, gain = rerank.measure(test, reranker.mix)
    found = rerank.TrainedReranker(kind, exported, reranker, len(test), recalls, gain)
    is_kept = keep or found.gain.is_gain
    if is_kept:
        with _keeping(opened, own):
            write_reranker(opened.folder, exported, reranker, own.spec.space)
    return found, is_kept


def candidates_of(
    opened: OpenIndex,
    folder: Path,
    labelled: LabelledSet,
    reranker: Reranker,
    on_progress: OnProgress,
    depth: int = 50,
) -> list[rerank.Candidates]:
    """What a search finds for each caption of a labelled set, and what re-ranking makes of it.

    Args:
        depth: how many of the first images.
    """
    found = []
    with opened.scratch(opened.space.spec.model) as other:
        index_listed(other, folder, labelled, on_progress, patches=True)
        held = other.store.contents()
        with other.searcher(Trained(reranker=lambda: reranker)) as searcher:
            for place, (text, media) in enumerate(
                zip(held.caption_texts, held.caption_media.tolist(), strict=True), 1
            ):
                query = Query((Term(text=text),), k=depth, rerank=depth)
                vector = searcher.embed(query.terms)
                answer = searcher.rank(vector[None], "image", depth)[0]
                seen, parts = searcher.patch_scorer(query).parts(vector, query.terms, answer.items)
                ids, cosines = np.array(answer.ids), np.array(answer.scores)
                found.append(rerank.Candidates(media, ids[seen], cosines[seen], parts))
                on_progress(Progress("queries", place, len(held.caption_texts)))
    return found


@contextmanager
def _keeping(opened: OpenIndex, own: SpaceRow) -> Iterator[None]:
    """The one writer of an index, whose space is still the one that was trained for."""
    with opened.store.writer():
        if opened.space.spec.space != own.spec.space:
            raise UsageError(
                f"{opened.folder}: was made again with another model meanwhile; train again"
            )
        yield
