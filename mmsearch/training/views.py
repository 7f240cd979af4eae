"""Pictures as a network takes them while it learns: augmented, or computed ahead.

On a machine without a GPU most of a step goes into layers that do not learn. What they make of
some augmented views of every picture is computed once, through OpenVINO, and kept in a file;
the steps start from there.
"""

from __future__ import annotations

import atexit
import copy
import functools
import hashlib
import itertools
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn
from torchvision.transforms import Compose, RandomHorizontalFlip

from mmsearch.errors import DecodeError, LabelsError, UsageError, in_a_line
from mmsearch.jobs.runner import parts
from mmsearch.media.sandbox import Decoders
from mmsearch.training.batches import seed_of
from mmsearch.training.runs import State, remembered
from mmsearch.types import OnProgress, Progress

log = logging.getLogger(__name__)

_BLOCK = 64
_VIEWS_VERSION = 5
_PORTION = 512  # pictures
#: How far OpenVINO may be from torch, in parts of what it computes: fp16 keeps about as much as
#: the first. In bf16 the first layers of an EfficientNet are 3 to 16% off, less than what views of
#: a picture differ by.
_SAME = {"fp32": 1e-3, "bf16": 0.25}


@dataclass(frozen=True)
class Transform:
    """From a picture to what an image tower takes; its name tells it from every other."""

    name: str
    steps: Callable[[Image.Image], torch.Tensor]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.steps(image)


def preprocess_of(network: nn.Module) -> PreprocessCfg:
    """How open_clip prepares pictures for a network."""
    return PreprocessCfg(**open_clip.get_model_preprocess_cfg(network))


def plain_transform(how: PreprocessCfg) -> Transform:
    """What a search does to a picture."""
    return Transform(f"plain {how}", image_transform_v2(how, is_train=False))


#: What open_clip's own training transform heeds; the rest is for timm's (`use_timm`).
_HEEDED = {"scale", "color_jitter", "color_jitter_prob", "gray_scale_prob", "use_timm"}


def training_transform(how: PreprocessCfg, augment: dict[str, Any], *, flip: bool) -> Transform:
    """open_clip's training transform, with a mirror image half of the time where `flip`.

    Args:
        augment: fields of open_clip's `AugmentationCfg`.

    Raises:
        UsageError: fields that there are not, or that would not be heeded.
    """
    ignored = set() if augment.get("use_timm") else set(augment) - _HEEDED
    try:
        with warnings.catch_warnings():
            # It names even what it has used.
            warnings.filterwarnings("ignore", message="Unused augmentation cfg items")
            steps = image_transform_v2(how, is_train=True, aug_cfg=augment)
            with _seeded(0):
                steps(Image.new("RGB", (64, 48)))  # or it would fail at the first picture
    except Exception as error:
        raise UsageError(f"augment: open_clip does not take it: {in_a_line(error)}") from error
    if ignored:
        raise UsageError(f"augment: {', '.join(sorted(ignored))} need use_timm = true")
    if flip:
        steps = Compose([RandomHorizontalFlip(), steps])
    return Transform(f"{how} {sorted(augment.items())} {flip}", steps)


