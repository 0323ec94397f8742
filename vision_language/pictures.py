"""Pictures and clips as a question holds them: exact 8-bit pixels, with the conversions from ComfyUI and from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import host
from ..host.display_matrix import turned
from ..host.errors import first_line
from ..host.frame_pixels import rgb_of
from ..host.name_limits import can_be_a_name
from ..host.picture_files import open_picture, upright
from ..host.video_opening import decodable, decoded, opened

# Four times what any preset shows of a frame: below it pictures stay exact, and 64 frames are under 700 MB.
LARGEST_FRAME = 4 * 1024 * 28 * 28
DEFAULT_FPS = 24.0  # what the processors assume of frames that come without a rate


@dataclass(frozen=True)
class Picture:
    """pixels: [H, W, 3] uint8 RGB."""

    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """frames: [T, H, W, 3] uint8 RGB. times: seconds of each frame since the start, rising; None: even, at `fps`."""

    frames: NDArray[np.uint8]
    fps: float = DEFAULT_FPS
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"A clip cannot have {self.fps} frames a second: give a number above 0.")

    def seconds(self) -> tuple[float, ...]:
        return self.times if self.times is not None else tuple(i / self.fps for i in range(len(self.frames)))

    def sampled(self, count: int) -> Clip:
        """At most `count` frames, evenly spread from the first to the last, with their own times."""
        if len(self.frames) <= count:
            return self
        index = np.linspace(0, len(self.frames) - 1, count, dtype=int)
        times = self.seconds()
        return Clip(self.frames[index], self.fps, tuple(times[i] for i in index))


def to_bytes(images: torch.Tensor) -> NDArray[np.uint8]:
    """[B, H, W, C] float 0..1 (C of 1, 3 or 4) -> [B, H, W, 3] uint8, the bytes that LoadImage read."""
    images = three_channels(images)
    made = np.empty(images.shape, dtype=np.uint8)
    for index, image in enumerate(images):  # a batch of a video as a whole would be there twice more, in float
        whole = image.detach().float().nan_to_num(0.0).clamp_(0, 1).mul_(255).round_()
        made[index] = whole.to(torch.uint8).cpu().numpy()
    return made


def three_channels(images: torch.Tensor) -> torch.Tensor:
    """A view [B, H, W, 3] of an IMAGE of 1, 3 or 4 channels. Raises ValueError for another shape."""
    if images.ndim == 4 and 0 in images.shape:
        raise ValueError(
            "There is no picture to look at: the batch is empty. Check what the node before it loads or keeps."
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(f"An IMAGE has the shape [pictures, height, width, 3], this one is {list(images.shape)}.")
    return images[..., :3] if images.shape[-1] == 4 else images.expand(*images.shape[:3], 3)


def from_images(images: torch.Tensor | None) -> list[Picture]:
    """One picture for each of a ComfyUI IMAGE batch; none for None."""
    return [] if images is None else [Picture(pixels) for pixels in to_bytes(images)]


def from_frames(frames: torch.Tensor | None, fps: float, most: int) -> list[Clip]:
    """A clip of at most `most` frames of a ComfyUI IMAGE batch; none for None."""
    if frames is None:
        return []
    index = np.linspace(0, len(frames) - 1, min(most, len(frames)), dtype=int)
    # Only the frames that are looked at are converted: 300 frames in float are gigabytes.
    times = tuple(float(i) / fps for i in index)
    return [Clip(to_bytes(frames[torch.from_numpy(index)]), fps, times)]


def read_picture(path: Path) -> Picture:
    """A picture file, turned as its EXIF says, transparency over white, the first frame of an animation.

    Raises ValueError for a file that is no picture, or a damaged one.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with open_picture(path) as file:
            return Picture(_eight_bits(file))
    except UnidentifiedImageError:
        raise ValueError("it is no picture that can be read: replace the file, or take it out of the folder") from None
    except Image.DecompressionBombError:
        raise ValueError("it has more pixels than can be read safely: put a smaller copy in its place") from None
    except Exception as error:  # Pillow has many words for what is cut off and what is broken
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"it is damaged ({first_line(error)}): replace the file") from error


def _eight_bits(file: Any) -> NDArray[np.uint8]:
    """[H, W, 3] of an opened picture of any kind."""
    from PIL import Image

    shown = upright(file)
    if shown.mode in ("RGBA", "LA", "PA") or "transparency" in shown.info:
        shown = shown.convert("RGBA")
        ground = Image.new("RGBA", shown.size, "white")
        shown = Image.alpha_composite(ground, shown)
    elif shown.mode in ("I", "F") or shown.mode.startswith("I;16"):
        wide = np.nan_to_num(np.asarray(shown, dtype=np.float32))
        # Numbers with a point reach 1, or 255 as Pillow takes them.
        top = 65535.0 if shown.mode != "F" else 1.0 if wide.max() <= 1 else 255.0
        return np.repeat((wide * (255 / top)).clip(0, 255).round().astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(shown.convert("RGB"), dtype=np.uint8)


def read_clip(path: Path, fps: float = 1.0, most: int = 64) -> Clip:
    """Frames of a video file as they are shown, about `fps` of each second and at most `most`, with their times since the first.

    Frames of more than LARGEST_FRAME pixels are made smaller. Raises FileNotFoundError, or ValueError for what is no video.
    """
    import av

    if not (all(map(can_be_a_name, path.parts)) and path.is_file()):
        raise FileNotFoundError(f"The video {path} is not there: check video_path.")
    try:
        return _read_clip(path, fps, most)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path.name} cannot be read as a video ({error.strerror}): give another file.") from error


def _read_clip(path: Path, fps: float, most: int) -> Clip:
    import av

    check = host.current().check_interrupt
    frames = np.empty(0, dtype=np.uint8)
    times: list[float] = []
    with opened(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path.name} has no video stream.")
        stream = decodable(container.streams.video[0], path)
        stream.thread_type = "AUTO"
        length = float(container.duration / av.time_base) if container.duration else 0.0
        # A long video is looked at less often, so that its end is seen as well.
        interval = max(1.0 / fps, length / most) if length else 1.0 / fps
        due, first, size = 0.0, None, (0, 0)
        for frame in decoded(container, stream):
            check()
            if first is None:
                first = frame.time or 0.0  # streams that were cut out of longer ones begin anywhere
            shown = float(frame.time - first) if frame.time is not None else len(times) * interval
            if shown + 1e-6 < due:
                continue
            if not times:
                shrink = min(1.0, (LARGEST_FRAME / (frame.width * frame.height)) ** 0.5)
                size = tuple(max(2, round(edge * shrink)) for edge in (frame.width, frame.height))
            picture = _as_shown(frame, *size)
            if not times:
                # One piece from the start: a list and what it is stacked to would be there at once.
                frames = np.empty((most, *picture.shape), dtype=np.uint8)
            frames[len(times)] = picture
            times.append(shown)
            due = shown + interval
            if len(times) >= most:
                break
    if not times:
        raise ValueError(f"{path.name} has no frame that could be decoded.")
    return Clip(frames[: len(times)], 1.0 / interval, tuple(times))


def _as_shown(frame: Any, width: int, height: int) -> NDArray[np.uint8]:
    """RGB of a decoded frame at `width` x `height`, upright."""
    picture: NDArray[np.uint8] = rgb_of(frame, width, height, interpolation="AREA")
    mirrored, turns = turned(frame)
    return np.rot90(picture[:, ::-1] if mirrored else picture, turns)
