"""Which models the GGUF files of a folder are: parts that belong together, and the tower (mmproj) that belongs to a model."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..unusable import UnusableModel
from .file import GgufFile, cut_off, parts_of
from .source import HYBRID, SEEING, TEXT, TOWERS, architecture, projector

SUFFIX = ".gguf"
TOWER = "mmproj"
PRECISION = ("f16", "bf16", "f32", "q8_0")  # of towers, the usual one first
REMEMBERED = 512  # headers
# Of older releases of the pack that the nodes come from: "file (publisher)", "publisher / file".
ADDED = re.compile(r"\s*\([^()]*\)\s*$")
# Architectures that are refused by the name of the family, with what serves instead.
FAMILIES = {"qwen3next": "Qwen3-Next", "qwen4exp": "Qwen3.8"}
READ = "Qwen2, Qwen2.5, Qwen3, Qwen3.5, Qwen2-VL, Qwen2.5-VL and Qwen3-VL"


@dataclass(frozen=True)
class GgufModel:
    """files: of the language model, in their order. tower: the file that lets it see, where there is one that fits."""

    files: tuple[Path, ...]
    tower: Path | None = None

    @property
    def every(self) -> tuple[Path, ...]:
        return self.files if self.tower is None else (*self.files, self.tower)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json would say first of all."""
        facts = head(self.files[0])
        kind = architecture(facts)
        every, more = (facts.get(f"{kind}.{name}") for name in ("block_count", "nextn_predict_layers"))
        # What a file may say as well is told when it is loaded.
        every, more = (number if isinstance(number, int) else 0 for number in (every, more))
        layers = {"num_hidden_layers": max(0, every - more)}
        if self.tower is None:
            return {"model_type": TEXT.get(kind, kind), **layers}
        return {"model_type": TOWERS[projector(head(self.tower))][kind], **layers, "vision_config": {}}


def head(path: Path) -> dict[str, Any]:
    """The metadata before the tokenizer's lists; empty for what is no GGUF file."""
    try:
        stat = path.stat()
        return _head(path, stat.st_size, stat.st_mtime_ns)
    except (OSError, UnusableModel):
        return {}


@functools.lru_cache(REMEMBERED)
def _head(path: Path, size: int, time: int) -> dict[str, Any]:
    return GgufFile(path, head=True).metadata


def problem(path: Path) -> str:
    """What keeps a file from being whole; "" when nothing does."""
    if not path.is_file():
        return path.name
    stat = path.stat()
    return _problem(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(REMEMBERED)
def _problem(path: Path, size: int, time: int) -> str:
    try:
        end = GgufFile(path).end
    except UnusableModel as error:
        return str(error)
    return cut_off(path, size, end) if size < end else ""


def is_tower(path: Path) -> bool:
    return TOWER in path.name.lower() or architecture(head(path)) == "clip"


def of(path: Path) -> GgufModel:
    """The model that `path`, or the file that it is a part of, belongs to."""
    files = tuple(parts_of(path))
    try:
        beside = sorted(file for file in path.parent.iterdir() if file.suffix.lower() == SUFFIX)
    except OSError:
        beside = []
    return GgufModel(files, tower_of(files[0], [file for file in beside if is_tower(file)]))


def listed(folder: Path, names: Iterable[str]) -> list[GgufModel]:
    """The models among the files `names` of a folder: those that can be read, and no towers."""
    files = [folder / name for name in sorted(names) if name.lower().endswith(SUFFIX)]
    towers = [file for file in files if is_tower(file)]
    first = [file for file in files if file not in towers and next(parts_of(file)) == file]
    readable = [file for file in first if architecture(head(file)) in TEXT]
    return [GgufModel(tuple(parts_of(file)), tower_of(file, towers)) for file in readable]


def tower_of(path: Path, towers: Sequence[Path]) -> Path | None:
    """The one of `towers` that fits the model in `path`: by what both say, then by their names."""
    facts = head(path)
    fitting = [tower for tower in towers if fits(facts, head(tower))]
    return min(fitting, key=lambda tower: rank(tower.name, path.name)) if fitting else None


def rank(tower: str, model: str) -> tuple[int, int, str]:
    """By which of several towers is taken: words that its name shares with the model's, then how precise it is."""
    words = [set(re.split(r"[^a-z0-9.]+|(?<=vl)(?=-)", name.lower().removesuffix(SUFFIX))) for name in (tower, model)]
    precision = next((number for number, word in enumerate(PRECISION) if word in words[0]), len(PRECISION))
    return -len(words[0] & words[1]), precision, tower


def fits(model: dict[str, Any], tower: dict[str, Any]) -> bool:
    """Whether a tower is one of the model's kind and width."""
    kind = architecture(model)
    if kind not in TOWERS.get(projector(tower), ()):
        return False
    # Of two families whose towers are called the same only one has outputs of deeper levels.
    deep = tower.get("clip.vision.is_deepstack_layers")
    if isinstance(deep, list) and any(deep) == (kind in HYBRID):
        return False
    return bool(tower.get("clip.vision.projection_dim") == model.get(f"{kind}.embedding_length"))


def check(model: GgufModel, name: str, must_see: bool) -> None:
    """Raises UnusableModel for a model that is not whole, cannot be read, or cannot look at pictures and must."""
    if absent := [file.name for file in model.files if not file.is_file()]:
        raise UnusableModel(
            f"{model.files[0]} is one of {len(model.files)} files that belong together, and {', '.join(absent[:4])} "
            f"{'is' if len(absent) == 1 else 'are'} missing: put them beside it."
        )
    for file in model.every:
        if found := problem(file):
            raise UnusableModel(found)
    kind = architecture(head(model.files[0]))
    if kind == "clip":
        raise UnusableModel(
            f"{name} is the tower of a model (mmproj), without its language model: choose the other file beside it."
        )
    if kind not in TEXT:
        whose = FAMILIES.get(kind, f"the architecture {kind!r:.40}")
        raise UnusableModel(
            f"{name} is of {whose}, whose GGUF files are not read here ({READ} are): take the model's folder, with "
            "quantization int4 or int8 where memory is short."
        )
    if not must_see or model.tower is not None:
        return
    if kind not in SEEING:
        raise UnusableModel(
            f"{name} is a text-only model ({kind}), which cannot look at pictures: choose a -VL one, or use a text node."
        )
    others = [file.name for file in sorted(model.files[0].parent.glob(f"*{SUFFIX}")) if is_tower(file)]
    beside = f" {others[0]}, which is there, belongs to another model." if others else ""
    raise UnusableModel(
        f"{name} needs its vision tower to look at pictures: put the mmproj file of the same model into "
        f"{model.files[0].parent}.{beside}"
    )


def file_name(name: str) -> str:
    """The file that a name of a menu means, without folders; "" when it cannot mean one."""
    plain = ADDED.sub("", name.strip().replace("\\", "/")).rsplit("/", 1)[-1].strip()
    return plain if not plain or plain.lower().endswith(SUFFIX) else f"{plain}{SUFFIX}"


def is_name(name: str) -> bool:
    """Whether somebody who writes `name` means a GGUF file."""
    return ADDED.sub("", name.strip()).lower().endswith(SUFFIX)
