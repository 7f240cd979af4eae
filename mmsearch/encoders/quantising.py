"""Makes a converted image tower in int8: `python -m mmsearch.encoders.quantising FOLDER PIXELS`.

A process of its own, which `mmsearch.encoders.checking` starts. PIXELS is a file of NumPy's with
pictures to calibrate on, (n, height, width, 3).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np


def quantise(folder: Path, pixels: np.ndarray) -> None:
    """Writes `image-int8.xml` and its weights beside the image tower: whole, or not at all."""
    from mmsearch.encoders.openvino import openvino_core
    from mmsearch.encoders.precision import INT8_IMAGE
    from mmsearch.encoders.telemetry import without_telemetry

    with without_telemetry():
        import nncf
        import openvino as ov

    graph = openvino_core().read_model(folder / "image.xml")
    kinds = {op.get_type_name() for op in graph.get_ordered_ops()}
    is_transformer = "ScaledDotProductAttention" in kinds or "Softmax" in kinds
    small = nncf.quantize(
        graph,
        nncf.Dataset([one[None] for one in pixels]),
        subset_size=len(pixels),
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
    )
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=folder) as scratch:
        draft = Path(scratch) / INT8_IMAGE
        ov.save_model(small, draft, compress_to_fp16=False)
        # The graph last: it is what others look for.
        os.replace(draft.with_suffix(".bin"), (folder / INT8_IMAGE).with_suffix(".bin"))
        os.replace(draft, folder / INT8_IMAGE)


if __name__ == "__main__":
    quantise(Path(sys.argv[1]), np.load(sys.argv[2]))
