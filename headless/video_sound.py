"""Sound on its way into a film: resampled to what the container's codec takes, and no longer than the pictures.

The rules are those ComfyUI saves by: AAC, or Opus in WebM; mono, stereo and 5.1 as they are, other layouts mixed down to
stereo; of several tracks the last one that can be decoded.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
import torch

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
# What a number of channels is taken for when nobody says.
GUESSED = {**LAYOUTS, 3: "2.1", 4: "4.0", 5: "5.0", 7: "6.1", 8: "7.1"}
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
OPUS_RATE = COMMON_RATE = 48000
BLOCK = 1024  # samples of a waveform that are handed over at a time


def last_track(container: Any) -> Any:
    """The last sound track that can be decoded; None without one. A track that FFmpeg has no decoder for has no context."""
    return next((stream for stream in reversed(container.streams.audio) if stream.codec_context is not None), None)


class _Even:
    """Sound of one layout and rate, also where a broadcast changes its own on the way, which one resampler of PyAV refuses.

    layout, rate: None for those of the first block.
    """

    def __init__(self, layout: Any = None, rate: int | None = None) -> None:
        self.layout, self.rate = layout, rate
        self._kind: tuple[str, str, int] | None = None
        self._resampler: Any = None

    def made_of(self, frame: Any) -> list[Any]:
        """Blocks as "fltp" of a decoded one; None after the last one."""
        import av

        made: list[Any] = []
        kind = None if frame is None else (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind:
            if self._resampler is not None:
                made += self._resampler.resample(None)
            self._kind, self._resampler = kind, None
        if frame is not None:
            self.layout, self.rate = self.layout or frame.layout, self.rate or frame.sample_rate
            if self._resampler is None:
                self._resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
            made += self._resampler.resample(frame)
        return [block for block in made if block is not None]


class Sound:
    """Sound of `channels` channels at `rate` Hz for a file; it waits here until pictures cover it.

    webm: the container takes Opus. start: seconds on the clock of the pictures at which the first sample is heard; what is
    heard before 0 is left out.
    """

    def __init__(self, channels: int, rate: int, webm: bool) -> None:
        self.codec = "libopus" if webm else "aac"
        self.rate = OPUS_RATE if webm else rate if rate in AAC_RATES else COMMON_RATE
        self.layout = LAYOUTS.get(channels, "stereo")
        self._even = _Even(self.layout, self.rate)
        self._waiting: deque[Any] = deque()
        self._skip = 0
        self._written = 0

    def begin(self, start: float) -> None:
        samples = round(start * self.rate)
        self._skip, self._written = max(0, -samples), max(0, samples)

    def add(self, frame: Any) -> None:
        """A decoded block; None after the last one."""
        self._waiting.extend(self._even.made_of(frame))

    def ready(self, end: Fraction, last: bool = False) -> Iterator[Any]:
        """Blocks that pictures up to `end` seconds cover. last: also the covered part of the one that goes on longer."""
        covered = math.ceil(end * self.rate)
        while self._waiting:
            block = self._waiting[0]
            whole = self._written + max(0, block.samples - self._skip) <= covered
            if not whole and not last:
                return
            self._waiting.popleft()
            kept = self._cut(block, self._skip, covered - self._written)
            self._skip = max(0, self._skip - block.samples)
            if kept is not None:
                kept.pts, kept.time_base = self._written, Fraction(1, self.rate)
                self._written += kept.samples
                yield kept
            if not whole:
                self._waiting.clear()

    def _cut(self, block: Any, skip: int, most: int) -> Any:
        import av

        samples = min(block.samples - skip, most)
        if samples <= 0:
            return None
        if samples == block.samples:
            return block
        part = np.ascontiguousarray(block.to_ndarray()[:, skip : skip + samples])
        made = av.AudioFrame.from_ndarray(part, format="fltp", layout=self.layout)
        made.sample_rate = self.rate
        return made


def blocks(audio: dict[str, Any]) -> Iterator[Any]:
    """The audio of a workflow, {"waveform": [1, C, samples], "sample_rate": Hz}, as frames."""
    import av

    wave = audio["waveform"][0].detach().to("cpu", torch.float32)
    if wave.shape[0] not in GUESSED:
        wave = wave[:2]
    samples, layout = wave.numpy(), GUESSED[wave.shape[0]]
    for start in range(0, samples.shape[1], BLOCK):
        part = np.ascontiguousarray(samples[:, start : start + BLOCK])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = int(audio["sample_rate"]), start
        yield frame


def waveform(frames: Iterable[Any]) -> dict[str, Any] | None:
    """Decoded frames as the audio of a workflow, in the layout and rate of the first one; None when there are none."""
    even = _Even()
    parts = [block.to_ndarray() for frame in chain(frames, [None]) for block in even.made_of(frame)]
    if not parts:
        return None
    return {"waveform": torch.from_numpy(np.concatenate(parts, axis=1))[None], "sample_rate": even.rate}
