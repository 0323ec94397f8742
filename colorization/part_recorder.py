"""The writing side of a film job: pictures into the part that is open, and parts into the manifest."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from .film import ColouringFrames, Snapshot
from .film_state import save_state
from .manifest import FinishedPart, Manifest
from .stage_times import StageTimes
from .video_file import VideoFacts
from .video_parts import PartWriter

log = logging.getLogger("hotpath.colorization")


class PartRecorder:
    """All calls from one thread, in the order of the film."""

    def __init__(
        self, folder: Path, manifest: Manifest, facts: VideoFacts, codec: str, quality: int, times: StageTimes
    ) -> None:
        self.folder, self.manifest, self.facts = folder, manifest, facts
        self.codec, self.quality, self.times = codec, quality, times
        self._writer: PartWriter | None = None
        self._frames = 0  # in the open part
        self._broken = False  # a frame is missing: nothing after it may count

    def write(self, queued: ColouringFrames, times: list[int]) -> tuple[int, Tensor]:
        """Encode frames once they are there. Returns how many, and the last of them."""
        whole, self._broken = not self._broken, True
        pictures = queued.wait().pictures
        with self.times.beside("encoding, beside it"):
            if self._writer is None:
                path = self.manifest.part_file(self.folder, len(self.manifest.parts) + 1)
                self._writer = PartWriter(path, self.facts, self.codec, self.quality)
            self._writer.write(pictures, times)
        self._frames += len(times)
        self._broken = not whole
        return len(times), pictures[-1]

    def finish(self, snapshot: Snapshot, next_time: int, shot: int, ends_shot: bool) -> None:
        """Close the open part, which is of shot `shot`; the film goes on with `snapshot` at `next_time`.

        After a write or a finish that failed, this does nothing: the film goes on before it another time.
        """
        if self._broken or self._writer is None:
            return
        self._broken = True
        writer, self._writer = self._writer, None
        writer.close()
        first = self.manifest.frames
        save_state(snapshot.state(), self.manifest.state_file(self.folder, len(self.manifest.parts) + 1))
        self.manifest.add(self.folder, FinishedPart(first, first + self._frames, shot, ends_shot), next_time)
        self._frames = 0
        self._broken = False

    def abandon(self) -> None:
        """Close a part that will not be finished."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:
                log.debug("closing an unfinished part: %s", error)
