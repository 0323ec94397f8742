"""A whole clip in memory, from IMAGE to IMAGE, with progress, preview and report; the job of our nodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import host
from .film import ColouredFrames, ColouringFrames, FilmSession
from .film_options import FilmOptions, Reference
from .film_room import activations, computed_size, full_size_room, memory_room
from .film_state import FilmState
from .networks import AUTOMATIC, COLORMNET_LICENCE, LoadedNetwork, load_colormnet, load_deep_exemplar
from .pictures import as_frames, is_grey, network_size
from .report import JobReport

PORTIONS = (20, 10, 5)
PORTION_BYTES = 512 << 20  # two of them are held beside the film
PREVIEW_SIDE = 512
GREY_REFERENCE = "has next to no colour, so it gives the film none; connect a picture in colour."


@dataclass(frozen=True)
class ColouredClip:
    """pictures: [T, H, W, 3] float; confidence: [T, H, W] in 0..1; state: where the film can go on."""

    pictures: Tensor
    confidence: Tensor
    state: FilmState
    report: str


def load_method(options: FilmOptions, checkpoint: str = AUTOMATIC, precision: str = AUTOMATIC) -> LoadedNetwork:
    """The networks of the options' method."""
    if options.deep_exemplar:
        return load_deep_exemplar(precision)
    return load_colormnet(checkpoint, precision)


def colorize_clip(
    loaded: LoadedNetwork,
    images: Tensor,
    references: Sequence[Reference],
    options: FilmOptions,
    state: FilmState | None = None,
) -> ColouredClip:
    """images: [T, H, W, C]. With a state, they are the frames that follow those it was taken after."""
    frames = as_frames(images, "the frames")
    count, height, width = frames.shape[:3]
    report = start_report(loaded, references, options, height, width)
    pictures = torch.empty(count, height, width, 3)
    confidence = torch.empty(count, height, width)
    with loaded.resident(room_for(loaded, options, height, width, len(references), count)) as network:
        film = FilmSession(network, loaded, options, references, height, width)
        if state is not None:
            film.load(state)
            report.fact("continued", f"from frame {film.frame}")
        for rows, done in _coloured(film, frames, options.method):
            pictures[rows] = done.pictures
            confidence[rows] = F.interpolate(done.confidence[:, None], (height, width), mode="bilinear")[:, 0]
        after = film.state()
        finish_report(report, film, count)
    return ColouredClip(pictures, confidence, after, report.text(film.times, film.engines(), film.notes()))


def colorize_stills(
    loaded: LoadedNetwork, images: Tensor, references: Sequence[Reference], options: FilmOptions
) -> tuple[Tensor, str]:
    """Pictures that have nothing to do with one another, [T, H, W, C]. Returns [T, H, W, 3] float and the report."""
    frames = as_frames(images, "the pictures")
    count, height, width = frames.shape[:3]
    report = start_report(loaded, references, options, height, width)
    pictures = torch.empty(count, height, width, 3)
    with loaded.resident(room_for(loaded, options, height, width, len(references), count)) as network:
        film = FilmSession(network, loaded, options, references, height, width, stills=True)
        for rows, done in _coloured(film, frames, options.method):
            pictures[rows] = done.pictures
        finish_report(report, film, count)
    return pictures, report.text(film.times, film.engines(), film.notes())


def room_for(
    loaded: LoadedNetwork,
    options: FilmOptions,
    height: int,
    width: int,
    references: int = 1,
    frames: int | None = None,
    bytes_per_number: int = 4,
) -> int:
    """Bytes beside the weights to ask the host for: what is remembered, frames on the device, and the larger of what the
    networks and the conversion at full size work in. frames: of the whole job; bytes_per_number: of what comes in."""
    dtype = loaded.precision.dtype
    _, needed = activations(options, (height, width), dtype, loaded.managed.device)
    portion = portion_frames(height, width, bytes_per_number) + 1
    portion = portion if frames is None else min(frames, portion)
    held, converting = full_size_room((height, width), portion, bytes_per_number, loaded.managed.device)
    remembered = 0
    if not options.deep_exemplar:
        small = computed_size(options, height, width)
        remembered = memory_room(options.memory_mode, small, loaded.widths, dtype, references)
    return remembered + held + max(needed, converting)


def start_report(
    loaded: LoadedNetwork, references: Sequence[Reference], options: FilmOptions, height: int, width: int
) -> JobReport:
    report = JobReport(f"{options.method}, coloured by Hotpath", loaded.managed.device)
    report.fact("checkpoint", loaded.names)
    small = network_size(height, width, options.colour_size)
    seen = ", of which the networks see half" if options.deep_exemplar else ""
    report.fact("size", f"colours at {small[1]}x{small[0]}{seen}, luminance at {width}x{height}")
    matching = "matching in float32; " if options.deep_exemplar else ""
    report.fact("precision", matching + loaded.precision.reason)
    for index, reference in enumerate(references):
        if is_grey(reference.lab):
            report.note(f"Reference {index + 1} {GREY_REFERENCE}")
    if not options.deep_exemplar:
        report.note(COLORMNET_LICENCE)
    return report


def finish_report(report: JobReport, film: FilmSession, frames: int) -> None:
    report.frames = frames
    report.fact("remembered", f"{film.remembered_bytes() / 2**20:.1f} MiB after the last frame")
    if film.detector is not None:
        cuts = ", ".join(map(str, film.cuts[:20])) + (", ..." if len(film.cuts) > 20 else "")
        without = "no cut in these frames" if film.shot else "no cut found"  # a state may come from behind some
        report.fact("shots", f"{film.shot + 1}{f'; cuts at {cuts}' if cuts else f', {without}'}")


def _coloured(film: FilmSession, frames: Tensor, label: str) -> Iterator[tuple[slice, ColouredFrames]]:
    """The film in portions. While one is computed, the next one is on its way to the device and the last one back.

    Every step moves the bar and looks for an interrupt.
    """
    size = portion_frames(*film.size, 4)
    waiting: deque[tuple[slice, ColouringFrames]] = deque()
    with host.tracked(host.current(), len(frames), label) as bar:

        def taken() -> tuple[slice, ColouredFrames]:
            rows, queued = waiting.popleft()
            done = queued.wait()
            bar.update(len(done.pictures), preview_of(done.pictures[-1]))
            return rows, done

        first = 0
        while first < len(frames):
            portion = frames[first : first + size + (first == 0)]
            prepared = film.prepare(_floating(portion))
            for segment in prepared.segments:
                if segment.cut:
                    film.begin_shot()
                queued = film.colour(prepared, segment)
                waiting.append((slice(first + segment.first, first + segment.stop), queued))
                while len(waiting) > 1:
                    yield taken()
            first += len(portion)
        while waiting:
            yield taken()


def portion_frames(height: int, width: int, bytes_per_number: int) -> int:
    """Frames of a portion: whole windows between memory frames, fewer where frames are large."""
    fitting = PORTION_BYTES // (height * width * 3 * bytes_per_number)
    return next((frames for frames in PORTIONS if frames <= fitting), 1)


def preview_of(picture: Tensor) -> Any:
    """A small PIL image of [H, W, 3], float or uint8."""
    from PIL import Image

    levels = picture if picture.dtype == torch.uint8 else (picture.clamp(0, 1) * 255).to(torch.uint8)
    image = Image.fromarray(levels.numpy())
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return image


def _floating(frames: Tensor) -> Tensor:
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames
