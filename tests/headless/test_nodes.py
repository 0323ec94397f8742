"""The rebuilt core nodes: pictures, masks and videos in and out, file names, and the same interface as ComfyUI's."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotpath import host
from hotpath.headless import core_nodes, files, video_nodes
from hotpath.headless.catalog import declared_inputs
from hotpath.headless.video import VideoComponents, VideoFile, VideoFrames
from PIL import Image

ALL = {**core_nodes.NODES, **video_nodes.NODES}


@pytest.fixture
def folders(headless_host):
    headless_host.input_folder().mkdir()
    headless_host.temp_folder = lambda: headless_host.output_folder() / "temp"
    return headless_host


def random_picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (13, 9), **options: Any) -> np.ndarray:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze() if channels == 1 else pixels, mode).save(path, **options)
    return pixels


def test_a_picture_comes_back_to_the_bit(folders):
    pixels = random_picture(folders.input_folder() / "a.png")
    image, mask = core_nodes.LoadImage().load_image("a.png")
    assert image.shape == (1, 9, 13, 3) and image.dtype == torch.float32
    assert np.array_equal((image[0] * 255).round().byte().numpy(), pixels)
    assert mask.shape == (1, 64, 64) and not mask.any()
    shown = core_nodes.SaveImage().save_images(image, "b")["ui"]["images"]
    assert shown == [{"filename": "b_00001_.png", "subfolder": "", "type": "output"}]
    assert np.array_equal(np.array(Image.open(folders.output_folder() / "b_00001_.png")), pixels)


def test_transparency_becomes_the_mask(folders):
    pixels = random_picture(folders.input_folder() / "a.png", "RGBA")
    image, mask = core_nodes.LoadImage().load_image("a.png")
    assert image.shape[-1] == 3
    assert torch.allclose(mask[0], 1 - torch.from_numpy(pixels[..., 3] / 255).float(), atol=1e-6)
    (alpha,) = core_nodes.LoadImageMask().load_image_mask("a.png", "alpha")
    (green,) = core_nodes.LoadImageMask().load_image_mask("a.png", "green")
    assert torch.equal(alpha, mask)
    assert torch.allclose(green[0], torch.from_numpy(pixels[..., 1] / 255).float())


def test_grey_palette_and_16_bit_pictures(folders):
    folder = folders.input_folder()
    random_picture(folder / "grey.png", "L")
    Image.open(folder / "grey.png").convert("P").save(folder / "palette.png")
    assert core_nodes.LoadImage().load_image("grey.png")[0].shape == (1, 9, 13, 3)
    assert core_nodes.LoadImage().load_image("palette.png")[0].shape == (1, 9, 13, 3)
    deep = np.array([[0, 257, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    image = core_nodes.LoadImage().load_image("deep.png")[0]
    assert torch.allclose(image[0, 0, :, 0], torch.tensor([0.0, 257 / 65535, 1.0]))


def test_a_turned_photo_is_upright(folders):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    random_picture(folders.input_folder() / "a.jpg", exif=exif)
    assert core_nodes.LoadImage().load_image("a.jpg")[0].shape == (1, 13, 9, 3)


def test_every_frame_of_an_animation(folders):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folders.input_folder() / "a.gif", save_all=True, append_images=frames[1:])
    assert core_nodes.LoadImage().load_image("a.gif")[0].shape == (3, 4, 6, 3)


def test_a_file_that_is_no_picture(folders):
    (folders.input_folder() / "a.png").write_text("hello")
    with pytest.raises(ValueError, match=r"a\.png is not a picture"):
        core_nodes.LoadImage().load_image("a.png")


def test_the_workflow_is_in_the_picture(folders):
    prompt, extra = {"1": {"class_type": "A", "inputs": {}}}, {"workflow": {"nodes": [1]}}
    core_nodes.SaveImage().save_images(torch.zeros(1, 4, 4, 3), "a", prompt, extra)
    stored = Image.open(folders.output_folder() / "a_00001_.png").info
    assert json.loads(stored["prompt"]) == prompt and json.loads(stored["workflow"]) == extra["workflow"]


def test_outputs_are_numbered_on(folders):
    save = core_nodes.SaveImage().save_images
    names = [save(torch.zeros(2, 4, 4, 3), "sub/a")["ui"]["images"] for _ in range(2)]
    assert [n["filename"] for shown in names for n in shown] == [f"a_{i:05}_.png" for i in range(1, 5)]
    assert {n["subfolder"] for shown in names for n in shown} == {"sub"}
    (folders.output_folder() / "sub" / "ab_00099_.png").touch()  # another prefix
    assert save(torch.zeros(1, 4, 4, 3), "sub/a")["ui"]["images"][0]["filename"] == "a_00005_.png"


def test_names_with_size_and_batch_number(folders):
    shown = core_nodes.SaveImage().save_images(torch.zeros(2, 4, 6, 3), "%width%x%height%-%batch_num%")["ui"]["images"]
    assert [n["filename"] for n in shown] == ["6x4-0_00001_.png", "6x4-1_00002_.png"]


@pytest.mark.parametrize("prefix", ["../out", "/etc/x", "a/../../b", "..\\b", ""])
def test_outputs_stay_in_their_folder(folders, prefix):
    with pytest.raises(ValueError, match=r"outside|No file"):
        core_nodes.SaveImage().save_images(torch.zeros(1, 4, 4, 3), prefix)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "link/secret.png", "\0", ""])
def test_inputs_stay_in_their_folder(folders, name):
    folder = folders.input_folder()
    random_picture(folder.parent / "secret.png")
    (folder / "link").symlink_to(folder.parent)
    with pytest.raises(ValueError, match=r"outside|No file"):
        files.input_file(name)
    assert core_nodes.LoadImage.VALIDATE_INPUTS(name) is not True


def test_marked_names(folders):
    core_nodes.SaveImage().save_images(torch.ones(1, 4, 4, 3), "a")
    image, _ = core_nodes.LoadImage().load_image("a_00001_.png [output]")
    assert image.min() == 1
    assert "no file" in core_nodes.LoadImage.VALIDATE_INPUTS("a_00001_.png")
    # Not searched anew from each of its spaces: this took minutes, in which nothing else of the process ran.
    started = time.perf_counter()
    assert core_nodes.LoadImage.VALIDATE_INPUTS("a" + " " * 200_000 + "x") is not True
    assert time.perf_counter() - started < 5


def test_is_changed_follows_the_content(folders):
    path = folders.input_folder() / "a.png"
    random_picture(path)
    before = core_nodes.LoadImage.IS_CHANGED("a.png")
    random_picture(path, size=(5, 5))
    assert core_nodes.LoadImage.IS_CHANGED("a.png") != before
    assert core_nodes.LoadImageMask.IS_CHANGED(image="a.png", channel="red") == core_nodes.LoadImage.IS_CHANGED("a.png")


def test_previews_go_to_the_temporary_folder(folders):
    shown = core_nodes.PreviewImage().save_images(torch.zeros(1, 4, 4, 3))["ui"]["images"]
    assert shown[0]["type"] == "temp"
    assert (folders.temp_folder() / shown[0]["filename"]).is_file()


def test_batches_of_different_sizes():
    first, second = torch.zeros(1, 4, 8, 3), torch.ones(2, 8, 8, 3)
    (batch,) = core_nodes.ImageBatch().batch(first, second)
    assert batch.shape == (3, 4, 8, 3) and batch[1:].min() == 1
    (batch,) = core_nodes.ImageBatch().batch(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 3))
    assert batch.shape == (2, 4, 4, 4) and batch[1, ..., 3].min() == 1


@pytest.mark.parametrize(
    ("value", "text"), [("a", "a"), (1.5, "1.5"), ([1, "b"], '[\n    1,\n    "b"\n]'), (None, "null")]
)
def test_any_value_as_text(value, text):
    assert core_nodes.PreviewAny().main(value) == {"ui": {"text": (text,)}, "result": (text,)}


def test_solid_mask():
    (mask,) = core_nodes.SolidMask().solid(0.25, 6, 4)
    assert mask.shape == (1, 4, 6) and mask.unique().item() == 0.25


def test_mask_to_image():
    (picture,) = core_nodes.MaskToImage().convert(torch.full((2, 4, 6), 0.25))
    assert picture.shape == (2, 4, 6, 3) and picture.unique().item() == 0.25


@pytest.mark.parametrize(
    ("index", "length", "wanted"), [(0, 2, [0, 1]), (3, 9, [3, 4]), (-1, 1, [4]), (-9, 1, [0]), (9, 3, [4])]
)
def test_image_from_batch(index, length, wanted):
    batch = torch.arange(5.0)[:, None, None, None].expand(5, 2, 2, 3)
    (taken,) = core_nodes.ImageFromBatch().take(batch, index, length)
    assert taken[:, 0, 0, 0].tolist() == wanted


def clip(frames: int = 6, height: int = 32, width: int = 48, sound: bool = False) -> VideoComponents:
    ramp = torch.linspace(0.1, 0.9, frames)[:, None, None, None].expand(frames, height, width, 3).clone()
    audio = {"waveform": torch.sin(torch.arange(12000) / 20)[None, None], "sample_rate": 48000} if sound else None
    return VideoComponents(ramp, Fraction(12), audio)


def test_the_container_that_is_named_is_written_whatever_the_ending(folders, tmp_path):
    import av

    def container(path: Path) -> str:
        with av.open(str(path)) as opened:
            return opened.format.name

    made, again = tmp_path / "made.video", tmp_path / "again.video"
    for format, muxer, codec in (("mkv", "matroska", "h264"), ("mp4", "mp4", "h264"), ("webm", "webm", "av1")):
        VideoFrames(clip()).save_to(made, format=format, metadata={"prompt": {}})
        assert muxer in container(made).split(",")
        VideoFile(made).save_to(again, format=format)  # copied
        assert muxer in container(again).split(",")
        VideoFile(made).save_to(again, format=format, crf=30.0)  # encoded again
        with av.open(str(again)) as opened:
            assert muxer in opened.format.name.split(",")
            assert opened.streams.video[0].codec.canonical_name == codec
    with pytest.raises(ValueError, match="webm file holds AV1"):
        VideoFrames(clip()).save_to(made, format="webm", codec="h264")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_video_comes_back(folders, tmp_path, name):
    VideoFrames(clip(sound=True)).save_to(tmp_path / name, metadata={"prompt": {"1": {}}})
    video = VideoFile(tmp_path / name)
    parts = video.get_components()
    assert parts.images.shape == (6, 32, 48, 3) and parts.frame_rate == 12
    assert (parts.images - clip().images).abs().max() < 0.03
    assert parts.audio is not None and parts.audio["sample_rate"] == 48000
    assert abs(parts.audio["waveform"].shape[-1] - 12000) <= 2048  # codecs work in blocks
    assert video.get_dimensions() == (48, 32) and video.get_frame_count() == 6
    assert video.get_duration() == pytest.approx(0.5)
    assert {k.lower(): v for k, v in (parts.metadata or {}).items()}["prompt"] == '{"1": {}}'


def test_10_bits_keep_fine_steps(folders, tmp_path):
    fine = VideoComponents(
        (torch.arange(8)[:, None, None, None] / 1023 + 0.5).expand(8, 32, 32, 3).clone(), Fraction(8)
    )
    VideoFrames(fine, bit_depth=10).save_to(tmp_path / "a.mp4", crf=0)
    video = VideoFile(tmp_path / "a.mp4")
    assert video.get_bit_depth() == 10
    assert len(video.get_components().images.mean(dim=(1, 2, 3)).round(decimals=4).unique()) >= 6


def test_odd_sides_gain_a_row(folders, tmp_path):
    VideoFrames(clip(height=31, width=47)).save_to(tmp_path / "a.mp4")
    assert VideoFile(tmp_path / "a.mp4").get_dimensions() == (48, 32)


def test_an_unchanged_video_is_copied_and_not_encoded_again(folders, tmp_path):
    VideoFrames(clip(sound=True)).save_to(tmp_path / "a.mp4")
    VideoFile(tmp_path / "a.mp4").save_to(tmp_path / "b.mp4", metadata={"prompt": {"x": 1}})
    before, after = (VideoFile(tmp_path / name).get_components() for name in ("a.mp4", "b.mp4"))
    assert torch.equal(before.images, after.images)
    assert json.loads((after.metadata or {})["prompt"]) == {"x": 1}


def test_bad_videos(folders, tmp_path):
    with pytest.raises(ValueError, match="AV1"):
        VideoFrames(clip()).save_to(tmp_path / "a.webm", codec="h264")
    with pytest.raises(ValueError, match="no video codec 'vp6'"):
        VideoFrames(clip()).save_to(tmp_path / "a.mp4", codec="vp6")
    with pytest.raises(ValueError, match="at least one"):
        VideoFrames(VideoComponents(torch.zeros(0, 4, 4, 3), Fraction(1)))


def test_a_stop_while_encoding(folders, tmp_path):
    folders.stop()
    with pytest.raises(KeyboardInterrupt):
        VideoFrames(clip()).save_to(tmp_path / "a.mp4")


def test_the_video_nodes_together(folders):
    made = video_nodes.CreateVideo().create(clip().images, 24.0)[0]
    shown = video_nodes.SaveVideo().save(made, "video/a", "mp4", prompt={"1": {}}, **{"format.codec": "h264"})["ui"]
    assert shown == {
        "images": [{"filename": "a_00001_.mp4", "subfolder": "video", "type": "output"}],
        "animated": [True],
    }
    (folders.output_folder() / "video" / "a_00001_.mp4").rename(folders.input_folder() / "b.mp4")
    assert video_nodes.LoadVideo.INPUT_TYPES()["required"]["file"][0] == ["b.mp4"]
    assert video_nodes.LoadVideo.VALIDATE_INPUTS("b.mp4") is True
    assert video_nodes.LoadVideo.VALIDATE_INPUTS("../b.mp4") is not True
    loaded = video_nodes.LoadVideo().load("b.mp4")[0]
    images, audio, fps, depth, space = video_nodes.GetVideoComponents().split(loaded)
    assert images.shape == (6, 32, 48, 3) and audio is None and (fps, depth, space) == (24.0, 8, "sRGB")


def test_crf_reaches_the_encoder(folders):
    noise = VideoFrames(
        VideoComponents(torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(0)), Fraction(8))
    )
    sizes = []
    for crf in (5.0, 45.0):
        shown = video_nodes.SaveVideo().save(noise, f"crf{crf:.0f}", "mp4", codec="h264", **{"codec.encoding.crf": crf})
        sizes.append((folders.output_folder() / shown["ui"]["images"][0]["filename"]).stat().st_size)
    assert sizes[0] > 2 * sizes[1]


@pytest.mark.comfy
@pytest.mark.parametrize("node_id", sorted(ALL))
def test_the_interface_is_comfyuis(node_id, comfyui_path):
    """Same inputs in the same order, same outputs, same FUNCTION where the class is a V1 one."""
    import asyncio

    from comfy_extras import nodes_images, nodes_mask, nodes_preview_any, nodes_video

    import nodes as comfyui_nodes

    theirs = {**comfyui_nodes.NODE_CLASS_MAPPINGS}
    theirs.update(nodes_preview_any.NODE_CLASS_MAPPINGS)
    for module in (nodes_video, nodes_mask, nodes_images):
        for item in asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list()):
            theirs[item.GET_SCHEMA().node_id] = item
    original, ours = theirs[node_id], ALL[node_id]
    assert list(original.RETURN_TYPES) == list(ours.RETURN_TYPES)
    assert bool(getattr(original, "OUTPUT_NODE", False)) == bool(getattr(ours, "OUTPUT_NODE", False))
    declared = original.INPUT_TYPES()
    wanted = [n for section in ("required", "optional") for n in declared.get(section, {})]
    mine = [n for n, d in declared_inputs(ours).items() if d.section != "hidden" and "." not in n]
    assert mine == wanted
    assert set(ours.INPUT_TYPES()["required"]) == set(declared["required"])
    for name in wanted:
        entry = {**declared.get("required", {}), **declared.get("optional", {})}[name]
        mine_declared = declared_inputs(ours)[name]
        if isinstance(entry[0], str) and entry[0] in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            assert mine_declared.kind == entry[0]
            for key in ("min", "max", "default"):
                if key in entry[1]:
                    assert mine_declared.options[key] == entry[1][key], (name, key)


@pytest.mark.comfy
def test_a_picture_loads_as_in_comfyui(folders, comfyui_path, monkeypatch):
    import folder_paths

    import nodes as comfyui_nodes

    monkeypatch.setattr(folder_paths, "input_directory", str(folders.input_folder()))
    random_picture(folders.input_folder() / "rgb.png", size=(64, 32))
    random_picture(folders.input_folder() / "rgba.png", "RGBA", size=(64, 32))
    random_picture(folders.input_folder() / "grey.png", "L", size=(64, 32))
    for name in ("rgb.png", "rgba.png", "grey.png"):
        ours, theirs = core_nodes.LoadImage().load_image(name), comfyui_nodes.LoadImage().load_image(name)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape and (mine - other).abs().max() <= 1 / 255, name
    first, second = torch.rand(1, 6, 9, 3), torch.rand(1, 12, 10, 3)
    (mine,), (other,) = core_nodes.ImageBatch().batch(first, second), comfyui_nodes.ImageBatch().batch(first, second)
    assert torch.allclose(mine, other, atol=1e-6)
    assert host.current() is folders
