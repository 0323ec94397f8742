"""Model folders: what lies under the LLM paths the host knows, which name means which folder, and what it lacks.

A widget value names a folder under any LLM path, else a known repository, else `owner/name`. A folder counts as a model
when its config.json names a model type; whether its weights are whole is read from the files, before anything loads. A GGUF
file is a model as well, in whatever folder it lies.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from .. import host
from ..cache import content_key, file_fingerprint
from ..host.model_files import MAX_HEADER, MISSHAPEN, impostor
from .gguf import models as gguf_models
from .gguf.models import SUFFIX as GGUF
from .gguf.models import GgufModel
from .unusable import UnusableModel

KINDS = ("LLM", "llm", "prompt_generator")
# Packs keep their models one or two folders down: LLM/Qwen-VL/<name>, LLM/<owner>/<name>.
DEPTH = 3

VISION_MODELS = (
    "Qwen2.5-VL-3B-Instruct",
    "Qwen2.5-VL-7B-Instruct",
    *(f"Qwen3-VL-{size}-{kind}" for size in ("2B", "4B", "8B", "32B") for kind in ("Thinking", "Instruct")),
    "SkyCaptioner-V1",
)
OLD_VISION_MODELS = ("Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct")
TEXT_MODELS = (
    *(f"Qwen2.5-{size}-Instruct" for size in ("3B", "7B", "14B", "32B")),
    "Qwen3-4B-Thinking-2507",
    "Qwen3-4B-Instruct-2507",
)
WHOLE = ("model.safetensors", "pytorch_model.bin")  # what weights in one file are called
# What the library reads of a folder beside the weights.
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
# Folders of other packs, which are no owners.
CONTAINERS = ("qwen-vl",)
# Names whose repository is not Qwen/<name>.
REPOSITORIES = {
    "SkyCaptioner-V1": "Skywork/SkyCaptioner-V1",
    "qwen3-4b-Z-Image-Engineer": "BennyDaBall/qwen3-4b-Z-Image-Engineer",
}


@dataclass(frozen=True)
class ModelFolder:
    """A local model folder, or a GGUF file.

    name: how a widget calls it, relative to the LLM path it was found under. owner: whose it is, by the folder it is in; "" when
    that does not say. config: config.json; of a GGUF file no more than the first of what it would say.
    """

    path: Path
    name: str
    config: dict[str, Any]
    gguf: GgufModel | None = None

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def owner(self) -> str:
        return owner_of(self.name)

    @property
    def stored_quantization(self) -> dict[str, Any] | None:
        """How the folder's weights are quantised; None where they are not."""
        stored = self.config.get("quantization_config")
        return stored if isinstance(stored, dict) else None

    @property
    def sees(self) -> bool:
        """Whether the model has a vision tower."""
        return "vision_config" in self.config or "thinker_config" in self.config


def roots() -> list[Path]:
    """The LLM paths, the one to download into first."""
    return list(dict.fromkeys(path for kind in KINDS for path in host.current().model_folders(kind)))


