"""The compatible nodes' jobs: ColorMNet and Deep Exemplar on whole batches, with the sizes, crops and rounding that
shared workflows expect. Our own nodes' job is `film`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import host
from .clip_job import portion_frames
from .colormnet.engine import ColorMNetEngine, ColorMNetFunctions
from .colormnet.session import ColorMNetSession
from .colormnet.settings import ColorMNetSettings
from .colour_space import luminance_of, rgb_to_lab, with_luminance
from .deep_exemplar.color_net import HALF_SIZE_GAIN
from .deep_exemplar.engine import DeepExemplarEngine, DeepExemplarFunctions
from .deep_exemplar.framing import cover_and_crop
from .deep_exemplar.session import DeepExemplarSession
from .film_room import full_size_room, memory_room
from .frame_budget import colormnet_batch, deep_exemplar_batch
from .full_size import conversions, luminance_of_frames
from .networks import COLORMNET_LICENCE, LoadedNetwork
from .pictures import as_frames, is_grey, resized, to_channels_first
from .report import JobReport
from .stage_times import StageTimes
from .strips import by_strips
from .transfers import Download, copies_for, upload

PORTION = 16  # frames between two looks at the interrupt, fewer where they are large
GREY_REFERENCE = "The reference has next to no colour, so the result has none either."


@dataclass(frozen=True)
class ColorMNetJob:
    """height, width: what the network sees. original_luminance: put the colours on the frames' own luminance instead
    of returning the network-sized picture enlarged. stills: pictures that have nothing to do with one another.
    notes: sentences for the report."""

    height: int
    width: int
    memory_mode: str = "balanced"
    original_luminance: bool = False
    stills: bool = False
    compile: bool = False
    notes: tuple[str, ...] = ()


def run_colormnet(loaded: LoadedNetwork, images: Tensor, references: Tensor, job: ColorMNetJob) -> tuple[Tensor, str]:
    """images [T, H, W, C] and references [R, H, W, C], each reference an example of colours.

    Returns float [T, H, W, 3] on the CPU, of the images' size, and the report.
    """
    frames, references = as_frames(images, "the frames"), as_frames(references, "the reference")
    count, height, width = frames.shape[:3]
    device = loaded.managed.device
    report = JobReport("ColorMNet", device)
    report.fact("checkpoint", loaded.names)
    report.fact("size", f"{job.width}x{job.height} in the network, {width}x{height} out")
    report.fact("precision", loaded.precision.reason)
    times = StageTimes(device)
    largest = _larger((height, width), (job.height, job.width))
    at_full_size = conversions(*largest, device)
    batch, needed = colormnet_batch(job.height, job.width, loaded.precision.dtype, device, job.memory_mode)
    remembered = memory_room(
        job.memory_mode, (job.height, job.width), loaded.widths, loaded.precision.dtype, len(references)
    )
    held, converting = full_size_room(largest, min(count, _portion(*largest)), 4, device)
    result = torch.empty(count, height, width, 3)
    with loaded.resident(remembered + held + max(needed, converting)) as network:
        examples = [_lab(r[None], device, job.height, job.width)[0] for r in references]
        if all(is_grey(example) for example in examples):
            report.note(GREY_REFERENCE)
        settings = ColorMNetSettings.for_mode(job.memory_mode)
        functions = loaded.kept(
            (id(network), "compatible", job.compile), lambda: ColorMNetFunctions(network, job.compile)
        )
        session = ColorMNetSession(
            network, settings, job.height, job.width, examples, batch, times, ColorMNetEngine(functions)
        )

        def light(part: Tensor) -> tuple[Tensor, Tensor]:
            """L at full size, where it is wanted, and at the network's."""
            full = luminance_of_frames(part, device)
            return full if job.original_luminance else full[:0], resized(full, job.height, job.width, antialias=False)

        def coloured(portion: slice, arrived: Tensor, pictures: Download) -> None:
            with times.stage("colour space in"):
                parts = at_full_size.map(len(arrived), lambda rows: light(arrived[rows]))
                full, luminance = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            if job.stills:
                chroma = session.colorize_stills(luminance).chroma
            else:
                chroma = session.colorize(luminance, last=portion.stop == count).chroma

            def finish(rows: slice) -> None:
                if job.original_luminance:
                    rgb = with_luminance(full[rows], resized(chroma[rows], height, width, antialias=False))
                else:
                    rgb = resized(with_luminance(luminance[rows], chroma[rows]), height, width, antialias=False)
                pictures.put(rows, rgb.permute(0, 2, 3, 1))

            with times.stage("colour space out"):
                at_full_size.map(len(arrived), finish)

        _through(frames, result, coloured, device, "ColorMNet")
        report.fact("memory", f"{session.memory.nbytes / 2**20:.1f} MiB of remembered frames at the fullest")
    report.frames = count
    report.note(COLORMNET_LICENCE)
    return result, report.text(times, session.engines(), [*session.notes(), *at_full_size.notes, *job.notes])


@dataclass(frozen=True)
class DeepExemplarJob:
    """height, width: of the result; frames and reference are scaled to cover it and cropped. half: the network sees
    half of that. propagate: each frame sees the last one's colours. notes: sentences for the report."""

    height: int
    width: int
    half: bool = True
    propagate: bool = True
    compile: bool = False
    notes: tuple[str, ...] = ()


