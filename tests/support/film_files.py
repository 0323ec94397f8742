"""Films for tests: a few pictures with a tone beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
