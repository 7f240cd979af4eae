"""A file of many pictures: a line for each, which names its colour."""

import numpy as np

from mmsearch.media.media_types import Caption, Facts, Segment

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


class Clip:
    kind = "clip"
    suffixes = (".clip",)

    def read(self, file, inputs):
        yield Facts(8, 8)
        for place, line in enumerate(file.read().decode().split()):
            if line == "lies":
                yield Caption("of nothing", segment=99)
            elif line == "sings":
                yield Segment("sound", np.zeros(3, np.float32))
            else:
                yield Segment("image", np.full((8, 8, 3), COLOURS[line], np.uint8))
                yield Caption(f"picture {place} is {line}\0", segment=place)


CLIP = Clip()
