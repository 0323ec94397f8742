"""The pictures of the help pages and guides, made by the pack's own nodes on the demo's small models.

    python -m hotpath.demo.help_pictures [NAME ...]

Writes web/docs/images/<name>.jpg, each of 60 KB at most. Texts on the pictures are what the nodes said, word for word.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from .. import host
from ..host.headless import HeadlessHost
from ..nodes import NODE_CLASS_MAPPINGS
from .comparison_pictures import block_profile, block_telemetry, compare
from .map_pictures import map_workflow
from .picture_rows import ACCENT, DIM, INK, PAPER, card, font, labelled, save, shown, stacked
from .text_to_image_pictures import z_image, z_image_loader, z_image_lora
from .workflow_pictures import given, rising_weights, sampled, sized

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent / "web" / "docs" / "images"


def node(node_id: str, /, **inputs: Any) -> Any:
    """Run one node of the pack; its results."""
    node_class = NODE_CLASS_MAPPINGS[node_id]
    result = getattr(node_class(), node_class.FUNCTION)(**inputs)
    return result["result"] if isinstance(result, dict) else result


def photo(name: str) -> torch.Tensor:
    """[1, H, W, 3] in 0..1."""
    picture = Image.open(HERE / "inputs" / name).convert("RGB")
    return torch.from_numpy(np.array(picture)).float().div(255)[None]


def analyser() -> Any:
    return node("InstantIDFaceAnalysis", provider="CPU")[0]


def found(picture: torch.Tensor, **changes: Any) -> Any:
    options = {"choose": "all", "index": 0, "threshold": 0.5, "embeddings": True, "when_none": "error"}
    return node("HotpathFaces", faceanalysis=analyser(), image=picture, **{**options, **changes})


def person(name: str = "astronaut", file: str = "astronaut.png") -> Any:
    return node("HotpathIdentity", insightface=analyser(), image=photo(file), name=name, which_face="largest")


def face_models() -> Image.Image:
    report = node("HotpathFaceLoader", model="antelopev2", engine="torch", precision="fp32", device="cpu")[1]
    return card("Load Face Models", report)


def faces_found() -> Image.Image:
    everyone = found(photo("faces_drawn_three.png"))
    return stacked(
        [labelled([("marked", shown(everyone[1], 300))]), card("Find Faces", everyone[2].splitlines()[-1], 428)]
    )


def face_picked() -> Image.Image:
    from .. import face

    picture = photo("faces_drawn_three.png")
    faces, marked, *_ = found(picture)
    picked, _ = node("HotpathFacePick", faces=faces, choose="left to right", index=-1, when_none="error")
    return labelled(
        [("all faces", shown(marked)), ("left to right, index -1", shown(face.mark_faces(picture[0], picked[0])))]
    )


def key_points() -> Image.Image:
    pairs = []
    for name in ("astronaut.png", "faces_drawn_three.png"):
        picture = photo(name)
        drawing = node("HotpathFaceKeypoints", faces=found(picture)[0], width=0, height=0, fit="contain")[0]
        pairs += [("picture", shown(picture, 150)), ("key points", shown(drawing, 150))]
    return labelled(pairs)


def key_points_preprocessor() -> Image.Image:
    picture = photo("astronaut.png")
    drawing = node("FaceKeypointsPreprocessor", faceanalysis=analyser(), image=picture)[0]
    return labelled([("picture", shown(picture, 240)), ("key points", shown(drawing, 240))])


def cut_face() -> tuple[torch.Tensor, Any, Any]:
    picture = photo("astronaut.png")
    faces = found(picture, choose="largest", embeddings=False)[0]
    options = {"size": 512, "margin": 0.3, "align": True, "when_none": "skip"}
    crops, places, _ = node("HotpathFaceCrop", image=picture, faces=faces, **options)
    return picture, crops, places


def face_crop() -> Image.Image:
    picture, crops, _ = cut_face()
    return labelled([("picture", shown(picture, 240)), ("crop, eyes level", shown(crops, 240))])


def face_paste() -> Image.Image:
    picture, crops, places = cut_face()
    worked = crops.mean(-1, keepdim=True) * torch.tensor([1.0, 0.9, 0.72])
    pasted, mask = node("HotpathFacePaste", image=picture, crops=worked, places=places, feather=0.35)
    return labelled(
        [
            ("crop, worked on", shown(worked)),
            ("pasted", shown(pasted[:, :320, 80:400])),
            ("where it changed", shown(mask)),
        ]
    )


def face_match() -> Image.Image:
    from .. import face

    one, three = photo("faces_drawn_one.png"), photo("faces_drawn_three.png")
    who, everyone = found(one, choose="largest")[0], found(three)[0]
    best, _, _, report = node("HotpathFaceMatch", faces=everyone, identity=who, threshold=0.4)
    row = labelled([("who", shown(one)), ("best", shown(face.mark_faces(three[0], best[0])))])
    return stacked([row, card("Match Face", report, row.width)])


def face_mask() -> Image.Image:
    picture = photo("faces_drawn_three.png")
    options = {"shape": "oval", "grow": 0.1, "feather": 16, "width": 0, "height": 0}
    mask = node("HotpathFaceMask", faces=found(picture)[0], **options)[0]
    return labelled([("picture", shown(picture)), ("mask", shown(mask))])


def identity() -> Image.Image:
    _, report = person()
    return stacked([labelled([("the photo", shown(photo("astronaut.png")))]), card("Identity from Faces", report, 420)])


def tokens_of_a_person(file: str = "astronaut.png") -> tuple[torch.Tensor, str]:
    adapter = node("InstantIDModelLoader", instantid_file="demo_adapter.safetensors")[0]
    options = {"noise": 0.35, "combine_embeds": "average"}
    who = person(Path(file).stem, file)[0]
    _, drawn, report = node("HotpathIdentityTokens", instantid=adapter, identity=who, **options)
    return drawn, report


def identity_tokens() -> Image.Image:
    picture, report = tokens_of_a_person()
    return stacked([labelled([("a row per token", shown(picture))]), card("Identity Tokens", report)])


def identity_saved() -> Image.Image:
    who, report = person()
    path = node("HotpathIdentitySave", identity=who, filename="astronaut")[0]
    loaded = node("HotpathIdentityLoad", file="astronaut.safetensors")[0]
    assert torch.equal(loaded.embeddings, who.embeddings)
    name = Path(path[0] if isinstance(path, tuple) else path).name
    size = Path(path).stat().st_size
    return card("Save Identity, Load Identity", f"{report}\nmodels/identities/{name}, {size} bytes, no picture in it")


def apply_instantid() -> Image.Image:
    person = photo("portrait_ana.png")
    drawing = node("FaceKeypointsPreprocessor", faceanalysis=analyser(), image=photo("portrait_tilted.png"))[0]
    tokens, _ = tokens_of_a_person("portrait_ana.png")
    tokens = shown(tokens, 152).resize((152, 152), Image.Resampling.NEAREST)
    return labelled(
        [
            ("the person", shown(person, 152)),
            ("key points, for IdentityNet", shown(drawing, 152)),
            ("16 tokens, for attention", tokens),
            ("what was drawn", sized(sampled("instantid_posed"))),
        ]
    )


def instantid_weights() -> Image.Image:
    return rising_weights()


def blocks() -> Image.Image:
    """SDXL's 70 cross-attention blocks, and which of them each patch mode takes."""
    from ..identity.blocks import SDXL_BLOCKS, SELECTIONS

    left, cell, top, row = 104, 7, 26, 30
    picture = Image.new("RGB", (left + cell * len(SDXL_BLOCKS) + 44, top + row * len(SELECTIONS) + 4), PAPER)
    canvas = ImageDraw.Draw(picture)
    for part, at in (("input", 0), ("output", 24), ("middle", 60)):
        canvas.text((left + at * cell, 5), part, fill=DIM, font=font(13))
    for number, (mode, chosen) in enumerate(SELECTIONS.items()):
        y = top + row * number
        canvas.text((4, y + 2), mode, fill=INK, font=font(14))
        for n, block in enumerate(SDXL_BLOCKS):
            colour = ACCENT if block in chosen else "#34363e"
            canvas.rectangle((left + n * cell, y, left + n * cell + cell - 2, y + 18), fill=colour)
        canvas.text((left + cell * len(SDXL_BLOCKS) + 8, y + 2), str(len(chosen)), fill=INK, font=font(14))
    return picture


