"""What the bundled model can do: `python benchmarks/tiny.py --data DIR [--model MODEL]`.

Flickr8k's test split, with German captions too; everyday photos and web photos of which a tenth
was held out, with their captions, and the names of what is in them; the names of objects over
pictures that were held out (a fifth of each name
of Caltech-101 and of the 100 sports, one of two of ImageNet's); drawn scenes of unseen seeds;
words that no training caption holds; and how far each precision is from fp32. `--precisions` takes
fp32, bf16 and int8 (which needs `pip install nncf`). With `--pages DIR`: pages of hits and misses.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import tiny_data
from german_words import read_lines
from named import r_precision, with_article

from mmsearch.config import load_settings
from mmsearch.datasets import karpathy, scene_art, scenes
from mmsearch.encoders.encoder_provider import EncoderProvider
from mmsearch.encoders.loading import ModelCache
from mmsearch.encoders.openvino import openvino_core
from mmsearch.evaluation.classification import TEMPLATES, label_sentences, label_vectors
from mmsearch.evaluation.ranking import (
    TIE,
    both_ranks,
    both_recalls,
    rank_of_best,
    recall_at,
    recall_line,
)
from mmsearch.media.fit import fit
from mmsearch.search.known_words import words_of_model
from mmsearch.training.views import open_picture

#: Scenes that nobody learned from: below the training's seeds, above the demo's and the tests'.
UNSEEN_SEED = 700_000
#: A word, and one that means nearly the same. Those that a training caption holds are left out.
SYNONYMS = (
    ("canine", "dog"), ("hound", "dog"), ("pooch", "dog"), ("feline", "cat"), ("infant", "baby"),
    ("newborn", "baby"), ("lad", "boy"), ("lass", "girl"), ("youngster", "child"),
    ("gentleman", "man"), ("fellow", "man"), ("stallion", "horse"), ("mare", "horse"),
    ("seashore", "beach"), ("coastline", "beach"), ("woodland", "forest"), ("woods", "forest"),
    ("brook", "stream"), ("creek", "stream"), ("summit", "mountain"), ("peak", "mountain"),
    ("blizzard", "snow"), ("aircraft", "airplane"), ("jet", "airplane"), ("vessel", "boat"),
    ("yacht", "boat"), ("motorbike", "motorcycle"), ("residence", "house"), ("cottage", "house"),
    ("skyscraper", "building"), ("attire", "clothes"), ("apparel", "clothes"),
    ("footwear", "shoes"), ("beverage", "drink"), ("meal", "food"), ("crimson", "red"),
    ("scarlet", "red"), ("azure", "blue"), ("teal", "green"), ("beige", "brown"),
    ("sprinting", "running"), ("jogging", "running"), ("leaping", "jumping"),
    ("strolling", "walking"), ("grinning", "smiling"), ("soccer", "football"),
    ("physician", "doctor"), ("spectators", "crowd"), ("mob", "crowd"), ("pupils", "students"),
    ("teenager", "boy"), ("damsel", "girl"), ("equine", "horse"), ("avian", "bird"),
    ("automobile", "car"), ("sedan", "car"), ("lorry", "truck"), ("pebble", "rock"),
    ("boulder", "rock"), ("meadow", "field"), ("prairie", "field"), ("alley", "street"),
    ("avenue", "street"), ("sunset", "evening"), ("pond", "lake"), ("lagoon", "lake"),
)  # fmt: skip

#: What a person may ask of everyday photos, and what their labels have to name: all of several
#: (&), or one of them (|).
QUERIES = (
    ("a giraffe", "giraffe"), ("a dog", "dog"), ("a cat on a couch", "cat & couch"),
    ("a toilet", "toilet"), ("pizza", "pizza"), ("a man surfing a wave", "surfboard & person"),
    ("someone riding a horse", "horse & person"), ("a red double decker bus", "bus"),
    ("a train at a station", "train"), ("an airplane in the sky", "airplane"),
    ("a kitchen with an oven", "oven"), ("a laptop on a desk", "laptop"),
    ("a birthday cake", "cake"), ("a tennis player", "tennis racket"), ("people skiing", "skis"),
    ("a skateboarder doing a trick", "skateboard"), ("a clock tower", "clock"),
    ("a bowl of broccoli", "broccoli"), ("elephants", "elephant"), ("zebras", "zebra"),
    ("a boat on the water", "boat"), ("a baseball player", "baseball bat | baseball glove"),
    ("a motorcycle parked on the street", "motorcycle"),
    ("a person holding an umbrella", "umbrella & person"), ("a traffic light", "traffic light"),
)  # fmt: skip


class Measured:
    """A model and what it makes of pictures and texts."""

    def __init__(self, encoder) -> None:
        self.encoder = encoder

    def images(self, pictures, what):
        how = self.encoder.spec.preprocess
        rows = []
        for start in tqdm(range(0, len(pictures), 32), desc=what, disable=None, leave=False):
            pixels = [fit(load(), how) for load in pictures[start : start + 32]]
            rows.append(self.encoder.encode("image", np.stack(pixels)))
        return np.concatenate(rows)

    def texts(self, texts):
        parts = [texts[i : i + 256] for i in range(0, len(texts), 256)]
        return np.concatenate([self.encoder.encode("text", part) for part in parts])


def of_file(path):
    return lambda: open_picture(path, 224)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--precisions", nargs="+", default=["fp32"])
    parser.add_argument("--pages", type=Path, help="where pages of hits and misses go")
    args = parser.parse_args()
    first = None
    for precision in args.precisions:
        measured = Measured(encoder_of(args.model, precision, args.data))
        print(f"== {args.model}, {precision}")
        recall = flickr(measured, args.data)
        if first is None:
            first = recall
            german(measured, args.data)
            languages(args.model, args.data)
            everyday(measured, args.data)
            objects(measured, args.data)
            drawn(measured)
            synonyms(measured, args.data)
        else:
            away = {key: f"{recall[key] - first[key]:+.2f}" for key in ("t2i_R@1", "i2t_R@1")}
            print(f"  away from {args.precisions[0]}, points: {away}")
    if args.pages:
        pages(args.model, args.data, args.pages)


def encoder_of(model, precision, data):
    settings = dataclasses.replace(load_settings(), precision="fp32")
    if precision == "fp32":
        return EncoderProvider(settings, print, None).for_new_index(model, "cpu")
    if precision == "bf16":
        if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            settings = dataclasses.replace(settings, precision="bf16")
            return EncoderProvider(settings, print, None).for_new_index(model, "cpu")
        from mmsearch.encoders.open_clip import TorchEncoder, load_model

        print("  (this CPU has no bf16 in OpenVINO: measured in torch, which is slow)")
        source = EncoderProvider(settings, print, None).source(model)
        return TorchEncoder(load_model(source), "cpu", "bf16")
    return quantised(EncoderProvider(settings, print, None).for_new_index(model, "cpu"), data)


def quantised(encoder, data):
    """The image tower in int8, calibrated on photos of the train split and on drawn scenes.

    The first eight layers and the last three stay in fp32: few operations, and the most to lose.
    """
    import nncf
    import openvino as ov
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        OverflowFix,
    )

    from mmsearch.encoders.openvino import OpenVinoEncoder

    folder = data / "flickr8k/images"
    train = [image for image in flickr_images(data) if image.split == "train"][::20]
    pictures = [of_file(folder / image.file) for image in train]
    pictures += [lambda s=s: scene_art.render(scenes.scene(s)) for s in range(800_000, 800_060)]
    how = encoder.spec.preprocess
    pixels = [fit(load(), how)[None] for load in pictures]
    graph = openvino_core().read_model(folder_of(encoder) / "image.xml")
    kinds = ("Convolution", "GroupConvolution", "MatMul")
    layers = [op.get_friendly_name() for op in graph.get_ordered_ops()
              if op.get_type_name() in kinds]  # fmt: skip
    small = nncf.quantize(
        graph, nncf.Dataset(pixels), preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(pixels), fast_bias_correction=False,
        ignored_scope=nncf.IgnoredScope(names=layers[:8] + layers[-3:]),
        # CPUs without VNNI add in 16 bits, which overflows on full-range weights.
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
    )  # fmt: skip
    draft = Path(tempfile.mkdtemp(prefix="mmsearch-int8-"))
    for name in ("manifest.json", "text.xml", "text.bin", "tokenizer.json"):
        (draft / name).write_bytes((folder_of(encoder) / name).read_bytes())
    ov.save_model(small, draft / "image.xml", compress_to_fp16=False)
    return OpenVinoEncoder(draft, "fp32")


def folder_of(encoder):
    return ModelCache(load_settings().cache_folder()).folder_of(encoder.spec.space)


# -- what is measured --------------------------------------------------------------------------


def flickr_images(data):
    document = json.loads((data / "flickr8k/dataset_flickr8k.json").read_text())
    return karpathy.read(document, data).images


def flickr(measured, data):
    chosen = [image for image in flickr_images(data) if image.split == "test"]
    folder = data / "flickr8k/images"
    images = measured.images([of_file(folder / image.file) for image in chosen], "flickr8k")
    texts = measured.texts([text for image in chosen for text in image.captions])
    owner = np.repeat(np.arange(len(chosen)), [len(image.captions) for image in chosen])
    found = both_recalls(both_ranks(images, texts, owner))
    print(f"  Flickr8k test, R@1/5/10: {recall_line(found)}")
    return found


def recalls_of(measured, folder, captions, what):
    """Recalls both ways over files with their captions."""
    images = measured.images([of_file(folder / name) for name in captions], what)
    texts = [text for own in captions.values() for text in own]
    owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions.values()])
    ranks = both_ranks(images, measured.texts(texts), owner)
    line = recall_line(both_recalls(ranks))
    print(f"  {what}: {len(captions)} photos, {len(texts)} captions, R@1/5/10: {line}")


def german(measured, data):
    """The 929 test photos of Flickr8k that have German captions, asked in both languages."""
    if not (data / "flickr8k_more").is_dir():
        return
    said = {row["image"]: row["de"] for row in translated(data) if row["split"] == "test"}
    own = {image.file: image.captions for image in flickr_images(data) if image.file in said}
    for what, captions in (("English", own), ("German", {file: said[file] for file in own})):
        recalls_of(measured, data / "flickr8k/images", captions, f"Flickr8k test, {what}")


def translated(data):
    return read_lines(data / "flickr8k_more/multilingual.jsonl.gz")


def languages(model, data):
    """In how many sentences a search says that it does not read their language."""
    known = words_of_model(EncoderProvider(load_settings(), print, None).source(model))
    if known is None or not (data / "flickr8k_more").is_dir():
        return
    sentences = [row["parallel"] for row in translated(data) if row["split"] == "test"]
    told = {code: np.mean([not known.reads(own[code]) for own in sentences])
            for code in ("en", "de", "fr", "cs")}  # fmt: skip
    shown = ", ".join(f"{code} {100 * share:.1f}%" for code, share in told.items())
    print(f"  said not to be read, of {len(sentences)} sentences in each language: {shown}")


def everyday(measured, data):
    """The tenth of everyday and of web photos that was not learned from."""
    for folder, read, what in (
        (data / "coco_objects", tiny_data.spoken, "everyday photos"),
        (data / "web_captions", tiny_data.web, "web photos"),
    ):
        if not folder.is_dir():
            continue
        captions = {file: texts for file, texts in read(folder).items()
                    if texts and tiny_data.is_held_out(file)}  # fmt: skip
        recalls_of(measured, folder / "images", captions, what)
    if (data / "coco_objects").is_dir():
        names_in_photos(measured, data / "coco_objects")
        right = np.array([row for _, _, row in everyday_hits(measured, data / "coco_objects")])
        print(
            f"  {len(right)} everyday queries: {right[:, 0].sum()} right at the first place, "
            f"{100 * right.mean():.0f}% of the first {right.shape[1]}"
        )


@functools.cache
def held_out_photos(measured, folder):
    """The labels of the held-out everyday photos, and what the model makes of the photos."""
    labels = {file: objects for file, objects in tiny_data.coco_labels(folder).items()
              if tiny_data.is_held_out(file)}  # fmt: skip
    files = [of_file(folder / "images" / file) for file in labels]
    return labels, measured.images(files, "everyday photos")


def names_in_photos(measured, folder):
    """Mean average precision of 80 names over the held-out everyday photos, by their labels."""
    labels, images = held_out_photos(measured, folder)
    names = sorted({name for objects in labels.values() for name in objects})
    vectors = label_vectors(label_sentences(names, TEMPLATES), measured.texts)
    true = np.array([[name in objects for objects in labels.values()] for name in names])
    order = np.argsort(-(vectors @ images.T - TIE * true), axis=1, kind="stable")
    hits = np.take_along_axis(true, order, axis=1)
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    average = (precision * hits).sum(axis=1) / hits.sum(axis=1)
    print(
        f"  {len(names)} names over {len(labels)} everyday photos: mAP {100 * average.mean():.1f}, "
        f"by chance {100 * true.mean():.1f}"
    )


def everyday_hits(measured, folder):
    """For each of the queries: its words, the first five photos, and whether each is right."""
    labels, images = held_out_photos(measured, folder)
    files = [folder / "images" / file for file in labels]
    found = []
    for text, names in QUERIES:
        needed, either = names.split(" & "), names.split(" | ")
        wanted = [set(needed) <= set(own) if len(either) == 1 else not set(either).isdisjoint(own)
                  for own in labels.values()]  # fmt: skip
        first = np.argsort(-(images @ measured.texts([text])[0]), kind="stable")[:5]
        found.append((text, [files[row] for row in first], [wanted[row] for row in first]))
    return found


def objects(measured, data):
    images, held_out = tiny_data.split_objects(data)
    for what, sources in (
        ("Caltech-101 and 100 sports", ("caltech101", tiny_data.SPORTS)),
        ("Caltech-101", ("caltech101",)), ("100 sports", (tiny_data.SPORTS,)),
        ("ImageNet", ("imagenet",)),
    ):  # fmt: skip
        gallery = [i for i in images if i.file in held_out and i.source in sources]
        names = sorted({image.name for image in gallery})
        vectors = measured.images([of_file(data / "objects" / i.file) for i in gallery], what)
        true = np.array([[i.name == name for i in gallery] for name in names])
        scores = measured.texts(names) @ vectors.T
        precise = 100 * r_precision(scores, true).mean()
        ranks = rank_of_best(scores, true)
        print(
            f"  {what}: {len(names)} names over {len(gallery)} held-out pictures: "
            f"R-precision {precise:.1f}, hit@1 {recall_at(ranks, 1):.1f}, "
            f"hit@10 {recall_at(ranks, 10):.1f}"
        )


def drawn(measured):
    gallery = scenes.gallery(150, seed=UNSEEN_SEED)
    captions = [scenes.captions(scene)[0] for scene in gallery]
    pictures = [lambda s=s: scene_art.render(s) for s in gallery]
    images, texts = measured.images(pictures, "scenes"), measured.texts(captions)
    ranks = rank_of_best(texts @ images.T, np.eye(len(gallery), dtype=bool))
    kinds = np.array([scene.kind for scene in gallery])
    shown = ", ".join(f"{k} {recall_at(ranks[kinds == k], 1):.0f}" for k in scenes.KINDS)
    print(f"  150 drawn scenes of unseen seeds: R@1 {recall_at(ranks, 1):.1f} ({shown})")
    learned = {
        dataclasses.replace(scenes.scene(tiny_data.SCENE_SEED + number), seed=0)
        for number in range(tiny_data.SCENES)
    }
    twin = np.array([dataclasses.replace(scene, seed=0) in learned for scene in gallery])
    print(
        f"    {twin.sum()} of them differ from a scene that was learned from by the seed alone: "
        f"R@1 {recall_at(ranks[twin], 1):.1f}, the others {recall_at(ranks[~twin], 1):.1f}"
    )
    rng = random.Random(0)
    seeds = iter(range(UNSEEN_SEED + 10_000, UNSEEN_SEED + 60_000))
    for what, kinds_of, change in (
        ("colour", ("shape", "count", "vehicle"), other_colour), ("count", ("count",), other_count),
        ("relation", ("relation",), other_relation),
    ):  # fmt: skip
        pairs = []
        while len(pairs) < 200:
            scene = scenes.scene(next(seeds))
            other = change(scene, rng) if scene.kind in kinds_of else None
            if other is not None:
                pairs.append((scene, other))
        images = measured.images([lambda s=s: scene_art.render(s) for s, _ in pairs], what)
        right = measured.texts([scenes.captions(s)[0] for s, _ in pairs])
        wrong = measured.texts([scenes.captions(s)[0] for _, s in pairs])
        told = ((images * right).sum(1) > (images * wrong).sum(1)).mean()
        print(f"    told apart from the same scene with another {what}: {100 * told:.1f}% of 200")


def other_colour(scene, rng):
    thing = scene.things[0]
    taken = {thing.colour, scene.setting}
    colour = rng.choice([c for c in sorted(scenes.COLOURS) if c not in taken | {"white"}])
    return dataclasses.replace(
        scene, things=(dataclasses.replace(thing, colour=colour), *scene.things[1:])
    )


def other_count(scene, rng):
    thing = scene.things[0]
    count = rng.choice([n for n in range(2, 7) if n != thing.count])
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, count=count),))


def other_relation(scene, _rng):
    turned = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    if scene.detail not in turned:
        return None
    return dataclasses.replace(scene, detail=turned[scene.detail])


def learned_texts(data):
    """All captions that the bundled model learns from, as often as they come."""
    texts = [t for i in flickr_images(data) if i.split in ("train", "restval") for t in i.captions]
    images, held_out = tiny_data.split_objects(data)
    texts += [t for i in images if i.file not in held_out for t in tiny_data.captions_of(i)]
    for read, name in ((tiny_data.everyday, "coco_objects"), (tiny_data.web, "web_captions")):
        if (data / name).is_dir():
            texts += [t for file, own in read(data / name).items() for t in own
                      if not tiny_data.is_held_out(file)]  # fmt: skip
    if (data / "flickr8k_more").is_dir():
        texts += [t for row in tiny_data.german(data / "flickr8k_more")
                  if row["split"] in ("train", "restval") for t in row["caption"]]  # fmt: skip
    return texts + [t for s in range(tiny_data.SCENES)
                    for t in scenes.captions(scenes.scene(tiny_data.SCENE_SEED + s))]  # fmt: skip


def synonyms(measured, data):
    """Whether a word that was never seen lands near one that means nearly the same."""
    texts = learned_texts(data)
    seen = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    pairs = [(new, old) for new, old in SYNONYMS if new not in seen and seen[old] > 20]
    common = [word for word, _ in seen.most_common(1000) if len(word) > 2]
    words = list(dict.fromkeys([*common, *(old for _, old in pairs)]))
    known = measured.texts([f"a photo of {with_article(word)}" for word in words])
    asked = measured.texts([f"a photo of {with_article(new)}" for new, _ in pairs])
    true = np.array([[word == old for word in words] for _, old in pairs])
    scores = asked @ known.T
    ranks = rank_of_best(scores, true)
    print(
        f"  {len(pairs)} words that no training caption holds, among {len(words)} common ones: the "
        f"synonym is first for {recall_at(ranks, 1):.0f}%, in the first ten for "
        f"{recall_at(ranks, 10):.0f}%, median rank {np.median(ranks):g} (by chance "
        f"{len(words) / 2:.0f})"
    )
    for row in np.argsort(ranks)[[0, 1, len(pairs) // 2, -1]]:
        near = ", ".join(words[i] for i in np.argsort(-scores[row])[:4])
        print(f"    {pairs[row][0]}: {near} (asked for: {pairs[row][1]}, rank {ranks[row]})")


def pages(model, data, folder):
    """The pages of `bench`, queries with what they found, the best and the worst: of Flickr8k's
    test split, and of a gallery of drawn scenes. And everyday queries."""
    from mmsearch.engine import Engine
    from mmsearch.evaluation.retrieval import to_html
    from mmsearch.search.page import Section, Tile, render_page

    gallery = folder / "gallery"
    gallery.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes.gallery(150, seed=UNSEEN_SEED)):
        scene_art.render(scene).save(gallery / f"{number:03d}.png")
        (gallery / f"{number:03d}.txt").write_text(scenes.captions(scene)[0])
    for name, where in (("scenes", gallery), ("flickr8k", data / "flickr8k")):
        with Engine.open(model=model, precision="fp32") as engine:
            report = engine.bench(where)
        paths = dict(enumerate(map(Path, report.corpus.image_names)))
        page = to_html(report, paths, examples=4)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    if not (data / "coco_objects").is_dir():
        return
    sections = []
    for text, files, right in everyday_hits(
        Measured(encoder_of(model, "fp32", data)), data / "coco_objects"
    ):
        tiles = [Tile(file, mark=one) for file, one in zip(files, right, strict=True)]
        sections.append(Section(text, tiles))
    page = render_page(f"Everyday queries, {model}", sections)
    (folder / "everyday.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
