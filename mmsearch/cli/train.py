"""`mmsearch train`: aligned spaces of your own."""

from __future__ import annotations

import dataclasses
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmsearch.cli.common import (
    DeviceOption,
    IndexOption,
    JsonOption,
    LimitOption,
    engine_for,
    one_of,
    print_table,
    progress_bar,
    say,
    shown_path,
)
from mmsearch.errors import UsageError, extra

if TYPE_CHECKING:
    from mmsearch.config import Settings
    from mmsearch.encoders.base import Encoder
    from mmsearch.training.align import AlignReport
    from mmsearch.training.sets import Features


class Head(StrEnum):
    """The kinds of projection heads."""

    linear = "linear"
    residual = "residual"


ImagesOption = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="The folder of the pictures, if it is not that of the captions.",
    ),
]
OutOption = Annotated[
    str,
    typer.Option(
        "--out", metavar="NAME", help="The model's name, for `index --model NAME`; or a folder."
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, metavar="N", help="Random seed.")
]
RestartOption = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Begin again: delete what an earlier run with this --out left, even a model.",
    ),
]


def align(
    dataset: Annotated[
        Path | None,
        typer.Argument(metavar="[DATASET]", help="Captioned pictures: a folder or a labels file."),
    ] = None,
    out: OutOption = "",
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The frozen model. Default: the one in the settings, else tiny.",
        ),
    ] = None,
    images: ImagesOption = None,
    features: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--features",
            metavar="TEXT.npy IMAGE.npy",
            help="Instead of a DATASET: vectors from elsewhere, row i with row i, of any width.",
        ),
    ] = None,
    head: Annotated[
        Head, typer.Option("--head", help="A matrix, or one with a two-layer perceptron added.")
    ] = Head.linear,
    dim: Annotated[
        int | None,
        typer.Option(
            "--dim",
            min=2,
            max=65536,
            metavar="N",
            help="Width of the shared space. Default: the smaller of the two.",
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, metavar="N", help="Passes over the data.")
    ] = 30,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=2,
            metavar="N",
            help="Pairs in a step. Default: an eighth of the images, 32 to 512.",
        ),
    ] = None,
    rate: Annotated[
        float, typer.Option("--rate", min=1e-9, max=100, metavar="R", help="Learning rate.")
    ] = 1e-3,
    seed: SeedOption = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep heads even if they do not help.")
    ] = False,
    json_: JsonOption = False,
    device: DeviceOption = None,
    restart: RestartOption = False,
) -> None:
    """Fit small heads on a frozen model to your captioned pictures: minutes, no GPU."""
    if not out:
        raise UsageError("say what the model is to be called: --out NAME")
    if (dataset is None) == (features is None):
        raise UsageError("give a DATASET, or --features TEXT.npy IMAGE.npy")
    if features is not None and (base or images):
        raise UsageError("--base and --images go with a DATASET")

    from mmsearch.config import load_settings
    from mmsearch.encoders.registry import model_folder, name_of

    with extra("torch", "training"):
        from mmsearch.training import align as job
        from mmsearch.training.runs import check_room
        from mmsearch.training.sets import read_features

    settings = load_settings(device=device)
    folder = model_folder(out, settings.home_folder())
    name = name_of(folder, settings.home_folder())
    check_room(folder, restart=restart, uses=features or ())
    how = job.AlignSettings(head.value, dim, epochs, batch, rate, seed=seed)
    with progress_bar() as bar:
        if features is not None:
            found, encoder = read_features(*features, seed), None
            about = f"{features[0].name} and {features[1].name}"
        else:
            assert dataset is not None
            found, encoder, about = _embedded(dataset, images, base, settings, seed, bar)
        report = job.align(
            found, how, folder, base=encoder, name=name, data=about,
            keep=keep, restart=restart, files=features, on_progress=bar, notify=say,
        )  # fmt: skip
    if json_:
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        _show(report, folder, name, usable=encoder is not None)


def _embedded(
    dataset: Path, images: Path | None, base: str | None, settings: Settings, seed: int, bar: Any
) -> tuple[Features, Encoder, str]:
    from mmsearch.datasets.archives import unpacked
    from mmsearch.datasets.formats import find_images, read_labelled
    from mmsearch.encoders.encoder_provider import EncoderProvider
    from mmsearch.encoders.loading import pick_device
    from mmsearch.encoders.registry import require_network
    from mmsearch.training.sets import embed_set

    dataset = unpacked(dataset, settings.cache_folder())
    labelled = read_labelled(dataset, say)
    folder = images or find_images(dataset, list(labelled.images))
    models = EncoderProvider(settings, say, None)
    name = base or ("tiny" if settings.model == "auto" else settings.model)
    require_network(models.source(name))  # heads stand on one
    encoder = models.for_new_index(name, pick_device(settings.device))
    found = embed_set(
        encoder, folder, labelled.images, settings.cache_folder() / "views", seed, bar, say
    )
    return found, encoder, labelled.name


