"""One picture as one job: a plain description in, a file out, for the command line and for workers anywhere.

A job's id is the MD5 of everything its picture depends on. It stands in the file's name and in the file, so a job that
was done is known by its file, whoever did it, and is not done again.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import host
from ..cache import content_key
from ..host.whole_files import whole_file
from .adapter_files import UnusableAdapter
from .adapters import Adapter, stack_identity
from .denoising import Guidance
from .folders import existing
from .generation import Drawn, Pipeline, generate
from .loading import MODELS, LoadOptions, ZImage
from .prompts import MAX_TOKENS
from .requests import Request, check

KEY = "hotpath"  # the PNG text that holds a picture's description
STEM_LENGTH = 40
KINDS = {str: "text", int: "a whole number", float: "a number", tuple: "a list"}

_kept: ZImage | None = None
_lock = threading.Lock()


@dataclass(frozen=True)
class Item:
    """One picture to draw.

    model: a folder under the model paths or anywhere. loras: (file, strength), by path or by name under models/loras.
    dtype, attention, compile, precision: see `LoadOptions`; of these, dtype, precision and a lossy attention are part of the
    picture's id, and so are tiles that are always taken. name: begins the file's name; "" makes it of the prompt.
    """

    model: str
    prompt: str
    negative: str = ""
    seed: int = 0
    width: int = 1024
    height: int = 1024
    steps: int = 8
    guidance: float = 0.0
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    max_tokens: int = MAX_TOKENS
    loras: tuple[tuple[str, float], ...] = ()
    dtype: str = "auto"
    attention: str = "auto"
    compile: str = "none"
    precision: str = "none"
    tiling: str = "auto"
    prompt_cache: str = "memory"
    name: str = ""

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Item:
        """The item of a plain mapping, such as a line of JSON. Raises ValueError, naming the key, for what is wrong."""
        known = {field.name: type(field.default) for field in fields(cls)} | {"model": str, "prompt": str}
        if unknown := sorted(description.keys() - known.keys()):
            raise ValueError(f"{unknown[0]!r} is no part of a picture's description: there are {', '.join(known)}.")
        values: dict[str, Any] = {}
        for key, value in description.items():
            kind = known[key]
            if key == "loras" and isinstance(value, list | tuple):
                values[key] = tuple(_lora(entry) for entry in value)
            elif kind is float and isinstance(value, int) and not isinstance(value, bool):
                values[key] = float(value)
            elif isinstance(value, kind) and not isinstance(value, bool):
                values[key] = value
            else:
                raise ValueError(f"{key} is {value!r}, and should be {KINDS[kind]}.")
            if kind is float and not math.isfinite(values[key]):
                raise ValueError(f"{key} is {value!r}, and should be a finite number.")
        for key in ("model", "prompt"):
            if not str(values.get(key, "")).strip():
                raise ValueError(f"A picture's description needs a {key}, which is missing or empty.")
        return cls(**values)

    def request(self) -> Request:
        return Request(
            self.prompt,
            self.negative,
            self.width,
            self.height,
            self.steps,
            Guidance(self.guidance, self.cfg_normalization, self.cfg_truncation),
            self.seed,
            max_tokens=self.max_tokens,
            tiling=self.tiling,
            prompt_cache=self.prompt_cache,
        )

    def load_options(self) -> LoadOptions:
        return LoadOptions(self.dtype, self.attention, self.compile, self.precision)


def _lora(entry: Any) -> tuple[str, float]:
    if isinstance(entry, str):
        return entry, 1.0
    if isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str):
        strength = entry[1]
        if isinstance(strength, int | float) and not isinstance(strength, bool) and math.isfinite(strength):
            return entry[0], float(strength)
    raise ValueError(f"{entry!r} is no LoRA: give a file, or a file and its strength, a number such as 0.8.")


@dataclass(frozen=True)
class Job:
    """An item with its checkpoint and LoRA files found: what is drawn, its id, and where its file goes."""

    item: Item
    pipeline: Pipeline
    id: str
    file: Path

    def is_done(self) -> bool:
        """Whether the file is there and says that it is this job's."""
        return described(self.file).get("id") == self.id

    def run(self) -> Drawn:
        """Draw the picture and write its file, whole or not at all."""
        drawn = generate(self.pipeline, self.item.request())
        write_picture(drawn.pictures[0], self.file, self.description())
        return drawn

    def description(self) -> dict[str, Any]:
        """What stands in the file: enough to draw the picture again."""
        shown = {field.name: getattr(self.item, field.name) for field in fields(self.item)}
        shown["model"] = self.pipeline.model.checkpoint.name
        return {"id": self.id, **shown}


