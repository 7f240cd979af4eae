"""Which approximate index to take: `python benchmarks/ivf.py --data DIR`.

Vectors like those of a large corpus, 512 numbers each: `tiny`'s embeddings of the photos of DIR,
mixed with those of photos that look alike and perturbed, two mixes of a photo side by side.
Queries are captions, which lie apart from all images, and photos that nothing was mixed from. For
each index: recall@10 against exact search, milliseconds a query at the median (one at a time, all
cores), seconds to build, bytes a vector beside the exact vectors, with the least effort that gives
captions a recall of 0.97. `hnswlib` and `usearch` are measured where they are installed. "mmsearch"
is what an index of mmsearch does, from files as it keeps them: with filters that leave a share of
the vectors, by chance or of one kind, with a tenth of them removed, and for a hundred hits.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from mmsearch import Engine
from mmsearch.store.faiss_index import FaissIndex
from mmsearch.store.ivf_index import IvfIndex

RECALL = 0.97
K = 10
NEIGHBOURS = 50
SIGMA = 0.35  # the length of the noise, where a vector has length 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--features", type=Path, help="keep the embeddings of the photos here")
    parser.add_argument("--indexes", nargs="+", default=["mmsearch", *FAISS, "hnswlib", "usearch"])
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    features = embeddings(args.data, args.features)
    base, texts, photos = corpus(features, args.count, args.queries)
    flat = faiss.IndexFlatIP(base.shape[1])
    flat.add(base)
    truth = {name: flat.search(queries, K)[1] for name, queries in
             (("captions", texts), ("photos", photos))}  # fmt: skip
    each = milliseconds(lambda query: flat.search(query, K), texts[:50])
    print(f"{len(base):,} x {base.shape[1]}, {len(texts)} captions, {len(photos)} photos ask; "
          f"{os.cpu_count()} cores")  # fmt: skip
    print(f"{'exact':24} captions 1.000 photos 1.000 {each:7.2f} ms", flush=True)
    for name in args.indexes:
        try:
            if name == "mmsearch":
                own(base, texts, photos)
            elif name == FILTERED:
                filtered_graph(base, texts, photos)
            else:
                one(name, base, texts, photos, truth)
        except (ImportError, RuntimeError) as error:
            print(f"{name:24} not measured: {str(error).splitlines()[0][:90]}", flush=True)


def embeddings(data: Path, kept: Path | None) -> dict[str, np.ndarray]:
    """Unit vectors of photos, and of captions, by `tiny`."""
    if kept is not None and kept.is_file():
        return dict(np.load(kept))
    with tempfile.TemporaryDirectory() as scratch, Engine.open(scratch, model="tiny") as engine:
        engine.index([data / "flickr8k/images", data / "objects"], captions=data / "flickr8k")
        held = engine.store.contents()
        found = {"photos": held.image_vectors, "captions": held.caption_vectors}
    if kept is not None:
        np.savez(kept, **found)
    return found


def corpus(features, count, queries, seed=0):
    """So many vectors, and the two kinds of queries."""
    rng = np.random.default_rng(seed)
    photos = rng.permutation(features["photos"])
    held_out, own = photos[:queries], photos[queries:]
    near = np.concatenate([
        np.argpartition(-(some @ own.T), NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        for some in np.array_split(own, 16)
    ])  # fmt: skip
    base = np.empty((count, 2 * own.shape[1]), np.float32)
    for start in range(0, count, 20_000):
        some = rng.integers(len(own), size=min(20_000, count - start))
        base[start : start + len(some)] = np.concatenate(
            [mixed(own, near, some, rng) for _ in range(2)], axis=1
        )
    base /= np.sqrt(2)
    captions = rng.permutation(features["captions"])[:queries]
    twice = [np.concatenate([one, one], axis=1) / np.sqrt(2) for one in (captions, held_out)]
    return base, *(np.ascontiguousarray(one, np.float32) for one in twice)


def mixed(own, near, rows, rng):
    other = near[rows, rng.integers(near.shape[1], size=len(rows))]
    share = rng.uniform(0.3, 0.7, size=(len(rows), 1))
    noise = rng.normal(size=(len(rows), own.shape[1])) * (SIGMA / np.sqrt(own.shape[1]))
    found = share * own[rows] + (1 - share) * own[other] + noise
    return found / np.linalg.norm(found, axis=1, keepdims=True)


#: FAISS's candidates: what is built, how many times ten are looked at again, efforts to try.
FILTERED = "HNSW32,SQ8 filtered"
PROBES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
FAISS = {
    "IVF4096,SQ8": (1, PROBES),
    "IVF4096,SQ8 refined": (4, PROBES),
    "IVF4096,RaBitQ refined": (40, PROBES),
    "IVF4096,RaBitQ4 refined": (10, PROBES),
    "IVF4096,PQ128x4fs refined": (40, PROBES),
    "HNSW32,SQ8 refined": (4, (16, 32, 64, 96, 128, 192, 256)),
}


def one(name, base, texts, photos, truth):
    started = time.perf_counter()
    search, efforts, size = (hnswlib_of if name == "hnswlib" else usearch_of
                             if name == "usearch" else faiss_of)(name, base)  # fmt: skip
    built = time.perf_counter() - started
    for effort in efforts:
        recalls = [recall(search(queries, effort), truth[kind])
                   for kind, queries in (("captions", texts), ("photos", photos))]  # fmt: skip
        if recalls[0] >= RECALL or effort == efforts[-1]:
            break
    each = milliseconds(lambda query: search(query, effort), texts[:200])
    print(
        f"{name:24} captions {recalls[0]:.3f} photos {recalls[1]:.3f} {each:7.2f} ms, effort "
        f"{effort}, built in {built:.0f} s, {size / len(base):.0f} bytes",
        flush=True,
    )


def own(base, texts, photos, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.arange(1, len(base) + 1)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "exact", Path(folder) / "ivf"
        exact = FaissIndex.open(
            files[0], FaissIndex.build(base.shape[1], [(ids, base)]).save(files[0])
        )
        started = time.perf_counter()
        checksum = IvfIndex.build(exact, texts[len(texts) // 2 :]).save(files[1])
        built = time.perf_counter() - started
        size = files[1].stat().st_size
        print(
            f"mmsearch: inverted lists built in {built:.0f} s, {size / len(base):.0f} bytes",
            flush=True,
        )
        quick = IvfIndex.open(files[1], exact, checksum)
        cases = {"all": {}, "a hundred hits": {"k": 10 * K}}
        for share in (2, 10, 100, 1000):
            chosen = np.sort(rng.permutation(ids)[: len(ids) // share])
            cases[f"one in {share}"] = {"among": chosen}
        alike = np.argpartition(-(base @ photos[0]), len(ids) // 50)[: len(ids) // 50]
        cases["one in 50, alike"] = {"among": np.sort(ids[alike])}
        chosen = np.sort(rng.permutation(ids)[: len(ids) // 10])
        cases["a tenth removed"] = {"without": chosen}
        for name, limits in cases.items():
            recalls = []
            for queries in (texts[: len(texts) // 2], photos):  # the others have chosen the effort
                pairs = [index.search(queries, **{"k": K, **limits}) for index in (quick, exact)]
                recalls.append(np.mean([
                    len(set(a[1].tolist()) & set(b[1].tolist())) / len(b[1])
                    for a, b in zip(*pairs, strict=True)
                ]))  # fmt: skip
            times = []
            for index, queries in ((quick, texts[:200]), (exact, texts[:20])):
                search = functools.partial(index.search, **{"k": K, **limits})
                times.append(milliseconds(search, queries))
            print(f"{'mmsearch, ' + name:24} captions {recalls[0]:.3f} photos {recalls[1]:.3f} "
                  f"{times[0]:7.2f} ms, exact {times[1]:.2f} ms", flush=True)  # fmt: skip


def filtered_graph(base, texts, photos, seed=0):
    """What a graph finds of what a filter leaves, by effort."""
    search, _, _ = faiss_of("HNSW32,SQ8 refined", base)
    rng = np.random.default_rng(seed)
    flat = faiss.IndexFlatIP(base.shape[1])
    flat.add(base)
    cases = {f"one in {share}": rng.permutation(len(base))[: len(base) // share]
             for share in (2, 10, 100)}  # fmt: skip
    cases["one in 50, alike"] = np.argpartition(-(base @ photos[0]), len(base) // 50)[
        : len(base) // 50
    ]
    for name, rows in cases.items():
        mask = np.zeros(len(base), bool)
        mask[rows] = True
        chosen = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        parameters = faiss.SearchParameters(sel=chosen)
        truth = flat.search(texts, K, params=parameters)[1]
        for effort in (32, 128, 512):
            found = recall(search(texts, effort, chosen), truth)
            print(f"{FILTERED}, {name:18} captions {found:.3f}, effort {effort}", flush=True)


def faiss_of(name, base):
    factor, efforts = FAISS[name]
    index = faiss.index_factory(base.shape[1], name.split()[0], faiss.METRIC_INNER_PRODUCT)
    if "IVF" in name:
        index.cp.niter = 10
    rng = np.random.default_rng(0)
    index.train(base[rng.permutation(len(base))[:200_000]])
    index.add(base)

    def search(queries, effort, chosen=None):
        if "IVF" in name:
            index.nprobe = effort
        else:
            index.hnsw.efSearch = effort
        parameters = None
        if chosen is not None:
            parameters = faiss.SearchParametersHNSW(sel=chosen, efSearch=effort)
        rows = index.search(queries, K * factor, params=parameters)[1]
        return rows[:, :K] if factor == 1 else np.stack(
            [again(base, query, some) for query, some in zip(queries, rows, strict=True)]
        )  # fmt: skip

    with tempfile.NamedTemporaryFile() as file:
        faiss.write_index(index, file.name)
        size = os.path.getsize(file.name)
    return search, efforts, size


def again(base, query, rows):
    """The best ten of some rows by the exact vectors."""
    rows = rows[rows >= 0]
    scores = base[rows] @ query
    return np.resize(rows[np.argsort(-scores)[:K]], K) if len(rows) else np.full(K, -1)


def hnswlib_of(_name, base):
    import hnswlib

    index = hnswlib.Index(space="ip", dim=base.shape[1])
    index.init_index(max_elements=len(base), ef_construction=100, M=16)
    index.add_items(base)

    def search(queries, effort):
        index.set_ef(effort)
        return index.knn_query(queries, k=K)[0].astype(np.int64)

    with tempfile.NamedTemporaryFile() as file:
        index.save_index(file.name)
        size = os.path.getsize(file.name)
    return search, (16, 32, 64, 96, 128, 192, 256, 384), size


def usearch_of(_name, base):
    from usearch.index import Index

    index = Index(ndim=base.shape[1], metric="ip", dtype="i8", connectivity=16, expansion_add=100)
    index.add(np.arange(len(base)), base)

    def search(queries, effort):
        index.expansion_search = effort
        found = index.search(queries, 4 * K)
        rows = np.atleast_2d(np.asarray(found.keys)).astype(np.int64)
        return np.stack([again(base, q, some) for q, some in zip(queries, rows, strict=True)])

    return search, (16, 32, 64, 96, 128, 192, 256, 384), index.memory_usage


def recall(found, truth):
    return float(np.mean([len(set(a) & set(b)) / K for a, b in
                          zip(found.tolist(), truth.tolist(), strict=True)]))  # fmt: skip


def milliseconds(search, queries):
    spent = []
    for query in queries:
        started = time.perf_counter()
        search(query[None])
        spent.append(1e3 * (time.perf_counter() - started))
    return float(np.median(spent))


if __name__ == "__main__":
    sys.exit(main())
