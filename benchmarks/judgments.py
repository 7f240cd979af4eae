"""Flickr8k's judgments by people: `python benchmarks/judgments.py --data DIR [--model MODEL]`.

The grades of experts (the mean of three, 1 to 4) and of a crowd (the share that says yes) become
qrels, which `mmsearch bench --qrels` reads: of the experts' 1 from 2.5 and 2 from 3.5 (3 is
"describes it with minor mistakes", 4 "without mistakes"); of the crowd's 1 where more than half say
yes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import tempfile
from pathlib import Path

from mmsearch import Engine
from mmsearch.evaluation.retrieval import to_text


def write_qrels(judgments: Path, source: str, out: Path) -> int:
    """The judgments of "expert" or "crowd" as qrels; returns how many are above 0."""
    approved = 0
    with gzip.open(judgments, "rt", newline="") as file, out.open("w") as qrels:
        for row in csv.DictReader(file):
            if row["source"] != source:
                continue
            score = float(row["score"])
            grade = (score >= 2.5) + (score >= 3.5) if source == "expert" else int(score > 0.5)
            approved += grade > 0
            name = f"{row['caption_image']}#{row['caption_number']}"
            qrels.write(f"{name} 0 {row['image']} {grade}\n")
    return approved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, help="where the qrels are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for source in ("expert", "crowd"):
            qrels = out / f"{source}.qrels"
            approved = write_qrels(args.data / "flickr8k_more/judgments.csv.gz", source, qrels)
            print(f"== {source}: {approved} pairs with a grade above 0")
            with Engine.open(Path(scratch) / "index", model=args.model) as engine:
                report = engine.bench(
                    args.data / "flickr8k/dataset_flickr8k.json", split="test", qrels=qrels
                )
            print(to_text(report))


if __name__ == "__main__":
    main()
