"""Picture files, batches and films as a model sees them."""

from __future__ import annotations

import numpy as np
import pytest
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.pictures import Clip, from_frames, from_images, read_clip, read_picture, to_bytes
from PIL import Image


def test_picture_files(tmp_path):
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").pixels.min() == 255
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").pixels.shape == (4, 2, 3)
    Image.fromarray(np.full((2, 3), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").pixels.tolist() == np.full((2, 3, 3), 255).tolist()
    Image.new("P", (3, 3)).save(tmp_path / "indexed.gif")
    assert read_picture(tmp_path / "indexed.gif").pixels.shape == (3, 3, 3)


def test_every_byte_survives_the_way_through_comfyui():
    import torch

    values = torch.arange(256, dtype=torch.uint8)
    image = (values.float() / 255).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(torch.from_numpy(to_bytes(image)[0, ..., 0]).flatten(), values)
    assert to_bytes(torch.full((1, 2, 2, 4), float("nan"))).max() == 0
    assert to_bytes(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1, 1))[:, 0, 0].tolist() == [
        [0] * 3,
        [128] * 3,
        [255] * 3,
    ]
    assert len(from_images(torch.rand(3, 4, 5, 3))) == 3 and from_images(None) == []
    with pytest.raises(ValueError, match="IMAGE has the shape"):
        to_bytes(torch.rand(4, 5, 3))


def test_a_batch_is_never_whole_in_float(monkeypatch):
    import torch

    real, sizes = torch.Tensor.nan_to_num, []
    monkeypatch.setattr(torch.Tensor, "nan_to_num", lambda it, *rest: (sizes.append(it.numel()), real(it, *rest))[1])
    assert len(from_images(torch.rand(6, 4, 5, 3))) == 6 and max(sizes) == 4 * 5 * 3


def test_frames_keep_their_times():
    import torch

    (clip,) = from_frames(torch.rand(300, 4, 4, 3), 30.0, 4)
    assert len(clip.frames) == 4
    assert clip.seconds() == pytest.approx((0.0, 99 / 30, 199 / 30, 299 / 30))
    with pytest.raises(ValueError, match="frames a second"):
        Clip(clip.frames, 0.0)
    assert clip.sampled(2).seconds() == pytest.approx((0.0, 299 / 30))


def test_an_empty_batch_is_no_question_without_pictures():
    import torch

    for look in (from_images, lambda batch: from_frames(batch, 24.0, 16)):
        with pytest.raises(ValueError, match="the batch is empty"):
            look(torch.rand(0, 8, 8, 3))


def test_video_files(tmp_path):
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for index in range(35):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), index * 7, dtype=np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read_clip(path, 1.0)
    assert clip.seconds() == pytest.approx((0, 1, 2, 3), abs=0.11)
    assert [int(f.mean()) // 7 for f in clip.frames] == pytest.approx([0, 10, 20, 30], abs=1)
    assert len(read_clip(path, 10.0, most=5).frames) == 5
    with pytest.raises(FileNotFoundError, match="video_path"):
        read_clip(tmp_path / "absent.mp4")
    with pytest.raises(FileNotFoundError, match="video_path"):
        read_clip(tmp_path / ("x" * 300))


def write_film(path):
    """20 frames that get brighter, the top half black, 10 a second, from second 5 on."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for index in range(20):
            pixels = np.full((32, 64, 3), 50 + index * 10, dtype=np.uint8)
            pixels[:16] = 0
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = 50 + index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def film(tmp_path):
    """A film that is to be shown a quarter turn to the left."""
    path = write_film(tmp_path / "phone.mp4")
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 2 * 4
    matrix = (0, -1 << 16, 0, 1 << 16, 0, 0, 0, 0, 1 << 30)
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
    return path


def test_a_film_of_a_phone_is_upright(film, monkeypatch):
    from hotpath.vision_language import pictures

    clip = read_clip(film, 5.0)
    assert clip.frames.shape == (10, 64, 32, 3)
    assert clip.frames[:, :, :16].max() < 40 < clip.frames[:, :, 17:].min(), "what was above is at the left"
    assert clip.seconds() == pytest.approx(np.arange(10) / 5, abs=0.01)
    assert read_clip(write_film(film.with_suffix(".ts")), 5.0).seconds() == clip.seconds(), "it begins at second 5"
    monkeypatch.setattr(pictures, "LARGEST_FRAME", 16 * 32)
    assert read_clip(film, 5.0).frames.shape == (10, 32, 16, 3)


def test_reading_a_film_can_be_stopped(film, headless_host):
    from hotpath.host import Interrupted

    headless_host.stop()
    with pytest.raises(Interrupted):
        read_clip(film)


def test_a_long_clip_stays_within_its_budget(load, ask):
    from hotpath.vision_language.embeddings import clip_size
    from hotpath.vision_language.prompts import Question

    model = load("qwen3_vl")
    clip = Clip(np.random.default_rng(0).integers(0, 255, (300, 40, 60, 3), dtype=np.uint8), 30.0)
    made = ask(model, Question("What happens?", "", (), (clip,)), budget=PRESETS["native"], max_new_tokens=2)
    item = made.items[0]
    assert item.grid[0] == 150
    assert item.tokens(2) <= model.context_length // 2
    huge = np.broadcast_to(np.zeros(1, dtype=np.uint8), (300, 4320, 7680, 3))
    tall, wide = clip_size(model, Clip(huge, 30.0), PRESETS["native"])
    assert tall * wide * 150 // 1024 <= model.context_length // 2


def test_an_8k_picture_costs_its_budget(load, ask):
    from hotpath.vision_language.pictures import Picture
    from hotpath.vision_language.prompts import Question

    picture = Picture(
        np.random.default_rng(0).integers(0, 255, (432, 768, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    )
    made = ask(load("qwen3_vl"), Question("x", "", (picture,)), max_new_tokens=2)
    assert 200 <= made.items[0].tokens(2) <= 256
    assert "visual tokens" in made.report


def test_a_file_that_is_no_video(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"this is no video" * 100)
    with pytest.raises(ValueError, match=r"clip\.mp4 cannot be read as a video"):
        read_clip(path)