def people() -> Image.Image:
    """Two people, the places of another two, and both in one picture."""
    row = [(name, sized(given(f"portrait_{name}"))) for name in ("ana", "ben")]
    row += [("their poses", sized(given("portrait_two"))), ("a half for each", sized(sampled("instantid_two_people")))]
    return labelled(row)


def coloured_film(method: str = "ColorMNet") -> tuple[torch.Tensor, torch.Tensor, Any, str, torch.Tensor]:
    from .colorize_scenes import held_out_clip

    truth = held_out_clip(16).permute(0, 2, 3, 1).contiguous()
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    grey = (truth @ weights)[..., None].expand(-1, -1, -1, 3)
    options = {"colour_size": 0, "edge_filter": "none"}
    frames, confidence, state, report = node(
        "HotpathColorizeVideo", frames=grey, reference=truth[:1], method=method, **options
    )
    return grey, frames, state, report, confidence


def _strip(film: torch.Tensor, size: int = 148) -> Image.Image:
    return labelled([(f"frame {i}", shown(film[i : i + 1], size)) for i in (0, 5, 10, 15)])


def film() -> Image.Image:
    grey, frames, *_ = coloured_film()
    return stacked([_strip(grey), _strip(frames)])


def film_report() -> Image.Image:
    _, frames, _, report, confidence = coloured_film()
    row = labelled([("frame 15", shown(frames[15:])), ("confidence", shown(confidence[15:]))])
    return stacked(
        [row, card("Colorize Video", "\n".join(line for line in report.splitlines()[:5] if "fps" not in line))]
    )


