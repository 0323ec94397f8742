"""Colouring a film with Deep Exemplar: the last frame's colours run along, all else is computed in batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import host
from ..batch_size import BatchSize
from ..colour_space import LUMINANCE_CENTRE, lab_to_rgb
from ..film_references import Encodings
from ..stage_times import StageTimes
from ..winograd import convolutions_status
from .engine import DeepExemplarEngine, DeepExemplarFunctions
from .networks import DeepExemplar
from .warp import legal_size

CELL = 4  # correspondence is found between cells of 4x4 pixels


@dataclass(frozen=True)
class ReferenceColours:
    """A reference as frames are compared with it: features [M, C] of unit length and Lab colours [M, 3] per cell."""

    features: Tensor
    colours: Tensor


@dataclass(frozen=True)
class Matched:
    """What correspondence says of T frames: ab [T, 2, H, W] of the best matches, similarity [T, 1, H, W] in -1..1,
    and index [T, cells], which cell of the reference it was."""

    chroma: Tensor
    similarity: Tensor
    index: Tensor


@dataclass(frozen=True)
class Coloured:
    """chroma [T, 2, H, W] in Lab units; confidence [T, 1, H, W] in 0..1, the similarity of the best match."""

    chroma: Tensor
    confidence: Tensor


class DeepExemplarSession:
    """One film, or one shot of it.

    reference: Lab picture [3, h, w] of any size. propagate: feed each frame's colours to the next; without it every
    frame starts from nothing. last: Lab picture of the frame's size that stands before frame 0 (zeros when None).
    engine: how the networks run; its own when None. encodings: of references, shared by the shots of a film.
    """

    def __init__(
        self,
        networks: DeepExemplar,
        height: int,
        width: int,
        reference: Tensor,
        propagate: bool = True,
        last: Tensor | None = None,
        batch: int = 8,
        times: StageTimes | None = None,
        engine: DeepExemplarEngine | None = None,
        encodings: Encodings | None = None,
    ) -> None:
        self._encodings = encodings or Encodings()
        self.networks = networks
        self.engine = engine or DeepExemplarEngine(DeepExemplarFunctions(networks))
        self.size = (height, width)
        self.padding = _padding(height, width)
        self.propagate = propagate
        self.times = times or StageTimes(networks.compute_device)
        self.frames_together = BatchSize(batch, "frames per batch")
        self.time = 0
        self.reference = self._prepare(reference)
        self.last: Tensor | None = None  # [1, 3, H, W], L centred
        if last is not None:
            self.last = _centred(_padded(last[None].to(networks.compute_device), self.padding))

    def change_reference(self, reference: Tensor) -> None:
        """Match the next frames with another reference, Lab [3, h, w]."""
        self.reference = self._prepare(reference)

    def colorize(self, luminance: Tensor) -> Coloured:
        """The next frames: [T, 1, H, W], L in 0..100, on the networks' device."""
        if tuple(luminance.shape[-2:]) != self.size:
            raise ValueError(f"This session colours {self.size} frames, not {tuple(luminance.shape[-2:])}.")
        padded = _padded(luminance, self.padding)
        parts = self.frames_together.map(len(padded), lambda rows: self.match(padded[rows]))
        matched_chroma = torch.cat([part.chroma for part in parts])
        similarity = torch.cat([part.similarity for part in parts])
        frames: list[Tensor] = []
        with self.times.stage("colour network"):
            centred = padded - LUMINANCE_CENTRE
            known = torch.cat((centred, matched_chroma, similarity), dim=1)
            for index in range(len(padded)):
                host.current().check_interrupt()
                frames.append(self._colour(known[index : index + 1], centred[index : index + 1]))
        chroma = torch.cat(frames)
        self.time += len(luminance)
        height, width = self.size
        return Coloured(chroma[..., :height, :width], similarity[..., :height, :width].clamp(0, 1))

    def _colour(self, known: Tensor, luminance: Tensor) -> Tensor:
        last = torch.zeros_like(known[:, :3]) if self.last is None else self.last
        chroma = self.engine.step(torch.cat((known, last), dim=1).to(self.networks.dtype))[0]
        if self.propagate:
            self.last = torch.cat((luminance, chroma), dim=1)
        return chroma

    def match(self, luminance: Tensor) -> Matched:
        """Correspondence of frames with the reference. luminance: [T, 1, H, W] padded, L in 0..100."""
        with self.times.stage("features"):
            grey = (luminance / 100).expand(-1, 3, -1, -1)
            features = self.networks.warp.frame_features(self.engine.vgg(grey))
        with self.times.stage("match"):
            frames, channels, rows, columns = features.shape
            theta = features.flatten(2).transpose(1, 2).reshape(-1, channels)
            score, index = self.engine.find_matches(theta, self.reference.features)
            chroma = self.reference.colours[index, 1:].view(frames, rows, columns, 2).permute(0, 3, 1, 2)
            similarity = score.view(frames, 1, rows, columns)
        return Matched(_enlarged(chroma), _enlarged(similarity), index.view(frames, -1))

    def _prepare(self, reference: Tensor) -> ReferenceColours:
        return self._encodings.once(reference, lambda: self._encoded(reference))

    def _encoded(self, reference: Tensor) -> ReferenceColours:
        picture = reference[None].to(self.networks.compute_device)
        picture = _padded(picture, _padding(*picture.shape[-2:]))
        with self.times.stage("reference"):
            features = self.networks.warp.reference_features(self.engine.vgg(lab_to_rgb(picture)))
            colours = F.avg_pool2d(picture, CELL)
        return ReferenceColours(features[0].flatten(1).T.contiguous(), colours[0].flatten(1).T.contiguous())

    def engines(self) -> dict[str, str]:
        """Which implementation of each kernel runs here, and why."""
        return {**self.engine.report(), "wide convolutions": convolutions_status(self.networks)}

    def notes(self) -> list[str]:
        return list(self.frames_together.notes)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next frames depend on, copied; see `load`."""
        state = {"time": torch.tensor([self.time])}
        if self.last is not None:
            state["last"] = self.last.clone()
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, by a session of the same networks, size and reference."""
        self.time = int(state["time"][0])
        self.last = state["last"].to(self.networks.compute_device) if "last" in state else None
        wanted = (1, 3, *legal_size(*self.size))
        if self.last is not None and self.last.shape != wanted:
            raise RuntimeError(f"its last frame is {list(self.last.shape)} and should be {list(wanted)}")


def _padding(height: int, width: int) -> tuple[int, int, int, int]:
    legal = legal_size(height, width)
    return 0, legal[1] - width, 0, legal[0] - height


def _padded(pictures: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Border pixels repeated at the right and bottom up to a size the networks take."""
    return F.pad(pictures, padding, mode="replicate") if any(padding) else pictures


def _centred(lab: Tensor) -> Tensor:
    return torch.cat((lab[:, :1] - LUMINANCE_CENTRE, lab[:, 1:]), dim=1)


def _enlarged(cells: Tensor) -> Tensor:
    return F.interpolate(cells, scale_factor=CELL, mode="nearest")
