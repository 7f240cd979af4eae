"""What moving unseen words with their like gives: `python benchmarks/words.py --data DIR`.

Takes a model that `recipes/tiny.toml` trained, where its words' start is known, and moves the
tokens that no caption held (`mmsearch.training.network.carry_meanings`). First well-known words are
taken for unknown ones: how near do they come to where learning had put them? Then the probe of
benchmarks/tiny.py, before and after, for words that really are unknown.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from named import with_article

from mmsearch.config import load_settings
from mmsearch.encoders.encoder_provider import EncoderProvider
from mmsearch.encoders.open_clip import load_model
from mmsearch.evaluation.ranking import rank_of_best, recall_at
from mmsearch.training.network import carry_meanings, give_meanings

WELL_KNOWN = 60
TAKEN_OUT = 300


class Texts:
    """The text tower, as benchmarks/tiny.py asks for it."""

    def __init__(self, network) -> None:
        self.network = network.eval()

    @torch.inference_mode()
    def texts(self, texts):
        parts = tokens_of(texts).split(256)
        return torch.cat([self.network.encode_text(p, normalize=True) for p in parts]).numpy()


def tokens_of(texts):
    return open_clip.tokenize(texts, context_length=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    network = load_model(EncoderProvider(load_settings(), print, None).source(args.model)).network
    words = args.data / "weights/potion-base-4m-int8"
    seen = tokens_of(tiny.learned_texts(args.data)).flatten()
    leave_out(copy.deepcopy(network), words, seen)
    for what in ("as it is", "unseen words moved"):
        print(f"== {args.model}, {what}")
        tiny.synonyms(Texts(network), args.data)
        carry_meanings(network, words, seen)


def leave_out(network, words, seen):
    """Puts well-known words back to their start, and moves them as if no caption held them."""
    start = copy.deepcopy(network)
    give_meanings(start, words)
    counts = torch.bincount(seen, minlength=len(start.token_embedding.weight)).numpy()
    names = {t: name[:-4] for t, name in open_clip.SimpleTokenizer().decoder.items()
             if counts[t] >= WELL_KNOWN and name.endswith("</w>") and name[:-4].isalpha()
             and len(name) > 6}  # fmt: skip
    chosen = np.random.default_rng(0).permutation(list(names))[:TAKEN_OUT]
    asked, known = [names[t] for t in chosen], list(names.values())
    true = np.array([[other == word for other in known] for word in asked])

    def told(what):
        found = Texts(network).texts([f"a photo of {with_article(word)}" for word in asked])
        scores = found @ gallery.T
        ranks = rank_of_best(scores, true)
        print(
            f"  {what}: cosine to where it was learned {scores[true].mean():.3f}, it is the "
            f"nearest of {len(known)} for {recall_at(ranks, 1):.0f}%, in the first ten for "
            f"{recall_at(ranks, 10):.0f}%"
        )

    gallery = Texts(network).texts([f"a photo of {with_article(word)}" for word in known])
    print(f"{len(asked)} well-known words, taken for unknown")
    with torch.no_grad():
        network.token_embedding.weight[chosen] = start.token_embedding.weight[chosen]
    told("where it started")
    carry_meanings(network, words, seen[~torch.isin(seen, torch.from_numpy(chosen))])
    told("moved with its like")


if __name__ == "__main__":
    main()