def prepare(item: Item, output_folder: Path) -> Job:
    """Find the item's checkpoint and LoRA files; nothing is loaded yet. Raises what `generate` would, beforehand."""
    model = _model(item)
    adapters = tuple(Adapter(adapter_file(name), strength) for name, strength in item.loras)
    request = item.request()
    check(request, model)
    key = content_key(
        model.identity,
        stack_identity(adapters),
        request.prompt,
        request.negative if item.guidance > 0 else "",
        [request.width, request.height, request.steps, request.seed, request.max_tokens],
        [item.guidance, item.cfg_normalization, item.cfg_truncation],
        *(["tiles"] if item.tiling == "always" else []),
    )
    stem = re.sub(r"[^\w-]+", "_", item.name or item.prompt).strip("_")[:STEM_LENGTH] or "picture"
    file = output_folder / f"{stem}_{item.seed}_{key[:12]}.png"
    return Job(item, Pipeline(model, adapters), key, file)


def _model(item: Item) -> ZImage:
    """The item's checkpoint, kept for the next item: a worker draws many pictures with one."""
    global _kept
    model = MODELS.get(item.model, item.load_options(), anywhere=True)
    with _lock:
        if _kept is not None and _kept is not model:
            _kept.release()
        _kept = model
    return model


def forget_models() -> None:
    """Let go of the checkpoint that `run_item` kept, and of all others."""
    global _kept
    with _lock:
        _kept = None
    MODELS.clear()


def adapter_file(name: str) -> Path:
    """The LoRA file `name` means: a path, else a file under models/loras. Raises ModelNotFound or UnusableAdapter."""
    path = existing(name) if name.strip() else None
    if path is None:
        return host.current().model_path("loras", name)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UnusableAdapter(
                f"{path} holds {len(files)} safetensors files, and a LoRA folder holds one: name the file."
            )
        return files[0]
    return path


def run_item(item: Mapping[str, Any], output_folder: str | Path) -> dict[str, Any]:
    """Draw one picture: the whole job of a worker, from plain values to plain values, both fit for JSON and pickle.

    item: the fields of `Item`, of which model and prompt must be there. output_folder: made when it is missing.
    Returns {"id": MD5 of what the picture depends on, "files": [path of the PNG], "skipped": True when the file was there
    already, "seconds": by stage, "report": text}. The picture depends on the item alone, not on the worker or on what it
    drew before; the file appears whole or not at all, so a job may be tried again, anywhere, at any time. Raises ValueError
    (also as UnusableCheckpoint and UnusableAdapter) or ModelNotFound for an item that no try can draw, and the host's
    interrupt when it was stopped. The checkpoint stays loaded for the next item until `forget_models`.
    """
    job = prepare(Item.of(item), Path(output_folder))
    if job.is_done():
        return {"id": job.id, "files": [str(job.file)], "skipped": True, "seconds": {}, "report": ""}
    drawn = job.run()
    return {
        "id": job.id,
        "files": [str(job.file)],
        "skipped": False,
        "seconds": drawn.seconds,
        "report": drawn.report,
    }


def described(file: Path) -> dict[str, Any]:
    """What a PNG of ours says about itself; {} for a file that is missing, damaged or somebody else's."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            found = json.loads(picture.info.get(KEY, "{}"))
            picture.load()
    except (OSError, ValueError, SyntaxError):
        return {}
    return found if isinstance(found, dict) else {}


def write_picture(picture: Tensor, file: Path, description: Mapping[str, Any]) -> None:
    """Write [H, W, 3] in 0..1 as PNG with `description` in its text, to a temporary name first."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels = (picture * 255).round().clamp(0, 255).byte().numpy()
    told = PngInfo()
    told.add_itxt(KEY, json.dumps(description, ensure_ascii=False))
    with whole_file(file) as unfinished:
        Image.fromarray(pixels).save(unfinished, format="PNG", pnginfo=told)
