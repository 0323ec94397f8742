"""Colouring a film with ColorMNet: what happens from frame to frame.

A session takes frames in any portions and remembers. Between two memory frames the memories do not change, so their
frames are encoded, matched and fused together; only the decoder's recurrent rest runs frame by frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import host
from ...attention.topk_memory import SIMILARITIES
from ..batch_size import BatchSize
from ..colour_space import CHROMA_SCALE, normalise_luminance
from ..film_references import Encodings
from ..stage_times import StageTimes
from ..winograd import convolutions_status
from .decoder import DecoderContext
from .engine import ColorMNetEngine, ColorMNetFunctions
from .feature_fusion import PLANES
from .memory import FrameMemory, SensoryMemory
from .network import PATCH, ColorMNet, FrameKeys
from .settings import ColorMNetSettings


@dataclass(frozen=True)
class Coloured:
    """Frames in colour: chroma [T, 2, H, W] in Lab units; confidence [T, 1, h, w] in 0..1, how near the memory had
    something alike, at the network's own resolution."""

    chroma: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class EncodedReference:
    """A reference as it is remembered: its keys, [1, C, h, w] and shrinkage [1, 1, h, w], and value [2, V, h, w]."""

    key: Tensor
    shrinkage: Tensor
    selection: Tensor
    value: Tensor


