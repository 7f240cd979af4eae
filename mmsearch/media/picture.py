"""The media type of pictures: one segment, and what EXIF says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from mmsearch.media.media_types import Facts, Part, Segment
from mmsearch.types import IMAGE, InputSpec, Modality, Preprocess

#: What is sent as it is, without being made to fit a model.
_MOST_PIXELS = 64_000_000


class Picture:
    """Pictures, as `mmsearch.media.image` decodes them."""

    kind = "image"
    suffixes = (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
        ".heic", ".heif", ".hif", ".avif",
    )  # fmt: skip

    def read(self, file: BinaryIO, inputs: Mapping[Modality, InputSpec]) -> Iterator[Part]:
        """The facts and the pixels, (height, width, 3), RGB.

        They are made to fit a model, as `Preprocess` says, or they come in their own shape: at
        least `at_least` pixels on either side, where the picture has so many, and at most `within`.
        """
        from mmsearch.media import image
        from mmsearch.media.fit import fit

        how = inputs.get(IMAGE, {"at_least": 1, "within": 0})
        if "at_least" in how:
            side, within = how["at_least"], how["within"]
            found = image.decode(file.read(), at_least=(side, side))
            shown = found.image
            while shown.width * shown.height > _MOST_PIXELS:
                shown = shown.reduce(2)
            if within:
                shown.thumbnail((within, within))
            pixels = np.asarray(shown)
        else:
            preprocess = Preprocess.from_json(how)
            found = image.decode(file.read(), at_least=preprocess.size)
            pixels = fit(found.image, preprocess)
        yield Facts(found.width, found.height, found.captured)
        if IMAGE in inputs:
            yield Segment(IMAGE, pixels)


PICTURE = Picture()
