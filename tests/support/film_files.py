"""Films for tests: a few pictures, files of them with a tone beside, and what is in a file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def frames(count: int, height: int = 40, width: int = 54, seed: int = 0) -> Tensor:
    """[count, height, width, 3] in 0..1, slowly changing."""
    random = torch.Generator().manual_seed(seed)
    ends = torch.rand(2, 3, 4, 5, generator=random)
    blend = torch.linspace(0, 1, count)[:, None, None, None]
    coarse = ends[:1] * (1 - blend) + ends[1:] * blend
    return F.interpolate(coarse, (height, width), mode="bilinear").permute(0, 2, 3, 1).clamp(0, 1)


def write_film(path: Path, pictures: Tensor, sound: bool = True, rate: int = 12, crf: int = 10) -> None:
    """pictures: [T, H, W, 3] float in 0..1. crf: x264's rate factor; 4 is nearly without loss."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv444p"
        voice: Any = container.add_stream("aac", rate=16000, options={"aac_coder": "fast"}) if sound else None
        for picture in (pictures * 255).to(torch.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
        if voice is not None:
            wave = np.sin(np.arange(16000 * len(pictures) // rate) / 6).astype(np.float32)[None]
            heard = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            heard.sample_rate = 16000
            for part in (heard, None):
                container.mux(voice.encode(part))


def read_video(path: Path) -> tuple[Tensor, list[Fraction], float]:
    """Pictures, times in seconds, and the length of the sound (0 when there is none)."""
    import av

    with av.open(str(path)) as container:
        decoded = list(container.decode(container.streams.video[0]))
        pictures = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in decoded])
        times = [f.pts * f.time_base for f in decoded]
    with av.open(str(path)) as container:
        sound = container.streams.audio
        samples = sum(f.samples for f in container.decode(sound[0])) / 16000 if sound else 0.0
    return pictures, times, samples
