"""Names of models, where their weights lie, and whether they are there. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmsearch.errors import ModelNotFound, UsageError, extra, in_a_line
from mmsearch.types import Notify

BUNDLED = Path(__file__).parent / "bundled"
TINY = "tiny"
BASE = "base"
#: What names of mmsearch's own stand for, besides `tiny`.
ALIASES = {
    BASE: "hf-hub:immich-app/ViT-B-32__laion2b-s34b-b79k",
    "base-multilingual": "hf-hub:immich-app/ViT-B-32-SigLIP2-256__webli",
}


_OWN = {name: alias for alias, name in ALIASES.items()}


@dataclass(frozen=True)
class KnownModel:
    """What is known of a model before it was ever loaded; 0 and "" where that is nothing."""

    dim: int = 0
    parameters: int = 0
    licence: str = ""
    megabytes: int = 0
    """To fetch."""
    languages: str = ""
    """Those that it reads, where a search tells them of others by the words that it knows."""
    precisions: tuple[str, ...] = ()
    """Those besides fp32 in which it was measured on labels: Recall@1 on Flickr8k's test split
    at most half a point less than in fp32, both ways (docs/models.md)."""


NOTHING_KNOWN = KnownModel()
#: The models that come with a name of mmsearch's own.
KNOWN = {
    TINY: KnownModel(
        384,
        28_624_449,
        "research only (weights trained on Flickr8k photos)",
        languages="English and German",
        precisions=("bf16",),
    ),
    ALIASES[BASE]: KnownModel(512, 151_277_313, "MIT", 605),
    ALIASES["base-multilingual"]: KnownModel(768, 376_856_066, "Apache-2.0", 1541),
}

Kind = Literal["local-dir", "onnx", "hf-hub", "tag", "file"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    `name` is what the index remembers; `architecture` is open_clip's (for "tag" and "file");
    `location` is a folder, a hub repository (open_clip's, or of ONNX graphs), a pretrained tag or
    a weights file.
    """

    name: str
    kind: Kind
    architecture: str
    location: str

    @property
    def open_clip_name(self) -> str:
        """What `open_clip.create_model` and `open_clip.get_tokenizer` take."""
        if self.kind in ("local-dir", "hf-hub"):
            return f"{self.kind}:{self.location}"
        return self.architecture

    @property
    def pretrained(self) -> str | None:
        return self.location if self.kind in ("tag", "file") else None


def parse_model(name: str) -> ModelSource:
    """The source that a model's name stands for; looks at no file.

    Names are `tiny` (bundled), those in `ALIASES`, open_clip's `ARCH/TAG`,
    `ARCH:/path/to/weights`, `local-dir:/path` or the path alone if it begins like one (`./`, `/`,
    `~/`), `onnx:/path` for ONNX graphs as immich publishes them, and `hf-hub:org/repository` for
    either.

    Raises:
        UsageError: the name has none of these forms.
    """
    if name == TINY:
        return ModelSource(TINY, "local-dir", "", str(BUNDLED / TINY))
    name = ALIASES.get(name, name)
    kinds: tuple[Kind, ...] = ("local-dir", "onnx", "hf-hub")
    for kind in kinds:
        prefix, _, rest = name.partition(":")
        if prefix == kind and rest:
            if kind == "hf-hub" and not _REPOSITORY.fullmatch(rest):
                raise UsageError(f"'{rest}' is no hub repository: name one as hf-hub:org/name")
            location = rest if kind == "hf-hub" else _absolute(rest)
            return ModelSource(f"{kind}:{location}", kind, "", location)
    if name.startswith(("./", "../", "/", "~/")):
        return parse_model(f"local-dir:{name}")
    architecture, colon, path = name.partition(":")
    if colon and architecture and path:
        location = _absolute(path)
        return ModelSource(f"{architecture}:{location}", "file", architecture, location)
    architecture, slash, tag = name.rpartition("/")
    if slash and architecture and tag and not colon:
        return ModelSource(name, "tag", architecture, tag)
    raise UsageError(
        f"unknown model '{name}'; use tiny, {', '.join(ALIASES)}, the name of one trained here, "
        "ARCH/TAG (as ViT-B-32/laion2b_s34b_b79k), ARCH:/path/to/weights, local-dir:/path, "
        "onnx:/path or hf-hub:org/repository"
    )