class ColorMNetSession:
    """One film, or one shot of it.

    height, width: of the frames and references this session will see.
    references: Lab pictures [3, H, W], examples of colours, kept in memory for good. Without any, frame 0 must be
    given (see `colorize`). engine: how the network runs; its own when None. encodings: of references, shared by the
    shots of a film. first_given: frame 0 will be given, and is a reference that stays for good, too.
    """

    def __init__(
        self,
        network: ColorMNet,
        settings: ColorMNetSettings,
        height: int,
        width: int,
        references: Sequence[Tensor] = (),
        batch: int = 8,
        times: StageTimes | None = None,
        engine: ColorMNetEngine | None = None,
        encodings: Encodings | None = None,
        first_given: bool = False,
    ) -> None:
        self.network = network
        self.engine = engine or ColorMNetEngine(ColorMNetFunctions(network))
        self.settings = settings
        self.size = (height, width)
        self.padding = padding_to(height, width, PATCH)
        self.times = times or StageTimes(network.compute_device)
        self.frames_together = BatchSize(batch, "frames per batch")
        self.similarities_together = BatchSize(SIMILARITIES, "similarities at a time", smallest=1 << 16)
        self.time = 0  # index of the next frame
        self.last_memory = 0
        left, right, top, bottom = self.padding
        rows, columns = (height + top + bottom) // 16, (width + left + right) // 16
        widths = network.widths
        self.memory = FrameMemory(
            settings,
            rows * columns,
            len(references) + first_given,
            widths.key,
            widths.values.value,
            network.dtype,
            network.compute_device,
        )
        self.sensory = SensoryMemory(widths.values.hidden, rows, columns, network.compute_device)
        self.position = network.position_embedding(rows * 16, columns * 16)
        self._encodings = encodings or Encodings()
        self._references = [self._checked(reference) for reference in references]

    def colorize(self, luminance: Tensor, given: Mapping[int, Tensor] | None = None, last: bool = False) -> Coloured:
        """The next frames. luminance: [T, 1, H, W], L in 0..100, on the network's device.

        given: chroma [2, H, W] in Lab units of frames whose colours are known, by their index in the whole session;
        they are returned as they are and remembered. last: the film ends here, nothing need be remembered of its last
        frame; it changes no colours.
        """
        if tuple(luminance.shape[-2:]) != self.size:
            raise ValueError(f"This session colours {self.size} frames, not {tuple(luminance.shape[-2:])}.")
        given = given or {}
        if self.time == 0 and not self._references and 0 not in given:
            raise ValueError("ColorMNet needs a reference picture, or the colours of frame 0.")
        normal = F.pad(normalise_luminance(luminance), self.padding)
        if self.time == 0 and self.memory.work == 0:
            for reference in self._references:
                self._remember_reference(reference)
        parts: list[Coloured] = []
        end = self.time + len(luminance)
        while self.time < end:
            first = len(luminance) - (end - self.time)
            count, memory_frame = self._next_group(end, given)
            is_last = last and self.time + count == end
            group = normal[first : first + count]
            known = given.get(self.time + count - 1)
            remember = memory_frame and not is_last
            parts.append(self._colour_group(group, remember, is_last, known))
            self.time += count
            if remember:
                self.last_memory = self.time - 1
        return self._cut_out(parts)

    def colorize_stills(self, luminance: Tensor) -> Coloured:
        """Pictures that have nothing to do with one another, each as frame 0 of a film of its own. [T, 1, H, W]."""
        if self.memory.work == 0:
            if not self._references:
                raise ValueError("ColorMNet needs a reference picture.")
            for reference in self._references:
                self._remember_reference(reference)
        normal = F.pad(normalise_luminance(luminance), self.padding)

        def part(rows: slice) -> Coloured:
            keys = self.engine.encode_keys(normal[rows], self.position)
            readout, confidence = self._read(keys, local=False)
            context = self.network.decoder.add_readout(keys.context, readout)
            rest = torch.zeros_like(self.sensory.hidden)
            frames = []
            for index in range(len(keys.key)):
                host.current().check_interrupt()
                frames.append(self.engine.decode(context.frame(index), rest, False)[0])
            return Coloured(torch.cat(frames), confidence)

        with self.times.stage("stills"):
            parts = self.frames_together.map(len(luminance), part)
        return self._cut_out(parts)

    def _cut_out(self, parts: Sequence[Coloured]) -> Coloured:
        """The frames without their padding, chroma in Lab units."""
        left, _, top, _ = self.padding
        height, width = self.size
        chroma = torch.cat([p.chroma for p in parts])[..., top : top + height, left : left + width]
        return Coloured(chroma * CHROMA_SCALE, torch.cat([p.confidence for p in parts]))

    def _next_group(self, end: int, given: Mapping[int, Tensor]) -> tuple[int, bool]:
        """How many frames can be coloured before the memory changes, and whether the last of them is remembered."""
        if self.time == 0 or self.time in given:
            return 1, True
        due = max(self.time, self.last_memory + self.settings.memory_every)
        known = min((index for index in given if index > self.time), default=end)
        stop = min(due + 1, known, end, self.time + max(1, self.frames_together.size))
        return stop - self.time, stop - 1 == due

    def _colour_group(self, luminance: Tensor, remember: bool, is_last: bool, known: Tensor | None) -> Coloured:
        with self.times.stage("key encoder"):
            keys = self._encode(luminance)
        places = keys.key.shape[-2:]
        if known is not None:
            # Only single frames are given; memory and decoder have nothing to add.
            chroma = F.pad(known[None].to(luminance) / CHROMA_SCALE, self.padding)
            confidence = chroma.new_ones(1, 1, *places)
            if remember:
                self._remember(keys, luminance, chroma, deep=True)
            return Coloured(chroma, confidence)
        exemplar_only = self.time == 0
        with self.times.stage("memory read"):
            readout, confidence = self._read(keys, local=not exemplar_only)
        with self.times.stage("decoder"):
            context = self._with_readout(keys.context, readout)
            frames: list[Tensor] = []
            for index in range(len(luminance)):
                host.current().check_interrupt()
                closing = index == len(luminance) - 1
                update = not (closing and (remember or is_last))
                frame = context.frame(index)
                colours, self.sensory.hidden = self.engine.steps[update](
                    frame.entry, frame.skip, frame.skip8, frame.skip4, self.sensory.hidden
                )
                frames.append(colours)
        chroma = torch.cat(frames)
        if remember:
            # Frame 0 next to an exemplar leaves the sensory state at zero.
            self._remember(keys.last(), luminance[-1:], chroma[-1:], deep=not exemplar_only)
        return Coloured(chroma, confidence)

    def _encode(self, luminance: Tensor) -> FrameKeys:
        """The key encoder over all frames of a group, in as many batches as memory asks for."""
        parts: list[FrameKeys] = self.frames_together.map(
            len(luminance), lambda rows: self.engine.encode_keys(luminance[rows], self.position)
        )
        context = DecoderContext(
            *(_joined([getattr(p.context, n) for p in parts]) for n in ("entry", "skip", "skip8", "skip4"))
        )
        key, shrinkage, selection, f16 = (
            _joined([getattr(p, n) for p in parts]) for n in ("key", "shrinkage", "selection", "f16")
        )
        return FrameKeys(key, shrinkage, selection, f16, context)

    def _read(self, keys: FrameKeys, local: bool) -> tuple[Tensor, Tensor]:
        """What the memories say of a group: [T * 2, value, h, w], and how near they came, [T, 1, h, w]."""
        frames, _, rows, columns = keys.key.shape
        reading = self.similarities_together.run(
            lambda similarities: self.memory.read(keys.key, keys.selection, similarities)
        )
        readout = reading.readout.view(frames, rows * columns, PLANES, -1).permute(0, 2, 3, 1)
        readout = readout.reshape(frames * PLANES, -1, rows, columns)
        # Rounding can put a key that is the query itself a little above 0.
        confidence = reading.nearest.clamp_max(0).exp().view(frames, 1, rows, columns)
        key, value = self.sensory.last_key, self.sensory.last_value
        if local and key is not None and value is not None:
            near = self.frames_together.map(frames, lambda rows: self.engine.near(keys.key[rows], key, value))
            readout = readout + _joined(near).reshape(readout.shape)
        return readout, confidence

    def _with_readout(self, context: DecoderContext, readout: Tensor) -> DecoderContext:
        def part(rows: slice) -> DecoderContext:
            planes = slice(rows.start * PLANES, rows.stop * PLANES)
            return self.network.decoder.add_readout(context.frames(rows), readout[planes])

        parts = self.frames_together.map(len(context.skip8), part)
        entry, skip = _joined([p.entry for p in parts]), _joined([p.skip for p in parts])
        return DecoderContext(entry, skip, context.skip8, context.skip4)

    def _remember(self, keys: FrameKeys, luminance: Tensor, chroma: Tensor, deep: bool) -> None:
        """Put one frame and its colours, both padded and normalised, into the memories."""
        with self.times.stage("value encoder"):
            value = self.network.encode_value(luminance, chroma, keys.f16)
            self.memory.add(keys.key[0], keys.shrinkage[0], keys.selection[0], value)
            self.sensory.look_at(keys.key, value)
            if deep:
                self.sensory.hidden = self.network.reinforce(value, self.sensory.hidden)

    def _remember_reference(self, lab: Tensor) -> None:
        encoded = self._encoded(lab)
        self.memory.add(encoded.key[0], encoded.shrinkage[0], encoded.selection[0], encoded.value)
        self.sensory.look_at(encoded.key, encoded.value)

    def _encoded(self, lab: Tensor) -> EncodedReference:
        def encode() -> EncodedReference:
            with self.times.stage("reference"):
                picture = lab[None].to(self.network.compute_device)
                luminance = F.pad(normalise_luminance(picture[:, :1]), self.padding)
                chroma = F.pad(picture[:, 1:] / CHROMA_SCALE, self.padding)
                keys = self.engine.encode_keys(luminance, self.position)
                value = self.network.encode_value(luminance, chroma, keys.f16)
            return EncodedReference(keys.key, keys.shrinkage, keys.selection, value)

        return self._encodings.once(lab, encode)

    def renew_references(self, first: Sequence[Tensor] = ()) -> None:
        """After `load`: remember this session's references where those of the loaded one are, and behind them `first`, the
        Lab picture of a frame 0 that was given."""
        if self.memory.work == 0:
            return
        for index, lab in enumerate([*self._references, *map(self._checked, first)]):
            encoded = self._encoded(lab)
            self.memory.replace(index, encoded.key[0], encoded.shrinkage[0], encoded.selection[0], encoded.value)

    def _checked(self, reference: Tensor) -> Tensor:
        if tuple(reference.shape) != (3, *self.size):
            raise ValueError(f"A reference must be Lab of {(3, *self.size)}, not {tuple(reference.shape)}.")
        return reference

    def engines(self) -> dict[str, str]:
        """Which implementation of each kernel runs here, and why."""
        return {
            **self.engine.report(),
            "wide convolutions": convolutions_status(self.network),
            "memory read": f"tiled top-{self.settings.top_k}, {self.similarities_together.size} similarities at a time",
        }

    def notes(self) -> list[str]:
        return [*self.frames_together.notes, *self.similarities_together.notes]

    def state(self) -> dict[str, Tensor]:
        """Everything that the next frames depend on, as tensors on the CPU; see `load`."""
        return {
            "time": torch.tensor([self.time, self.last_memory]),
            **{f"memory.{name}": tensor for name, tensor in self.memory.state().items()},
            **{f"sensory.{name}": tensor for name, tensor in self.sensory.state().items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, by a session of the same network, settings, size and references."""
        self.time, self.last_memory = (int(n) for n in state["time"])
        self.memory.load(_under("memory.", state))
        self.sensory.load(_under("sensory.", state))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """In a row; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def padding_to(height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that bring a picture to multiples of `multiple`, the smaller half first."""
    across, down = -width % multiple, -height % multiple
    return across // 2, across - across // 2, down // 2, down - down // 2
