"""How patch embeddings are kept: the vector of the view in half precision, patches in bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Vectors

_TOP = 127  # of a signed byte


def pack_patches(vectors: Vectors, patches: NDArray[np.floating]) -> list[bytes]:
    """One picture after the other: `2 dim + p (2 + dim)` bytes for p patches.

    That is the vector as float16, for each patch its largest number as float16, and each patch as
    signed bytes, of which 127 stand for that; all little-endian.

    Args:
        vectors: (n, dim).
        patches: (n, p, dim).
    """
    top = np.abs(patches).max(axis=2).astype("<f2")  # (n, p)
    scale = np.maximum(top.astype(np.float32), 1e-6)[:, :, None]
    codes = np.clip(np.rint(patches / scale * _TOP), -_TOP, _TOP).astype(np.int8)
    return [
        vector.astype("<f2").tobytes() + tops.tobytes() + code.tobytes()
        for vector, tops, code in zip(vectors, top, codes, strict=True)
    ]


def unpack_patches(kept: list[bytes], dim: int) -> tuple[Vectors, NDArray[np.float32]]:
    """The vectors (n, dim) and the patches (n, p, dim) that `pack_patches` packed.

    Raises:
        ValueError: something else, or pictures with different numbers of patches.
    """
    sizes = {len(one) for one in kept}
    if len(sizes) != 1:
        raise ValueError(f"patches of {len(sizes)} sizes")
    count, rest = divmod(sizes.pop() - 2 * dim, 2 + dim)
    if rest or count < 1:
        raise ValueError(f"no patches of {dim} numbers")
    rows = np.frombuffer(b"".join(kept), np.uint8).reshape(len(kept), -1)
    ends = 2 * dim, 2 * (dim + count)
    vectors = np.ascontiguousarray(rows[:, : ends[0]]).view("<f2").astype(np.float32)
    top = np.ascontiguousarray(rows[:, ends[0] : ends[1]]).view("<f2").astype(np.float32)
    codes = rows[:, ends[1] :].view(np.int8).reshape(len(kept), count, dim)
    patches: NDArray[np.float32] = codes.astype(np.float32) * (top / np.float32(_TOP))[:, :, None]
    return vectors, patches