def listed_name(name: str) -> str:
    """A model's name for a list: with mmsearch's own name for it in brackets, where it has one."""
    return f"{name} ({_OWN[name]})" if name in _OWN else name


def model_folder(name: str, home: Path) -> Path:
    """The folder of a model that was trained here: by its name below `home`, or a path.

    Raises:
        UsageError: a name that could not be told from the others.
    """
    if "/" in name or os.sep in name:
        return Path(_absolute(name))
    if name in _RESERVED or not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be a model's name: letters, digits, dots, dashes and underscores, "
            f"and not {', '.join(_RESERVED)}"
        )
    return home / "models" / name


def name_of(folder: Path, home: Path) -> str:
    """How `--model` takes a model that was trained into a folder: `model_folder` the other way."""
    return folder.name if folder.parent == home / "models" else f"local-dir:{folder}"


_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = (TINY, *ALIASES, "auto")


def trained_names(home: Path) -> list[str]:
    """The models that were trained here, by name."""
    folders = (home / "models").glob("*/")
    return sorted(
        path.name for path in folders
        if (path / ALIGNED).is_file() or (path / "open_clip_config.json").is_file()
    )  # fmt: skip


def full_name(name: str, home: Path) -> str:
    """A model's name as `parse_model` takes it: that of one that was trained here is its folder."""
    if name in _RESERVED or not _NAME.fullmatch(name):
        return name
    folder = home / "models" / name
    return f"local-dir:{folder.absolute()}" if folder.is_dir() else name


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def cached_files(source: ModelSource) -> list[Path] | None:
    """The files that make the model what it is, or None where they are not on this machine.

    Raises:
        ModelNotFound: a folder or a file that was named does not exist.
    """
    if source.kind == "local-dir":
        return _local_files(source)
    if source.kind == "file":
        path = Path(source.location)
        if not path.is_file():
            raise ModelNotFound(f"{path}: no such weights file (model '{source.name}')")
        return [path]
    if (folder := onnx_folder(source)) is not None:
        found = (path for part in _ONNX_PARTS for path in sorted(folder.glob(part)))
        named = {folder / name for name in ONNX_FILES}
        return [path for path in found if path in named or _may_be_weights(path)]
    if source.kind == "hf-hub":
        config = _in_hub_cache(source.location, ("open_clip_config.json",))
        weights = _in_hub_cache(source.location, _WEIGHT_NAMES)
        return [config, weights] if config and weights else None
    return _tag_files(source)


#: The files of a folder as immich publishes it; what else lies beside a graph may be its weights.
ONNX_FILES = (
    "config.json",
    "visual/model.onnx",
    "visual/preprocess_cfg.json",
    "textual/model.onnx",
    "textual/tokenizer.json",
    "textual/tokenizer_config.json",
)
_ONNX_PARTS = ("config.json", "visual/*", "textual/*")
_OTHER_RUNTIMES = (".armnn", ".rknn")
#: What tokenizers and people leave beside the graphs.
_NO_WEIGHTS = (*_OTHER_RUNTIMES, ".json", ".md", ".model", ".txt")


def _may_be_weights(path: Path) -> bool:
    """Whether a file beside a graph may be part of it: large graphs have weights in others."""
    return path.is_file() and path.suffix not in _NO_WEIGHTS and not path.name.startswith(".")


def onnx_folder(source: ModelSource) -> Path | None:
    """Where a model's ONNX graphs are; None where it has none, or they are not on this machine.

    Raises:
        ModelNotFound: a folder that was named has not all that it takes.
    """
    if source.kind == "onnx":
        folder = Path(source.location)
        if not folder.is_dir():
            raise ModelNotFound(f"{folder}: no such folder (model '{source.name}')")
        missing = [name for name in ONNX_FILES if not (folder / name).is_file()]
        if missing:
            raise ModelNotFound(
                f"{folder}: no {', '.join(missing)} there, so it is no folder of ONNX graphs as "
                "immich publishes them (docs/models.md)"
            )
        return folder
    if source.kind != "hf-hub":
        return None
    config = _in_hub_cache(source.location, ONNX_FILES[:1])
    if config is None or not all((config.parent / name).is_file() for name in ONNX_FILES):
        return None
    return config.parent


