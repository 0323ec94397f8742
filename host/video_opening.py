"""Opening a video file for reading, its packets and its frames, whoever wrote it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger("hotpath.host")


def opened(path: Path) -> AbstractContextManager[Any]:
    """The file as a container of PyAV, open at once. Names in old files are in any encoding; what cannot be read is replaced.

    Raises OSError or ValueError when it is none, and MemoryError where there is no room for it.
    """
    import av

    try:
        try:
            container = av.open(str(path), metadata_errors="replace")
        except TypeError:  # PyAV 19 reads them all, and has no word for it
            container = av.open(str(path))
    except (OSError, ValueError, MemoryError):
        raise
    except av.error.FFmpegError as error:  # such as PyAV's own EOFError, which is neither
        raise ValueError(f"{path.name} is damaged or cut off: {error}") from error
    return _at_rest_in_the_end(container)


def decodable(stream: Any, path: Path) -> Any:
    """The stream. Raises ValueError where nothing decodes it, which PyAV before 18.1 tries, and the process dies (PyAV #2344)."""
    if stream.codec_context is None:
        raise ValueError(f"{path.name} cannot be decoded: PyAV has no decoder for its video.")
    return stream


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """Packets in the order of the file, of all streams if none is named; those without content at the end flush decoders."""
    try:
        yield from container.demux(*streams)
    except IndexError:
        # The end: up to PyAV 18 it then looks into streams that a broadcast has begun on the way, of which it has no list.
        log.debug("streams began on the way and are left out")


def decoded(container: Any, *streams: Any) -> Iterator[Any]:
    """The frames of some streams as they come. A damaged packet costs its frame and not the film."""
    import av

    for packet in packets(container, *streams):
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:  # decoders have many words for damage
            if isinstance(error, MemoryError):
                raise
            log.info("a damaged packet of stream %d is left out: %s", packet.stream.index, error)
            continue
        yield from frames


@contextmanager
def _at_rest_in_the_end(container: Any) -> Iterator[Any]:
    with container:
        try:
            yield container
        finally:
            # PyAV frees a decoder while it holds Python's lock. A thread of the decoder that tells of damage meanwhile waits for
            # that lock, once anybody has turned PyAV's log on (torchvision up to 0.25 does), and the whole process stands
            # still. To flush waits for the threads without the lock.
            for stream in container.streams:
                if (decoder := getattr(stream, "codec_context", None)) is not None:
                    decoder.flush_buffers()
