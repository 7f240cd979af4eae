"""The facade: which model it takes, and threads that share one engine."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from fakes import FakeEncoder, paint
from huggingface_hub import constants

from mmsearch import Engine, Filter, Query, Term
from mmsearch.config import load_settings
from mmsearch.datasets import scene_art, scenes
from mmsearch.encoders import registry
from mmsearch.encoders.encoder_provider import EncoderProvider, GivenEncoder
from mmsearch.errors import IndexNotFound, Interrupted, ModelNotFound, UsageError


@pytest.fixture
def engine(tmp_path, tiny):
    with Engine.open(tmp_path / "index", model="tiny") as engine:
        yield engine


def test_an_engine_without_an_index_says_so_until_it_makes_one(engine, photos):
    with pytest.raises(IndexNotFound):
        engine.search("red")
    engine.index([photos])
    assert len(engine.search("red")) == 6


def test_threads_share_an_engine_while_it_writes(engine, tmp_path):
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    drawn = scenes.gallery(60, seed=700)
    for number, scene in enumerate(drawn[:30]):
        scene_art.render(scene).save(gallery / f"{number:02d}.png")
    engine.index([gallery])
    texts = [scenes.captions(scene)[0] for scene in drawn[:30]]
    alone = [engine.search(text, k=30)[0].path.name for text in texts]

    def ask(place):
        hits = engine.search(texts[place % 30], k=100)
        return len(hits), next(hit.path.name for hit in hits if hit.path.name < "30")

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, place) for place in range(240)]
        for number, scene in enumerate(drawn[30:], start=30):
            scene_art.render(scene).save(gallery / f"{number}.png")
            if number % 10 == 9:
                engine.index([gallery])
        answers = [one.result() for one in asked]
    assert [first for _, first in answers] == [alone[place % 30] for place in range(240)]
    assert {count for count, _ in answers} <= {30, 40, 50, 60}


def test_an_interrupt_becomes_an_error_that_says_what_is_kept(engine, photos):
    def stop(_progress):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="is kept"):
        engine.index([photos], on_progress=stop)
    assert engine.status().images == 6


@pytest.fixture
def base():
    """Files by the names of those of `base`, where the hub's client keeps them."""
    repository = registry.parse_model("base").location
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    files = [f"snapshots/some-commit/{name}" for name in registry.ONNX_FILES]
    for file in ("refs/main", *files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("some-commit")
    yield
    shutil.rmtree(folder)


@pytest.mark.usefixtures("base")
def test_auto_takes_base_where_its_weights_are(tmp_path, photos, tiny):
    """Stood in for by weights of the same kind: what is loaded is asked for by name."""
    asked = []

    def load(source, *_, **options):
        asked.append(source.name)
        return tiny

    settings = load_settings(index=tmp_path / "i")
    with Engine(settings, provider=EncoderProvider(settings, print, None, load)) as engine:
        engine.index([photos])
    assert asked == [registry.ALIASES["base"]]


@pytest.mark.parametrize("agreed", [True, False])
def test_auto_fetches_base_only_where_that_is_agreed(tmp_path, photos, tiny, agreed):
    asked, said, questions = [], [], []

    def load(source, *_, **options):
        asked.append(source.name)
        if source.name == registry.ALIASES["base"]:
            raise ModelNotFound("the connection broke")
        return tiny

    def confirm(question):
        questions.append(question)
        return agreed

    settings = load_settings(index=tmp_path / "i")
    provider = EncoderProvider(settings, said.append, confirm, load)
    with Engine(settings, provider=provider) as engine:
        engine.index([photos])
    assert asked[: 2 if agreed else 1] == ([registry.ALIASES["base"]] if agreed else []) + ["tiny"]
    assert "605 MB" in questions[0]
    assert ("the connection broke" in said) is agreed
    assert "'tiny'" in said[-1]


def test_weights_that_changed_since_are_refused(tmp_path, photos, monkeypatch, tiny):
    import dataclasses

    with Engine.open(tmp_path / "i", model="tiny") as engine:
        engine.index([photos])

    class Other:
        spec = dataclasses.replace(tiny.spec, space="0" * 32)

    monkeypatch.setenv("MMSEARCH_CACHE", str(tmp_path / "fresh"))  # nothing is converted there
    settings = load_settings(index=tmp_path / "i")
    provider = EncoderProvider(settings, print, None, lambda *_, **options: Other())
    with (
        Engine(settings, provider=provider) as engine,
        pytest.raises(ModelNotFound, match="are not those"),
    ):
        engine.search("red")


@pytest.mark.slow
def test_a_converted_model_that_was_deleted_is_made_again(tmp_path, photos, monkeypatch, tiny):
    monkeypatch.setenv("MMSEARCH_CACHE", str(tmp_path / "cache"))
    with Engine.open(tmp_path / "i", model="tiny", precision="fp32") as engine:
        engine.index([photos])
    monkeypatch.setenv("MMSEARCH_CACHE", str(tmp_path / "fresh"))
    with Engine.open(tmp_path / "i", precision="fp32") as engine:
        assert len(engine.search("red")) == 6


def test_an_empty_index_finds_nothing(tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    with Engine.open(tmp_path / "i", model="tiny") as engine:
        engine.index([tmp_path / "empty"])
        assert engine.search("red") == []
        with pytest.raises(UsageError, match="nothing to measure"):
            engine.bench()


def test_a_search_takes_an_image_a_filter_and_a_query(engine, photos):
    engine.index([photos])
    assert engine.search(image=photos / "red.png", k=1)[0].path == photos / "red.png"
    assert len(engine.search("red", under=photos / "more")) == 2
    query = Query((Term(text="red"), Term(image=str(photos / "red.png"))), filter=Filter(), k=1)
    assert engine.search(query)[0].path == photos / "red.png"
    with pytest.raises(UsageError, match="nothing to search for"):
        engine.search()


def test_paths_may_be_text(engine, tmp_path):
    paint(tmp_path / "p" / "a.png", "red")
    assert engine.index([str(tmp_path / "p")]).added == 1
    assert engine.remove([str(tmp_path / "p" / "a.png")]) == 1


def test_a_warm_query_is_one_transaction_and_parses_no_description(tmp_path, photos):
    (photos / "red.txt").write_text("\n".join(f"a red thing {n}" for n in range(40)))
    engine = Engine(load_settings(index=tmp_path / "index"), provider=GivenEncoder(FakeEncoder()))
    with engine:
        engine.index(photos)
        queries = (
            Query((Term("red"),)), Query((Term("red"),), fusion="image"),
            Query((Term("red"),), to="caption"), Query((Term(image=photos / "red.png"),)),
            Query((Term("red"),), filter=Filter(under=photos / "more")),
        )  # fmt: skip
        for query in queries:
            engine.search(query)
        described, told = engine.store.active_space().spec, []
        with ExitStack() as opened:  # as many connections as a search could want at once
            for _ in range(4):
                reading = opened.enter_context(engine.store.catalog.read())
                reading.connection.set_trace_callback(told.append)
        for query in queries:
            told.clear()
            assert engine.search(query)
            assert told.count("BEGIN") == 1
            with engine.searcher() as searcher:  # parsed again it would be another object
                assert searcher.reader.space.spec is described