def _show(report: AlignReport, folder: Path, name: str, *, usable: bool) -> None:
    from mmsearch.evaluation.ranking import CUTOFFS, gain_line

    counts = report.images
    print(
        f"trained on {counts['train']} images, chosen on {counts['val']}, measured on "
        f"{counts['test']} held-out ones (percent; in brackets: 95% paired bootstrap over images)"
    )
    rows = []
    for way, what in (("t2i", "text -> image"), ("i2t", "image -> text")):
        for k in CUTOFFS:
            key = f"{way}_R@{k}"
            before = f"{report.before[key]:.1f}" if report.before else "-"
            gain = gain_line(report.gains[key]) if report.gains else "-"
            rows.append([before, f"{report.after[key]:.1f}", f"{what} R@{k}", gain])
    print_table(["before", "after", "", "gain"], rows, right=2)
    if report.overall is not None:
        print(f"mean of the six: {gain_line(report.overall)}")
    if report.folder is None:
        print("the heads do not help, so they were not kept (--keep keeps them anyway)")
    elif usable:
        _tell(folder, name)
    else:
        print(f"heads and aligned vectors (text.npy, image.npy): {shown_path(folder)}")


def clip(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The recipe.")],
    out: OutOption,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="The folder that the recipe's paths are relative to. Default: its own.",
        ),
    ] = None,
    device: DeviceOption = None,
    restart: RestartOption = False,
) -> None:
    """Train an open_clip model by a recipe: from scratch, a checkpoint, or a tower's weights."""
    from mmsearch.config import load_settings
    from mmsearch.encoders.encoder_provider import EncoderProvider
    from mmsearch.encoders.loading import pick_device
    from mmsearch.encoders.registry import model_folder, name_of
    from mmsearch.evaluation.ranking import recall_line

    with extra("torch", "training"):
        from mmsearch.training.clip import train_clip
        from mmsearch.training.distributed import processes
        from mmsearch.training.recipe import read_recipe
        from mmsearch.training.runs import Place

    found = read_recipe(recipe)
    settings = load_settings(device=device)
    folder = model_folder(out, settings.home_folder())
    models = EncoderProvider(settings, say, None)
    with processes(pick_device(settings.device)) as own, progress_bar() as bar:
        place = Place(
            data=(data or recipe.parent).absolute(),  # what is kept is found again by it
            folder=folder,
            cache=settings.cache_folder() / "views",
            home=settings.home_folder(),
            device=own.device,
            workers=settings.workers // own.beside if sys.platform == "linux" else 0,
            rank=own.rank,
            world=own.world,
        )
        report = train_clip(
            found,
            place,
            open_model=lambda name: models.for_new_index(name, own.device),
            restart=restart,
            on_progress=bar if not own.rank else _ignore,
            notify=say if not own.rank else _ignore,
        )
    if own.rank:
        return
    print(f"validation: {recall_line(report.validation)}")
    if report.test:
        print(f"test: {recall_line(report.test)}")
    _tell(folder, name_of(folder, settings.home_folder()))


def fusion(
    dataset: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATASET]",
            help="Captioned pictures to train on. Default: the index's own captions.",
        ),
    ] = None,
    index: IndexOption = None,
    images: ImagesOption = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="Which split of the DATASET.")
    ] = None,
    limit: LimitOption = None,
    hold_out: Annotated[
        int,
        typer.Option(
            "--hold-out", min=1, metavar="N", help="Captions of each image that are queries."
        ),
    ] = 1,
    seed: SeedOption = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep weights even if they do not help.")
    ] = False,
    json_: JsonOption = False,
    device: DeviceOption = None,
) -> None:
    """Train the weights of image and caption scores, for --fusion trained."""
    from mmsearch.evaluation.ranking import gain_line

    if dataset is None and (images or split or limit):
        raise UsageError("--images, --split and --limit go with a DATASET")
    with engine_for(index, device=device) as engine, progress_bar() as bar:
        found, is_kept = engine.train_fusion(
            dataset, hold_out=hold_out, keep=keep, images=images, split=split, limit=limit,
            seed=seed, on_progress=bar,
        )  # fmt: skip
    if json_:
        print(json.dumps({**dataclasses.asdict(found), "kept": is_kept}))
        return
    print(f"trained on {found.trained_on} held-out captions, measured on {found.measured_on} "
          "of other images (percent)")  # fmt: skip
    rows = [[f"{found.before[key]:.1f}", f"{found.after[key]:.1f}", key] for key in found.before]
    print_table(["equal", "trained", ""], rows, right=2)
    weights = ", ".join(f"{name} {v:.2f}" for name, v in vars(found.weights).items())
    print(f"weights: {weights}")
    print(f"mean of the three: {gain_line(found.overall)}")
    if is_kept:
        print(
            f"kept in {shown_path(engine.folder)}: searches with --fusion auto or trained use them"
        )
    else:
        print("they do not help, so they were not kept (--keep keeps them anyway)")