def film_state() -> Image.Image:
    from .colorize_scenes import held_out_clip

    truth = held_out_clip(16).permute(0, 2, 3, 1).contiguous()
    options = {"method": "ColorMNet", "colour_size": 0, "edge_filter": "none"}
    first, _, state, _ = node("HotpathColorizeVideo", frames=truth[:8], reference=truth[:1], **options)
    path = node("HotpathSaveColorState", state=state, name="film")[0]
    state, frame = node("HotpathLoadColorState", name="film")
    second = node("HotpathColorizeVideo", frames=truth[8:], reference=truth[:1], state=state, **options)[0]
    at_once = node("HotpathColorizeVideo", frames=truth, reference=truth[:1], **options)[0]
    assert torch.allclose(torch.cat([first, second]), at_once, atol=1e-5)
    row = labelled([(f"frame {i}", shown(torch.cat([first, second])[i : i + 1], 118)) for i in (0, 4, 7, 8, 15)])
    said = f"color_states/{Path(path).name}: the film goes on with frame {frame}; equal to colouring it at once"
    return stacked([row, card("Save Color State, Load Color State", said, row.width)])


def images_coloured() -> Image.Image:
    from .colorize_scenes import held_out_clip

    truth = held_out_clip(16).permute(0, 2, 3, 1).contiguous()
    grey = (truth @ torch.tensor([0.2126, 0.7152, 0.0722]))[..., None].expand(-1, -1, -1, 3)
    options = {"method": "ColorMNet", "colour_size": 0, "edge_filter": "none"}
    coloured = node("HotpathColorizeImage", images=grey[12:13], reference=truth[:1], **options)[0]
    return labelled([("reference", shown(truth[:1])), ("picture", shown(grey[12:13])), ("coloured", shown(coloured))])


def compatible_film() -> Image.Image:
    """The compatible Deep Exemplar node crops to its target size, as the pack it comes from did."""
    from .colorize_scenes import held_out_clip

    truth = held_out_clip(8).permute(0, 2, 3, 1).contiguous()
    grey = (truth @ torch.tensor([0.2126, 0.7152, 0.0722]))[..., None].expand(-1, -1, -1, 3)
    frames = node(
        "DeepExColorVideoNode",
        video_frames=grey,
        reference_image=truth[:1],
        frame_propagate=True,
        use_half_resolution=False,
        target_width=160,
        target_height=96,
    )[0]
    return labelled(
        [("frame", shown(grey[7:], 170)), ("coloured, 160x96: cropped to its shape", shown(frames[7:], 170))]
    )


def color_transfer() -> Image.Image:
    light, small = photo("colorize_grey.png"), photo("colorize_small.png")
    done = node("HotpathColorTransfer", luminance=light, colours=small, strength=1.0, edge_filter="guided")[0]
    return labelled(
        [("luminance", shown(light, 150)), ("colours, 75x50", shown(small, 100)), ("result, 600x400", shown(done, 150))]
    )


def _captioner() -> tuple[Any, str]:
    return node("HotpathVLMLoader", model="hotpath-captioner")


def vlm_loader() -> Image.Image:
    return card("Load Vision-Language Model", _captioner()[1])


