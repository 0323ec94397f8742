"""Colouring films our way: any size without a crop, colours at network size on the frames' own luminance, several
references, shots, filters, and a state that lets a film be done in portions and resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .colormnet.engine import ColorMNetEngine, ColorMNetFunctions
from .colormnet.session import ColorMNetSession
from .colormnet.settings import ColorMNetSettings
from .deep_exemplar.color_net import HALF_SIZE_GAIN
from .deep_exemplar.engine import DeepExemplarEngine, DeepExemplarFunctions
from .deep_exemplar.session import DeepExemplarSession
from .edge_filter import apply_filter
from .film_options import FilmOptions, Reference
from .film_references import FilmReferences
from .film_room import activations, computed_size
from .film_state import CHECKPOINT, FILES, PICTURES, FilmState, check_state
from .full_size import conversions, frames_of, luminance_of_frames
from .networks import LoadedNetwork
from .pictures import resized
from .shots import Segment, ShotDetector
from .smoothing import ChromaSmoother
from .stage_times import StageTimes
from .transfers import Copies, Download, Upload, copies_for, download, upload

OTHER_REFERENCES = (
    "The references, or the frames they are, differ from those that the state was taken with: the film goes on with the ones "
    "that are connected now, and with what it remembers of its own frames."
)


@dataclass(frozen=True)
class ColouredFrames:
    """pictures: [T, H, W, 3] on the CPU, float in 0..1 or uint8; confidence: [T, h, w] in 0..1 on the CPU, at the
    networks' resolution."""

    pictures: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class PreparedFrames:
    """Frames on their way to the device, and where they are cut."""

    upload: Upload
    segments: list[Segment]


@dataclass(frozen=True)
class ColouringFrames:
    """Frames that are queued to be coloured and copied back."""

    pictures: Download
    confidence: Download

    def wait(self) -> ColouredFrames:
        """From any thread."""
        return ColouredFrames(self.pictures.wait(), self.confidence.wait())


@dataclass(frozen=True)
class Snapshot:
    """A film's state on the device, as what is queued so far will leave it."""

    tensors: Mapping[str, Tensor]
    description: Mapping[str, Any]
    copies: Copies
    mark: Any

    def for_any_thread(self) -> Snapshot:
        """Itself, with its tensors on the CPU where only the thread that computes may use the device."""
        if self.copies.from_any_thread:
            return self
        return replace(self, tensors={name: tensor.cpu() for name, tensor in self.tensors.items()})

    def state(self) -> FilmState:
        """The state on the CPU; waits for the device. From any thread, of a snapshot that is for it."""
        self.copies.host_waits(self.mark)
        return FilmState({name: tensor.cpu() for name, tensor in self.tensors.items()}, self.description)