def read_config(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json when it is a model's, else None."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) and "model_type" in config else None


def scan() -> list[ModelFolder]:
    """Every model folder under the LLM paths, sorted by name; links are followed, hidden folders are not."""
    found: dict[Path, ModelFolder] = {}
    for root in roots():
        for where, subfolders, files in os.walk(root, followlinks=True):
            path = Path(where)
            depth = len(path.relative_to(root).parts)
            subfolders[:] = [] if depth >= DEPTH else sorted(s for s in subfolders if not s.startswith("."))
            for model in gguf_models.listed(path, files):
                found.setdefault(model.files[0].resolve(), of_gguf(model, root))
            if depth and "config.json" in files and (config := read_config(path)) is not None:
                if weight_files(path) or not any(name.lower().endswith(GGUF) for name in files):
                    found.setdefault(path.resolve(), ModelFolder(path, path.relative_to(root).as_posix(), config))
                subfolders.clear()
    return sorted(found.values(), key=lambda folder: folder.name.lower())


def of_gguf(model: GgufModel, root: Path) -> ModelFolder:
    return ModelFolder(model.files[0], model.files[0].relative_to(root).as_posix(), model.config, model)


def choices(known: Iterable[str], sees: bool | None, files_only: bool = False) -> list[str]:
    """Names for a widget: the known ones, then what lies on the disk (with a vision tower, without one, or both).

    files_only: no folders, but GGUF files.
    """
    names = list(known)
    for folder in scan():
        fits = (sees is None or folder.sees == sees) and (folder.gguf is not None or not files_only)
        if fits and folder.path.name not in names and folder.name not in names:
            names.append(folder.name)
    return names


def find(name: str) -> ModelFolder | None:
    """The local folder that `name` means, or None: by its path under an LLM path, else by the folder's own name.

    Raises UnusableModel for a name that is empty or points outside the folders.
    """
    wanted = name.strip().replace("\\", "/").rstrip("/")
    parts = wanted.split("/")
    if not wanted:
        raise UnusableModel(f"No model is chosen: pick one, or put a model folder into {roots()[0]}.")
    if wanted.startswith("/") or ".." in parts or ":" in wanted:
        raise UnusableModel(
            f"{name!r} is not a folder inside the LLM paths nor a repository, so it is not opened: put the folder, or a link to "
            f"it, into {roots()[0]}, or name the place it is in as LLM in extra_model_paths.yaml."
        )
    for root in roots():
        for candidate in (root / wanted, root / "Qwen-VL" / wanted):
            if (config := read_config(candidate)) is not None:
                return ModelFolder(candidate, candidate.relative_to(root).as_posix(), config)
            if candidate.suffix.lower() == GGUF and candidate.is_file():
                return of_gguf(gguf_models.of(candidate), root)
    # A download of `owner/name` by another pack is a folder `name`; a deep folder may be called by its last part.
    owner = owner_of(wanted)
    found = [folder for folder in scan() if folder.path.name.lower() == parts[-1].lower()]
    # Another owner's is another model, whatever it is called; but what the name alone means is that also with its owner, and
    # people keep it in folders of their own.
    usual = not owner or repository(parts[-1]).lower() == wanted.lower()
    fitting = [folder for folder in found if usual or folder.owner in ("", owner)]
    return min(fitting, key=lambda folder: folder.owner != owner) if fitting else find_gguf(parts)


def find_gguf(parts: Sequence[str]) -> ModelFolder | None:
    """The GGUF file that a name, cut at its slashes, means: of a menu, or the folder that has no other model.

    Raises UnusableModel for a folder with several.
    """
    every = [folder for folder in scan() if folder.gguf is not None]
    file = gguf_models.file_name(parts[-1]).lower()
    if len(parts) == 1 and (named := [folder for folder in every if folder.path.name.lower() == file]):
        return named[0]
    inside = [folder for folder in every if folder.path.parent.name.lower() == parts[-1].lower()]
    if len(inside) > 1:
        names = ", ".join(folder.path.name for folder in inside[:4])
        raise UnusableModel(
            f"{inside[0].path.parent} holds {len(inside)} models ({names}): choose one of them by its name."
        )
    return inside[0] if inside else None


def revision_folder(name: str, revision: str) -> str:
    safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in revision)
    return f"{name.strip().rstrip('/')}@{safe}"


def owner_of(name: str) -> str:
    """Whose model `owner/name` or `folder/owner/name` is, in small letters; "" when it does not say."""
    above = name.lower().split("/")[-2:-1]
    return above[0] if above and above[0] not in CONTAINERS else ""


def fingerprint(folder: ModelFolder) -> tuple[list[str], str]:
    """(fingerprints of the weights, one of everything that the library reads). Other weights under the same name, or another
    template, are another model."""
    if folder.gguf is not None:
        weights = [file_fingerprint(file) for file in folder.gguf.every]
        return weights, content_key(weights)
    path = folder.path
    weights = [file_fingerprint(file) for file in weight_files(path)]
    settings = sorted({file for pattern in SETTINGS for file in path.glob(pattern) if file.is_file()})
    return weights, content_key(weights, [[file.name, file_fingerprint(file)] for file in settings])


