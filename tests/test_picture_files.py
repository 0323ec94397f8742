"""Pictures with broken EXIF or much beside them, and damaged ones, in every place that opens picture files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotpath import host
from hotpath.colorization.file_job import colorize_file_by_path
from hotpath.colorization.film_options import FilmOptions
from hotpath.colorization.pictures import from_pil
from hotpath.comparison.folders import FolderError
from hotpath.comparison.folders import read_picture as compared
from hotpath.headless.core_nodes import read_image
from hotpath.host.headless import HeadlessHost
from hotpath.host.picture_files import open_picture
from hotpath.vision_language.pictures import read_picture as looked_at
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

ORIENTATION, X_RESOLUTION, WIDTH = 0x0112, 0x011A, 0x0100
FLOAT, ASCII = 11, 2
# A number that is none, and text where a number belongs
BROKEN = {"nan": (X_RESOLUTION, FLOAT, 1, struct.pack("<f", float("nan"))), "text": (WIDTH, ASCII, 4, b"abc\0")}


def photo(path: Path, broken: tuple[int, int, int, bytes] | None, turned: int = 6) -> Path:
    """4 x 8 pixels, the upper half red, that lie on their side in the file."""
    entries = [(ORIENTATION, 3, 1, struct.pack("<HH", turned, 0)), *([broken] if broken else [])]
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255, 0, 0
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


def read_by_all(path: Path) -> list[torch.Tensor]:
    with open_picture(path) as file:
        reference = from_pil(file)
    before = host.use(
        HeadlessHost(models=path.parent, input_folder=path.parent, output_folder=path.parent, device="cpu")
    )
    try:
        loaded = read_image(path.name)[0][0]
    finally:
        host.use(before)
    return [reference, loaded, compared(path), torch.from_numpy(looked_at(path).pixels.copy()) / 255]


@pytest.mark.parametrize("broken", [None, *BROKEN])
def test_a_photo_with_broken_exif_is_upright(tmp_path: Path, broken: str | None) -> None:
    path = photo(tmp_path / "a.jpg", BROKEN[broken] if broken else None)
    if broken is not None:
        with Image.open(path) as file, pytest.raises((ValueError, struct.error)):
            ImageOps.exif_transpose(file)
    for picture in read_by_all(path):
        assert picture.shape == (64, 32, 3)
        assert picture[:24, :, 0].min() > 0.9 and picture[40:].max() < 0.1


def test_every_orientation_is_that_of_pillow(tmp_path: Path) -> None:
    for turned in range(1, 9):
        path = photo(tmp_path / f"{turned}.jpg", None, turned)
        with Image.open(path) as file:
            wanted = torch.from_numpy(np.array(ImageOps.exif_transpose(file))) / 255
        assert all(torch.equal(picture, wanted) for picture in read_by_all(path))


def test_exif_that_cannot_be_read_costs_the_turn_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = photo(tmp_path / "a.jpg", None)

    def raises(*_: Any) -> Any:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", raises)
    assert all(picture.shape == (32, 64, 3) for picture in read_by_all(path))


def packed(path: Path, kind: str) -> Path:
    """A PNG with 2 MB in a chunk of `kind`."""
    told, profile = PngInfo(), None
    if kind == "iCCP":
        profile = bytes(2_000_000)
    elif kind == "iTXt":
        told.add_itxt("workflow", "x" * 2_000_000, zip=True)
    else:
        told.add_text("workflow", "x" * 2_000_000, zip=kind == "zTXt")
    pixels = np.zeros((32, 64, 4), np.uint8)
    pixels[:, :32] = 255, 0, 0, 255
    pixels[:, 32:, 3] = 255
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    Image.fromarray(pixels).save(path, icc_profile=profile, pnginfo=told, exif=turned)
    return path


@pytest.mark.parametrize("kind", ["iCCP", "iTXt", "zTXt", "tEXt"])
def test_what_lies_beside_the_picture_costs_no_picture(tmp_path: Path, kind: str) -> None:
    path = packed(tmp_path / "a.png", kind)
    if kind != "tEXt":
        with pytest.raises(ValueError, match=r"(?i)too large"):
            Image.open(path)
    for picture in read_by_all(path):
        assert picture.shape == (64, 32, 3) and picture[:24, :, 0].min() == 1 and picture[40:].max() == 0


def test_a_png_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.png", "iTXt")
    whole = path.read_bytes()
    for length in (8, 20, 60, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(FolderError, match=r"a\.png cannot be read as a picture: "):
            compared(path)
        with pytest.raises(ValueError, match=r"^it is (damaged|no picture)"):
            looked_at(path)


@pytest.mark.parametrize(
    "words", [RuntimeError("Failed to decode image"), ValueError("buffer is not large enough"), struct.error("4 bytes")]
)
def test_damage_is_told_whatever_pillow_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Exception
) -> None:
    path = photo(tmp_path / "a.jpg", None)

    def raises(*_: Any) -> Any:
        raise words

    monkeypatch.setattr(Image.Image, "convert", raises)
    with pytest.raises(ValueError, match=r"it is damaged \(.*: replace the file$"):
        looked_at(path)
    with pytest.raises(FolderError, match=r"a\.jpg cannot be read as a picture: "):
        compared(path)
    with pytest.raises(ValueError, match=r"a\.jpg is damaged .*: take another copy of this picture\.$"):
        colorize_file_by_path(tmp_path / "in.mp4", tmp_path / "o.mp4", [path], FilmOptions())


def test_a_picture_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.jpg", None)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.jpg is damaged \("):
        colorize_file_by_path(tmp_path / "in.mp4", tmp_path / "o.mp4", [path], FilmOptions())