def require_network(source: ModelSource) -> None:
    """Makes sure that a model is one that torch runs.

    Raises:
        UsageError: it comes as ONNX graphs.
    """
    if onnx_folder(source) is not None:
        raise UsageError(
            f"'{source.name}' comes as ONNX graphs, which torch does not run; to train or to read "
            f"patches take 'tiny', or an open_clip model such as {DATACOMP}"
        )


def fetch_onnx(source: ModelSource, notify: Notify) -> Path | None:
    """Fetches a hub repository of ONNX graphs; None where it is none.

    Files that an earlier call fetched are not fetched again. The hub's library draws a progress
    bar.

    Raises:
        ModelNotFound: there is no such repository, or it cannot be fetched.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = HfApi().list_repo_files(source.location)
    except RepositoryNotFoundError as error:  # or a gated one
        raise ModelNotFound(
            f"'{source.name}': the hub has no such repository, or asks for a login"
        ) from error
    except Exception as error:  # whatever the hub library's client raises
        raise ModelNotFound(f"'{source.name}': the hub answers {in_a_line(error, 200)}") from error
    try:
        if "open_clip_config.json" in files or not set(ONNX_FILES).issubset(files):
            return None
        notify(f"fetching '{source.name}'")
        # The config last: where it is, all is (`onnx_folder`).
        ignored = [f"*{suffix}" for suffix in _OTHER_RUNTIMES]
        for parts in (_ONNX_PARTS[1:], _ONNX_PARTS[:1]):
            snapshot_download(source.location, allow_patterns=list(parts), ignore_patterns=ignored)
    except Exception as error:  # whatever the hub library's client raises
        raise ModelNotFound(
            f"'{source.name}' was not fetched in full: {in_a_line(error, 200)}; files that have "
            "come are kept: run the same command to resume"
        ) from error
    return onnx_folder(source)


_WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
#: What `base` was before it was one that needs no torch.
DATACOMP = "ViT-B-32-256/datacomp_s34b_b86k"
DATACOMP_REPOSITORY = "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


#: Says of a folder which model its heads stand on.
ALIGNED = "mmsearch_model.json"
HEADS = "heads.safetensors"


@dataclass(frozen=True)
class AlignedFolder:
    """Heads that `mmsearch train align` made, and the frozen model that they stand on."""

    base: str | None
    """A model's name; None where the heads were made for vectors from elsewhere."""
    space: str | None
    """The space of the base when the heads were made."""
    heads: Mapping[str, Any]
    """The heads' shape, as `HeadsConfig` takes it."""


