"""Thumbnails of the example workflows for ComfyUI's template browser, from what the pack's own nodes make.

    python -m hotpath.demo.thumbnails [NAME ...]

Writes example_workflows/<name>.jpg. InstantID's examples are run in a ComfyUI on the demo's portrait model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from . import (
    captioner_gguf,
    captioner_pictures,
    colorize_pictures,
    face_pictures,
    help_pictures,
    identity_pictures,
    node_runs,
)
from .picture_rows import PAPER, card, labelled, shown
from .workflow_pictures import given, sampled

FOLDER = Path(__file__).resolve().parent.parent / "example_workflows"
SIDE, GAP = 400, 6
METHOD = "Deep Exemplar"  # of the example workflows that colour films
Cells = Sequence[Image.Image]


def tiles(*pictures: Image.Image) -> Image.Image:
    """One picture fills the square, two share it in rows, three are one over two, four a grid."""
    rows: list[Cells] = {1: [pictures], 2: [pictures[:1], pictures[1:]]}.get(
        len(pictures), [pictures[: len(pictures) - 2], pictures[-2:]]
    )
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    height = (SIDE - GAP * (len(rows) - 1)) // len(rows)
    for r, row in enumerate(rows):
        width = (SIDE - GAP * (len(row) - 1)) // len(row)
        for c, picture in enumerate(row):
            fitted = ImageOps.fit(
                picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS, centering=(0.5, 0.35)
            )
            square.paste(fitted, (c * (width + GAP), r * (height + GAP)))
    return square


def photo(name: str = "astronaut.png") -> Image.Image:
    pixels = node_runs.photo(name)
    return shown(pixels[:, :300, 70:370] if name == "astronaut.png" else pixels, 512)


def text(title: str, said: str) -> Image.Image:
    """A card that fills a row."""
    return ImageOps.pad(card(title, said, 320), (SIDE, SIDE // 2), color=PAPER)


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures that fill a row."""
    return tiles(left, right, left, right).crop((0, 0, SIDE, SIDE // 2 - GAP // 2))


def key_points(name: str = "astronaut.png", zoom: bool = True) -> Image.Image:
    faces = face_pictures.found(node_runs.photo(name))[0]
    drawing = node_runs.node("HotpathFaceKeypoints", faces=faces, width=0, height=0, fit="contain")[0]
    return shown(drawing[:, 30:260, 110:340] if zoom else drawing, 512)


def tokens(name: str = "astronaut.png") -> Image.Image:
    return shown(identity_pictures.tokens_of_a_person(name)[0], 400)


def face_of(name: str) -> Image.Image:
    return given(f"portrait_{name}").resize((SIDE, SIDE))


def marked() -> Image.Image:
    return shown(face_pictures.found(node_runs.photo("faces_drawn_three.png"))[1], 448)


def crop() -> Image.Image:
    return shown(face_pictures.cut_face()[1], 400)


def film_frames(method: str = METHOD) -> tuple[Image.Image, Image.Image]:
    grey, frames, *_ = colorize_pictures.coloured_film(method)
    return shown(grey[8:9], 400), shown(frames[8:9], 400)


def colorize_both() -> Image.Image:
    """A row for each method."""
    return tiles(*film_frames(METHOD), *film_frames("ColorMNet"))


def references() -> Image.Image:
    first, later, other = (photo(f"colorize_{n}.png") for n in ("reference", "reference_12", "small"))
    return tiles(first, later, other, film_frames()[1])


def strip_of_film() -> Image.Image:
    grey, frames, *_ = colorize_pictures.coloured_film(METHOD)
    return tiles(*(shown(f[i : i + 1], 300) for f, i in ((grey, 0), (grey, 15), (frames, 0), (frames, 15))))


@functools.cache
def captioned() -> tuple[tuple[Image.Image, str], ...]:
    """The four drawings of shapes, and what the small captioner says of each."""
    pictures = [node_runs.photo(f"captioner_shapes_{n}.png") for n in range(1, 5)]
    answers, _ = captioner_pictures.captions_of(pictures)
    return tuple(zip((shown(picture, 200) for picture in pictures), answers, strict=True))


def shapes() -> Image.Image:
    """A grid, each with its caption under it."""
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    side, step = 172, (SIDE + GAP) // 2
    for n, (picture, said) in enumerate(captioned()):
        cell = labelled([(said, picture.resize((side, side)))])
        square.paste(cell, (n % 2 * step + (step - GAP - side) // 2, n // 2 * step + 2))
    return square


def row_of_shapes() -> Image.Image:
    row = Image.new("RGB", (SIDE, SIDE // 2), PAPER)
    for n, (picture, _) in enumerate(captioned()):
        row.paste(picture.resize((97, 97)), (n * 101, 50))
    return row


def captions() -> Image.Image:
    return tiles(row_of_shapes(), text("Caption Folder", "\n".join(said for _, said in captioned())))


def one_caption() -> Image.Image:
    picture, said = captioned()[0]
    return tiles(picture, text("QwenVL", said))


def caption_of_a_file() -> Image.Image:
    picture = node_runs.photo("captioner_shapes_1.png")
    (said,), _ = captioner_pictures.captions_of([picture], captioner_gguf.MODEL)
    return tiles(shown(picture, 200), text("QwenVL (GGUF)", said))


def mapped() -> Image.Image:
    """The pictures of a folder, and what becomes of them."""
    return tiles(row_of_shapes(), text("Map Workflow", "one workflow, every picture,\nall GPUs; goes on where it was"))


def boxes() -> Image.Image:
    """The help page's boxes, with the words that say whose answer they are."""
    sheet = captioner_pictures.vlm_boxes()
    return tiles(labelled([("an answer written by hand, drawn", sheet.crop((0, 0, 300, 276)))]))


def transfer() -> Image.Image:
    light, small = node_runs.photo("colorize_grey.png"), node_runs.photo("colorize_small.png")
    done = node_runs.node("HotpathColorTransfer", luminance=light, colours=small, strength=1.0, edge_filter="guided")[0]
    return tiles(shown(light, 400), shown(done, 400))


def restored() -> Image.Image:
    return tiles(beside(*film_frames()), text("A film", "coloured, then described\nby a vision-language model"))


def heat_map() -> Image.Image:
    """The upper half: the blocks of the input side."""
    drawn = Image.open(help_pictures.PICTURES / "block_telemetry.jpg")
    return drawn.crop((0, 0, drawn.width, drawn.width))


def comparison() -> Image.Image:
    """What patch mode full draws, and fast."""
    modes = [sampled("instantid_identity", f"HotpathInstantID.patch_mode={mode}") for mode in ("full", "fast")]
    return beside(*modes).resize((SIDE, SIDE))


def chart() -> Image.Image:
    """Steps after one that compiles, and what was asked for."""
    drawn = Image.open(help_pictures.PICTURES / "profile_report.jpg")
    steps = drawn.crop((30, 210, 630, 504))
    return tiles(
        ImageOps.pad(steps, (SIDE, SIDE // 2), color="white"),
        text("Speed Profile", "balanced: the same\npictures, faster"),
    )


def prompt_and_report() -> Image.Image:
    """A checkpoint of random weights draws noise, so this shows what is asked and what is told."""
    said = "text encoder: from the cache\ntransformer: compiled once,\nfor every prompt and size\nVAE: whole picture"
    return tiles(text("Z-Image", "A red fox in fresh snow\nat the edge of a birch forest"), text("Report", said))


THUMBNAILS: dict[str, Callable[[], Image.Image]] = {
    "ab_compare": comparison,
    "block_telemetry": lambda: tiles(heat_map()),
    "caption_gguf": caption_of_a_file,
    "caption_pictures": shapes,
    "caption_qwenvl": one_caption,
    "captions_of_a_folder": captions,
    "colorize_film": lambda: tiles(*film_frames()),
    "colorize_film_with_colormnet": colorize_both,
    "colorize_in_chunks": strip_of_film,
    "colorize_many_references": references,
    "colorize_transfer": transfer,
    "colorize_video_file": strip_of_film,
    "faces_crop_and_paste": lambda: tiles(photo(), crop()),
    "faces_find_and_match": lambda: tiles(marked()),
    "faster_sampling": chart,
    "find_boxes": boxes,
    "identity_from_photo": lambda: tiles(photo(), key_points(), tokens()),
    "instantid_basic": lambda: tiles(sampled("instantid_basic")),
    "instantid_depth_controlnet": lambda: tiles(sampled("instantid_depth_controlnet"), photo("depth_bust.png")),
    "instantid_face_second_pass": lambda: tiles(sampled("instantid_face_second_pass"), face_of("ana")),
    "instantid_identity": lambda: tiles(
        beside(face_of("ana"), tokens("portrait_ana.png")), sampled("instantid_identity")
    ),
    "instantid_posed": lambda: tiles(beside(face_of("ana"), face_of("tilted")), sampled("instantid_posed")),
    "instantid_two_people": lambda: tiles(beside(face_of("ana"), face_of("ben")), sampled("instantid_two_people")),
    "map_captions": mapped,
    "restore_a_film": restored,
    "z_image_fast": prompt_and_report,
}


def main(names: Sequence[str]) -> int:
    torch.set_num_threads(1)
    with help_pictures.demo_host():
        for name in names or THUMBNAILS:
            THUMBNAILS[name]().save(FOLDER / f"{name}.jpg", quality=86, optimize=True)
            print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
