"""The face nodes that change or make pictures: draw key points, crop faces and paste them back, mask them.

What a FACES socket carries is told in `faces.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import face
from ..face import CropPlaces, Faces
from .sockets import FACES, PICTURES, number

CATEGORY = "Hotpath/faces"


def _when_none(also: str) -> tuple[list[str], dict[str, Any]]:
    tooltip = (
        f"A picture without a face: stop with an error, skip it ({also}, so that the batch stays aligned), or pass it "
        "through as it is."
    )
    return (["error", "skip", "pass through"], {"default": "skip", "tooltip": tooltip})


class HotpathFaceKeypoints:
    DISPLAY_NAME = "Draw Face Key Points"
    CATEGORY = CATEGORY
    DESCRIPTION = "Draws five key points per face for InstantID's ControlNet, at any size, one drawing per picture."
    SEARCH_ALIASES = ["kps", "landmarks", "face pose", "instantid"]
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The drawings, black where there is no face.",)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 0, "min": 0, "max": 16384, "step": 8}
        return {
            "required": {
                "faces": FACES,
                "width": (
                    "INT",
                    {**size, "tooltip": "Size of the drawing, in pixels; 0 is that of the first picture."},
                ),
                "height": (
                    "INT",
                    {**size, "tooltip": "Size of the drawing, in pixels; 0 is that of the first picture."},
                ),
                "fit": (
                    ["contain", "cover", "stretch"],
                    {"default": "contain", "tooltip": "How a picture of another shape is laid into the drawing."},
                ),
            }
        }

    def draw(self, faces: list[Faces], width: int, height: int, fit: str) -> tuple[Tensor]:
        return (face.draw_faces(faces, height, width, fit),)


class HotpathFaceCrop:
    DISPLAY_NAME = "Crop Faces"
    CATEGORY = CATEGORY
    DESCRIPTION = "Cuts a square around each face, level if you like, ready to be worked on and pasted back."
    SEARCH_ALIASES = ["face detailer", "align face", "face crop", "face swap"]
    RETURN_TYPES = ("IMAGE", "FACE_CROPS", "INT")
    RETURN_NAMES = ("crops", "places", "count")
    OUTPUT_TOOLTIPS = ("One crop per face.", "Where they come from, for Paste Faces.", "How many there are.")
    FUNCTION = "crop"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": PICTURES,
                "faces": FACES,
                "size": ("INT", {"default": 512, "min": 64, "max": 4096, "step": 8, "tooltip": "Side of each crop."}),
                "margin": number(0.5, 0.0, 3.0, "Room on each side, in face sizes.", 0.05),
                "align": ("BOOLEAN", {"default": True, "tooltip": "Turn each crop so that the eyes are level."}),
                "when_none": _when_none("a black crop that is pasted nowhere"),
            }
        }

    def crop(
        self, image: Tensor, faces: list[Faces], size: int, margin: float, align: bool, when_none: str
    ) -> tuple[Tensor, CropPlaces, int]:
        crops, places = face.cut_faces(image, faces, size, margin, upright=not align, when_none=when_none)
        return crops, places, len(places)


class HotpathFacePaste:
    DISPLAY_NAME = "Paste Faces"
    CATEGORY = CATEGORY
    DESCRIPTION = "Puts crops back where Crop Faces took them, with a soft border."
    SEARCH_ALIASES = ["face detailer", "uncrop", "composite", "face swap"]
    RETURN_TYPES = ("IMAGE", "MASK")
    OUTPUT_TOOLTIPS = ("The pictures with their new faces.", "Where they changed.")
    FUNCTION = "paste"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": (
                    "IMAGE",
                    {"tooltip": "The pictures that the crops were cut from; they may have been scaled as a whole."},
                ),
                "crops": ("IMAGE", {"tooltip": "The worked-on crops, of any size."}),
                "places": ("FACE_CROPS", {"tooltip": "From Crop Faces."}),
                "feather": (
                    "FLOAT",
                    {
                        "default": 0.25,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Width of the soft border; 1 is half a crop.",
                    },
                ),
            },
            "optional": {
                "mask": ("MASK", {"tooltip": "Which part of each crop is pasted; one mask for all, or one per crop."})
            },
        }

    def paste(
        self, image: Tensor, crops: Tensor, places: CropPlaces, feather: float, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return face.paste(image, crops, places, feather, mask)


class HotpathFaceMask:
    DISPLAY_NAME = "Face Mask"
    CATEGORY = CATEGORY
    DESCRIPTION = "Makes a mask over the faces of each picture."
    SEARCH_ALIASES = ["face area", "inpaint face", "segmentation"]
    RETURN_TYPES = ("MASK",)
    OUTPUT_TOOLTIPS = ("One mask per picture, black where there is no face.",)
    FUNCTION = "mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 0, "min": 0, "max": 16384, "step": 8}
        return {
            "required": {
                "faces": FACES,
                "shape": (list(face.SHAPES), {"default": "oval", "tooltip": "oval follows the tilt of the face."}),
                "grow": number(0.1, -0.4, 3.0, "Added on each side, in face sizes.", 0.05),
                "feather": (
                    "INT",
                    {"default": 16, "min": 0, "max": 1024, "tooltip": "Width of the soft edge, in pixels."},
                ),
                "width": ("INT", {**size, "tooltip": "Size of the mask, in pixels; 0 is that of the first picture."}),
                "height": ("INT", {**size, "tooltip": "Size of the mask, in pixels; 0 is that of the first picture."}),
            }
        }

    def mask(self, faces: list[Faces], shape: str, grow: float, feather: int, width: int, height: int) -> tuple[Tensor]:
        return (face.mask_faces(faces, height, width, shape, grow, float(feather)),)


NODES: dict[str, type[Any]] = {
    "HotpathFaceKeypoints": HotpathFaceKeypoints,
    "HotpathFaceCrop": HotpathFaceCrop,
    "HotpathFacePaste": HotpathFacePaste,
    "HotpathFaceMask": HotpathFaceMask,
}