def read_aligned(folder: Path) -> AlignedFolder | None:
    """What a folder's `mmsearch_model.json` says, or None where there is none.

    Raises:
        ModelNotFound: it says nothing that this program understands.
    """
    try:
        stored = json.loads((folder / ALIGNED).read_text(encoding="utf-8"))
        if stored["version"] != 1:
            raise ValueError("made by a newer program")
        return AlignedFolder(stored["base"], stored["space"], stored["heads"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFound(f"{folder / ALIGNED}: cannot be used: {error}") from error


def tower_source(source: ModelSource) -> ModelSource:
    """Where the towers and the tokenizer of a model come from: below all heads.

    Raises:
        ModelNotFound: the model is heads for vectors from elsewhere, without towers.
    """
    base = base_source(source)
    return source if base == source else tower_source(base)


def base_source(source: ModelSource) -> ModelSource:
    """The model that a model's heads stand on; itself where it has no heads.

    Raises:
        ModelNotFound: the model is heads for vectors from elsewhere, without towers.
    """
    aligned = read_aligned(Path(source.location)) if source.kind == "local-dir" else None
    if aligned is None:
        return source
    if aligned.base is None:
        raise ModelNotFound(
            f"{source.location}: holds heads for vectors from elsewhere, which embed no pictures"
        )
    return parse_model(aligned.base)


def _local_files(source: ModelSource) -> list[Path] | None:
    folder = Path(source.location)
    if (folder / ALIGNED).is_file():
        base = cached_files(base_source(source))
        return [folder / ALIGNED, folder / HEADS, *base] if base is not None else None
    config = folder / "open_clip_config.json"
    if not config.is_file() and (folder / ONNX_FILES[1]).is_file():
        raise ModelNotFound(f"{folder}: holds ONNX graphs: name it as onnx:{folder}")
    if not config.is_file() and (folder / "training" / "mmsearch-run").is_file():
        raise ModelNotFound(
            f"{folder}: no finished model there: 'mmsearch train' was stopped, or kept no heads"
        )
    if not config.is_file():
        raise ModelNotFound(f"{folder}: no open_clip_config.json there, so it is no model folder")
    weights = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    if not weights:
        raise ModelNotFound(f"{folder}: no weights (.safetensors, .bin, .pt) beside the config")
    return [config, *own_text_files(folder), *weights]


#: In an `open_clip_config.json`, as the name of a text tower of the hub's: its files are beside.
OWN_FOLDER = "."
_TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def own_text_files(folder: Path) -> list[Path]:
    """What a folder holds of its text tower beside open_clip's config; nothing for most.

    Raises:
        ModelNotFound: one of the files is not there.
    """
    try:
        stored = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        text = stored.get("model_cfg", stored)["text_cfg"]
        is_own = text.get("hf_model_name") == OWN_FOLDER
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # loading it tells what is wrong with it
    files = [folder / name for name in _TEXT_FILES] if is_own else []
    if missing := [path.name for path in files if not path.is_file()]:
        raise ModelNotFound(f"{folder}: {', '.join(missing)} of its text tower is not there")
    return files


def _in_hub_cache(repository: str, names: tuple[str, ...]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def _tag_files(source: ModelSource) -> list[Path] | None:
    if source.name == DATACOMP:  # known without importing open_clip, which takes seconds
        found = _in_hub_cache(DATACOMP_REPOSITORY, _WEIGHT_NAMES)
        return [found] if found else None
    with extra("torch", f"'{source.name}'"):
        import open_clip

    known = open_clip.get_pretrained_cfg(source.architecture, source.location)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(source.architecture))
        raise ModelNotFound(
            f"{source.architecture} has no weights '{source.location}'; it has {tags}"
            if tags
            else f"open_clip knows no pretrained architecture '{source.architecture}'"
        )
    repository, _, name = known.get("hf_hub", "").rpartition("/")
    if repository:
        safe = name.rsplit(".", 1)[0] + ".safetensors"
        found = _in_hub_cache(repository, (safe, name) if name else _WEIGHT_NAMES)
        if found:
            return [found]
    url = known.get("url", "")
    beside = Path(os.path.expanduser("~/.cache/clip")) / os.path.basename(url)
    return [beside] if url and not repository and beside.is_file() else None


def write_json(path: Path, document: Any) -> None:
    """Writes a file that others see as it was, or whole."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(document, indent=1), encoding="utf-8")
    os.replace(draft, path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> list[Any]:
    """What a file is known by, without reading it: its path, size and time."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the model hub answers, known within about `seconds`.

    open_clip's loader alone would try for most of a minute. Looking a name up can hang past
    any time-out of its own, so the attempt runs in a thread that is left behind.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever the hub library's client raises
            status = get_session().head(constants.ENDPOINT, timeout=seconds).status_code
            if status < 500 and status not in (403, 407):  # a hub that is down, a proxy's refusal
                answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    return answered.is_set()


def require_weights(source: ModelSource) -> None:
    """Makes sure that loading the model will not hang on a missing network.

    Raises:
        ModelNotFound: the weights are not cached and the hub does not answer.
    """
    if cached_files(source) is None and not hub_reachable():
        raise ModelNotFound(
            f"the weights of '{source.name}' are not on this machine and the model hub cannot be "
            "reached; connect once, or use tiny, onnx:/path, local-dir:/path or "
            "ARCH:/path/to/weights"
        )
