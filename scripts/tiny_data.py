"""Lays out what the bundled model learns from: `python scripts/tiny_data.py --data DIR --out DIR`.

OUT gets links to the data sets, captions composed from the names of objects (with a fifth, of
ImageNet a half, of each name held out as the split "test"), sentences for everyday photos and for
web photos (a tenth held out), and drawn scenes with captions; the recipe with the architecture that
it names; and what the model starts from (scripts/backbones.py). OUT is the recipe's `--data`.

With --permissive, captions are made of the names of objects in everyday photos alone. The recipe
then learns from those and from drawn scenes, starts from MiniLM as it is, and validates on the
held-out tenth: what people wrote under other terms decides nothing. (Photos are under Flickr's.)
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import backbones
from german_words import add_german, read_lines
from named import NamedImage, hold_out, plural, read_named, with_article

from mmsearch.datasets import scene_art, scenes

RECIPES = Path(__file__).parents[1] / "recipes"
#: The drawn scenes learned from start here; the demo's, the tests' and the benchmarks' lie below.
SCENE_SEED = 1_000_000
SCENES = 6000
PERMISSIVE = ("everyday", "scenes")
INSTEAD = {
    "[validation]": """[validation]
labels = "everyday.jsonl"
images = "coco_objects/images"
split = "test"

""",
    "[card]": """[card]
licence = "labels: CC BY 4.0; photos: Flickr's terms"

""",
}
DROPPED = ("images to predict",)
SPORTS = "sports100"
SENTENCES = (
    "a photo of {}",
    "{}",
    "a picture of {}",
    "there is {} in the picture",
    "{} in a photo",
)
THINGS = ("a photo of {}", "a picture of {}", "{}", "a close view of {}", "there is {} here",
          "this is {}", "an image of {} in the picture", "look at {}")  # fmt: skip
DOING = ("{}", "a photo of {}", "people doing {}", "a person doing {}", "someone is {}",
         "an athlete in a {} competition", "the sport of {}", "a picture of {}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--permissive", action="store_true", help="no captions under other terms")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / "weights"
    backbones.fetch_all(weights)
    recipe = (RECIPES / "tiny.toml").read_text(encoding="utf-8")
    lay_out_architecture(args.out / "recipe/tiny", weights)
    link(args.data / "coco_objects", args.out)
    draw(args.out / "scenes", args.scenes)
    if args.permissive:
        recipe = permissive(recipe)
        captions = everyday(args.data / "coco_objects", made_only=True)
    else:
        captions = everyday(args.data / "coco_objects")
        lay_out_more(args.data, args.out)
    write_captions(args.out / "everyday.jsonl", captions)
    (args.out / "recipe/tiny.toml").write_text(recipe, encoding="utf-8")


def lay_out_architecture(folder: Path, weights: Path) -> None:
    """The architecture with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(RECIPES / "tiny/open_clip_config.json", folder / "open_clip_config.json")
    for name in backbones.TEXT_FILES:
        shutil.copyfile(weights / name, folder / name)


def lay_out_more(data: Path, out: Path) -> None:
    """All that is for research only, and German."""
    for name in ("flickr8k", "objects", "web_captions"):
        link(data / name, out)
    images, held_out = split_objects(data)
    with (out / "objects.jsonl").open("w", encoding="utf-8") as file:
        for image in images:
            split = "test" if image.file in held_out else "train"
            row = {"file_name": image.file, "caption": captions_of(image), "split": split}
            file.write(json.dumps(row) + "\n")
    write_captions(out / "web.jsonl", web(data / "web_captions"))
    with (out / "german.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in german(data / "flickr8k_more"))
    weights = out / "weights"
    add_german(
        data / "flickr8k_more", weights / "minilm.safetensors",
        out / "recipe/tiny/tokenizer.json", weights / "minilm_german.safetensors",
    )  # fmt: skip


def link(folder: Path, out: Path) -> None:
    place = out / folder.name
    if not place.is_symlink():
        place.symlink_to(folder.resolve())


def permissive(recipe: str) -> str:
    """The recipe without the sets and the weights that are for research only."""
    kept = []
    for table in re.split(r"(?m)^(?=\[)", recipe):
        head = table.split("\n", 1)[0]
        is_dropped = head == "[[data]]" and not any(
            f'name = "{one}"' in table for one in PERMISSIVE
        )
        if not is_dropped and head != "[test]":
            kept.append(INSTEAD.get(head, table))
    return "".join(kept).replace("minilm_german", "minilm")


def write_captions(path: Path, captions: dict[str, list[str]]) -> None:
    """Captions by file; a tenth of the files, which their names decide, is the split "test"."""
    with path.open("w", encoding="utf-8") as file:
        for name, texts in captions.items():
            split = "test" if is_held_out(name) else "train"
            file.write(json.dumps({"file_name": name, "caption": texts, "split": split}) + "\n")


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def everyday(folder: Path, *, made_only: bool = False) -> dict[str, list[str]]:
    """Sentences about COCO's photos: true ones, and some that are composed of their labels."""
    captions, phrases = ({}, {}) if made_only else (spoken(folder), spoken(folder, "phrases"))
    found = {}
    for name, objects in coco_labels(folder).items():
        rng = random.Random(name)
        said = [*captions.get(name, []), *phrases.get(name, [])]
        count = 2 if captions.get(name) else 4
        made = [compose(objects, rng) for _ in range(count)] if objects else []
        if texts := [*said, *made]:
            found[name] = texts
    return found


def coco_labels(folder: Path) -> dict[str, list[str]]:
    """The names of what is in each of COCO's photos."""
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["file_name"]: [one for one in row["objects"].split("|") if one]
            for row in csv.DictReader(file)
        }


def spoken(folder: Path, kind: str = "captions") -> dict[str, list[str]]:
    """What people said of each of COCO's photos: captions, or short statements ("phrases")."""
    said = {row["image"]: row.get(kind, []) for row in read_lines(folder / "sentences.jsonl.gz")}
    return {name: said.get(name, []) for name in coco_labels(folder)}


def compose(objects: list[str], rng: random.Random) -> str:
    """A sentence about one to four of a photo's objects.

    People are in every second photo: they are named three times in ten where there is something
    else.
    """
    named = [one for one in objects if one != "person" or rng.random() < 0.3] or objects
    some = rng.sample(named, min(len(named), rng.choice((1, 1, 2, 2, 3, 4))))
    *first, last = [one if one == "skis" else with_article(one) for one in some]
    return rng.choice(SENTENCES).format(f"{', '.join(first)} and {last}" if first else last)


def web(folder: Path) -> dict[str, list[str]]:
    with (folder / "captions.csv").open(encoding="utf-8", newline="") as file:
        return {row["image"]: [row["caption"]] for row in csv.DictReader(file)}


def german(folder: Path) -> Iterator[dict[str, Any]]:
    """The German captions of Flickr8k's photos, in the splits that the English ones have."""
    for row in read_lines(folder / "multilingual.jsonl.gz"):
        texts = [*row["de"], row["parallel"]["de"]]
        yield {"file_name": row["image"], "caption": texts, "split": row["split"]}


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
