"""Films that a workflow saves without ComfyUI: copied or encoded again, their times, their sound."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hotpath import host
from hotpath.headless import video, video_nodes
from hotpath.headless.video import VideoComponents, VideoFile, VideoFrames, read_video
from hotpath.host.headless import HeadlessHost

HEIGHT, WIDTH = 32, 48


@pytest.fixture(autouse=True)
def here(tmp_path: Path) -> Iterator[HeadlessHost]:
    made = HeadlessHost(models=tmp_path, input_folder=tmp_path, output_folder=tmp_path, device="cpu")
    before = host.use(made)
    yield made
    host.use(before)


def film(
    path: Path,
    times: tuple[int, ...] = tuple(range(12)),
    sounds: tuple[float, ...] = (),
    late: float = 0.0,
    codec: str = "libx264",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    form: str = "yuv420p",
) -> Path:
    """Pictures that grow brighter at `times` twelfths of a second, and a second of tone for each loudness of `sounds`,
    `late` seconds after the pictures."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=12)
        (stream.width, stream.height), stream.pix_fmt = size, form
        voices = [out.add_stream("aac", rate=48000, layout="mono") for _ in sounds]
        for number, time in enumerate(times):
            grey = np.full((size[1], size[0], 3), 60 + 12 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format=form)
            frame.pts, frame.time_base = time, Fraction(1, 12)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        for voice, loudness in zip(voices, sounds, strict=True):
            tone = loudness * np.sin(np.arange(48000, dtype=np.float32) / 20)[None]
            heard = av.AudioFrame.from_ndarray(tone.astype(np.float32), format="fltp", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = 48000, round(late * 48000), Fraction(1, 48000)
            for part in (heard, None):
                out.mux(voice.encode(part))
    return path


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(p) for p in container.demux(container.streams.video[0]) if p.size]


def shown(path: Path) -> tuple[list[float], str]:
    """When each picture is shown, in seconds, and the codec."""
    with av.open(str(path)) as container:
        times = [float(frame.time) for frame in container.decode(container.streams.video[0])]
        return times, container.streams.video[0].codec.canonical_name


def tone(components: VideoComponents, seconds: float, channels: int = 2, rate: int = 48000) -> VideoComponents:
    """The same with a tone in its last channel."""
    wave = torch.zeros(1, channels, int(rate * seconds))
    wave[0, -1] = torch.sin(torch.arange(wave.shape[-1]) * (900 / rate)) * 0.5
    return VideoComponents(components.images, components.frame_rate, {"waveform": wave, "sample_rate": rate})


def ramp(frames: int = 12) -> VideoComponents:
    levels = torch.linspace(0.2, 0.8, frames)[:, None, None, None]
    return VideoComponents(levels.expand(frames, HEIGHT, WIDTH, 3).clone(), Fraction(12))


@pytest.fixture
def unheld(monkeypatch: pytest.MonkeyPatch) -> None:
    def held(path: Path) -> None:
        raise AssertionError("the whole film was decoded")

    monkeypatch.setattr(video, "read_video", held)


@pytest.mark.parametrize(
    ("source", "codec", "format", "asked", "copied"),
    [
        ("a.mkv", "libx264", "auto", {}, True),
        ("a.mov", "libx264", "mp4", {"format.codec": "h264"}, True),
        ("a.mp4", "libx264", "mkv", {}, False),  # the container is another
        ("a.mp4", "mpeg4", "mp4", {"format.codec": "h264"}, False),
        ("a.avi", "wmv2", "auto", {}, False),  # an MP4 file cannot hold it
    ],
)
@pytest.mark.usefixtures("unheld")
def test_what_is_copied_and_what_is_encoded_again(tmp_path, source, codec, format, asked, copied):
    path = film(tmp_path / source, sounds=(0.5,), codec=codec)
    ui = video_nodes.SaveVideo().save(VideoFile(path), "out", format, prompt={"1": {}}, **asked)["ui"]
    made = tmp_path / ui["images"][0]["filename"]
    assert (packets(made) == packets(path)) == copied
    before, after = read_video(path), read_video(made)
    assert (after.images - before.images).abs().max() < 0.04
    assert after.audio["waveform"].shape[-1] == pytest.approx(48000, abs=2048)
    assert {k.lower(): v for k, v in after.metadata.items()}["prompt"] == '{"1": {}}'
    assert shown(made)[1] == (shown(path)[1] if copied else "h264")
    assert shown(made)[0] == pytest.approx(shown(path)[0], abs=0.001)


