"""Holds a converted model's faster precisions against fp32, on pictures like those to come."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmsearch.encoders.openvino import OpenVinoEncoder, capabilities
from mmsearch.encoders.precision import INT8_IMAGE, Verdict, write_verdicts
from mmsearch.types import Notify, Pixels, Vectors

_NEAREST = 10
_CALIBRATING = 64  # of the pictures; the others are what is compared
_BATCH = 16


def check_precisions(folder: Path, pixels: Pixels, notify: Notify) -> dict[str, Verdict]:
    """Compares, and keeps what was seen beside the model.

    The image tower in int8 (post-training quantisation by NNCF) is made first, calibrated on a
    quarter of the pictures; where that cannot be done, a user is told and it is left out.

    Args:
        folder: the converted model's.
        pixels: (n, height, width, 3), at least 80.
    """
    calibrating = np.zeros(len(pixels), bool)
    calibrating[np.linspace(0, len(pixels) - 1, min(_CALIBRATING, len(pixels) // 4), dtype=int)] = 1
    names = ["fp32"]
    if "BF16" in capabilities():
        names.append("bf16")
    reason = _quantise(folder, pixels[calibrating])
    if reason:
        notify(f"no int8 for this model: {reason}")
    else:
        names.append("int8")
    held = pixels[~calibrating]
    verdicts: dict[str, Verdict] = {}
    reference = None
    for name in names:
        encoder = OpenVinoEncoder(folder, name)
        vectors, rate = _timed(encoder, held)
        reference = vectors if reference is None else reference
        cosine = float((reference * vectors).sum(axis=1).mean())
        verdicts[name] = Verdict(round(overlap(reference, vectors), 4), round(cosine, 6),
                                 round(rate, 2))  # fmt: skip
    write_verdicts(folder, verdicts)
    return verdicts


def overlap(reference: Vectors, vectors: Vectors) -> float:
    """The mean share of each row's ten nearest others that stay the same."""
    first, second = _nearest(reference), _nearest(vectors)
    kept = [len(set(a) & set(b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    return float(np.mean(kept) / first.shape[1])


def _nearest(vectors: Vectors) -> np.ndarray:
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argsort(-cosines, axis=1, kind="stable")[:, : min(_NEAREST, len(vectors) - 1)]


def _timed(encoder: OpenVinoEncoder, pixels: Pixels) -> tuple[Vectors, float]:
    encoder.encode("image", pixels[:_BATCH])  # compiles
    started = time.perf_counter()
    parts = [
        encoder.encode("image", pixels[start : start + _BATCH])
        for start in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(parts), len(pixels) / (time.perf_counter() - started)


def _quantise(folder: Path, pixels: Pixels) -> str:
    """Makes the image tower in int8, in a process of its own; returns why that failed, or "".

    NNCF imports torch, prints, and takes more memory than a whole run of indexing.
    """
    with tempfile.TemporaryDirectory(prefix="mmsearch-int8-") as scratch:
        sample = Path(scratch) / "pixels.npy"
        np.save(sample, pixels)
        command = [sys.executable, "-m", "mmsearch.encoders.quantising", str(folder), str(sample)]
        # NNCF draws its progress, in characters that not every terminal has.
        encoding = {"PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, check=False, env={**os.environ, **encoding}
        )
    if not done.returncode and (folder / INT8_IMAGE).is_file():
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [
        f"exit code {done.returncode}"
    ]
    return lines[-1][:200]
