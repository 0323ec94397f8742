"""Colouring films our way: any size without a crop, colours at network size on the frames' own luminance, several
references, shots, filters, and a state that lets a film be done in portions and resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch_size import BatchSize
from .colormnet.session import ColorMNetSession
from .colormnet.settings import MODES, ColorMNetSettings
from .colour_space import luminance_of, rgb_to_lab, with_luminance
from .deep_exemplar.session import DeepExemplarSession
from .edge_filter import FILTERS, apply_filter
from .film_state import FilmState, check_state
from .frame_budget import colormnet_batch, deep_exemplar_batch
from .networks import LoadedNetwork
from .pictures import as_frames, network_size, resized, to_channels_first
from .shots import ShotDetector
from .smoothing import ChromaSmoother
from .stage_times import StageTimes

METHODS = ("ColorMNet", "Deep Exemplar")
SHOTS = ("off", "reset", "reference per shot")
# Deep Exemplar was trained at half the size of its result, with chroma this much too weak.
HALF_SIZE_GAIN = 1.25
FULL_SIZE_PIXELS = 1 << 23  # of frames converted together at full size


@dataclass(frozen=True)
class FilmOptions:
    """How a film is coloured.

    colour_size: short side of the picture whose colours are computed; 0 for the frames' own size. Deep Exemplar's
    networks see half of it, as they were trained. strength: factor on the chroma. temporal_smoothing: 0..1, how much
    of the last frame's chroma stays where the luminance stays. shots: forget everything at a cut, or also take the
    next reference. propagate: Deep Exemplar's feedback of the last frame.
    """

    method: str = "ColorMNet"
    colour_size: int = 432
    memory_mode: str = "balanced"
    strength: float = 1.0
    edge_filter: str = "none"
    temporal_smoothing: float = 0.0
    shots: str = "off"
    shot_threshold: float = 27.0
    propagate: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("memory mode", self.memory_mode, MODES),
            ("edge filter", self.edge_filter, FILTERS),
            ("shots", self.shots, SHOTS),
        ):
            if value not in choices:
                raise ValueError(f"There is no {name} {value!r}; choose one of {', '.join(choices)}.")
        if not 0 <= self.temporal_smoothing < 1:
            raise ValueError(f"temporal_smoothing must be from 0 to under 1, not {self.temporal_smoothing}.")


@dataclass(frozen=True)
class Reference:
    """A picture whose colours are wanted. lab: [3, h, w], any size. frame: the frame of the film that it is in
    colour, or None for an example."""

    lab: Tensor
    frame: int | None = None


class Session(Protocol):
    """What both methods' sessions have in common here."""

    def engines(self) -> dict[str, str]: ...
    def notes(self) -> list[str]: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Any) -> None: ...


@dataclass(frozen=True)
class ColouredFrames:
    """pictures: [T, H, W, 3] on the CPU, float in 0..1 or uint8; confidence: [T, h, w] in 0..1 on the CPU, at the
    networks' resolution."""

    pictures: Tensor
    confidence: Tensor


