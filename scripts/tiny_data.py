"""Lays out what the bundled model learns from: `python scripts/tiny_data.py --data DIR --out DIR`.

OUT gets links to the data sets, captions composed from the names of objects (with a fifth, of
ImageNet a half, of each name held out as the split "test"), and drawn scenes with captions. The
recipes in `recipes/` take OUT as their `--data`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from named import NamedImage, hold_out, plural, read_named, with_article

from mmsearch.datasets import scene_art, scenes

#: The drawn scenes learned from start here; the demo's, the tests' and the benchmarks' lie below.
SCENE_SEED = 1_000_000
SCENES = 6000
DROPPED = ("images to predict",)
SPORTS = "sports100"
THINGS = ("a photo of {}", "a picture of {}", "{}", "a close view of {}", "there is {} here",
          "this is {}", "an image of {} in the picture", "look at {}")  # fmt: skip
DOING = ("{}", "a photo of {}", "people doing {}", "a person doing {}", "someone is {}",
         "an athlete in a {} competition", "the sport of {}", "a picture of {}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=SCENES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("flickr8k", "objects", "weights"):
        link = args.out / name
        if not link.is_symlink():
            link.symlink_to((args.data / name).resolve())
    images, held_out = split_objects(args.data)
    with (args.out / "objects.jsonl").open("w", encoding="utf-8") as file:
        for image in images:
            split = "test" if image.file in held_out else "train"
            row = {"file_name": image.file, "caption": captions_of(image), "split": split}
            file.write(json.dumps(row) + "\n")
    draw(args.out / "scenes", args.scenes)


def split_objects(data: Path) -> tuple[list[NamedImage], set[str]]:
    """The named pictures, and the files among them that are measured on only.

    A picture that would be held out while a copy of it is learned from is left out altogether.
    """
    text = (data / "objects/labels.csv").read_text(encoding="utf-8")
    images = read_named(text, DROPPED)
    rules = {"imagenet": 2, "caltech101": 5, SPORTS: 5}
    held_out = set().union(*(hold_out(images, every, of) for of, every in rules.items()))
    digests = {image.file: digest(data / "objects" / image.file) for image in images}
    learned = {digests[image.file] for image in images if image.file not in held_out}
    copies = {file for file in held_out if digests[file] in learned}
    return [image for image in images if image.file not in copies], held_out - copies


def digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def captions_of(image: NamedImage) -> list[str]:
    """Ways to say what a named picture shows."""
    if image.source == SPORTS:
        return [template.format(image.name) for template in DOING]
    one = with_article(image.name)
    return [
        *(template.format(one) for template in THINGS),
        image.name, plural(image.name), f"a photo of {plural(image.name)}",
    ]  # fmt: skip


def draw(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    with ProcessPoolExecutor() as pool:
        rows = pool.map(draw_one, [folder] * count, range(count), chunksize=200)
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def draw_one(folder: Path, number: int) -> dict[str, object]:
    scene = scenes.scene(SCENE_SEED + number)
    file = f"{number:05d}.png"
    if not (folder / file).is_file():
        draft = folder / f".{file}"
        scene_art.render(scene).save(draft, "PNG")
        draft.rename(folder / file)
    return {"file_name": file, "caption": scenes.captions(scene)}


if __name__ == "__main__":
    main()