@dataclass(frozen=True)
class Pictures:
    """Image files through a transform, decoded when they are asked for."""

    files: Sequence[Path]
    transform: Transform
    side: int

    def __len__(self) -> int:
        return len(self.files)

    def load(self, place: int, seed: int) -> torch.Tensor:
        return self.views(place, [seed])[0]

    def views(self, place: int, seeds: Sequence[int]) -> list[torch.Tensor]:
        """One picture, decoded once, through the transform with each of some seeds."""
        image = open_picture(self.files[place], self.side)
        found = []
        for seed in seeds:
            with _seeded(seed):
                found.append(self.transform(image))
        return found


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds all that transforms draw from, and puts it back: other draws do not notice.

    torchvision draws from torch, open_clip's colour jitter from Python, timm's from NumPy too.
    """
    pythons, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm uses it
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)  # noqa: NPY002


def stamps(files: Sequence[Path]) -> list[Any]:
    """What tells whether files are the same as before: path, size and mtime where they exist."""
    found: list[Any] = []
    for file in files:
        try:
            stat = file.stat()
            found.append((str(file), stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(str(file))
    return found


def decoders() -> Decoders:
    """What reads pictures in this process, until it ends."""
    return _decoders_of(os.getpid())  # those of a process that it was forked from are not its own


@functools.cache
def _decoders_of(_process: int) -> Decoders:
    found = Decoders()
    atexit.register(found.close)
    return found


def open_picture(file: Path, side: int) -> Image.Image:
    """A labelled picture, upright and RGB, at least twice `side` where it is that large.

    Raises:
        LabelsError: it is missing or damaged.
    """
    try:
        with decoders().open(os.fsencode(file)) as opened:
            return Image.fromarray(opened.pixels({"at_least": 2 * side, "within": 0}))
    except DecodeError as error:
        raise LabelsError(f"{file}: cannot be trained on: {error}") from error


class CachedViews:
    """What a network's first layers made of every picture."""

    def __init__(self, files: Sequence[torch.Tensor]) -> None:
        """Takes tensors (n, views, ...) that have one portion of the pictures each."""
        self._files = files
        self._portion = max(1, len(files[0]) if files else 0)

    def __len__(self) -> int:
        return sum(map(len, self._files))

    def load(self, place: int, seed: int) -> torch.Tensor:
        views = self._files[place // self._portion][place % self._portion]
        return views[seed % len(views)].float()


# -- the first layers ----------------------------------------------------------------------


class _Reached(Exception):
    """Carries the output that was waited for."""


class Prefix(nn.Module):
    """An image tower up to the output of the last of its first modules."""

    def __init__(self, network: nn.Module, modules: Sequence[str]) -> None:
        super().__init__()
        self.network: Any = network
        self.modules_used = tuple(modules)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        def stop(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            raise _Reached(output)

        handle = self.network.get_submodule(self.modules_used[-1]).register_forward_hook(stop)
        try:
            self.network.encode_image(image)
        except _Reached as reached:
            found: torch.Tensor = reached.args[0]
            return found
        finally:
            handle.remove()
        raise AssertionError("a module of the tower was not used")


def split_network(network: Any, modules: Sequence[str]) -> tuple[Prefix, nn.Module]:
    """Parts an image tower into its first modules and a network that goes on from their output.

    The second part is a copy in which those modules do nothing; its `encode_image` takes what
    the first part gives.

    Raises:
        UsageError: no such modules, or they are not the beginning of the image tower.
    """
    for name in modules:
        try:
            network.get_submodule(name)
        except AttributeError as error:
            known = [n for n, _ in network.named_modules() if n.count(".") == name.count(".")]
            raise UsageError(
                f"cache: the model has no module '{name}'; as deep are {', '.join(known[:12])}"
            ) from error
    prefix = Prefix(network.eval(), modules)
    rest = copy.deepcopy(network)
    for name in modules:
        parent, _, child = name.rpartition(".")
        setattr(rest.get_submodule(parent) if parent else rest, child, nn.Identity())
    size = preprocess_of(network).size
    height, width = (size, size) if isinstance(size, int) else size
    probe = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            same = torch.allclose(
                network.encode_image(probe), rest.encode_image(prefix(probe)), atol=1e-4, rtol=1e-3
            )
        except (RuntimeError, AssertionError, ValueError, IndexError, TypeError):
            same = False
    if not same:
        raise UsageError(
            f"cache: {', '.join(modules)} are not the beginning of the image tower, in its order"
        )
    return prefix, rest


# -- the file of views ---------------------------------------------------------------------


def compute_views(
    prefix: Prefix,
    pictures: Pictures,
    views: int,
    seed: int,
    folder: Path,
    name: str,
    on_progress: OnProgress,
    portion: int = _PORTION,
    precision: str = "fp32",
) -> CachedViews:
    """The views of every picture, from files in `folder` where an earlier run left them.

    A run that was stopped resumes at the portion that it was at. View v of picture i depends on
    the seed, i and v alone.

    Args:
        portion: how many pictures a file has.
        precision: what OpenVINO computes in, "fp32" or "bf16".

    Raises:
        TrainingError: a full disk.
    """
    run = functools.cache(lambda: _runtime(prefix, pictures.load(0, seed), precision))
    weights = hashlib.sha256()
    for module in prefix.modules_used:
        for weight in prefix.network.get_submodule(module).state_dict().values():
            weights.update(weight.cpu().numpy().tobytes())
    how = [
        _VIEWS_VERSION, prefix.modules_used, weights.hexdigest(), pictures.transform.name, precision
    ]  # fmt: skip

    def about(part: Sequence[Path], start: int) -> Any:
        return [*how, views, seed, start, stamps(part)]

    def load(some: list[int]) -> torch.Tensor:
        seeds = ([seed_of(seed, i, view) >> 1 for view in range(views)] for i in some)
        made = (pictures.views(i, own) for i, own in zip(some, seeds, strict=True))
        return torch.stack(list(itertools.chain.from_iterable(made)))

    def compute(part: Sequence[Path], start: int) -> State:
        found = []
        # One thread: transforms draw from a generator that threads would share.
        with ThreadPoolExecutor(1) as pool:
            jobs = parts(range(start, start + len(part)), max(1, _BLOCK // views))
            blocks = (pool.submit(load, some) for some in jobs)
            # In pairs: the next block is loaded while one is used.
            for block, _ in itertools.pairwise(itertools.chain(blocks, [Future[torch.Tensor]()])):
                found.append(run()(block.result()).astype(np.float16))
                done = views * start + sum(map(len, found))
                on_progress(Progress(f"views of {name}", done, views * len(pictures)))
        return {"views": torch.from_numpy(np.concatenate(found)).unflatten(0, (len(part), views))}

    made = remembered(folder, name, pictures.files, about, compute, portion)
    return CachedViews([one["views"] for one in made])


def _runtime(
    prefix: Prefix, example: torch.Tensor, precision: str
) -> Callable[[torch.Tensor], np.ndarray]:
    """The prefix as a function: through OpenVINO on the CPU where that agrees, else torch."""
    device = next(prefix.parameters()).device

    def by_torch(batch: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = prefix(batch.to(device)).float().cpu().numpy()
        return found

    if device.type != "cpu":
        return by_torch
    from mmsearch.encoders.openvino import Graph, convert_graph

    probe = torch.stack([example, example])
    try:
        graph = Graph(convert_graph(prefix, probe, [-1, *example.shape]), precision=precision)
    except Exception as error:  # noqa: BLE001 - whatever OpenVINO raises for what it lacks
        log.info("not convertible: %s", error)
    else:
        want, got = by_torch(probe[:1]), graph(probe[:1].numpy())[0]
        if np.linalg.norm(want - got) <= _SAME[precision] * np.linalg.norm(want):
            return lambda batch: graph(batch.numpy())[0]
    log.info("the first layers run in torch, which is slower here")
    return by_torch
