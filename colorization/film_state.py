"""The state of a film between two portions, in memory and as a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..host.whole_files import whole_file
from .checkpoint_file import WrongCheckpoint

MARK = "hotpath_film_state"
# Of a description: keys of the weights and of each reference, which say nothing to people, and the names of the files.
CHECKPOINT, PICTURES, FILES = "checkpoint", "reference pictures", "checkpoint files"


@dataclass(frozen=True)
class FilmState:
    """tensors: what the next frames depend on, on the CPU. description: the film and options it belongs to."""

    tensors: Mapping[str, Tensor]
    description: Mapping[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    @property
    def frame(self) -> int:
        """Index of the next frame of the film."""
        return int(self.tensors["film"][0])


def check_state(state: FilmState, expected: Mapping[str, Any]) -> None:
    """Raises ValueError naming everything in which the state differs from what it is to be continued with. Its references
    may differ, and a state from before checkpoints were noted may be of any."""
    there = state.description
    differing = [
        f"{name} {there.get(name)!r} there, {value!r} here"
        for name, value in expected.items()
        if name not in (CHECKPOINT, PICTURES, FILES) and there.get(name) != value
    ]
    if there.get(CHECKPOINT, expected.get(CHECKPOINT)) != expected.get(CHECKPOINT):
        before, now = there.get(FILES), expected.get(FILES)
        other = f"{before} there, {now} here" if before != now else f"other weights under the name {now}"
        differing.append(f"checkpoint {other}")
    if differing:
        raise ValueError(f"This state cannot be continued here: {'; '.join(differing)}.")


def save_state(state: FilmState, path: Path) -> None:
    """Write a .safetensors file; a file that is there stays whole until the new one is."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    with whole_file(path) as unfinished:
        # Not save_file, which writes into a file of a name that it chooses itself, and leaves that when it is killed.
        unfinished.write_bytes(save(tensors, metadata={MARK: json.dumps(dict(state.description))}))


def load_state(path: Path) -> FilmState:
    """Raises WrongCheckpoint for a file that `save_state` did not write."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: as long as a tensor lies in the file, Windows lets nobody replace or delete it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state = FilmState(tensors, json.loads(metadata[MARK]))
        place = tensors["film"].tolist()  # frame, shot, and where that began
        if (
            not isinstance(state.description, dict)
            or len(place) != 3
            or not all(type(n) is int and n >= 0 for n in place)
        ):
            raise ValueError("it says nothing of a film")
        return state
    except FileNotFoundError:
        raise
    except Exception as error:
        raise WrongCheckpoint(
            f"{path.name} is not a colour state that can be read ({type(error).__name__}); start the film anew."
        ) from error
