"""Coverage-guided fuzzing of readers: `python benchmarks/fuzz.py TARGET --seconds N`.

Atheris (`pip install 'mmsearch[fuzz]'`, Linux) makes inputs that reach new lines of the readers and
of the libraries in Python behind them. Whatever they are, only the errors that a reader documents
may come of it. A finding ends the run, with the input in `crash-*`; without one the last line says
how many inputs were tried.

    image      mmsearch.media.image.decode, in this process
    labels     every format of labelled sets, and sidecars
    exchange   an export's npy and parquet files
    trained    fusion.json, compose.safetensors, rerank.safetensors, weights' headers
    store      a small index with bytes of its catalog and vector files changed: verify, search,
               repair, and verify again
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".token.txt")

with atheris.instrument_imports(include=["mmsearch", "PIL", "pillow_heif"]):
    from mmsearch.datasets.formats import read_labelled
    from mmsearch.datasets.sidecar import read_sidecar
    from mmsearch.errors import DecodeError, MmsearchError
    from mmsearch.ingest.exchange import model_of, read_embeddings
    from mmsearch.media.image import decode
    from mmsearch.search.candidates import find_candidates
    from mmsearch.search.compose import read_composer
    from mmsearch.search.fusion import read_weights
    from mmsearch.search.rerank import read_reranker
    from mmsearch.store.repair import repair
    from mmsearch.store.store import Store
    from mmsearch.store.verify import verify
    from mmsearch.types import Filter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "media"))

SCRATCH = Path(tempfile.mkdtemp(prefix="mmsearch-fuzz-"))


def image(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        decode(data, at_least=(32, 32))


def labels(data: bytes) -> None:
    path = SCRATCH / f"captions{SUFFIXES[data[0] % len(SUFFIXES)] if data else '.json'}"
    path.write_bytes(data[1:])
    with contextlib.suppress(MmsearchError):
        read_labelled(path)
    with contextlib.suppress(UnicodeDecodeError):
        for caption in read_sidecar(os.fsencode(path)):
            caption.encode("utf-8")
    path.unlink()


def exchange(data: bytes) -> None:
    from fakes import FakeEncoder

    which = data[0] % 3 if data else 0
    top = SCRATCH / "export"
    if not top.exists():
        seeds_of("exchange", SCRATCH / "seeds")
    path = EXPORT_FILES[which](top)
    whole = path.read_bytes()
    path.write_bytes(data[1:])
    try:
        model_of(top)
        read_embeddings(top, FakeEncoder().spec)
    except MmsearchError:
        pass
    finally:
        path.write_bytes(whole)


EXPORT_FILES = (
    lambda top: top / "img_emb/img_emb_0.npy",
    lambda top: top / "text_emb/text_emb_0.npy",
    lambda top: top / "metadata/metadata_0.parquet",
)


def trained(data: bytes) -> None:
    readers = (
        ("fusion.json", lambda: read_weights(SCRATCH, "f" * 32)),
        ("compose.safetensors", lambda: read_composer(SCRATCH, "f" * 32, 16)),
        ("rerank.safetensors", lambda: read_reranker(SCRATCH, "f" * 32)),
    )
    name, read = readers[data[0] % 3 if data else 0]
    (SCRATCH / name).write_bytes(data[1:])
    with contextlib.suppress(MmsearchError):
        read()
    (SCRATCH / name).unlink()


def store(data: bytes) -> None:
    whole, copy = SCRATCH / "whole", SCRATCH / "copy"
    if not whole.exists():
        make_index(whole)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    source = atheris.FuzzedDataProvider(data)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    touched = set()
    for _ in range(source.ConsumeIntInRange(1, 8)):
        path = files[source.ConsumeIntInRange(0, len(files) - 1)]
        content = bytearray(path.read_bytes())
        place = source.ConsumeIntInRange(0, len(content) - 1)
        new = source.ConsumeBytes(source.ConsumeIntInRange(1, 64))
        content[place : place + len(new)] = new
        path.write_bytes(content)
        touched.add(path.parent.name)
    try:
        found = search_all(copy)
        # Vector files are compared with their checksums, so that no answer is another one.
        assert touched != {"vectors"} or found == search_all(whole)
    except MmsearchError:
        pass
    try:
        verify(copy, deep=True)
        repair(copy)
    except MmsearchError:
        return
    left = verify(copy, deep=True).damages
    assert all(damage.kind == "missing" for damage in left), left


def search_all(folder: Path) -> object:
    import numpy as np

    opened = Store(folder)
    try:
        with opened.reader() as reader:
            if reader.is_empty:
                return None
            query = np.ones((1, reader.space.spec.dim), np.float32)
            scores, ids = reader.nearest("image", query, 50)[0]
            reader.items("image", ids.tolist())
            find_candidates(reader, query[0], "red thing", 5, Filter())
        opened.status()
        return ids.tolist(), scores.tolist()
    finally:
        opened.close()


def make_index(folder: Path) -> None:
    import numpy as np
    from fakes import FakeEncoder, new_media, root_at, unit_vectors

    made, spec, rng = Store.create(folder), FakeEncoder().spec, np.random.default_rng(0)
    for start in (0, 20):
        with made.writer() as writer:
            space, root = writer.space_of(spec, "fp32"), root_at(writer, b"/p")
            with writer.change() as change:
                for number in range(start, start + 20):
                    vectors, name = unit_vectors(rng, 2), b"%d.png" % number
                    captions = [(f"a red thing {number}", vectors[1])]
                    new = new_media(root, name, vectors[0], captions=captions)
                    change.add_media(new, space)
            if not start:
                writer.compact()
    made.close()


def seeds_of(target: str, folder: Path) -> None:
    """Sound inputs to begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[bytes] = []
    if target == "image":
        import hostile

        found = [*hostile.wholes().values(), *hostile.bombs(quick=True).values()]
        found = [content for content in found if len(content) < 200_000]
    elif target == "labels":
        found = [
            (b'\0{"images": [{"filename": "a.jpg", "split": "test", '
            b'"sentences": [{"raw": "a dog"}]}]}'),
            (b'\0{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": '
            b'[{"image_id": 1, "caption": "a dog"}]}'),
            (b'\1{"file_name": "a.jpg", "text": "a dog"}\n'
            b'{"file_name": "b.jpg", "text": ["x", "y"]}'),
            b"\2image,caption\na.jpg,a dog\n", b'\2file_name,text\na.jpg,"a, dog"\n',
            b"\3a.jpg#0\ta dog\na.jpg#1\ta cat\n", b"\4a.jpg#0\ta dog\n", b"\xef\xbb\xbf",
        ]  # fmt: skip
    elif target == "exchange":
        from mmsearch.ingest.exchange import export_embeddings

        make_index(SCRATCH / "whole")
        opened = Store(SCRATCH / "whole")
        export_embeddings(opened, SCRATCH / "export")
        opened.close()
        found = [
            bytes([which]) + path(SCRATCH / "export").read_bytes()
            for which, path in enumerate(EXPORT_FILES)
        ]
    elif target == "trained":
        from mmsearch.search.trained import Network, write_trained

        write_trained(folder / "seed", Network(b"<net/>", bytes(64)), "f" * 32, {"dim": "16"}, {})
        weights = (folder / "seed").read_bytes()
        (folder / "seed").unlink()
        found = [b'\0{"version": 1, "space": "' + b"f" * 32
                 + b'", "weights": {"image": 1, "caption": 0, "words": 0}}',
                 b"\1" + weights, b"\2" + weights]  # fmt: skip
    for number, content in enumerate(found):
        (folder / f"{number}").write_bytes(content)


TARGETS = {
    "image": image,
    "labels": labels,
    "exchange": exchange,
    "trained": trained,
    "store": store,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="where inputs of earlier runs are kept")
    args = parser.parse_args()
    corpus = args.corpus or SCRATCH / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    seeds_of(args.target, SCRATCH / "seeds")
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={args.seconds}", "-max_len=100000", "-timeout=120",
         "-rss_limit_mb=6000", "-print_final_stats=1", "-verbosity=0", str(corpus),
         str(SCRATCH / "seeds")],
        TARGETS[args.target],
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main()
