"""Shows pictures to this program and to ImageMagick, and lists where the two see something else.

    python benchmarks/pictures.py --data DIR [--show]

The pictures are the odd and hostile files of DIR/ugly/files (docs/datasets.md) and one drawing,
stored in every way that Pillow, pillow_heif and a few lines in tests/media/stored.py can write.
Needs ImageMagick (on Debian: apt-get install imagemagick).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "media"))
from stored import made

from mmsearch.errors import DecodeError
from mmsearch.media.sandbox import Decoders
from mmsearch.types import Preprocess

SIDE = 64
HOW = Preprocess((SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, resize_mode="squash")
#: Up to this mean difference of a channel (of 255) two pictures are the same: filters differ.
SAME = 8.0


def magick() -> str:
    for name in ("magick", "/usr/bin/convert", "convert"):
        path = shutil.which(name)
        if path:
            said = subprocess.run([path, "-version"], capture_output=True, check=False).stdout
            if b"ImageMagick" in said:
                return path
    sys.exit("ImageMagick is not here: apt-get install imagemagick")


def theirs(program: str, path: Path, srgb: Path) -> np.ndarray | str:
    """What ImageMagick shows of the first frame, (SIDE, SIDE, 3), or why not."""
    command = [program, f"{path}[0]", "-auto-orient", "-profile", str(srgb),
               "-background", "white", "-alpha", "background", "-alpha", "remove", "-alpha", "off",
               "-colorspace", "sRGB", "-filter", "Catrom", "-resize", f"{SIDE}x{SIDE}!",
               "-depth", "8", "rgb:-"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        return "takes longer than 120 s"
    if len(done.stdout) != SIDE * SIDE * 3:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return said[0].rpartition(" @ ")[0][-120:] if said else "nothing"
    return np.frombuffer(done.stdout, np.uint8).reshape(SIDE, SIDE, 3)


def ours(decoders: Decoders, path: Path) -> np.ndarray | str:
    with decoders.open(str(path).encode()) as file:
        try:
            return file.pixels(asdict(HOW))
        except DecodeError as error:
            return str(error)


def compared(own: np.ndarray | str, other: np.ndarray | str) -> tuple[str, str]:
    """In a word how two readings of a file compare, and what is to be said of it."""
    if isinstance(own, str) and isinstance(other, str):
        return "neither", f"{own} | {other}"
    if isinstance(own, str):
        return "ImageMagick alone", own
    if isinstance(other, str):
        return "mmsearch alone", other
    gap = np.abs(own.astype(int) - other.astype(int)).mean()
    return ("same" if gap <= SAME else "differ"), f"{gap:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="where the data sets are")
    parser.add_argument("--show", type=Path, help="write a sheet of those that differ")
    args = parser.parse_args()
    program = magick()
    counts: Counter[tuple[str, str]] = Counter()
    differing = []
    with tempfile.TemporaryDirectory() as scratch, Decoders() as decoders:
        srgb = Path(scratch) / "srgb.icc"
        srgb.write_bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        files = []
        for name, content in made().items():
            path = Path(scratch) / name
            path.write_bytes(content)
            files.append(("made", name, path))
        if args.data is not None:
            ugly = args.data / "ugly"
            listed = json.loads((ugly / "index.json").read_text(encoding="utf-8"))
            files += [("ugly", one["path"], ugly / "files" / one["path"]) for one in listed]
        for group, name, path in files:
            own, other = ours(decoders, path), theirs(program, path, srgb)
            outcome, detail = compared(own, other)
            if outcome == "differ":
                differing.append((name, own, other))
            counts[group, outcome] += 1
            if outcome != "same":
                print(f"{outcome:<18} {name}: {detail}", flush=True)
    for (group, outcome), number in sorted(counts.items()):
        print(f"{group}: {outcome} {number}")
    if args.show is not None and differing:
        sheet = Image.new(
            "RGB", (8 * (2 * SIDE + 10), -(-len(differing) // 8) * (SIDE + 24)), "gray"
        )
        draw = ImageDraw.Draw(sheet)
        for place, (name, own, other) in enumerate(differing):
            left, top = place % 8 * (2 * SIDE + 10), place // 8 * (SIDE + 24)
            sheet.paste(Image.fromarray(own), (left, top))
            sheet.paste(Image.fromarray(other), (left + SIDE, top))
            draw.text((left, top + SIDE + 2), name.rpartition("/")[2][-22:], fill="white")
        sheet.save(args.show)


if __name__ == "__main__":
    main()