def run_deep_exemplar(
    loaded: LoadedNetwork, images: Tensor, reference: Tensor, job: DeepExemplarJob
) -> tuple[Tensor, str]:
    """images [T, H, W, C], reference [1, H, W, C]. Returns float [T, height, width, 3] in steps of 1/255 on the CPU."""
    frames, reference = as_frames(images, "the frames"), as_frames(reference, "the reference")
    device = loaded.managed.device
    report = JobReport("Deep Exemplar", device)
    report.fact("checkpoints", loaded.names)
    small = (job.height // 2, job.width // 2) if job.half else (job.height, job.width)
    report.fact("size", f"{small[1]}x{small[0]} in the networks, {job.width}x{job.height} out")
    report.fact("precision", f"matching in float32; {loaded.precision.reason}")
    if len(reference) > 1:
        report.note("Deep Exemplar matches one reference at a time; the first of the batch is used.")
    times = StageTimes(device)
    largest = _larger((frames.shape[1], frames.shape[2]), (job.height, job.width))
    at_full_size = conversions(*largest, device)
    batch, needed = deep_exemplar_batch(*small, device)
    count = len(frames)
    held, converting = full_size_room(largest, min(count, _portion(*largest)), 4, device)
    result = torch.empty(count, job.height, job.width, 3)
    with loaded.resident(held + max(needed, converting)) as networks:
        example = _halved(rgb_to_lab(_framed(reference[:1], device, job)), small)[0]
        if is_grey(example):
            report.note(GREY_REFERENCE)
        functions = loaded.kept((id(networks), job.compile), lambda: DeepExemplarFunctions(networks, job.compile))
        session = DeepExemplarSession(
            networks, *small, example, job.propagate, batch=batch, times=times, engine=DeepExemplarEngine(functions)
        )

        def coloured(portion: slice, arrived: Tensor, pictures: Download) -> None:
            with times.stage("colour space in"):
                parts = at_full_size.map(len(arrived), lambda rows: luminance_of(_framed(arrived[rows], device, job)))
                luminance = torch.cat(parts)
            chroma = session.colorize(_halved(luminance, small)).chroma

            def finish(rows: slice) -> None:
                colours = chroma[rows]
                if job.half:
                    colours = resized(colours, job.height, job.width, antialias=False) * HALF_SIZE_GAIN
                pictures.put(rows, by_strips(_in_steps, luminance[rows], colours, made=-3))

            with times.stage("colour space out"):
                at_full_size.map(len(arrived), finish)

        _through(frames, result, coloured, device, "Deep Exemplar")
    report.frames = count
    return result, report.text(times, session.engines(), [*session.notes(), *at_full_size.notes, *job.notes])


def _larger(*sizes: tuple[int, int]) -> tuple[int, int]:
    """Of what comes in and what goes out, (height, width)."""
    return max(sizes, key=lambda size: size[0] * size[1])


def _portion(height: int, width: int) -> int:
    return min(PORTION, portion_frames(height, width, 4))


def _lab(images: Tensor, device: torch.device, height: int, width: int) -> Tensor:
    return resized(rgb_to_lab(to_channels_first(images, device)), height, width, antialias=False)


def _framed(images: Tensor, device: torch.device, job: DeepExemplarJob) -> Tensor:
    """8-bit pictures covering the target, cropped: RGB in 0..1, channels first."""
    # Half a step of float32 below a whole number must not lose the whole step.
    eight_bits = (to_channels_first(images, device) * 255 + 1e-3).floor()
    return cover_and_crop(eight_bits, job.height, job.width) / 255


def _in_steps(luminance: Tensor, chroma: Tensor) -> Tensor:
    """sRGB [T, H, W, 3] in steps of 1/255, rounded down."""
    return ((with_luminance(luminance, chroma) * 255).floor() / 255).permute(0, 2, 3, 1)


def _halved(lab: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear by one half: the mean of 2x2 pixels; an odd last row or column is left out."""
    if tuple(lab.shape[-2:]) == size:
        return lab
    return torch.nn.functional.avg_pool2d(lab, 2)


def _through(
    frames: Tensor,
    result: Tensor,
    coloured: Callable[[slice, Tensor, Download], None],
    device: torch.device,
    label: str,
) -> None:
    """`coloured` over the frames, portion by portion, into `result`. While one is computed, the last one is on its way
    back. Every step moves the progress bar, which also looks whether the user wants to stop."""
    copies = copies_for(device)
    waiting: tuple[slice, Download] | None = None
    size = _portion(*_larger((frames.shape[1], frames.shape[2]), (result.shape[1], result.shape[2])))
    with host.tracked(host.current(), len(frames), label) as bar:
        for first in range(0, len(frames), size):
            portion = slice(first, min(first + size, len(frames)))
            arriving = upload(copies, frames[portion])
            leaving = Download(copies, result[portion].shape, result.dtype)
            coloured(portion, copies.arrived(arriving.tensor, arriving.mark), leaving)
            if waiting is not None:
                result[waiting[0]] = waiting[1].wait()
            waiting = portion, leaving
            bar.update(portion.stop - first)
        if waiting is not None:
            result[waiting[0]] = waiting[1].wait()
