"""A film's references at the sizes that its networks and frames have, and what the networks made of them: once per film,
whatever its shots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..cache import BoundedCache, content_key
from .film_options import FilmOptions, Reference
from .pictures import network_size, resized
from .transfers import Copies, upload

Made = TypeVar("Made")

ENCODED_BYTES = 256 << 20  # of what networks made of references; what does not fit is made anew at every cut


class Encodings:
    """What a network made of pictures, by picture."""

    def __init__(self, limit: int = ENCODED_BYTES) -> None:
        # An entry holds its picture, so that no other one gets its id meanwhile.
        self._kept: BoundedCache[tuple[Tensor, Any]] = BoundedCache(
            "encoded references", limit, lambda entry: sum(tensor.nbytes for tensor in vars(entry[1]).values())
        )

    def once(self, picture: Tensor, make: Callable[[], Made]) -> Made:
        """What `make` gave for this very tensor, a dataclass of tensors."""
        made: Made = self._kept.get_or_compute(str(id(picture)), lambda: (picture, make()))[1]
        return made


class FilmReferences:
    """size: of the frames; small: of what the networks see, both (height, width)."""

    def __init__(
        self, references: Sequence[Reference], options: FilmOptions, size: tuple[int, int], small: tuple[int, int]
    ) -> None:
        if not references:
            raise ValueError("Connect at least one reference picture: both methods take their colours from it.")
        self.all = list(references)
        self.encodings = Encodings()
        self._per_shot = options.shots == "reference per shot"
        self._size, self._small = size, small
        self._resized: dict[tuple[int, str], Tensor] = {}  # one of each kind per reference
        self._matched: set[int] = set()

    def of_shot(self, shot: int) -> list[Reference]:
        """The references of shot number `shot`, from 0."""
        return [self.all[min(shot, len(self.all) - 1)]] if self._per_shot else self.all

    def small(self, reference: Reference) -> Tensor:
        """Lab [3, h, w] of the networks' size."""
        return self._once("small", reference, lambda: resized(reference.lab[None], *self._small)[0])

    def for_matching(self, reference: Reference) -> Tensor:
        """Lab [3, h, w] for Deep Exemplar, which matches references of any shape: they keep theirs, at a size like the
        frames'."""
        self._matched.add(self._number(reference))
        height, width = reference.lab.shape[-2:]
        size = network_size(height, width, max(min(self._small), 32))
        return self._once("matched", reference, lambda: resized(reference.lab[None], *size)[0])

    def chroma(self, reference: Reference, copies: Copies) -> Tensor:
        """[1, 2, H, W] of the frames' size on the device."""
        arriving = upload(copies, reference.lab[None, 1:])
        return resized(copies.arrived(arriving.tensor, arriving.mark), *self._size)

    @functools.cached_property
    def keys(self) -> list[str]:
        """Of each reference one that changes with it."""
        return [content_key(reference.lab, reference.frame) for reference in self.all]

    def unmatched(self) -> list[str]:
        """A sentence on the examples that no frame was matched with so far."""
        left = [
            number
            for number, reference in enumerate(self.all)
            if reference.frame is None and number not in self._matched
        ]
        if self._per_shot or not left:
            return []
        named = f"reference {left[0] + 1} was" if len(left) == 1 else f"references {_listed(left)} were"
        return [
            f"Deep Exemplar matches one reference at a time, and {named} not used: give each the frame in reference_frames "
            "that it is, or choose ColorMNet, which looks at all of them."
        ]

    def _number(self, reference: Reference) -> int:
        return next(number for number, other in enumerate(self.all) if other is reference)

    def _once(self, kind: str, reference: Reference, make: Callable[[], Tensor]) -> Tensor:
        key = self._number(reference), kind
        if key not in self._resized:
            self._resized[key] = make()
        return self._resized[key]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number + 1) for number in numbers)
