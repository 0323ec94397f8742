"""Checkpoint folders in diffusers' layout: where they lie, what `model_index.json` says, and whether they are whole.

Everything here is read from JSON and safetensors headers; no weight is loaded and no code of a folder is run.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .. import host
from ..cache import content_key, file_fingerprint
from ..host.model_files import structure_problem

KINDS = ("diffusers", "diffusion_models", "checkpoints")
DEPTH = 3  # models/diffusers/<owner>/<name> and one deeper
INDEX = "model_index.json"

# All of them hold the networks that text to image needs.
CONTROL = "ZImageControlNetPipeline"
PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", CONTROL)
# Of the family, but drawn from pictures through networks these nodes do not run.
OTHER_PIPELINES = {
    "ZImageOmniPipeline": "it draws from reference pictures through a SigLIP network",
    "ZImageControlNetInpaintPipeline": "its ControlNet wants a mask and what is around it as well",
}
CLASSES = {
    "transformer": ("ZImageTransformer2DModel",),
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "vae": ("AutoencoderKL",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
COMPONENTS = (*CLASSES, "tokenizer", "controlnet")
CONTROL_CLASSES = ("ZImageControlNetModel",)
WEIGHTS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
CONFIGS = ("config.json", "scheduler_config.json")
READ = (".safetensors", ".json", ".txt", ".jinja")  # what is ever read of a component, tokenizers included


class UnusableCheckpoint(ValueError):
    """A checkpoint that cannot be used; the message names the folder or file, what is wrong, and the cure."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose model_index.json names a pipeline of the family.

    name: how a widget calls it. variants: the weight files' variant by component ("fp16"; "" for none).
    """

    path: Path
    name: str
    pipeline: str
    index: dict[str, Any]
    variants: dict[str, str] = field(default_factory=dict)

    @property
    def controlled(self) -> bool:
        """Whether it has a ControlNet, and can draw after a control picture."""
        return self.pipeline == CONTROL

    def config(self, component: str) -> dict[str, Any]:
        """The component's configuration; {} when it has none."""
        for name in CONFIGS:
            file = self.path / component / name
            if file.is_file():
                return read_json(file)
        return {}

    def identity(self, *components: str) -> str:
        """MD5 of the components' files as they lie on the disk: the same for a renamed folder, another for a fine-tune."""
        found = []
        for component in components:
            files = sorted(file for file in (self.path / component).glob("*") if file.suffix in READ and file.is_file())
            found.append([[file.name, file_fingerprint(file)] for file in files])
        return content_key(found)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UnusableCheckpoint for anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnusableCheckpoint(f"{file} is missing: fetch the checkpoint folder again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableCheckpoint(f"{file} cannot be read as JSON ({error}): fetch it again.") from error
    if not isinstance(value, dict):
        raise UnusableCheckpoint(f"{file} holds no JSON object: fetch it again.")
    return value


def roots() -> list[Path]:
    """The folders searched for checkpoints, the one to put new ones into first."""
    return list(dict.fromkeys(path for kind in KINDS for path in host.current().model_folders(kind)))


def scan() -> list[str]:
    """Names of the folders with a model_index.json of the family, sorted; links are followed, hidden folders are not."""
    names: dict[str, None] = {}
    for root in roots():
        for where, subfolders, files in os.walk(root, followlinks=True):
            path = Path(where)
            depth = len(path.relative_to(root).parts)
            subfolders[:] = [] if depth >= DEPTH else sorted(s for s in subfolders if not s.startswith("."))
            if depth and INDEX in files:
                subfolders.clear()
                try:
                    known = read_json(path / INDEX).get("_class_name") in PIPELINES
                except UnusableCheckpoint:
                    known = False
                if known:
                    names.setdefault(path.relative_to(root).as_posix())
    return sorted(names, key=str.lower)


def find(name: str, anywhere: bool = False) -> Checkpoint:
    """The checkpoint a widget value means: a folder under the model paths; anywhere=True also any path on the disk.

    Raises ModelNotFound or UnusableCheckpoint.
    """
    wanted = name.strip().replace("\\", "/").rstrip("/")
    if not wanted:
        raise host.ModelNotFound(f"No checkpoint is chosen: put a Z-Image folder into {roots()[0]} and press R.")
    if anywhere and (path := existing(name.strip())) is not None:
        path = path.resolve()
        return check(path, path.name)
    if wanted.startswith("/") or ".." in wanted.split("/") or ":" in wanted:
        raise host.ModelNotFound(f"{name!r} is not a folder inside the model paths, so it is not opened.")
    for root in roots():
        if (path := existing(root / wanted)) is not None:
            return check(path, wanted)
    looked = ", ".join(str(root) for root in roots())
    raise host.ModelNotFound(
        f"The checkpoint folder {name!r} was not found. Looked in: {looked}. Put the whole Hugging Face folder "
        "(with model_index.json, such as Tongyi-MAI/Z-Image-Turbo) there and press R."
    )


def existing(named: str | Path) -> Path | None:
    """The file or folder `named` means, ~ for the home folder; None where there is none, and for what can be no path."""
    try:
        path = Path(named).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a zero byte
        return None


def check(path: Path, name: str) -> Checkpoint:
    """The checkpoint in `path` when it can be loaded. Raises UnusableCheckpoint."""
    if path.is_file():
        raise UnusableCheckpoint(
            f"{path} is a single file: load it with ComfyUI's Load Diffusion Model, or choose a Hugging Face folder."
        )
    if not (path / INDEX).is_file():
        parent = path.parent / INDEX
        cure = (
            f"choose the folder above it, {path.parent}"
            if parent.is_file()
            else "choose a folder that has one, such as a copy of Tongyi-MAI/Z-Image-Turbo"
        )
        raise UnusableCheckpoint(f"{path} has no {INDEX}, so it is no diffusers checkpoint: {cure}.")
    index = read_json(path / INDEX)
    pipeline = str(index.get("_class_name", ""))
    if pipeline in OTHER_PIPELINES:
        raise UnusableCheckpoint(
            f"{path} is a {pipeline}, and {OTHER_PIPELINES[pipeline]}: choose a folder of {' or '.join(PIPELINES)}."
        )
    if pipeline not in PIPELINES:
        raise UnusableCheckpoint(
            f"{path} is a {pipeline or 'folder without a pipeline class'}, not of the Z-Image family: choose a folder "
            f"of {' or '.join(PIPELINES)}."
        )
    for component, classes in CLASSES.items():
        _check_class(path, index, component, classes)
    weights = dict(WEIGHTS)
    if pipeline == CONTROL:
        _check_class(path, index, "controlnet", CONTROL_CLASSES)
        weights["controlnet"] = "diffusion_pytorch_model"
    variants = {component: _check_weights(path / component, stem) for component, stem in weights.items()}
    _check_tokenizer(path / "tokenizer")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    if scheduler.get("stochastic_sampling"):
        raise UnusableCheckpoint(
            f"{path}/scheduler asks for stochastic sampling, whose pictures depend on more than their seed: set "
            "stochastic_sampling to false in scheduler_config.json."
        )
    return Checkpoint(path, name, pipeline, index, variants)


def _check_class(path: Path, index: dict[str, Any], component: str, classes: tuple[str, ...]) -> None:
    named = index.get(component)
    found = str(named[1]) if isinstance(named, list) and len(named) == 2 else ""
    if found not in classes:
        raise UnusableCheckpoint(
            f"{path / INDEX} names {found or 'nothing'} as {component}, and a Z-Image checkpoint has "
            f"{' or '.join(classes)}: this is another architecture."
        )
    if not (path / component).is_dir():
        raise UnusableCheckpoint(f"{path} has no folder {component}: fetch the checkpoint again.")


def _check_weights(folder: Path, stem: str) -> str:
    """The weight files' variant ("" for none). Raises UnusableCheckpoint for what is missing, cut off or a pickle."""
    read_json(folder / "config.json")
    indexes = sorted(folder.glob(f"{stem}.safetensors.index*.json"), key=lambda file: len(file.name))
    files = sorted(folder.glob(f"{stem}*.safetensors"), key=lambda file: len(file.name))
    whole = [file for file in files if file.name.count(".") <= 2 and "-of-" not in file.name]
    if indexes:
        shards = _shards(indexes[0])
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise UnusableCheckpoint(f"{folder} is not whole, missing: {shown}. Download them into it.")
        found = [folder / shard for shard in shards]
        variant = indexes[0].name.removeprefix(f"{stem}.safetensors.index").removesuffix(".json").strip(".")
    elif whole:
        found = whole[:1]
        variant = whole[0].name.removeprefix(stem).removesuffix(".safetensors").strip(".")
    elif pickles := [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
        raise UnusableCheckpoint(
            f"{folder} has its weights in {pickles[0].name}, a pickle, which can run code and is not opened: fetch the "
            "safetensors files of the checkpoint."
        )
    else:
        raise UnusableCheckpoint(f"{folder} has no weights ({stem}.safetensors): fetch the checkpoint again.")
    for file in found:
        if (problem := structure_problem(file)) is not None:
            raise UnusableCheckpoint(f"{file}: {problem} Fetch it again.")
    return variant


def _shards(index: Path) -> list[str]:
    """The weight files an index names: plain names, beside it. Raises UnusableCheckpoint for anything else."""
    named = read_json(index).get("weight_map")
    shards = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
    if not shards:
        raise UnusableCheckpoint(f"{index} names no weight files: fetch it again.")
    if outside := [s for s in shards if PurePath(s).name != s or s == ".." or "\\" in s or ":" in s]:
        raise UnusableCheckpoint(
            f"{index} names {outside[0]!r}, which is no file beside it: fetch the checkpoint again."
        )
    return shards


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise UnusableCheckpoint(f"{folder} has no tokenizer: put tokenizer.json and tokenizer_config.json there.")
    if not (folder / "chat_template.jinja").is_file() and "chat_template" not in read_json(
        folder / "tokenizer_config.json"
    ):
        raise UnusableCheckpoint(
            f"{folder} has no chat template, in which Z-Image's prompts are written: fetch tokenizer_config.json again."
        )