def compose(
    context: typer.Context,
    dataset: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATASET]", help="Captioned pictures to train on too: a folder or a file."
        ),
    ] = None,
    index: IndexOption = None,
    images: ImagesOption = None,
    seed: SeedOption = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the network even if it does not help.")
    ] = False,
    json_: JsonOption = False,
    device: DeviceOption = None,
) -> None:
    """Train early fusion ("this picture, but ...") on drawn scenes: minutes, no GPU."""
    from mmsearch.evaluation.ranking import gain_line

    if dataset is None and images:
        raise UsageError("--images goes with a DATASET")
    with extra("torch", "training"):
        from mmsearch.training.compose import Recipe

    with engine_for(index, device=device) as engine, progress_bar() as bar:
        found, is_kept = engine.train_compose(
            dataset, images=images, keep=keep, seed=seed, on_progress=bar,
            recipe=context.find_object(Recipe),  # of a program that runs this command
        )  # fmt: skip
    measured = [*found.drawn, *([found.photos] if found.photos else [])]
    if json_:
        rows = [dataclasses.asdict(row) for row in measured]
        print(json.dumps({"measured": rows, "kept": is_kept, "auto": found.is_for_photos}))
        return
    print(
        "changes that lead to what was not trained on, by the text alone, by the weighted sum and "
        "by early fusion;\nR@1/5/10 in percent, the picture itself among what is found"
    )
    lines = [
        [row.kind, str(row.queries), str(row.targets),
         *map(_recalls, (row.text, row.sum, row.early)), f"{gain_line(row.gain)} over {row.over}"]
        for row in measured
    ]  # fmt: skip
    head = ["change", "queries", "targets", "text alone", "sum", "early", "mean of the three"]
    print_table(head, lines)
    if not is_kept:
        print("it does not help, so it was not kept (--keep keeps it anyway)")
        return
    print(f"kept in {shown_path(engine.folder)}: --compose early uses it")
    if found.is_for_photos:
        print("searches with --image and a text use it unasked")
    elif found.photos is None:
        print("without captioned photos to measure on, searches do not use it unasked")
    else:
        print("on photos it may find less than the text alone or a sum: not used unasked")


def rerank(
    context: typer.Context,
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Captioned photos: a folder or a file.")
    ],
    index: IndexOption = None,
    images: ImagesOption = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="interaction (the best patch of each word) or attention (cross-modal, slower).",
        ),
    ] = "interaction",
    seed: SeedOption = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the network even if it does not help.")
    ] = False,
    json_: JsonOption = False,
    device: DeviceOption = None,
) -> None:
    """Train a re-ranker for the index's model, for --rerank: captioned photos, no GPU."""
    from mmsearch.evaluation.ranking import gain_line
    from mmsearch.search.rerank import KINDS

    with extra("torch", "training"):
        from mmsearch.training.rerank import Recipe

    with engine_for(index, device=device) as engine, progress_bar() as bar:
        found, is_kept = engine.train_rerank(
            dataset, kind=one_of("--kind", kind, KINDS), images=images, keep=keep, seed=seed,
            on_progress=bar, recipe=context.find_object(Recipe),
        )  # fmt: skip
    if json_:
        print(
            json.dumps(
                {
                    "kind": found.kind,
                    "queries": found.queries,
                    "recalls": found.recalls,
                    "mix": dataclasses.asdict(found.reranker.mix),
                    "gain": dataclasses.asdict(found.gain),
                    "kept": is_kept,
                }
            )
        )
        return
    print(
        f"{found.queries} captions of photos that were not trained on, the first 50 re-ranked; "
        "R@1/5/10 in percent; each line adds its part to those above"
    )
    lines = [[name, _recalls(recalls)] for name, recalls in found.recalls.items()]
    print_table(["by", "R@1/5/10"], lines)
    print(f"mean of the three: {gain_line(found.gain)}")
    if is_kept:
        print(f"kept in {shown_path(engine.folder)}: search --rerank N uses it")
    else:
        print("it does not help, so it was not kept (--keep keeps it anyway)")


def _recalls(recalls: dict[str, float]) -> str:
    return " / ".join(f"{value:.1f}" for value in recalls.values())


def _ignore(_what: Any) -> None:
    return None


def _tell(folder: Path, name: str) -> None:
    print(f"model: {shown_path(folder)} (its card: README.md, its log and plot: training)")
    print(f"use it: mmsearch index FOLDER --model {name} --index {folder.name}.index")
