"""The face nodes that find faces, pick some of them and compare them with somebody.

A FACES socket carries one `Faces` per picture, empty where there is none, so that batches stay aligned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import face, host
from ..face import FaceAnalyser, Faces
from .sockets import FACES, HIDDEN, PICTURES, number

CATEGORY = "Hotpath/faces"
FOLDER = "insightface"
ALL = "all"
DETECTOR_SIZES = ("640", "1024", "1280", "1920", "2560")
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


class HotpathFaceLoader:
    DISPLAY_NAME = "Load Face Models"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a face detector and recogniser, and shows where they run, and why. Other packs can use the output as "
        "insightface's FaceAnalysis."
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
                        "tooltip": "fp16 and bf16 are used if the loaded weights give practically the same output in "
                        "them; torch only.",
                    },
                ),
            },
            "optional": {
                "device": (["auto", "cpu"], {"default": "auto", "tooltip": "auto: where ComfyUI computes."}),
                "provider": (
                    ["auto", *face.PROVIDERS],
                    {"default": "auto", "tooltip": "For the engine onnxruntime. auto: the one for the device."},
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
                "image": PICTURES,
                "choose": (
                    [ALL, *face.CHOICES],
                    {"default": ALL, "tooltip": "Which face of each picture to keep; only those are embedded."},
                ),
                "index": INDEX,
                "threshold": number(0.5, 0.05, 0.99, "Lowest score of a face."),
                "embeddings": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Also compute who it is. Turn it off if you only need places; then the recogniser "
                        "is not loaded.",
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
            face.require_faces(found, choice)
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
                "faces": FACES,
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
            face.require_faces(picked, choice)
        return picked, sum(map(len, picked))


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
                "faces": FACES,
                "identity": IDENTITY_INPUT,
                "threshold": (
                    "FLOAT",
                    {
                        "default": 0.4,
                        "min": -1.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Lowest cosine that counts as the same person. It depends on the recogniser; look "
                        "at your own pairs.",
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


def _choice(choose: str, index: int, identity: list[Faces] | None) -> face.FaceChoice:
    # Only a match looks at the identity, so only there may it lack a face.
    person = face.average_identity(identity) if identity is not None and choose == face.BEST_MATCH else None
    return face.choose_face(choose, index, person)


NODES: dict[str, type[Any]] = {
    "HotpathFaceLoader": HotpathFaceLoader,
    "HotpathFaces": HotpathFaces,
    "HotpathFacePick": HotpathFacePick,
    "HotpathFaceMatch": HotpathFaceMatch,
}
