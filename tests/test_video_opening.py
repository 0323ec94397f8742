"""Films that are left before their end, and those that cannot be opened."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hotpath.colorization.video_file import open_video, read_facts
from hotpath.headless.video import VideoFile, read_video
from hotpath.host import video_opening
from hotpath.vision_language.pictures import read_clip
from odd_films import read, through, write

LEAVE = """
import importlib.util, logging, sys
import av, av.logging
spec = importlib.util.spec_from_file_location("video_opening", sys.argv[1])
opening = importlib.util.module_from_spec(spec)
spec.loader.exec_module(opening)
av.logging.set_level(av.logging.ERROR)
logging.getLogger("libav").setLevel(100)
for seen in range(3):
    with opening.opened(opening.Path(sys.argv[2])) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "FRAME", 4
        frames = container.decode(stream)
        for _ in range(seen + 1):
            next(frames)
print("left")
"""


def test_a_damaged_film_is_left_while_its_threads_tell_of_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "film.ts"
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for _ in range(12):
            noise = random.integers(0, 255, (240, 320, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        out.mux(stream.encode(None))
    content = np.fromfile(path, dtype=np.uint8)
    content[188 * 9 + 100 :: 188 * 7] ^= 0xFF
    content.tofile(path)
    # A process of its own: what would stand still is all of it.
    command = [sys.executable, "-c", LEAVE, video_opening.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "left\n"


def test_a_film_that_memory_does_not_hold_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory", "film.mp4")

    (tmp_path / "film.mp4").touch()
    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(MemoryError):
        open_video(tmp_path / "film.mp4")


def test_a_film_that_nothing_decodes_is_refused_before_it_is_tried(tmp_path: Path) -> None:
    """PyAV before 18.1 does not survive the attempt."""
    path = write(tmp_path / "in.mp4", 3)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    film = VideoFile(path)
    attempts: list[Callable[[], object]] = [
        lambda: read_facts(path),
        lambda: read_clip(path),
        lambda: read_video(path),
        film.get_dimensions,
        film.get_frame_count,
        film.get_bit_depth,
        film.get_color_space,
        lambda: film.save_to(tmp_path / "out.mkv"),
        lambda: film.save_to(tmp_path / "out.mkv", crf=20),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"^in\.mp4 cannot be decoded: PyAV has no decoder for its video\.$"):
            attempt()
    assert not (tmp_path / "out.mkv").exists()


def test_streams_that_begin_on_the_way_cost_no_film(tmp_path: Path) -> None:
    """As in a recording with advertisements that have more sound than the film; PyAV up to 18 has no list of them."""
    nothing = (b"\x47\x1f\xff\x10" + b"\xff" * 184) * 32768  # packets that say nothing: more than is looked through
    parts = [
        write(tmp_path / f"{number}.ts", times=list(range(24 * number, 24 * number + 24)), sound=sound, bf="0")
        for number, sound in enumerate((False, True, False))
    ]
    path = tmp_path / "in.ts"
    path.write_bytes(nothing.join(part.read_bytes() for part in parts))
    with av.open(str(path)) as container:
        assert len(container.streams) == 1
    assert len(read(path)[1]) == 72 and len(read_clip(path, 12).frames) == 24 and len(read_video(path).images) == 72
    through(path, tmp_path / "out.mp4")
    assert len(read(tmp_path / "out.mp4")[1]) == 72
    for name, crf in (("copy.ts", None), ("again.mp4", 20)):
        VideoFile(path).save_to(tmp_path / name, crf=crf)
        assert VideoFile(tmp_path / name).get_frame_count() == 72


@pytest.mark.parametrize("code", [67308554, 1094995529, 1163346256])
def test_whatever_a_decoder_calls_damage_costs_its_frame(code: int) -> None:
    def damaged() -> list[str]:
        av.error.err_check(-code)
        return []

    stream = SimpleNamespace(index=0)
    ways: list[Callable[[], list[str]]] = [lambda: ["a"], damaged, lambda: ["b"]]
    container = SimpleNamespace(demux=lambda *_: (SimpleNamespace(decode=way, stream=stream) for way in ways))
    assert list(video_opening.decoded(container, stream)) == ["a", "b"]
