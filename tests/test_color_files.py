"""Video files coloured by tiny networks: frames, times, sound, containers, what is refused."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from film_files import frames, read_video, write_film
from hotpath.colorization import file_job, film, pictures, video_file, video_parts
from hotpath.colorization.film_options import FilmOptions, Reference, read_references
from hotpath.colorization.transfers import DirectCopies
from torch import Tensor

pytestmark = pytest.mark.usefixtures("colour_host")


def file_task(folder: Path, **changes: Any) -> tuple[file_job.FileJob, list[Reference]]:
    options = FilmOptions(colour_size=32, **changes)
    return file_job.FileJob(folder / "in.mp4", folder / "out.mp4", options, quality=4), read_references([*frames(1)])


def test_file_keeps_frames_times_and_sound(tmp_path: Path) -> None:
    write_film(tmp_path / "in.mp4", frames(30))
    lines: list[str] = []
    job, references = file_task(tmp_path)
    report = file_job.colorize_file(job, references, lines.append)
    pictures, times, sound = read_video(job.output)
    _, expected_times, expected_sound = read_video(job.source)
    assert times == expected_times and len(pictures) == 30
    assert sound == expected_sound > 2
    colours = (pictures.float().amax(-1) - pictures.float().amin(-1)).mean()
    assert colours > 2
    assert "frames: 30 in" in report and lines and "left" in lines[-1]
    assert not (tmp_path / "out.mp4.parts").exists()


class OnDevice(Tensor):
    """Notes who uses it, and what comes of it, until it is copied to the host."""

    users: set[threading.Thread] = set()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.users.add(threading.current_thread())
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made.as_subclass(Tensor) if func is Tensor.cpu else made


class OneThread(DirectCopies):
    """To and from a device that only the thread that computes may use."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("mps"))
        assert not self.from_any_thread

    def arrived(self, tensor: Tensor, mark: None) -> Tensor:
        return tensor.as_subclass(OnDevice)


def test_a_device_that_two_threads_would_crash_is_used_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_film(tmp_path / "in.mp4", frames(30))
    job, references = file_task(tmp_path)
    file_job.colorize_file(job, references)
    expected = read_video(job.output)[0]
    job.output.unlink()
    monkeypatch.setattr(film, "copies_for", OneThread)
    monkeypatch.setattr(OnDevice, "users", set())
    file_job.colorize_file(job, references)
    assert OnDevice.users == {threading.current_thread()}
    assert torch.equal(read_video(job.output)[0], expected)


def test_full_disk_is_raised_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_film(tmp_path / "in.mp4", frames(6), sound=False)
    job, references = file_task(tmp_path)
    job.output.write_bytes(b"an older result")

    def full(self: Any, pictures: Tensor, times: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_parts.PartWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file_job.colorize_file(job, references)
    assert job.output.read_bytes() == b"an older result"


def test_files_that_are_no_videos_are_named(tmp_path: Path) -> None:
    job, references = file_task(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no video .*in\.mp4"):
        file_job.colorize_file(job, references)
    for content in (b"not a video at all" * 100, b"OggS"):
        job.source.write_bytes(content)
        with pytest.raises(video_file.VideoError, match=r"in\.mp4 cannot be opened"):
            file_job.colorize_file(job, references)
    write_film(tmp_path / "whole.mp4", frames(20))
    job.source.write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    with pytest.raises((video_file.VideoError, FileNotFoundError)):
        file_job.colorize_file(job, references)


def test_the_film_itself_is_never_written_over(tmp_path: Path) -> None:
    write_film(tmp_path / "in.mp4", frames(3), sound=False)
    (tmp_path / "link.mp4").hardlink_to(tmp_path / "in.mp4")
    for name in ("in.mp4", "link.mp4", "x/../in.mp4"):
        with pytest.raises(ValueError, match="is the film itself, which would be lost"):
            file_job.FileJob(tmp_path / "in.mp4", tmp_path / name, FilmOptions())


@pytest.mark.parametrize("quality", [-1, 52])
def test_a_quality_that_x264_does_not_know_is_refused(tmp_path: Path, quality: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 51, not {quality}"):
        file_job.FileJob(tmp_path / "in.mp4", tmp_path / "out.mp4", FilmOptions(), quality=quality)


@pytest.mark.parametrize("ending", [".webm", ".avi", ".mpg", ".gif", ".xyz", ""])
def test_a_container_that_cannot_hold_the_film_is_refused_before_it_is_coloured(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_film(tmp_path / "in.mp4", frames(3))
    monkeypatch.setattr(film.FilmSession, "prepare", lambda *_: pytest.fail("work was begun"))
    job = file_job.FileJob(tmp_path / "in.mp4", tmp_path / f"out{ending}", FilmOptions(colour_size=32))
    with pytest.raises(video_file.VideoError, match=r"cannot hold this film as libx264 .* such as \.mp4 or \.mkv"):
        file_job.colorize_file(job, read_references([*frames(1)]))
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_pixels_that_are_not_square_stay_so(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 40, 54, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 15)
        for picture in (frames(3) * 255).to(torch.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    job, references = file_task(tmp_path)
    file_job.colorize_file(job, references)
    with av.open(str(job.output)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 15)
    report = file_job.colorize_file(job, read_references([*frames(1)], "7"))
    assert "Reference 1 is frame 7, counted from 0, and the film has 3" in report


def test_odd_sizes_and_paths_from_the_command_line(tmp_path: Path) -> None:
    from PIL import Image

    write_film(tmp_path / "in.mp4", frames(3, 41, 53), sound=False)
    Image.fromarray((frames(1)[0] * 255).to(torch.uint8).numpy()).save(tmp_path / "r.png")
    file_job.colorize_file_by_path(
        tmp_path / "in.mp4", tmp_path / "o.mkv", [tmp_path / "r.png"], FilmOptions(colour_size=32), "0", quality=10
    )
    assert read_video(tmp_path / "o.mkv")[0].shape == (3, 41, 53, 3)
    with pytest.raises(ValueError, match=r"in\.mp4 is no picture that can be read"):
        file_job.colorize_file_by_path(tmp_path / "in.mp4", tmp_path / "o.mkv", [tmp_path / "in.mp4"], FilmOptions())
    with pytest.raises(FileNotFoundError, match="no reference picture"):
        file_job.colorize_file_by_path(tmp_path / "in.mp4", tmp_path / "o.mkv", [tmp_path / "x.png"], FilmOptions())


def test_a_reference_file_is_upright_without_transparency_and_in_0_to_1() -> None:
    from PIL import Image

    drawn = Image.new("RGBA", (3, 2), (255, 51, 0, 10))
    drawn.putpixel((0, 0), (0, 102, 255, 255))
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn clockwise
    drawn.getexif().update(turned)
    made = pictures.from_pil(drawn)
    assert made.shape == (3, 2, 3) and torch.allclose(made[0, 1], torch.tensor([0, 0.4, 1.0]))
    assert torch.allclose(made[0, 0], torch.tensor([1.0, 0.2, 0])) and torch.allclose(made[2], made[0, 0])
