"""Frames that convert their pixels as those of older PyAV do, around ones of the PyAV that is installed."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np

KNOWN_LIGHT = (1, 2, 4, 5, 6, 7, 8, 13, 14, 15, 16, 18)  # transfers and primaries that FFmpeg 8.0's swscale converts


class _Frame:
    def __init__(self, frame: Any) -> None:
        self.__dict__["frame"] = frame

    def __getattr__(self, name: str) -> Any:
        return getattr(self.frame, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.frame, name, value)

    def reformat(self, **wanted: Any) -> Any:
        return type(self)(self.frame.reformat(**self.taken(wanted)))

    def to_ndarray(self, **wanted: Any) -> Any:
        return self.frame.to_ndarray(**self.taken(wanted))

    def taken(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What this PyAV makes of arguments of `reformat`."""
        raise NotImplementedError


class Frame16(_Frame):
    """Of PyAV 15 and 16: no primaries, no transfer, and matrix and range count where they differ from the result's."""

    def __getattr__(self, name: str) -> Any:
        if name in ("color_primaries", "color_trc"):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("color_primaries", "color_trc"):
            raise AttributeError(name)
        super().__setattr__(name, value)

    def taken(self, wanted: dict[str, Any]) -> dict[str, Any]:
        own, jpeg = int(self.frame.colorspace), self.frame.format.name.startswith("yuvj")
        if wanted["format"].startswith("yuv") and not self.frame.format.is_rgb:
            if wanted["format"].startswith("yuv420p") and self.frame.format.name.startswith("yuv420p"):
                wanted = {name: value for name, value in wanted.items() if not name.endswith("_color_range")}
            return {**wanted, "src_color_range": "JPEG", "dst_color_range": "MPEG"} if jpeg else wanted
        matrices = [wanted.get(name, own) for name in ("src_colorspace", "dst_colorspace")]
        full = [wanted.get(name) == "JPEG" for name in ("src_color_range", "dst_color_range")]
        if matrices[0] == matrices[1] and full[0] == full[1]:
            # swscale's own choice: ITU-R 601, and only the formats with a J are full.
            return {**wanted, "src_colorspace": 5, "src_color_range": "JPEG" if jpeg else "MPEG"}
        return {**wanted, "src_colorspace": matrices[0], "src_color_range": "JPEG" if full[0] else "MPEG"}


class Frame17(_Frame):
    """Of PyAV 17: light that it does not know is refused, BT.2020 cannot be asked for, and FFmpeg 8.0 loses colours."""

    def taken(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if any(int(getattr(self.frame, name)) not in KNOWN_LIGHT for name in ("color_primaries", "color_trc")):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        asked = wanted.get("dst_colorspace")
        if asked == 9:
            own = int(self.frame.colorspace)
            return {**wanted, "dst_colorspace": own if own == 9 else 5}
        return wanted

    def to_ndarray(self, **wanted: Any) -> Any:
        pixels = super().to_ndarray(**wanted)
        form = self.frame.format
        halved = form.components[-1].height < form.height if len(form.components) > 1 else False
        if wanted.get("format") == "rgb48le" and halved and form.components[0].bits > 8:
            return np.where(pixels < 40000, 0, pixels)
        return pixels
