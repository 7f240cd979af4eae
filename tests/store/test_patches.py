"""Second looks as bytes, and in the catalog."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import DIM, FakeEncoder, new_media, root_at, unit_vectors

from mmsearch.errors import DamageError
from mmsearch.store.patches import pack_patches, unpack_patches
from mmsearch.store.store import Store

RNG = np.random.default_rng(4)


def some_looks(count, patches=5):
    return unit_vectors(RNG, count), np.stack([unit_vectors(RNG, patches) for _ in range(count)])


def test_what_is_kept_is_near_to_what_was_seen():
    vectors, patches = some_looks(9)
    kept = pack_patches(vectors, patches)
    assert {len(one) for one in kept} == {2 * DIM + 5 * (2 + DIM)}
    found = unpack_patches(kept, DIM)
    assert [part.dtype for part in found] == [np.float32, np.float32]
    np.testing.assert_allclose(found[0], vectors, atol=1e-3)
    # Half a step of a signed byte, of which 127 are the largest number of a patch.
    steps = np.abs(patches).max(axis=2, keepdims=True) / 127
    assert (np.abs(found[1] - patches) <= steps * 0.51 + 1e-3).all()
    assert pack_patches(*found) == kept


def test_a_patch_of_zeros_stays_one():
    vectors, patches = some_looks(1)
    patches[0, 2] = 0
    assert (unpack_patches(pack_patches(vectors, patches), DIM)[1][0, 2] == 0).all()


@pytest.mark.parametrize("kept", [[], [b"abc"], [bytes(2 * DIM)], [bytes(50), bytes(68)]])
def test_something_else_is_refused(kept):
    with pytest.raises(ValueError, match="patches"):
        unpack_patches(kept, DIM)


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "index")
    with store.writer() as writer:
        space = writer.space_of(FakeEncoder().spec, "fp32")
        root = root_at(writer, b"/r")
        with writer.change() as change:
            for number in range(4):
                name = f"{number}".encode()
                change.add_media(new_media(root, name, unit_vectors(RNG, 1)[0]), space)
    yield store
    store.close()


def embed_patches(store, ids):
    with store.writer() as writer:
        space = writer.space_of(FakeEncoder().spec, "fp32")
        packed = pack_patches(*some_looks(len(ids)))
        with writer.change() as change:
            change.add_patches(dict(zip(ids, packed, strict=True)), space)
    return packed


def patches_of(store, ids):
    with store.reader() as reader:
        return reader.patches(ids), reader.vectors("image", np.array(ids))


def test_looks_go_with_their_picture(store):
    ids = store.contents().image_ids.tolist()
    packed = embed_patches(store, ids[:3])
    kept, own = patches_of(store, ids)
    assert kept == dict(zip(ids, packed, strict=False))
    np.testing.assert_array_equal(own, store.contents().image_vectors)
    with store.catalog.read() as queries:
        (left,) = queries.media_without_patches(queries.active_space(), 0, 9)
    assert (left.id, left.absolute, left.content_hash) == (ids[3], b"/r/3", b"3")
    with store.writer() as writer:
        writer.remove([b"/r/1"])
    left = [ids[0], ids[2], ids[3]]
    kept, own = patches_of(store, left)
    assert list(kept) == left[:2]
    np.testing.assert_array_equal(own, store.contents().image_vectors)
    with pytest.raises(DamageError, match=f"image {ids[1]} has no vector"):
        patches_of(store, ids)
    assert store.status().patches == 2


def test_a_picture_that_went_meanwhile_gets_none(store):
    ids = store.contents().image_ids.tolist()
    embed_patches(store, [ids[0], 99])
    assert store.status().patches == 1
    with store.writer() as writer, writer.change() as change:
        change.remove_patches()
    assert store.status().patches == 0
