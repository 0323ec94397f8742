"""What the face nodes find, draw, cut and paste, for their help pages."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from .node_runs import node, photo
from .picture_rows import card, labelled, shown, stacked


def analyser() -> Any:
    return node("InstantIDFaceAnalysis", provider="CPU")[0]


def found(picture: torch.Tensor, **changes: Any) -> Any:
    options = {"choose": "all", "index": 0, "threshold": 0.5, "embeddings": True, "when_none": "error"}
    return node("HotpathFaces", faceanalysis=analyser(), image=picture, **{**options, **changes})


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