@pytest.mark.usefixtures("unheld")
def test_times_turns_and_odd_sides_stay(tmp_path):
    """Phones write films whose pictures last differently and lie on their side."""
    path = film(tmp_path / "a.mp4", times=(0, 1, 5, 6, 12), size=(WIDTH - 1, HEIGHT - 2), form="yuv444p")
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 2 * 4
    turn = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    path.write_bytes(data)
    VideoFile(path).save_to(tmp_path / "b.mkv", codec="h264", crf=5)
    assert shown(tmp_path / "b.mkv")[0] == pytest.approx([0, 1 / 12, 5 / 12, 0.5, 1], abs=0.002)
    before, after = read_video(path), read_video(tmp_path / "b.mkv")
    assert before.images.shape == (5, WIDTH - 1, HEIGHT - 2, 3) and after.images.shape == (5, WIDTH, HEIGHT - 2, 3)
    assert (after.images[:, :-1] - before.images).abs().max() < 0.04
    assert VideoFile(tmp_path / "b.mkv").get_dimensions() == (HEIGHT - 2, WIDTH)


@pytest.mark.usefixtures("unheld")
def test_hdr_stays_hdr(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream: Any = out.add_stream("ffv1", rate=12)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, 16, 9, 1
        for time in range(3):
            frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p10le")
            for plane in frame.planes:
                plane.update(np.full(plane.buffer_size // 2, 512, np.uint16).tobytes())
            frame.pts, frame.colorspace, frame.color_range = time, 9, 1
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    VideoFile(tmp_path / "a.mkv").save_to(tmp_path / "b.mp4", codec="h264")
    made = VideoFile(tmp_path / "b.mp4")
    assert (made.get_bit_depth(), made.get_color_space(), made.get_frame_count()) == (10, "HDR PQ", 3)


def test_the_last_track_and_its_place_in_time(tmp_path):
    path = film(tmp_path / "a.mkv", sounds=(0.1, 0.8), late=0.25)
    assert read_video(path).audio["waveform"].abs().max() > 0.5
    VideoFile(path).save_to(tmp_path / "b.mkv", codec="h264", crf=20)
    with av.open(str(tmp_path / "b.mkv")) as container:
        frames = list(container.decode(container.streams.audio[0]))
    heard = [frame.time for frame in frames if np.abs(frame.to_ndarray()).max() > 0.2]
    assert heard[0] == pytest.approx(0.25, abs=0.05) and heard[-1] < 1.0, "in step, and no longer than the pictures"


@pytest.mark.parametrize("rate", [22050, 192000])
@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_sound_of_any_rate(tmp_path, name, rate):
    VideoFrames(tone(ramp(3), 0.25, rate=rate)).save_to(tmp_path / name)
    audio = read_video(tmp_path / name).audio
    assert audio["sample_rate"] == (22050 if (name, rate) == ("a.mp4", 22050) else 48000)
    wave = audio["waveform"][0, 1]
    assert 0.45 < wave[2000:-2000].abs().max() < 0.55 and len(wave) / audio["sample_rate"] == pytest.approx(
        0.25, abs=0.05
    )
    # As high as it was: twice through zero a period.
    crossings = int((wave[1000:-1000].sign().diff() != 0).sum()) / (len(wave) - 2000) * audio["sample_rate"]
    assert crossings == pytest.approx(900 / np.pi, rel=0.05)


@pytest.mark.parametrize(("channels", "kept"), [(4, 2), (6, 6), (12, 2)])
def test_channels_of_sound(tmp_path, channels, kept):
    """What is said in a film with 5.1 comes out of the centre, which is none of the first two."""
    VideoFrames(tone(ramp(), 5.0, channels)).save_to(tmp_path / "a.mp4")
    wave = read_video(tmp_path / "a.mp4").audio["waveform"]
    assert wave.shape[1] == kept and wave.shape[-1] == pytest.approx(48000, abs=2048)
    assert channels > 8 or wave.abs().max() > 0.1


@pytest.mark.parametrize(("first", "second"), [("5.1", "stereo"), ("stereo", "5.1"), ("stereo", "mono")])
@pytest.mark.parametrize("rate", [48000, 44100])
def test_sound_that_changes_its_layout_or_rate(tmp_path, first, second, rate):
    """As broadcasts do, from the film to the advertisements."""
    parts = []
    for number, (layout, hertz) in enumerate(((first, 48000), (second, rate))):
        path = film(tmp_path / f"{number}.ts", times=tuple(range(12 * number, 12 * number + 12)))
        with av.open(str(tmp_path / f"s{number}.ts"), "w") as out, av.open(str(path)) as pictures:
            voice: Any = out.add_stream("ac3", rate=hertz, layout=layout)
            copy = out.add_stream_from_template(pictures.streams.video[0])
            channels = voice.codec_context.channels
            wave = 0.1 * np.sin(np.arange(hertz, dtype=np.float32) / 20)[None].repeat(channels, 0)
            heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=layout)
            heard.sample_rate, heard.pts, heard.time_base = hertz, number * hertz, Fraction(1, hertz)
            for part in (heard, None):
                out.mux(voice.encode(part))
            for packet in pictures.demux(pictures.streams.video[0]):
                if packet.size:
                    packet.stream = copy
                    out.mux(packet)
        parts.append((tmp_path / f"s{number}.ts").read_bytes())
    (tmp_path / "in.ts").write_bytes(b"".join(parts))
    VideoFile(tmp_path / "in.ts").save_to(tmp_path / "out.mp4", codec="h264", crf=20)
    audio = read_video(tmp_path / "in.ts").audio
    assert (audio["sample_rate"], audio["waveform"].shape[1]) == (48000, 6 if first == "5.1" else 2)
    for heard in (audio, read_video(tmp_path / "out.mp4").audio):
        wave, hertz = heard["waveform"][0], heard["sample_rate"]
        assert wave.shape[1] / hertz == pytest.approx(2, abs=0.15)
        assert all(
            0.05 < wave[0, at : at + hertz // 8].abs().max() < 0.4
            for at in range(hertz // 8, 13 * hertz // 8, hertz // 8)
        )


def test_a_film_that_announces_other_pictures_than_it_has(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mkv")
    whole = read_video(path).images
    for announced in (5, 40):
        monkeypatch.setattr(video, "_announced", lambda *_, n=announced: n)
        assert torch.equal(read_video(path).images, whole)


def test_a_size_that_changes_is_named(tmp_path):
    films = [film(tmp_path / f"{i}.ts", size=(WIDTH + 16 * i, HEIGHT)) for i in (0, 1)]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in films))
    with pytest.raises(ValueError, match="changes its size from 48x32 to 64x32: scale it first"):
        read_video(path)
    with pytest.raises(ValueError, match=r"a\.ts changes its size from 48x32 to 64x32: scale it first"):
        VideoFile(path).save_to(tmp_path / "b.mp4", crf=20)
    assert not (tmp_path / "b.mp4").exists()


def test_what_cannot_be_finished_is_not_left_behind(tmp_path, here):
    path = film(tmp_path / "a.mkv")
    for crf in (20.0, None):
        here.stop()
        with pytest.raises(KeyboardInterrupt):
            VideoFile(path).save_to(tmp_path / "b.mp4", crf=crf)
        assert [file.name for file in tmp_path.iterdir()] == ["a.mkv"]


def test_a_film_has_its_name_when_it_is_whole(tmp_path, here, monkeypatch):
    """Also where the process is killed meanwhile: half an MP4 cannot be opened, and nothing tells it from a whole one."""
    path, seen = film(tmp_path / "a.mkv"), []
    monkeypatch.setattr(here, "check_interrupt", lambda: seen.append((tmp_path / "b.mp4").exists()))
    for crf in (20.0, None):
        VideoFile(path).save_to(tmp_path / "b.mp4", crf=crf)
        (tmp_path / "b.mp4").unlink()
    assert seen and not any(seen)