class FilmSession:
    """One film of height x width. Use it while `loaded` is resident; `network` is what that yields.

    `colorize` colours frames and waits for them. A job that has more to do meanwhile calls `prepare` ahead of time,
    then for each segment `begin_shot` if it is a cut, and `colour`; neither waits for the device.
    """

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
        self.network = network
        self.options = options
        self.size = (height, width)
        self.device: torch.device = network.compute_device
        self.times = StageTimes(self.device)
        self.small = computed_size(options, height, width)
        self.references = FilmReferences(references, options, self.size, self.small)
        self.checkpoint = loaded.identity, loaded.names
        self.batch, _ = activations(options, self.size, loaded.precision.dtype, self.device)
        self.copies = copies_for(self.device)
        self.detector = ShotDetector(options.shot_threshold) if options.shots != "off" else None
        self.seen: Tensor | None = None  # the last frame as the detector saw it
        self.smoother = ChromaSmoother(options.temporal_smoothing)
        self.at_full_size = conversions(height, width, self.device)
        self.stills = stills
        self.frame = 0  # index of the next frame
        self.shot = 0
        self.shot_start = 0
        self.last_cut = 0  # that a detector found: a part of a film may begin behind it
        self.cuts: list[int] = []
        # One per film: what was recorded for one shot serves the next.
        self._engine = self._new_engine(loaded)
        self._given: dict[int, Tensor] = {}
        self._notes: list[str] = []
        self._session = self._new_session()

    def start_at(self, frame: int, shot: int, detector: ShotDetector | None = None) -> None:
        """Colour a film from `frame` on, which is in shot number `shot`, both from 0. detector: that has seen what comes
        before; without one, that shot and nothing else is coloured."""
        self.frame = self.shot_start = frame
        self.shot = shot
        self.detector = detector
        self.last_cut = frame if detector is None else detector.last_cut
        self._renew_session()

    def colorize(self, frames: Tensor) -> ColouredFrames:
        """The next frames: [T, H, W, 3], float in 0..1 or uint8; the result has the same type.

        The device is waited for once, at the end.
        """
        prepared = self.prepare(frames)
        queued: list[ColouringFrames] = []
        for segment in prepared.segments:
            if segment.cut:
                self.begin_shot()
            queued.append(self.colour(prepared, segment))
        done = [part.wait() for part in queued]
        if len(done) == 1:
            return done[0]
        return ColouredFrames(torch.cat([d.pictures for d in done]), torch.cat([d.confidence for d in done]))

    def prepare(self, frames: Tensor) -> PreparedFrames:
        """Look for cuts in the next frames and start their way to the device. In the order of the film; from another
        thread if one likes, and ahead of `colour`."""
        if tuple(frames.shape[1:3]) != self.size:
            raise ValueError(
                f"This film has frames of {self.size[1]}x{self.size[0]}; these are {frames.shape[2]}x{frames.shape[1]}."
            )
        whole = [Segment(0, len(frames))]
        segments = self.detector.segments(frames) if self.detector is not None else whole
        return PreparedFrames(upload(self.copies, frames), segments)

    def colour(self, prepared: PreparedFrames, segment: Segment) -> ColouringFrames:
        """Queue the colouring of one segment, the next one of the film."""
        arriving = prepared.upload.tensor[segment.first : segment.stop]
        frames = self.copies.arrived(arriving, prepared.upload.mark)
        with self.times.stage("colour space in"):
            luminance = torch.cat(
                self.at_full_size.map(len(frames), lambda rows: luminance_of_frames(frames[rows], self.device))
            )
            small = resized(luminance, *self.small)
        known = self._known(self.frame, self.frame + len(frames))
        chroma, confidence = self._through(small)
        with self.times.stage("colour space out"):
            dtype = torch.uint8 if frames.dtype == torch.uint8 else torch.float32
            pictures = Download(self.copies, (len(frames), *self.size, 3), dtype)
            self.at_full_size.map(
                len(frames), lambda rows: self._finish(luminance, chroma, known, rows, pictures, dtype)
            )
            certain = download(self.copies, confidence)
        self.seen = segment.seen
        return ColouringFrames(pictures, certain)

    def _through(self, luminance: Tensor) -> tuple[Tensor, Tensor]:
        """Chroma and confidence of frames of one shot."""
        first, end = self.frame, self.frame + len(luminance)
        stops = {end}
        if self.options.deep_exemplar:
            stops |= {r.frame for r in self.references.all if r.frame is not None and first < r.frame < end}
        chroma: list[Tensor] = []
        confidence: list[Tensor] = []
        for stop in sorted(stops):
            part = luminance[self.frame - first : stop - first]
            known = self._known(self.frame, stop)
            colours, certain = self._colour(part)
            chroma.append(self.smoother(part, colours, known))
            confidence.append(certain)
            self.frame = stop
        return torch.cat(chroma), torch.cat(confidence)

    def _known(self, first: int, end: int) -> dict[int, Reference]:
        """The references that are one of these frames, by its place among them; Deep Exemplar only matches with them."""
        if self.options.deep_exemplar or self.stills:
            return {}
        chosen = self.references.of_shot(self.shot)
        return {r.frame - first: r for r in chosen if r.frame is not None and first <= r.frame < end}

    def _colour(self, luminance: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self._session, ColorMNetSession) and self.stills:
            still = self._session.colorize_stills(luminance)
            return still.chroma, still.confidence[:, 0]
        if isinstance(self._session, ColorMNetSession):
            coloured = self._session.colorize(luminance, self._given)
            return coloured.chroma, coloured.confidence[:, 0]
        chosen = self.references.of_shot(self.shot)
        due = [r for r in chosen if r.frame == self.frame and self.frame > self.shot_start]
        if due:
            self._session.change_reference(self.references.for_matching(due[-1]))
        result = self._session.colorize(luminance)
        return result.chroma * HALF_SIZE_GAIN, result.confidence[:, 0]

    def _finish(
        self,
        luminance: Tensor,
        chroma: Tensor,
        known: Mapping[int, Reference],
        rows: slice,
        pictures: Download,
        dtype: torch.dtype,
    ) -> None:
        """Put the colours of some frames on their luminance at full size, and that into `pictures`. What is known of them
        at full size neither went through the networks' size nor needs a filter."""
        enlarged = resized(chroma[rows], *self.size)
        filtered = apply_filter(self.options.edge_filter, luminance[rows], enlarged)
        given = [index for index in range(rows.start, rows.stop) if index in known]
        if given:
            filtered = filtered.clone()
            for index in given:
                place = index - rows.start
                filtered[place : place + 1] = self.references.chroma(known[index], self.copies)
        pictures.put(rows, frames_of(luminance[rows], filtered * self.options.strength, dtype))

    def begin_shot(self) -> None:
        """A new shot starts at the next frame."""
        self._notes += self._session.notes()
        self.shot += 1
        self.shot_start = self.last_cut = self.frame
        self.cuts.append(self.frame)
        self.smoother.forget()
        self._renew_session()

    def _renew_session(self) -> None:
        # First the old one: two of ColorMNet's memories need not have room together.
        del self._session
        self._session = self._new_session()

    def _new_session(self) -> ColorMNetSession | DeepExemplarSession:
        chosen = self.references.of_shot(self.shot)
        if self.options.deep_exemplar:
            before = [r for r in chosen if r.frame is not None and r.frame <= self.shot_start]
            examples = [r for r in chosen if r.frame is None]
            latest = sorted(before, key=lambda reference: reference.frame or 0)[-1:]
            first = (latest or examples[:1] or chosen[:1])[0]
            # A reference that is this very frame also stands in for the frame before it.
            last = self.references.small(first) if first.frame == self.shot_start else None
            return DeepExemplarSession(
                self.network, *self.small, self.references.for_matching(first),
                self.options.propagate and not self.stills, None if self.stills else last, self.batch, self.times,
                self._engine if isinstance(self._engine, DeepExemplarEngine) else None, self.references.encodings,
            )  # fmt: skip
        # References that are later frames are examples until then: they are known from the start.
        labs = [self.references.small(r) for r in chosen if self.stills or r.frame != self.shot_start]
        settings = ColorMNetSettings.for_mode(self.options.memory_mode)
        self._given = {
            r.frame - self.shot_start: self.references.small(r)[1:].to(self.device)
            for r in chosen
            if r.frame is not None and r.frame >= self.shot_start
        }
        engine = self._engine if isinstance(self._engine, ColorMNetEngine) else None
        return ColorMNetSession(
            self.network, settings, *self.small, labs, self.batch, self.times, engine, self.references.encodings,
            first_given=0 in self._given and not self.stills,
        )  # fmt: skip

    def _new_engine(self, loaded: LoadedNetwork) -> ColorMNetEngine | DeepExemplarEngine:
        options, network = self.options, self.network
        # The host may hand out another copy of the network from one job to the next.
        name = (id(network), options.method, options.compile, options.attention)
        if options.deep_exemplar:
            matching = loaded.kept(name, lambda: DeepExemplarFunctions(network, options.compile))
            return DeepExemplarEngine(matching)
        functions = loaded.kept(name, lambda: ColorMNetFunctions(network, options.compile, options.attention))
        return ColorMNetEngine(functions, options.local_attention)

    def engines(self) -> dict[str, str]:
        return self._session.engines()

    def notes(self) -> list[str]:
        unmatched = self.references.unmatched() if self.options.deep_exemplar else []
        return [*self._notes, *self._session.notes(), *self.at_full_size.notes, *unmatched]

    def remembered_bytes(self) -> int:
        """Bytes of what is remembered between frames."""
        return sum(tensor.nbytes for tensor in self._session.state().values())

    def snapshot(self) -> Snapshot:
        """Everything the next frames depend on, without waiting for the device."""
        tensors = {f"session.{name}": tensor for name, tensor in self._session.state().items()}
        tensors.update({f"smoother.{name}": tensor for name, tensor in self.smoother.state().items()})
        tensors["film"] = torch.tensor([self.frame, self.shot, self.shot_start])
        if self.seen is not None:
            tensors["shots.seen"] = self.seen
            tensors["shots.last_cut"] = torch.tensor([self.last_cut])
        return Snapshot(tensors, self.description(), self.copies, self.copies.mark())

    def state(self) -> FilmState:
        return self.snapshot().state()

    def load(self, state: FilmState) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to another film, other options or another
        checkpoint. References may be others, as many: what was remembered of those before gives way to them."""
        here = self.description()
        check_state(state, here)
        try:
            self.frame, self.shot, self.shot_start = (int(n) for n in state.tensors["film"])
            self._renew_session()
            self._session.load(state.part("session."))
            if state.description.get(PICTURES, here[PICTURES]) != here[PICTURES]:
                self._notes.append(OTHER_REFERENCES)
                if isinstance(self._session, ColorMNetSession):
                    at_start = [r for r in self.references.of_shot(self.shot) if r.frame == self.shot_start]
                    self._session.renew_references([self.references.small(r) for r in at_start])
            self.smoother.load(state.part("smoother."), self.device)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"This state cannot be continued here: it is of a network of other widths, or damaged ({error}). Use the "
                "checkpoint it came from, or start the film anew."
            ) from error
        if isinstance(self._session, DeepExemplarSession):
            chosen = self.references.of_shot(self.shot)
            passed = [r for r in chosen if r.frame is not None and self.shot_start < r.frame < self.frame]
            if passed:
                latest = max(passed, key=lambda reference: reference.frame or 0)
                self._session.change_reference(self.references.for_matching(latest))
        shots = state.part("shots.")
        # A state of an older version says nothing of the cut, which was where its shot began.
        self.last_cut = int(shots["last_cut"][0]) if "last_cut" in shots else self.shot_start
        if self.detector is not None and "seen" in shots:
            self.seen = shots["seen"]
            self.detector.go_on(self.frame, self.last_cut, self.seen)

    def description(self) -> dict[str, Any]:
        """What a state must agree with to be continued here, and which references it remembers."""
        options = self.options.deciding()
        kept = [name for name in ("method", "colour_size", "memory_mode", "propagate") if name in options]
        remembered = {} if self.options.deep_exemplar else {"references": len(self.references.all)}
        return {
            "height": self.size[0],
            "width": self.size[1],
            **{name: options[name] for name in kept},
            **remembered,
            CHECKPOINT: self.checkpoint[0],
            FILES: self.checkpoint[1],
            PICTURES: self.references.keys,
        }