def weight_files(path: Path) -> list[Path]:
    found = (*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin"))
    return sorted(file for file in found if file.is_file())


def repository(name: str) -> str:
    """The hub repository that `name` means when no local folder has it: known, `owner/name`, else Qwen/<name>."""
    wanted = name.strip().replace("\\", "/")
    if wanted.count("/") == 1:
        return wanted
    short = wanted.rsplit("/", 1)[-1]
    return REPOSITORIES.get(short, f"Qwen/{short}")


def missing_weights(path: Path) -> list[str]:
    """What keeps the folder's weights from being whole, one phrase per file; empty when nothing does."""
    indexes = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.bin.index.json"))
    if indexes:
        try:
            shards = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
            elsewhere = [shard for shard in shards if PurePath(shard).name != shard or "\\" in shard or ":" in shard]
        except MISSHAPEN:
            return [f"{indexes[0].name} (unreadable)"]
        if elsewhere:
            return [f"{indexes[0].name} (it names {elsewhere[0]!r}, which is no file beside it)"]
        absent = [shard for shard in shards if not (path / shard).is_file()]
        present = [path / shard for shard in shards if (path / shard).is_file()]
    else:
        present = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        absent = [] if present else ["model.safetensors"]
    return absent + [problem for file in present if (problem := truncated(file))]


def missing_files(folder: ModelFolder) -> list[str]:
    """`missing_weights`, and what the library needs beside them to show a picture to the model."""
    if folder.gguf is not None:
        return [found for file in folder.gguf.every if (found := gguf_models.problem(file))]
    missing = missing_weights(folder.path)
    if folder.sees and not (folder.path / "preprocessor_config.json").is_file():
        try:  # where newer releases of the library write it
            joint = json.loads((folder.path / "processor_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            joint = None
        if not isinstance(joint, dict) or "image_processor" not in joint:
            missing.append("preprocessor_config.json")
    return missing


def truncated(file: Path) -> str:
    """A phrase when a safetensors file is shorter than its header says (an interrupted download), else ''."""
    if file.suffix != ".safetensors":
        return "" if file.stat().st_size else f"{file.name} (empty)"
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length)) if length < min(size, MAX_HEADER) else {}
        end = max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")
    except (struct.error, *MISSHAPEN):
        return f"{file.name} ({(impostor(file) or 'damaged').rstrip('.')})"
    expected = 8 + length + end
    return "" if size >= expected else f"{file.name} ({size:,} of {expected:,} bytes)"


def check(folder: ModelFolder, must_see: bool) -> ModelFolder:
    """`folder` itself when it can be loaded. Raises UnusableModel with the missing files, or for a text-only model."""
    if folder.gguf is not None:
        gguf_models.check(folder.gguf, folder.name, must_see)
        return folder
    if missing := missing_files(folder):
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise UnusableModel(
            f"The model folder {folder.path} is not whole, missing: {shown}. Download these files into it, or delete "
            "the folder so that it is fetched again."
        )
    weights = weight_files(folder.path)
    if not any(folder.path.glob("*.index.json")) and all(file.name not in WHOLE for file in weights):
        raise UnusableModel(
            f"The weights in {folder.path} are called {weights[0].name}: rename them to model.safetensors, as the library asks."
        )
    if not (folder.path / "tokenizer.json").is_file() and not (folder.path / "vocab.json").is_file():
        raise UnusableModel(f"The model folder {folder.path} has no tokenizer: put tokenizer.json beside config.json.")
    if must_see and not folder.sees:
        raise UnusableModel(
            f"{folder.name} is a text-only model ({folder.model_type}), which cannot look at pictures: choose a -VL one, "
            "or use a text node."
        )
    return folder


def check_unfetched(folder: ModelFolder, must_see: bool, failure: UnusableModel) -> ModelFolder:
    """`folder`, which is on the disk, when it can be loaded as it is, though nothing could be fetched for it. Raises
    UnusableModel with what is missing and why it could not be completed."""
    try:
        return check(folder, must_see)
    except UnusableModel as incomplete:
        raise UnusableModel(f"{incomplete} Fetching it failed: {failure}") from failure
