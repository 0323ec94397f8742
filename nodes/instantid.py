"""The seven InstantID nodes of shared workflows: same ids, inputs, order and results as the pack they come from.

What changes pictures there stays the default here and gets a switch at the end of the inputs; what crashed, leaked or
misled is mended. The nodes with the right defaults are in `identity.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import face, host
from ..face import FaceAnalyser
from ..identity import COMBINE_MODES, InstantIDAdapter, adopt_adapter, load_adapter
from ..patches.identity_conditioning import IdentityNet, apply_identity_net
from ..patches.instantid import (
    AttentionSettings,
    attach_identity,
    describe_faces,
    draw_aligned,
    draw_poses,
    find_poses,
    prepare_identity,
    read_faces,
)
from ..patches.mask import read_mask
from .sockets import (
    CONTROL_NET,
    END_AT,
    FACE_IMAGE,
    HIDDEN,
    IMAGE_KPS,
    INSIGHTFACE,
    INSTANTID,
    MASK,
    MIDDLE_BLOCK,
    MODEL,
    NEGATIVE,
    POSITIVE,
    START_AT,
    number,
)

CATEGORY = "InstantID"
FOLDER = "instantid"
# As it is published: a list without a file would show nothing, and be refused without a word about what is missing.
PUBLISHED = "ip-adapter.bin"
ADAPTER_PARAMETERS = 423_000_000
NOISE = number(
    0.0, 0.0, 1.0, "Noise instead of zeros as the negative identity. More gives stronger contrast to it; try 0.35.", 0.1
)


class InstantIDModelLoader:
    DISPLAY_NAME = "Load InstantID Model"
    CATEGORY = CATEGORY
    DESCRIPTION = "Loads InstantID's ip-adapter (.bin or .safetensors) from models/instantid."
    SEARCH_ALIASES = ["ip-adapter", "identity", "face adapter"]
    RETURN_TYPES = ("INSTANTID",)
    OUTPUT_TOOLTIPS = (
        "The adapter. It is in GPU memory while a new face is prepared, and stays there only where "
        "memory is plentiful.",
    )
    FUNCTION = "load_model"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        here = host.current()
        here.announce_models(FOLDER)
        files = here.model_files(FOLDER) or [PUBLISHED]
        return {"required": {"instantid_file": (files, {"tooltip": "A file in models/instantid."})}}

    @classmethod
    def VALIDATE_INPUTS(cls, instantid_file: Any = "") -> bool:
        # A name from somebody else's workflow is reported when the node runs, with the folders that were searched.
        return True

    def load_model(self, instantid_file: str) -> tuple[InstantIDAdapter]:
        here = host.current()
        path = here.model_path(FOLDER, instantid_file or "")
        return (load_adapter(path, here.compute_dtype(ADAPTER_PARAMETERS)),)


class InstantIDFaceAnalysis:
    DISPLAY_NAME = "InstantID Face Analysis"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads the face detector and recogniser (antelopev2) from models/insightface/models/antelopev2. To choose "
        "engine and precision, use Load Face Models."
    )
    SEARCH_ALIASES = ["insightface", "antelopev2", "face detection"]
    RETURN_TYPES = ("FACEANALYSIS",)
    OUTPUT_TOOLTIPS = ("The face models; other packs' nodes can use them as insightface's FaceAnalysis.",)
    FUNCTION = "load_insight_face"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "CPU, or the graphics card of this machine (CUDA, ROCM and CoreML each mean the one that is there)."
        return {
            "required": {"provider": (["CPU", "CUDA", "ROCM", "CoreML"], {"default": "CPU", "tooltip": tooltip})},
            "hidden": HIDDEN,
        }

    def load_insight_face(self, provider: str, unique_id: str | None = None) -> tuple[FaceAnalyser]:
        here = host.current()
        device = torch.device("cpu") if provider == "CPU" else here.device()
        analyser = face.load_analyser(here.model_folders("insightface"), name="antelopev2", device=device)
        here.show_text(analyser.report(), unique_id)
        if provider != "CPU" and device.type == "cpu":
            here.warn(f"{provider} was asked for, but the CPU is used: {face.why_the_cpu()}.", unique_id)
        return (analyser,)


class FaceKeypointsPreprocessor:
    DISPLAY_NAME = "Face Keypoints Preprocessor"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Draws the five key points of the largest face of each picture, as the IdentityNet expects them. "
        "A picture without a face gives a black drawing, so that batches stay aligned. "
        "Draw Face Key Points draws several faces, at any size."
    )
    SEARCH_ALIASES = ["kps", "landmarks", "pose"]
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("One drawing per picture.",)
    FUNCTION = "preprocess_image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"faceanalysis": INSIGHTFACE, "image": ("IMAGE", {"tooltip": "Pictures with a face."})},
            "hidden": HIDDEN,
        }

    def preprocess_image(
        self, faceanalysis: Any, image: torch.Tensor, unique_id: str | None = None
    ) -> tuple[torch.Tensor]:
        found = find_poses(face.adapt(faceanalysis), image)
        missing = sum(1 for f in found if not len(f))
        if missing:
            host.current().warn(f"No face in {missing} of {len(found)} pictures: drawn black.", unique_id)
        return (draw_aligned(found),)


class ApplyInstantID:
    DISPLAY_NAME = "Apply InstantID"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Puts a person's face into an SDXL generation: attention patch and IdentityNet in one node. In new "
        "workflows, use InstantID (HotpathInstantID)."
    )
    SEARCH_ALIASES = ["face", "identity", "portrait", "ip-adapter", "likeness"]
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("MODEL", "positive", "negative")
    OUTPUT_TOOLTIPS = ("The model with the identity.", "The prompt with IdentityNet.", "The negative with IdentityNet.")
    FUNCTION = "apply_instantid"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "instantid": INSTANTID,
                "insightface": INSIGHTFACE,
                "control_net": CONTROL_NET,
                "image": FACE_IMAGE,
                "model": MODEL,
                "positive": POSITIVE,
                "negative": NEGATIVE,
                "weight": number(0.8, 0.0, 5.0, "Strength of the identity, in attention and IdentityNet alike."),
                "start_at": START_AT,
                "end_at": END_AT,
            },
            "optional": {"image_kps": IMAGE_KPS, "mask": MASK, "middle_block": MIDDLE_BLOCK},
            "hidden": HIDDEN,
        }

    def apply_instantid(
        self,
        instantid: Any,
        insightface: Any,
        control_net: Any,
        image: torch.Tensor,
        model: Any,
        positive: Any,
        negative: Any,
        start_at: float,
        end_at: float,
        weight: float = 0.8,
        ip_weight: float | None = None,
        cn_strength: float | None = None,
        noise: float = 0.35,
        image_kps: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        combine_embeds: str = "average",
        middle_block: bool = False,
        unique_id: str | None = None,
    ) -> tuple[Any, Any, Any]:
        adapter, analyser, mask = adopt_adapter(instantid), face.adapt(insightface), read_mask(mask)
        reading = read_faces(analyser, image)
        poses = find_poses(analyser, image_kps) if image_kps is not None else reading.faces[:1]
        notes = [describe_faces(reading)]
        drawing = draw_poses(poses)
        if drawing is None:
            notes.append(
                "no face in image_kps, which is used as drawn" if image_kps is not None else "no pose was found"
            )
            drawing = image_kps if image_kps is not None else torch.zeros_like(image)
        elif drawing.shape[0] < len(poses):
            notes.append(f"{len(poses) - drawing.shape[0]} pictures of image_kps had no face and were left out")

        prepared = prepare_identity(adapter, reading.embeddings, combine_embeds, noise)
        settings = AttentionSettings(
            weight if ip_weight is None else ip_weight, start_at, end_at, middle_block=middle_block
        )
        patched, line = attach_identity(model, adapter, prepared, settings, mask)
        strength = weight if cn_strength is None else cn_strength
        # Copies: what other packs do to a CONDITIONING must not reach the cache.
        tokens = (prepared.cond.to(drawing.dtype, copy=True), prepared.uncond.to(drawing.dtype, copy=True))
        identity_net = IdentityNet(control_net, drawing, strength, (start_at, end_at), tokens)
        positive, negative = apply_identity_net(positive, negative, identity_net, mask)
        host.current().show_text("\n".join([*notes, line]), unique_id)
        return patched, positive, negative


class ApplyInstantIDAdvanced(ApplyInstantID):
    DISPLAY_NAME = "Apply InstantID Advanced"
    DESCRIPTION = (
        "Apply InstantID with separate strengths for attention and IdentityNet, noise, and ways to combine pictures. "
        "In new workflows, use InstantID (HotpathInstantID)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "instantid": INSTANTID,
                "insightface": INSIGHTFACE,
                "control_net": CONTROL_NET,
                "image": FACE_IMAGE,
                "model": MODEL,
                "positive": POSITIVE,
                "negative": NEGATIVE,
                "ip_weight": number(0.8, 0.0, 3.0, "Strength in attention: likeness."),
                "cn_strength": number(0.8, 0.0, 10.0, "Strength of IdentityNet: pose and shape."),
                "start_at": START_AT,
                "end_at": END_AT,
                "noise": NOISE,
                "combine_embeds": (
                    list(COMBINE_MODES),
                    {
                        "default": "average",
                        "tooltip": "How several pictures of the person are combined: by their mean, by their mean "
                        "after each feature is divided by its norm over the pictures, or as 16 tokens for each "
                        "picture.",
                    },
                ),
            },
            "optional": {"image_kps": IMAGE_KPS, "mask": MASK, "middle_block": MIDDLE_BLOCK},
            "hidden": HIDDEN,
        }


class InstantIDAttentionPatch:
    DISPLAY_NAME = "InstantID Patch Attention"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Only the attention half of InstantID, on all 70 blocks of SDXL. In new workflows, use InstantID "
        "(HotpathInstantID) without a ControlNet."
    )
    SEARCH_ALIASES = ["face", "identity", "ip-adapter"]
    RETURN_TYPES = ("MODEL", "FACE_EMBEDS")
    OUTPUT_TOOLTIPS = ("The model with the identity.", "The face tokens, for InstantID Apply ControlNet.")
    FUNCTION = "patch_attention"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "instantid": INSTANTID,
                "insightface": INSIGHTFACE,
                "image": FACE_IMAGE,
                "model": MODEL,
                "weight": number(1.0, -1.0, 3.0, "Strength of the identity; below 0 it is pushed away."),
                "start_at": START_AT,
                "end_at": END_AT,
                "noise": NOISE,
            },
            "optional": {"mask": MASK},
            "hidden": HIDDEN,
        }

    def patch_attention(
        self,
        instantid: Any,
        insightface: Any,
        image: torch.Tensor,
        model: Any,
        weight: float,
        start_at: float,
        end_at: float,
        noise: float = 0.0,
        mask: torch.Tensor | None = None,
        unique_id: str | None = None,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        adapter, mask = adopt_adapter(instantid), read_mask(mask)
        reading = read_faces(face.adapt(insightface), image)
        prepared = prepare_identity(adapter, reading.embeddings, "average", noise)
        # Copies: what other packs do to them must not reach the cache.
        face_embeds = {"cond": prepared.cond.clone(), "uncond": prepared.uncond.clone()}
        if weight == 0:
            return model, face_embeds
        patched, line = attach_identity(model, adapter, prepared, AttentionSettings(weight, start_at, end_at), mask)
        host.current().show_text(f"{describe_faces(reading)}\n{line}", unique_id)
        return patched, face_embeds


class ApplyInstantIDControlNet:
    DISPLAY_NAME = "InstantID Apply ControlNet"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Only the IdentityNet half of InstantID, with a key point drawing of your own. In new workflows, use "
        "InstantID (HotpathInstantID), which does both."
    )
    SEARCH_ALIASES = ["identitynet", "kps", "pose"]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_TOOLTIPS = ("The prompt with IdentityNet.", "The negative prompt with IdentityNet.")
    FUNCTION = "apply_controlnet"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "face_embeds": ("FACE_EMBEDS", {"tooltip": "From InstantID Patch Attention."}),
                "control_net": CONTROL_NET,
                "image_kps": (
                    "IMAGE",
                    {"tooltip": "A key point drawing, from Face Keypoints Preprocessor; used as it is."},
                ),
                "positive": POSITIVE,
                "negative": NEGATIVE,
                "strength": number(1.0, 0.0, 10.0, "Strength of IdentityNet; 0 leaves it out."),
                "start_at": START_AT,
                "end_at": END_AT,
            },
            "optional": {"mask": MASK},
        }

    def apply_controlnet(
        self,
        face_embeds: dict[str, torch.Tensor],
        control_net: Any,
        image_kps: torch.Tensor,
        positive: Any,
        negative: Any,
        strength: float,
        start_at: float,
        end_at: float,
        mask: torch.Tensor | None = None,
    ) -> tuple[Any, Any]:
        if strength == 0:
            return positive, negative
        tokens = (face_embeds["cond"], face_embeds["uncond"])
        identity_net = IdentityNet(control_net, image_kps, strength, (start_at, end_at), tokens)
        return apply_identity_net(positive, negative, identity_net, read_mask(mask))


NODES: dict[str, type[Any]] = {
    "InstantIDModelLoader": InstantIDModelLoader,
    "InstantIDFaceAnalysis": InstantIDFaceAnalysis,
    "ApplyInstantID": ApplyInstantID,
    "ApplyInstantIDAdvanced": ApplyInstantIDAdvanced,
    "FaceKeypointsPreprocessor": FaceKeypointsPreprocessor,
    "InstantIDAttentionPatch": InstantIDAttentionPatch,
    "ApplyInstantIDControlNet": ApplyInstantIDControlNet,
}
