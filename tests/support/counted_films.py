"""Films whose frames tell their number, and what is read back of them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from film_files import write_film
from hotpath.colorization import file_job, film
from hotpath.colorization.film_options import FilmOptions, Reference, read_references
from torch import Tensor

RATE = 12


def counted(count: int, start: int = 0, light: float = 0.0) -> Tensor:
    """[count, 40, 56, 3] in 0..1: a gradient, below which every frame tells its number in 8 bars, one of which changes
    from frame to frame, as in Gray's code."""
    x = torch.linspace(0, 0.3, 56)
    frames = (x + 0.2 + light)[None, None, :, None] + torch.linspace(0, 0.1, 40)[None, :, None, None]
    frames = frames.expand(count, -1, -1, 3).clone()
    for index in range(count):
        code = (start + index) ^ (start + index) >> 1
        for bit in range(8):
            frames[index, 30:, bit * 7 : bit * 7 + 7] = 0.9 if code >> bit & 1 else 0.1
    return frames


def numbers(pictures: Tensor) -> list[int]:
    """What `counted` wrote. pictures: uint8."""
    bars = pictures[:, 32:38].float().mean(dim=(1, 3)).unflatten(1, (8, 7))[..., 2:5].mean(dim=2) > 128
    found = [sum(int(bit) << place for place, bit in enumerate(row)) for row in bars]
    for shift in (1, 2, 4):
        found = [code ^ code >> shift for code in found]
    return found


def read_pictures(path: Path) -> Tensor:
    import av

    with av.open(str(path)) as container:
        decoded = container.decode(container.streams.video[0])
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded])


def read_times(path: Path) -> tuple[Tensor, list[Fraction]]:
    """Pictures, and times in seconds."""
    import av

    with av.open(str(path)) as container:
        decoded = list(container.decode(container.streams.video[0]))
        pictures = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in decoded])
        return pictures, [f.pts * f.time_base for f in decoded]


def sound_packets(path: Path) -> list[tuple[int, bytes]]:
    import av

    with av.open(str(path)) as container:
        return [(packet.pts, bytes(packet)) for packet in container.demux(audio=0) if packet.size]


def read_film(path: Path) -> tuple[Tensor, list[Fraction], Tensor]:
    """Pictures, times in seconds, and the sound's samples."""
    import av

    pictures, times = read_times(path)
    with av.open(str(path)) as container:
        heard = [torch.from_numpy(f.to_ndarray()) for f in container.decode(container.streams.audio[0])]
    return pictures, times, torch.cat(heard, dim=1)


def file_task(folder: Path, **changes: Any) -> tuple[file_job.FileJob, list[Reference]]:
    options = FilmOptions(colour_size=32, **changes)
    return file_job.FileJob(folder / "in.mp4", folder / "out.mp4", options, quality=4), read_references([*counted(1)])


def save_reference(folder: Path) -> None:
    from PIL import Image

    Image.fromarray((counted(1)[0] * 255).to(torch.uint8).numpy()).save(folder / "r.png")


def crash_at_the_third_segment(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Colouring raises at the third segment from now on; returns the count of segments, to be set back."""
    colour, calls = film.FilmSession.colour, [0]

    def crash(self: film.FilmSession, *parts: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("the machine went away")
        return colour(self, *parts)

    monkeypatch.setattr(film.FilmSession, "colour", crash)
    return calls


def finished_before(folder: Path) -> tuple[file_job.FileJob, list[Reference], Path]:
    """A film that is whole, a job with another strength for the same output, and what that leaves when it is stopped."""
    write_film(folder / "in.mp4", counted(66), rate=RATE, crf=4)
    job, references = file_task(folder)
    file_job.colorize_file(job, references)
    return file_task(folder, strength=0.5)[0], references, folder / "out.partial.mp4"
