"""One pair of pictures judged, and all pairs of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import host
from .face_agreement import FaceAgreement, FaceFinder, compare_faces
from .measures import Incomparable, Measures, as_rgb, drawable, measure
from .perceptual import SMALLEST, Perceptual

PASSED, FAILED, REFUSED = "passed", "failed", "not comparable"


@dataclass(frozen=True)
class Thresholds:
    """What a pair must reach. A measure that was not taken is not judged."""

    min_ssim: float = 0.95
    min_cosine: float = 0.98
    max_lpips: float | None = None

    def describe(self) -> str:
        parts = [f"SSIM at least {self.min_ssim:g}", f"face cosine at least {self.min_cosine:g}"]
        return ", ".join(parts + ([f"LPIPS at most {self.max_lpips:g}"] if self.max_lpips is not None else []))


@dataclass(frozen=True)
class Pair:
    """Two pictures [H, W, 3] of one setting of the grid. problem: why they could not be compared.

    at: where in a grid they are, such as {"seed": 1, "weight": 0.8}. failures: sentences, one per threshold missed.
    """

    name: str
    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    measures: Measures | None = None
    lpips: float | None = None
    faces: FaceAgreement | None = None
    failures: tuple[str, ...] = ()
    problem: str = ""
    at: Mapping[str, float] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return REFUSED if self.measures is None else FAILED if self.failures else PASSED

    @property
    def cosine(self) -> float | None:
        """The lowest cosine of its faces; None where none were compared."""
        return self.faces.least if self.faces is not None else None

    def without_pictures(self) -> Pair:
        """The same with pictures of no pixels, for a list that may get long."""
        nothing = torch.zeros(0, 0, 3)
        return replace(self, a=nothing, b=nothing)

    def numbers(self) -> str:
        """Such as "SSIM 0.9931, PSNR 38.1 dB, face cosine 0.991"."""
        if self.measures is None:
            return self.problem
        if self.measures.identical:
            parts = ["identical"]
        else:
            parts = [f"SSIM {self.measures.ssim:.4f}", f"PSNR {self.measures.psnr:.1f} dB"]
        if self.lpips is not None:
            parts.append(f"LPIPS {self.lpips:.4f}")
        if self.cosine is not None:
            parts.append(f"face cosine {self.cosine:.4f}")
        return ", ".join(parts)

    def remarks(self) -> list[str]:
        """Everything there is to say beside the numbers."""
        said = [*self.failures] or ([self.problem] if self.problem else [])
        if self.faces is not None and self.faces.problem and self.faces.problem not in said:
            said.append(self.faces.problem)
        return said


@dataclass(frozen=True)
class Comparison:
    """All pairs of one run. notes: what holds for all of them, such as why a measure was not taken."""

    label_a: str
    label_b: str
    thresholds: Thresholds
    pairs: Sequence[Pair]
    notes: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        return bool(self.pairs) and all(pair.state == PASSED for pair in self.pairs)

    def count(self, state: str) -> int:
        return sum(pair.state == state for pair in self.pairs)

    @property
    def least_ssim(self) -> float | None:
        return min((pair.measures.ssim for pair in self.pairs if pair.measures is not None), default=None)

    @property
    def least_cosine(self) -> float | None:
        return min((pair.cosine for pair in self.pairs if pair.cosine is not None), default=None)


def compare_pair(
    name: str,
    a: Tensor,
    b: Tensor,
    thresholds: Thresholds,
    faces: FaceFinder | None = None,
    perceptual: Perceptual | None = None,
    at: Mapping[str, float] | None = None,
) -> Pair:
    """Measure and judge two pictures [H, W, C] in 0..1. What cannot be compared becomes a pair with a `problem`."""
    place = dict(at or {})
    try:
        first, second = as_rgb(a, "A"), as_rgb(b, "B")
        measures = measure(first, second)
    except Incomparable as reason:
        return incomparable(name, a, b, str(reason), place)
    # AlexNet leaves nothing of a tiny picture.
    distance = perceptual(first, second) if perceptual is not None and min(first.shape[:2]) >= SMALLEST else None
    agreement = compare_faces(faces, first, second) if faces is not None else None
    failures = _judge(measures, distance, agreement, thresholds)
    return Pair(name, first, second, measures, distance, agreement, failures, at=place)


def incomparable(
    name: str, a: Tensor | None, b: Tensor | None, problem: str, at: Mapping[str, float] | None = None
) -> Pair:
    """A pair [H, W, C] that could not be compared, and why; None for a picture that is not there, shown as black."""
    shown = [drawable(torch.zeros(0)) if picture is None else drawable(picture) for picture in (a, b)]
    return Pair(name, shown[0], shown[1], problem=problem, at=dict(at or {}))


def _judge(
    measures: Measures, distance: float | None, faces: FaceAgreement | None, thresholds: Thresholds
) -> tuple[str, ...]:
    failures = []
    if measures.ssim < thresholds.min_ssim:
        failures.append(f"SSIM {measures.ssim:.4f} is below {thresholds.min_ssim:g}.")
    if distance is not None and thresholds.max_lpips is not None and distance > thresholds.max_lpips:
        failures.append(f"LPIPS {distance:.4f} is above {thresholds.max_lpips:g}.")
    if faces is not None and faces.lost:
        failures.append(faces.problem)
    elif faces is not None and faces.least is not None and faces.least < thresholds.min_cosine:
        failures.append(f"The face cosine {faces.least:.4f} is below {thresholds.min_cosine:g}.")
    elif faces is not None and faces.in_a and faces.least is None:
        failures.append("No face of A is at the place of a face of B.")
    return tuple(failures)


def compare_batches(
    a: Tensor,
    b: Tensor,
    thresholds: Thresholds,
    faces: FaceFinder | None = None,
    perceptual: Perceptual | None = None,
    notes: Sequence[str] = (),
    each: Callable[[Pair], None] | None = None,
) -> Comparison:
    """Compare two batches [N, H, W, C] picture by picture. Raises Incomparable when they are not equally many.

    each: called with every pair as it is judged; the comparison then keeps them without their pictures.
    """
    for name, batch in (("A", a), ("B", b)):
        if batch.ndim != 4 or batch.shape[0] == 0:
            raise Incomparable(f"{name} is no batch of pictures: its shape is {tuple(batch.shape)}.")
    if a.shape[0] != b.shape[0]:
        raise Incomparable(
            f"A has {a.shape[0]} pictures and B has {b.shape[0]}: they are compared one with one, so connect batches of the "
            "same length."
        )
    pairs = []
    for number, (first, second) in enumerate(host.each(list(zip(a, b, strict=True)), "comparing")):
        pair = compare_pair(f"picture {number}", first, second, thresholds, faces, perceptual)
        if each is not None:
            each(pair)
            pair = pair.without_pictures()
        pairs.append(pair)
    return Comparison("A", "B", thresholds, pairs, tuple(notes))
