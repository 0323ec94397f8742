"""What ColorMNet remembers: the numbers behind `low_memory`, `balanced` and `high_quality`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .feature_fusion import PLANES

MODES = ("balanced", "low_memory", "high_quality")


@dataclass(frozen=True)
class ColorMNetSettings:
    """Sizes of the memories (XMem, section 3.3) and how often they are written. The defaults are the paper's code's."""

    memory_every: int = 5  # a frame is remembered this often; the frames between share one read of the memory
    most_frames: int = 10  # working memory is compressed when it holds this many frames, the references included
    fewest_frames: int = 5  # what compression leaves of it
    prototypes: int = 128  # long-term elements that one compression makes
    long_term: int = 10000  # long-term elements, at most
    top_k: int = 30  # nearest elements that each place reads

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, not {getattr(self, field.name)}.")
        if self.most_frames <= self.fewest_frames:
            raise ValueError(
                f"Working memory must shrink when it is compressed: most_frames ({self.most_frames}) has to be above "
                f"fewest_frames ({self.fewest_frames})."
            )
        if self.prototypes > self.long_term:
            raise ValueError(f"{self.prototypes} prototypes do not fit into {self.long_term} long-term elements.")

    @classmethod
    def for_mode(cls, mode: str, **changes: Any) -> ColorMNetSettings:
        """The settings of a memory mode; raises ValueError for an unknown one."""
        modes: dict[str, dict[str, int]] = {
            "balanced": {},
            "low_memory": {
                "memory_every": 10,
                "most_frames": 5,
                "fewest_frames": 3,
                "prototypes": 64,
                "long_term": 5000,
            },
            "high_quality": {
                "memory_every": 3,
                "most_frames": 15,
                "fewest_frames": 7,
                "prototypes": 256,
                "long_term": 15000,
            },
        }
        if mode not in modes:
            raise ValueError(f"There is no memory mode {mode!r}; choose one of {', '.join(MODES)}.")
        return cls(**{**modes[mode], **changes})

    def nbytes(self, places: int, key: int, value: int, element: int, references: int = 1) -> int:
        """Bytes the memory of a film takes at its fullest: `places` per frame (h * w at 1/16), key and value widths,
        `element` bytes per number of a value; keys and their companions are float32."""
        rows = self.long_term + (self.most_frames + references - 1) * places
        return rows * (4 * (2 * key + 3) + PLANES * value * element)