class FilmSession:
    """One film of height x width. Use it while `loaded` is resident; `network` is what that yields."""

    def __init__(
        self,
        network: Any,
        loaded: LoadedNetwork,
        options: FilmOptions,
        references: Sequence[Reference],
        height: int,
        width: int,
        stills: bool = False,
    ) -> None:
        """stills: the frames have nothing to do with one another."""
        if not references:
            raise ValueError("Connect at least one reference picture: both methods take their colours from it.")
        self.network = network
        self.options = options
        self.references = list(references)
        self.size = (height, width)
        self.device: torch.device = network.compute_device
        self.times = StageTimes(self.device)
        small = network_size(height, width, options.colour_size)
        self.halved = options.method == "Deep Exemplar"
        self.small = (max(1, small[0] // 2), max(1, small[1] // 2)) if self.halved else small
        self.batch, _ = activations(options, self.small, loaded.precision.dtype, self.device)
        self.detector = ShotDetector(options.shot_threshold) if options.shots != "off" else None
        self.smoother = ChromaSmoother(options.temporal_smoothing)
        self.at_full_size = BatchSize(max(1, FULL_SIZE_PIXELS // (height * width)), "full-size frames at a time")
        self.stills = stills
        self.frame = 0  # index of the next frame
        self.shot = 0
        self.shot_start = 0
        self.cuts: list[int] = []
        self._session = self._new_session()
        self._notes: list[str] = []

    def start_at(self, frame: int, shot: int) -> None:
        """Colour one shot of a film and nothing else: its first frame is `frame`, and it is number `shot`, both from 0."""
        self.frame = self.shot_start = frame
        self.shot = shot
        self.detector = None
        self._session = self._new_session()

    def colorize(self, frames: Tensor) -> ColouredFrames:
        """The next frames: [T, H, W, 3], float in 0..1 or uint8; the result has the same type.

        The device is waited for once, at the end.
        """
        if tuple(frames.shape[1:3]) != self.size:
            raise ValueError(
                f"This film has frames of {self.size[1]}x{self.size[0]}; these are {frames.shape[2]}x{frames.shape[1]}."
            )
        with self.times.stage("colour space in"):
            luminance = torch.cat(
                self.at_full_size.map(
                    range(len(frames)),
                    lambda part: luminance_of(to_channels_first(frames[part[0] : part[-1] + 1], self.device)),
                )
            )
            small = resized(luminance, *self.small)
        with self.times.stage("shot detection"):
            cuts = self.detector.cuts(frames) if self.detector is not None else []
        chroma, confidence = self._through_shots(small, cuts)
        with self.times.stage("colour space out"):
            cuda = self.device.type == "cuda"
            dtype = torch.uint8 if frames.dtype == torch.uint8 else torch.float32
            pictures = torch.empty(len(frames), *self.size, 3, dtype=dtype, pin_memory=cuda)
            self.at_full_size.map(range(len(frames)), lambda part: self._finish(luminance, chroma, part, pictures))
            confidence = confidence.cpu()
            if cuda:
                torch.cuda.current_stream(self.device).synchronize()
        return ColouredFrames(pictures, confidence)

    def _through_shots(self, luminance: Tensor, cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
        first, end = self.frame, self.frame + len(luminance)
        stops = {end, *(first + cut for cut in cuts)}
        if self.halved:
            stops |= {r.frame for r in self.references if r.frame is not None and first < r.frame < end}
        chroma: list[Tensor] = []
        confidence: list[Tensor] = []
        for stop in sorted(stops):
            if stop > self.frame:
                part = luminance[self.frame - first : stop - first]
                colours, certain = self._colour(part)
                chroma.append(self.smoother(part, colours))
                confidence.append(certain)
                self.frame = stop
            if stop - first in cuts and stop < end:
                self._cut()
        return torch.cat(chroma), torch.cat(confidence)

    def _colour(self, luminance: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self._session, ColorMNetSession) and self.stills:
            still = self._session.colorize_stills(luminance)
            return still.chroma, still.confidence[:, 0]
        if isinstance(self._session, ColorMNetSession):
            given = {
                reference.frame - self.shot_start: resized(reference.lab[None].to(self.device), *self.small)[0, 1:]
                for reference in self._chosen()
                if reference.frame is not None and reference.frame >= self.shot_start
            }
            coloured = self._session.colorize(luminance, given)
            return coloured.chroma, coloured.confidence[:, 0]
        due = [r for r in self._chosen() if r.frame == self.frame and self.frame > self.shot_start]
        if due:
            self._session.change_reference(self._reference_for_matching(due[-1]))
        result = self._session.colorize(luminance)
        return result.chroma * HALF_SIZE_GAIN, result.confidence[:, 0]

    def _finish(self, luminance: Tensor, chroma: Tensor, part: Sequence[int], pictures: Tensor) -> None:
        """Put the colours of some frames on their luminance at full size, and that into `pictures`."""
        rows = slice(part[0], part[-1] + 1)
        enlarged = resized(chroma[rows], *self.size)
        filtered = apply_filter(self.options.edge_filter, luminance[rows], enlarged)
        rgb = with_luminance(luminance[rows], filtered * self.options.strength).permute(0, 2, 3, 1)
        if pictures.dtype == torch.uint8:
            rgb = (rgb * 255).round().to(torch.uint8)
        pictures[rows].copy_(rgb, non_blocking=True)

    def _cut(self) -> None:
        """A new shot starts at the next frame."""
        self._notes += self._session.notes()
        self.shot += 1
        self.shot_start = self.frame
        self.cuts.append(self.frame)
        self.smoother.forget()
        self._session = self._new_session()

    def _chosen(self) -> list[Reference]:
        """The references of the present shot."""
        if self.options.shots == "reference per shot":
            return [self.references[min(self.shot, len(self.references) - 1)]]
        return self.references

    def _new_session(self) -> ColorMNetSession | DeepExemplarSession:
        chosen = self._chosen()
        if self.halved:
            before = [r for r in chosen if r.frame is not None and r.frame <= self.shot_start]
            examples = [r for r in chosen if r.frame is None]
            first = (before[-1:] or examples[:1] or chosen[:1])[0]
            # A reference that is this very frame also stands in for the frame before it.
            last = resized(first.lab[None], *self.small)[0] if first.frame == self.shot_start else None
            return DeepExemplarSession(
                self.network, *self.small, self._reference_for_matching(first),
                self.options.propagate and not self.stills, None if self.stills else last,
                self.batch, self.times, self.options.compile,
            )  # fmt: skip
        # References that are later frames are examples until then: they are known from the start.
        examples = [r for r in chosen if self.stills or r.frame != self.shot_start]
        labs = [resized(r.lab[None], *self.small)[0] for r in examples]
        settings = ColorMNetSettings.for_mode(self.options.memory_mode)
        return ColorMNetSession(self.network, settings, *self.small, labs, self.batch, self.times, self.options.compile)

    def _reference_for_matching(self, reference: Reference) -> Tensor:
        """Deep Exemplar matches references of any shape, so they keep theirs at a size like the frames'."""
        height, width = reference.lab.shape[-2:]
        return resized(reference.lab[None], *network_size(height, width, max(min(self.small), 32)))[0]

    def engines(self) -> dict[str, str]:
        return self._session.engines()

    def notes(self) -> list[str]:
        return [*self._notes, *self._session.notes(), *self.at_full_size.notes]

    def remembered_bytes(self) -> int:
        """Bytes of what is remembered between frames."""
        return sum(tensor.nbytes for tensor in self._session.state().values())

    def state(self) -> FilmState:
        """Everything the next frames depend on. Shot detection starts afresh: a cut right there may be missed."""
        tensors = {f"session.{name}": tensor for name, tensor in self._session.state().items()}
        tensors.update({f"smoother.{name}": tensor for name, tensor in self.smoother.state().items()})
        tensors["film"] = torch.tensor([self.frame, self.shot, self.shot_start])
        return FilmState(tensors, self.description())

    def load(self, state: FilmState) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to another film or other options."""
        check_state(state, self.description())
        self.frame, self.shot, self.shot_start = (int(n) for n in state.tensors["film"])
        self._session = self._new_session()
        self._session.load(state.part("session."))
        self.smoother.load(state.part("smoother."), self.device)

    def description(self) -> dict[str, Any]:
        """What a state must agree with to be continued here."""
        options = asdict(self.options)
        kept = ("method", "colour_size", "memory_mode", "propagate")
        return {"height": self.size[0], "width": self.size[1], **{name: options[name] for name in kept}}


def activations(
    options: FilmOptions, small: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """Frames per batch and bytes of activations for frames of the networks' size."""
    if options.method == "Deep Exemplar":
        return deep_exemplar_batch(*small, device)
    return colormnet_batch(*small, dtype, device, options.memory_mode)


def read_references(pictures: Sequence[Tensor], frames: str = "") -> list[Reference]:
    """pictures: each [H, W, C]. frames: the film's frame that each of them is, by commas; empty or "-" for none."""
    written = [part.strip() for part in frames.split(",")] if frames.strip() else []
    if len(written) > len(pictures):
        raise ValueError(f"reference_frames names {len(written)} frames for {len(pictures)} reference pictures.")
    numbers: list[int | None] = []
    for part in written:
        if part in ("", "-"):
            numbers.append(None)
        elif part.isdigit():
            numbers.append(int(part))
        else:
            raise ValueError(f"reference_frames must be whole numbers by commas, or - for none; {part!r} is not one.")
    numbers += [None] * (len(pictures) - len(numbers))
    cpu = torch.device("cpu")
    labs = [rgb_to_lab(to_channels_first(as_frames(picture, "a reference"), cpu))[0] for picture in pictures]
    return [Reference(lab, frame) for lab, frame in zip(labs, numbers, strict=True)]
