"""The face nodes: find, pick, draw, crop, paste back, compare and mask the faces of a batch of pictures.

A FACES socket carries one `Faces` per picture, empty where there is none, so that batches stay aligned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import face, host
from ..face import FaceAnalyser, Faces
from ..face.crops import CropPlaces

CATEGORY = "Hotpath/faces"
FOLDER = "insightface"
ALL = "all"
DETECTOR_SIZES = ("640", "1024", "1280", "1920", "2560")
HIDDEN = {"unique_id": "UNIQUE_ID"}

FACES_INPUT = ("FACES", {"tooltip": "The faces of a batch, from Find Faces."})
IMAGE_INPUT = ("IMAGE", {"tooltip": "Pictures; grey and with transparency work too."})
IDENTITY_INPUT = (
    "FACES",
    {"tooltip": "Who to compare with: faces of one person, from Find Faces. Several are averaged."},
)
INDEX = (
    "INT",
    {
        "default": 0,
        "min": -64,
        "max": 64,
        "tooltip": "Which one, for 'left to right' and 'index': 0 is the first, -1 the last.",
    },
)


def _when_none(also: str) -> tuple[list[str], dict[str, Any]]:
    tooltip = (
        f"A picture without a face: stop with an error, skip it ({also}, so that the batch stays aligned), or pass it "
        "through as it is."
    )
    return (["error", "skip", "pass through"], {"default": "skip", "tooltip": tooltip})


class HotpathFaceLoader:
    DISPLAY_NAME = "Load Face Models"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a face detector and recogniser. Where it runs, and why, stands under the node; other packs can use the "
        "output as insightface's FaceAnalysis."
    )
    SEARCH_ALIASES = ["insightface", "antelopev2", "buffalo", "face analysis"]
    RETURN_TYPES = ("FACEANALYSIS", "STRING")
    RETURN_NAMES = ("faceanalysis", "report")
    OUTPUT_TOOLTIPS = (
        "The face models.",
        "Engine, device and precision, and what to do if it is not the one asked for.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = face.model_names(host.current().model_folders(FOLDER))
        engines = (
            "auto: torch on a graphics card, on the CPU onnxruntime where it is installed. torch: everywhere ComfyUI "
            "runs, memory shared with it. onnxruntime: its providers, verified. insightface: the library itself."
        )
        return {
            "required": {
                "model": (names or ["antelopev2"], {"tooltip": "A folder in models/insightface/models."}),
                "engine": (list(face.ENGINES), {"default": "auto", "tooltip": engines}),
                "precision": (
                    list(face.PRECISIONS),
                    {
                        "default": "fp32",
                        "tooltip": "fp16 and bf16 are used where the loaded weights give the same faces in them; torch only.",
                    },
                ),
            },
            "optional": {
                "device": (["auto", "cpu"], {"default": "auto", "tooltip": "auto: where ComfyUI computes."}),
                "provider": (
                    ["auto", *face.PROVIDERS],
                    {"default": "auto", "tooltip": "Of the onnxruntime engine. auto: the one for the device."},
                ),
            },
            "hidden": HIDDEN,
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: Any = "") -> bool:
        # A model this machine lacks is reported when the node runs, with the folders and files.
        return True

    def load(
        self,
        model: str,
        engine: str,
        precision: str,
        device: str = "auto",
        provider: str = "auto",
        unique_id: str | None = None,
    ) -> tuple[FaceAnalyser, str]:
        here = host.current()
        where = torch.device("cpu") if device == "cpu" else here.device()
        analyser = face.load_analyser(
            here.model_folders(FOLDER), model, engine, where, precision=precision, provider=provider
        )
        report = analyser.report()
        here.show_text(report, unique_id)
        return analyser, report


class HotpathFaces:
    DISPLAY_NAME = "Find Faces"
    CATEGORY = CATEGORY
    DESCRIPTION = "Finds the faces of a whole batch at once, with key points, scores and identity embeddings."
    SEARCH_ALIASES = ["detect faces", "face detection", "insightface", "bounding box"]
    RETURN_TYPES = ("FACES", "IMAGE", "STRING", "INT")
    RETURN_NAMES = ("faces", "marked", "report", "count")
    OUTPUT_TOOLTIPS = (
        "The faces of each picture.",
        "The pictures with boxes, key points, indices and scores.",
        "What was found where, and how long it took.",
        "How many faces there are in all.",
    )
    FUNCTION = "find"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "faceanalysis": ("FACEANALYSIS", {"tooltip": "From Load Face Models, or another pack's loader."}),
                "image": IMAGE_INPUT,
                "choose": (
                    [ALL, *face.CHOICES],
                    {"default": ALL, "tooltip": "Which face of each picture to keep; only those are embedded."},
                ),
                "index": INDEX,
                "threshold": (
                    "FLOAT",
                    {"default": 0.5, "min": 0.05, "max": 0.99, "step": 0.01, "tooltip": "Lowest score of a face."},
                ),
                "embeddings": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Also who it is. Off when only places are needed: the recogniser is not loaded.",
                    },
                ),
                "when_none": (
                    ["error", "skip"],
                    {"default": "skip", "tooltip": "A picture without a face: stop, or keep an empty entry for it."},
                ),
            },
            "optional": {
                "identity": IDENTITY_INPUT,
                "detector_size": (
                    list(DETECTOR_SIZES),
                    {
                        "default": DETECTOR_SIZES[0],
                        "tooltip": (
                            "Side to which each picture is shrunk to look for faces. Raise it for small faces in large "
                            "pictures; time and memory grow with its square."
                        ),
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    def find(
        self,
        faceanalysis: Any,
        image: Tensor,
        choose: str,
        index: int,
        threshold: float,
        embeddings: bool,
        when_none: str,
        identity: list[Faces] | None = None,
        detector_size: str = DETECTOR_SIZES[0],
        unique_id: str | None = None,
    ) -> tuple[list[Faces], Tensor, str, int]:
        analyser = face.adapt(faceanalysis)
        choice = None if choose == ALL else _choice(choose, index, identity)
        options = face.DetectionOptions.from_side(int(detector_size), threshold)
        found = analyser.analyse(image, choose=choice, embed=embeddings, options=options)
        if when_none == "error":
            face.require_faces(found)
        report = f"{analyser.report()}\n{face.describe(found)}"
        host.current().show_text(report, unique_id)
        return found, face.mark_pictures(image, found), report, sum(map(len, found))


class HotpathFacePick:
    DISPLAY_NAME = "Pick Face"
    CATEGORY = CATEGORY
    DESCRIPTION = "Keeps one face of each picture."
    SEARCH_ALIASES = ["select face", "face index", "largest face"]
    RETURN_TYPES = ("FACES", "INT")
    RETURN_NAMES = ("faces", "count")
    OUTPUT_TOOLTIPS = ("At most one face per picture.", "How many pictures have one.")
    FUNCTION = "pick"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "faces": FACES_INPUT,
                "choose": (
                    list(face.CHOICES),
                    {"default": "largest", "tooltip": "Which face of each picture to keep."},
                ),
                "index": INDEX,
                "when_none": (
                    ["error", "skip"],
                    {
                        "default": "skip",
                        "tooltip": "A picture without such a face: stop, or keep an empty entry for it.",
                    },
                ),
            },
            "optional": {"identity": IDENTITY_INPUT},
        }

    def pick(
        self, faces: list[Faces], choose: str, index: int, when_none: str, identity: list[Faces] | None = None
    ) -> tuple[list[Faces], int]:
        choice = _choice(choose, index, identity)
        picked = [choice.apply(one) for one in faces]
        if when_none == "error":
            face.require_faces(picked)
        return picked, sum(map(len, picked))


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
                "faces": FACES_INPUT,
                "width": ("INT", {**size, "tooltip": "Of the drawing, in pixels; 0 is that of the first picture."}),
                "height": ("INT", {**size, "tooltip": "Of the drawing, in pixels; 0 is that of the first picture."}),
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
    DESCRIPTION = "Cuts a square around each face, turned upright if wanted, ready to be worked on and pasted back."
    SEARCH_ALIASES = ["face detailer", "align face", "face crop", "face swap"]
    RETURN_TYPES = ("IMAGE", "FACE_CROPS", "INT")
    RETURN_NAMES = ("crops", "places", "count")
    OUTPUT_TOOLTIPS = ("One crop per face.", "Where they come from, for Paste Faces.", "How many there are.")
    FUNCTION = "crop"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": IMAGE_INPUT,
                "faces": FACES_INPUT,
                "size": ("INT", {"default": 512, "min": 64, "max": 4096, "step": 8, "tooltip": "Side of each crop."}),
                "margin": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.0,
                        "max": 3.0,
                        "step": 0.05,
                        "tooltip": "Room on each side, in face sizes.",
                    },
                ),
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
                "image": ("IMAGE", {"tooltip": "The pictures the crops were cut from, also scaled as a whole."}),
                "crops": ("IMAGE", {"tooltip": "The crops, worked on; of any size."}),
                "places": ("FACE_CROPS", {"tooltip": "From Crop Faces."}),
                "feather": (
                    "FLOAT",
                    {"default": 0.25, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "Soft border, in half crops."},
                ),
            },
            "optional": {"mask": ("MASK", {"tooltip": "What of each crop counts; one for all, or one per crop."})},
        }

    def paste(
        self, image: Tensor, crops: Tensor, places: CropPlaces, feather: float, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return face.paste(image, crops, places, feather, mask)


class HotpathFaceMatch:
    DISPLAY_NAME = "Match Face"
    CATEGORY = CATEGORY
    DESCRIPTION = "Compares every face with an identity: how alike is the result, and which face is the person?"
    SEARCH_ALIASES = ["face similarity", "cosine", "identity score", "face distance"]
    RETURN_TYPES = ("FACES", "FLOAT", "BOOLEAN", "STRING")
    RETURN_NAMES = ("best", "similarity", "matches", "report")
    OUTPUT_TOOLTIPS = (
        "The most similar face of each picture, where it reaches the threshold.",
        "Mean over the pictures of their best cosine, -1 to 1; a picture without a face counts 0.",
        "Whether every picture has a face at or over the threshold.",
        "All cosines.",
    )
    FUNCTION = "match"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "faces": FACES_INPUT,
                "identity": IDENTITY_INPUT,
                "threshold": (
                    "FLOAT",
                    {
                        "default": 0.4,
                        "min": -1.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Least cosine of the same person. It depends on the recogniser; look at your own pairs.",
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    def match(
        self, faces: list[Faces], identity: list[Faces], threshold: float, unique_id: str | None = None
    ) -> tuple[list[Faces], float, bool, str]:
        result = face.match_faces(faces, identity, threshold)
        host.current().show_text(result.report, unique_id)
        return result.best, result.similarity, result.all_match, result.report


class HotpathFaceMask:
    DISPLAY_NAME = "Face Mask"
    CATEGORY = CATEGORY
    DESCRIPTION = "A mask over the faces of each picture."
    SEARCH_ALIASES = ["face area", "inpaint face", "segmentation"]
    RETURN_TYPES = ("MASK",)
    OUTPUT_TOOLTIPS = ("One mask per picture, black where there is no face.",)
    FUNCTION = "mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 0, "min": 0, "max": 16384, "step": 8}
        return {
            "required": {
                "faces": FACES_INPUT,
                "shape": (list(face.SHAPES), {"default": "oval", "tooltip": "oval follows the tilt of the face."}),
                "grow": (
                    "FLOAT",
                    {
                        "default": 0.1,
                        "min": -0.4,
                        "max": 3.0,
                        "step": 0.05,
                        "tooltip": "Added on each side, in face sizes.",
                    },
                ),
                "feather": (
                    "INT",
                    {"default": 16, "min": 0, "max": 1024, "tooltip": "Width of the soft edge, in pixels."},
                ),
                "width": ("INT", {**size, "tooltip": "Of the mask; 0 is that of the first picture."}),
                "height": ("INT", {**size, "tooltip": "Of the mask; 0 is that of the first picture."}),
            }
        }

    def mask(self, faces: list[Faces], shape: str, grow: float, feather: int, width: int, height: int) -> tuple[Tensor]:
        return (face.mask_faces(faces, height, width, shape, grow, float(feather)),)


def _choice(choose: str, index: int, identity: list[Faces] | None) -> face.FaceChoice:
    # Only a match looks at the identity, so only there may it lack a face.
    person = face.average_identity(identity) if identity is not None and choose == face.BEST_MATCH else None
    return face.choose_face(choose, index, person)


NODES: dict[str, type[Any]] = {
    "HotpathFaceLoader": HotpathFaceLoader,
    "HotpathFaces": HotpathFaces,
    "HotpathFacePick": HotpathFacePick,
    "HotpathFaceKeypoints": HotpathFaceKeypoints,
    "HotpathFaceCrop": HotpathFaceCrop,
    "HotpathFacePaste": HotpathFacePaste,
    "HotpathFaceMatch": HotpathFaceMatch,
    "HotpathFaceMask": HotpathFaceMask,
}