def captions_of(pictures: list[torch.Tensor]) -> tuple[list[str], str]:
    """The small captioner's words for each, and the node's report."""
    model, _ = _captioner()
    result = node(
        "HotpathVLM",
        model=[model],
        prompt=["Describe this image."],
        images=pictures,
        system=["You are a helpful assistant."],
        one_answer_each=[True],
        max_new_tokens=[16],
        token_budget=["fast"],
    )
    return list(result[1]), str(result[5])


def vlm_answer() -> Image.Image:
    pictures = [photo(f"captioner_shapes_{n}.png") for n in range(1, 5)]
    answers, report = captions_of(pictures)
    row = labelled([(answer[:24], shown(p, 150)) for p, answer in zip(pictures, answers, strict=True)])
    return stacked([row, card("Ask Vision-Language Model", "\n".join(report.splitlines()[:2]), row.width)])


def vlm_boxes() -> Image.Image:
    """How an answer with boxes is read and drawn; the small captioner names no places, so the answer is written here."""
    from ..vision_language import answers

    answer = (
        '[{"bbox_2d": [345, 105, 545, 330], "label": "face"}, {"bbox_2d": [545, 610, 930, 1000], "label": "helmet"}]'
    )
    pixels = (photo("astronaut.png")[0] * 255).byte().numpy()
    boxes = answers.find_boxes(answers.find_json(answer), *pixels.shape[:2], None)
    drawn = torch.from_numpy(answers.draw_boxes(pixels, boxes).copy()).float()[None] / 255
    picture = labelled([("boxes drawn on the picture", shown(drawn, 300))])
    return stacked([picture, card("an answer, written by hand", answer, 420)])


def caption_folder() -> Image.Image:
    model, _ = _captioner()
    with tempfile.TemporaryDirectory() as written:
        captions, files, report = node(
            "HotpathCaptionFolder",
            model=model,
            folder=str(HERE / "inputs"),
            prompt="Describe this image.",
            system="You are a helpful assistant.",
            max_new_tokens=16,
            token_budget="fast",
            pattern="captioner_*",
            captions_to=written,
        )
    lines = [f"{Path(name).with_suffix('.txt').name}: {text}" for name, text in zip(files, captions, strict=True)]
    return card("Caption Folder", "\n".join([*lines, "", *report.splitlines()[1:3]]))


def prompt_enhancer() -> Image.Image:
    """What the node asks a model: the demo's captioner cannot rewrite prompts."""
    from ..vision_language import presets

    style, instruction = next(iter(presets.STYLES.items()))
    name = style.encode("ascii", "ignore").decode().strip()
    return card(f"QwenVL Prompt Enhancer, style {name}", f"system: {instruction}\n\nprompt: a lighthouse at dusk")


def cache_report() -> Image.Image:
    found(photo("astronaut.png"))
    found(photo("astronaut.png"))
    tokens_of_a_person()
    return card("Hotpath Cache", node("HotpathCache", clear="nothing")[0])


MADE: dict[str, Callable[[], Image.Image]] = {
    f.__name__: f
    for f in (
        face_models,
        faces_found,
        face_picked,
        key_points,
        key_points_preprocessor,
        face_crop,
        face_paste,
        face_match,
        face_mask,
        identity,
        identity_tokens,
        identity_saved,
        apply_instantid,
        instantid_weights,
        blocks,
        people,
        film,
        film_report,
        film_state,
        images_coloured,
        compatible_film,
        color_transfer,
        vlm_loader,
        vlm_answer,
        vlm_boxes,
        caption_folder,
        prompt_enhancer,
        cache_report,
        z_image_loader,
        z_image_lora,
        z_image,
        block_telemetry,
        block_profile,
        compare,
        map_workflow,
    )
}


@contextlib.contextmanager
def demo_host() -> Iterator[None]:
    """The demo's models and inputs, and a folder for what is written, which is removed at the end."""
    with tempfile.TemporaryDirectory() as work:
        before = host.use(
            HeadlessHost(
                models=Path(work) / "models",
                extra_models=[HERE / "models"],
                input_folder=HERE / "inputs",
                output_folder=Path(work),
                device="cpu",
                show_progress=False,
            )
        )
        try:
            yield
        finally:
            host.use(before)


def main(names: Sequence[str]) -> int:
    torch.set_num_threads(1)
    with demo_host():
        for name in names or MADE:
            size = save(MADE[name](), PICTURES / f"{name}.jpg")
            print(f"{name}.jpg {size / 1000:.1f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
