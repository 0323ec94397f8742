"""What InstantID's nodes make of a person, for their help pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from .face_pictures import analyser
from .node_runs import node, photo
from .picture_rows import ACCENT, DIM, INK, PAPER, card, font, labelled, shown, stacked
from .workflow_pictures import given, sampled, sized


def person(name: str = "astronaut", file: str = "astronaut.png") -> Any:
    return node("HotpathIdentity", insightface=analyser(), image=photo(file), name=name, which_face="largest")


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
    file = Path(path)
    said = f"{report}\nmodels/identities/{file.name}, {file.stat().st_size} bytes, no picture in it"
    return card("Save Identity, Load Identity", said)


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
