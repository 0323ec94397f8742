"""The playable file that a film job leaves when it is stopped.

It has the output's name while that is free. What else has that name, such as the whole film of an earlier job, is never
replaced by a part: then it is `<name>.partial.<ending>` beside it, which goes when the film is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..host.held import held
from .manifest import FILE as MANIFEST
from .video_file import VideoError

FILE = "playable.json"  # in the folder of the parts
AT_WORK = "at-work"  # there, too: held by the run that works in it


def parts_folder(output: Path) -> Path:
    """Where the work on `output` lies until it is whole."""
    return output.with_name(output.name + ".parts")


@contextmanager
def parts_held(output: Path) -> Iterator[Path]:
    """The folder of the parts, which is made, for one run alone; with nothing in it, it goes at the end.

    Raises VideoError where another run works on `output`: either would write over the other's parts, or delete them.
    """
    folder = parts_folder(output)
    try:
        with held(folder / AT_WORK) as ours:
            if ours is None:
                raise VideoError(
                    f"Another run works on {output.name} at this moment: wait for it, stop it, or choose another output name."
                )
            yield folder
    finally:
        with suppress(OSError):  # there is work in it
            folder.rmdir()


def place_for(output: Path) -> Path | None:
    """Where a part of the film may be written now; None where both names belong to other files."""
    before = left_before(output)
    beside = output.with_name(f"{output.stem}.partial{output.suffix}")
    return next((path for path in (output, beside) if path == before or not path.exists()), None)


def left_before(output: Path) -> Path | None:
    """The file that the last stop left, if it is still as it was then."""
    try:
        noted = json.loads((parts_folder(output) / FILE).read_text(encoding="utf-8"))
        path = output.with_name(noted["file"])
        return path if _stamp(path) == noted["stamp"] else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def note_left(output: Path, path: Path, frames: int) -> None:
    """`path` now holds what is finished of `output`, the first `frames`; the file of an earlier stop goes."""
    before = left_before(output)
    noted = json.dumps({"file": path.name, "stamp": _stamp(path), "frames": frames})
    (parts_folder(output) / FILE).write_text(noted, encoding="utf-8")
    if before is not None and before != path:
        before.unlink(missing_ok=True)


def drop_left(output: Path) -> None:
    """`output` is whole: what a stop left beside it goes."""
    before = left_before(output)
    if before is not None and before != output:
        with suppress(OSError):  # on Windows somebody who looks at it keeps it
            before.unlink(missing_ok=True)


def finished_so_far(output: Path) -> Path | None:
    """What holds the finished part of a film that is not whole: a video, or the folder of its parts where none could be
    made of all of them. None when nothing is finished."""
    folder = parts_folder(output)
    if not (finished := finished_frames(folder)):
        return None
    try:
        in_video = json.loads((folder / FILE).read_text(encoding="utf-8"))["frames"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return folder
    left = left_before(output)
    return left if left is not None and in_video == finished else folder


def finished_frames(folder: Path) -> int:
    """How many frames the parts in `folder` hold, of whatever job they are."""
    try:
        return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["parts"][-1]["stop"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return 0


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
