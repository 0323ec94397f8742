"""What GGUF files say of a language model and its tower: each fact with its name, and none that cannot be true."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..unusable import UnusableModel
from .file import Gguf

# Architectures by their names in GGUF, as text models, and the vision-language models that a file with a tower makes of them.
TEXT = {
    "qwen2": "qwen2", "qwen3": "qwen3", "qwen2vl": "qwen2", "qwen3vl": "qwen3", "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe", "qwen3vlmoe": "qwen3_moe", "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text",
}  # fmt: skip
NEWER = "qwen3vl_merger"
TOWERS = {
    "qwen2vl_merger": {"qwen2vl": "qwen2_vl"},
    "qwen2.5vl_merger": {"qwen2vl": "qwen2_5_vl"},
    NEWER: {"qwen3vl": "qwen3_vl", "qwen3vlmoe": "qwen3_vl_moe", "qwen35": "qwen3_5", "qwen35moe": "qwen3_5_moe"},
}
SEEING = {architecture for made_for in TOWERS.values() for architecture in made_for}
HYBRID = ("qwen35", "qwen35moe")  # with layers of linear attention


@dataclass(frozen=True)
class Source:
    """A language model and, where it sees, the file of its tower (mmproj)."""

    text: Gguf
    tower: Gguf | None

    @property
    def architecture(self) -> str:
        return architecture(self.text.metadata)

    @property
    def model_type(self) -> str:
        return TEXT[self.architecture] if self.tower is None else TOWERS[self.projector][self.architecture]

    @property
    def projector(self) -> str:
        """What kind of tower it has; "" without one."""
        return "" if self.tower is None else projector(self.tower.metadata)

    @property
    def hybrid(self) -> bool:
        return self.architecture in HYBRID

    @property
    def guessing_layers(self) -> int:
        """Layers behind the last one that guess later tokens, which nobody asks here."""
        return self.whole("nextn_predict_layers", 0)

    @property
    def layers(self) -> int:
        return self.whole("block_count") - self.guessing_layers

    def fact(self, name: str, default: Any = None) -> Any:
        """Of the language model. Raises UnusableModel where there is neither a value nor a default."""
        return told(self.text, f"{self.architecture}.{name}", default)

    def whole(self, name: str, default: int | None = None, most: int | None = None) -> int:
        """The same, a number of things. Raises UnusableModel for what cannot be one: more than `most`, or than the file has."""
        return whole(self.text, f"{self.architecture}.{name}", default, most)

    def real(self, name: str, default: float | None = None) -> float:
        """The same, a number above 0."""
        return real(self.text, f"{self.architecture}.{name}", default)

    def seen(self, name: str, default: int | None = None, most: int | None = None) -> int:
        """A number of things of the tower."""
        assert self.tower is not None
        return whole(self.tower, f"clip.vision.{name}", default, most)

    def colours(self, name: str) -> list[float]:
        """Three numbers of the tower."""
        assert self.tower is not None
        found = told(self.tower, f"clip.vision.{name}")
        if not isinstance(found, list) or len(found) != 3 or not all(map(is_real, found)):
            raise absurd(self.tower, f"clip.vision.{name}", found)
        return found


def architecture(metadata: Mapping[str, Any]) -> str:
    """What kind of model a file has, whatever it says."""
    return str(metadata.get("general.architecture"))


def projector(metadata: Mapping[str, Any]) -> str:
    """What kind of tower a file has; "" for one that has none."""
    return str(metadata.get("clip.vision.projector_type") or metadata.get("clip.projector_type") or "")


def deeper_levels(tower: Gguf) -> list[int]:
    """The blocks of a tower after which a level leaves it for the decoder's first layers."""
    names = (name.split(".") for name in tower.tensors if name.startswith("v.deepstack."))
    return sorted({int(parts[2]) for parts in names if parts[2].isdecimal()})


def told(file: Gguf, key: str, default: Any = None) -> Any:
    """What `file` says of `key`. Raises UnusableModel where there is neither a value nor a default."""
    found = file.metadata.get(key, default)
    if found is None:
        raise UnusableModel(f"{file.path} does not tell {key}: take another GGUF of the model.")
    return found


def whole(file: Gguf, key: str, default: int | None, most: int | None) -> int:
    """most: None for the largest size of a tensor, or their number: what a network could be made of."""
    found = told(file, key, default)
    if not isinstance(found, int) or (found != default and not 0 < found <= (file.largest if most is None else most)):
        raise absurd(file, key, found)
    return found


def real(file: Gguf, key: str, default: float | None) -> float:
    found = told(file, key, default)
    if not is_real(found) or found <= 0:
        raise absurd(file, key, found)
    return as_written(found)


def is_real(found: Any) -> bool:
    return isinstance(found, int | float) and math.isfinite(found)


def absurd(file: Gguf, key: str, found: Any) -> UnusableModel:
    return UnusableModel(
        f"{file.path} says that {key} is {found!r:.60}, which cannot be: fetch it again, or take another GGUF of the model."
    )


def as_written(number: Any) -> float:
    """What somebody wrote who is known to have it kept as a float32 number: 1e-06, not 9.999999974752427e-07."""
    return float(f"{float(number):.7g}")
