"""The colour part of the demo: a clip of a photograph no training saw, coloured by the small networks of both methods.

Writes before, after and truth side by side as a picture strip and as a video, and says how near the colours came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import host
from ..colorization.clip_job import colorize_clip, load_method
from ..colorization.colour_space import luminance_of, rgb_to_lab
from ..colorization.film_options import FilmOptions, read_references
from ..host.headless import HeadlessHost
from .colorize_scenes import held_out_clip

MODELS = Path(__file__).parent / "models"
ENLARGED = 2
SHOWN = 6  # frames in the picture strip
SHOWN_METHODS = ("Deep Exemplar", "ColorMNet")


@dataclass(frozen=True)
class DemoResult:
    """psnr: of ab against the truth, in decibels of a range of 220; uncoloured: the same for ab = 0."""

    method: str
    pictures: Tensor
    psnr: float
    uncoloured: float
    report: str


def chroma_psnr(pictures: Tensor, truth: Tensor) -> tuple[float, float]:
    """pictures, truth: [T, H, W, 3]. PSNR of ab in decibels, and what no colour at all would have."""
    found, wanted = (rgb_to_lab(p.permute(0, 3, 1, 2))[:, 1:] for p in (pictures, truth))

    def decibels(error: Tensor) -> float:
        return 10 * math.log10(220**2 / error.square().mean().item())

    return decibels(found - wanted), decibels(wanted)


def colour_held_out(method: str, frames: int = 24) -> DemoResult:
    """Colour the held-out clip from its first frame. Every later frame is judged."""
    return colour_clip(method, held_out_clip(frames).permute(0, 2, 3, 1))


def colour_clip(method: str, truth: Tensor) -> DemoResult:
    """The same for any clip [T, H, W, 3]."""
    grey = luminance_of(truth.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) / 100
    before = host.use(HeadlessHost(models=MODELS, device="cpu", show_progress=False))
    try:
        options = FilmOptions(method=method, colour_size=0)
        references = read_references([truth[0]])
        done = colorize_clip(load_method(options), grey.expand(-1, -1, -1, 3), references, options)
    finally:
        host.use(before)
    psnr, uncoloured = chroma_psnr(done.pictures[1:], truth[1:])
    return DemoResult(method, done.pictures, psnr, uncoloured, done.report)


def run(folder: Path) -> tuple[Path, Path, Path]:
    """Writes a picture strip, a film and a text to `folder` and returns their paths. Rows and columns: grey, Deep
    Exemplar, ColorMNet, truth."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    results = [colour_held_out(method) for method in SHOWN_METHODS]
    truth = held_out_clip(len(results[0].pictures)).permute(0, 2, 3, 1)
    light = luminance_of(truth.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).expand(-1, -1, -1, 3) / 100
    rows = [_large(clip) for clip in (light, *(result.pictures for result in results), truth)]
    picture, film, text = (folder / f"colorize_held_out{suffix}" for suffix in (".png", ".mp4", ".txt"))
    chosen = torch.linspace(0, len(truth) - 1, SHOWN).round().long()
    strip = torch.cat([torch.cat([row[i] for i in chosen], dim=1) for row in rows], dim=0)
    Image.fromarray(strip.numpy()).save(picture)
    _write(film, torch.cat(rows, dim=2))
    said = [
        f"{r.method}: chroma PSNR {r.psnr:.1f} dB, without colours {r.uncoloured:.1f} dB\n{r.report}" for r in results
    ]
    text.write_text("\n\n".join(said) + "\n", encoding="utf-8")
    return picture, film, text


def _large(clip: Tensor) -> Tensor:
    """[T, H, W, 3] in 0..1 to uint8, enlarged."""
    enlarged = F.interpolate(clip.permute(0, 3, 1, 2), scale_factor=ENLARGED, mode="bicubic").clamp(0, 1)
    return (enlarged.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)


def _write(path: Path, clip: Tensor) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "14"})
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
