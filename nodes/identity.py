"""InstantID with the right defaults: identities that travel without a photo, all 70 blocks, several people in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import face, host
from ..face import FaceChoice, Faces
from ..identity import COMBINE_MODES, Identity, adopt_adapter, load_identity, save_identity
from ..identity.blocks import PATCH_MODES
from ..identity.drawing import draw_tokens
from ..patches.identities import (
    InstantIDSettings,
    Person,
    apply_people,
    merge_people,
    pose_of,
    poses_in,
)
from ..patches.identity_conditioning import ALL_NETS, ONLY_IDENTITY_NET
from ..patches.instantid import describe_faces, identity_from, identity_of_faces, prepare_identity, read_faces
from ..patches.mask import read_mask
from .sockets import END_AT, HIDDEN, INSIGHTFACE, INSTANTID, MODEL, NEGATIVE, POSITIVE, START_AT

CATEGORY = "Hotpath/InstantID"
IDENTITY = "HOTPATH_IDENTITY"
FOLDER = "identities"
PEOPLE = 4
UNNAMED = "identity"

CHOICES = {
    "largest": FaceChoice.largest,
    "highest score": FaceChoice.highest_score,
    "centre": FaceChoice.centre,
    "left to right": FaceChoice.left_to_right,
}


def _number(default: float, low: float, high: float, tooltip: str, step: float = 0.01) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


SETTINGS: dict[str, Any] = {
    "cn_strength": _number(0.8, 0.0, 10.0, "Strength of IdentityNet: pose and shape of the face. 0 leaves it out."),
    "start_at": START_AT,
    "end_at": END_AT,
    "noise": _number(0.35, 0.0, 1.0, "Noise instead of zeros as the negative identity.", 0.05),
    "combine_embeds": (
        list(COMBINE_MODES),
        {"default": "average", "tooltip": "How several pictures become one person."},
    ),
    "pose": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": "Off: IdentityNet is left out, the pose is free and likeness comes from attention alone.",
        },
    ),
    "face_tokens_for": (
        [ONLY_IDENTITY_NET, ALL_NETS],
        {
            "default": ONLY_IDENTITY_NET,
            "tooltip": "Which ControlNets see the face instead of the prompt. Depth and pose nets were trained on prompts.",
        },
    ),
    "patch_mode": (
        list(PATCH_MODES),
        {
            "default": "full",
            "tooltip": "Attention blocks that carry the identity: full 70, balanced 55, fast 20, output_only 36, or custom.",
        },
    ),
    "custom_blocks": (
        "STRING",
        {
            "default": "",
            "tooltip": "For patch_mode custom: such as output.0, output.1, input.7.0-4, middle, or numbers 0 to 69.",
        },
    ),
}
KPS = (
    "IMAGE",
    {"tooltip": "Sets the pose: a photo (with insightface connected) or a finished key point drawing."},
)
OPTIONAL_INSIGHTFACE = ("FACEANALYSIS", {"tooltip": "Finds the face in image_kps. Not needed for a finished drawing."})
OPTIONAL_CONTROL_NET = ("CONTROL_NET", {"tooltip": "IdentityNet. Without it, likeness comes from attention alone."})
MASK = ("MASK", {"tooltip": "Where this identity acts. Any size; one mask, or one per picture of the batch."})


class HotpathIdentity:
    DISPLAY_NAME = "Identity from Faces"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "A person as an identity that travels without the photo: from pictures, from faces found before, and from other "
        "identities of the same person, which are averaged."
    )
    SEARCH_ALIASES = ["face embedding", "faceid", "embeds", "person"]
    RETURN_TYPES = (IDENTITY, "STRING")
    RETURN_NAMES = ("identity", "report")
    OUTPUT_TOOLTIPS = ("The person.", "What was found.")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {
                "insightface": ("FACEANALYSIS", {"tooltip": "The face models; needed for pictures."}),
                "image": ("IMAGE", {"tooltip": "Pictures of one person; several make a steadier identity."}),
                "faces": (
                    "FACES",
                    {"tooltip": "Faces that were found before, instead of pictures: the first of each picture."},
                ),
                "identity": (IDENTITY, {"tooltip": "More of the same person: joined with what is made here."}),
                "name": ("STRING", {"default": UNNAMED, "tooltip": "Shown in reports and used as file name."}),
                "which_face": (
                    list(CHOICES),
                    {"default": "largest", "tooltip": "Which face of each picture is the person."},
                ),
            },
            "hidden": HIDDEN,
        }

    def make(
        self,
        insightface: Any = None,
        image: torch.Tensor | None = None,
        faces: Sequence[Faces] | None = None,
        identity: Identity | None = None,
        name: str = UNNAMED,
        which_face: str = "largest",
        unique_id: str | None = None,
    ) -> tuple[Identity, str]:
        made: list[Identity] = []
        lines: list[str] = []
        if faces is not None:
            made.append(identity_of_faces(faces, name))
            lines.append(f"faces found before: {made[-1].embeddings.shape[0]}")
        if image is not None:
            if insightface is None:
                raise ValueError(
                    "A picture is connected but no face model: connect insightface (InstantID Face Analysis)."
                )
            analyser = face.adapt(insightface)
            reading = read_faces(analyser, image, CHOICES[which_face]())
            made.append(identity_from(reading, name, _recogniser(analyser)))
            lines.append(describe_faces(reading))
        if identity is not None:
            made.append(identity)
            lines.append(f"joined with {identity.name} (pictures: {identity.embeddings.shape[0]})")
        if not made:
            raise ValueError("Nothing to make an identity of: connect image (with insightface), faces or identity.")
        person = merge_people(made[0], made[1:])
        if name and name != UNNAMED:
            person = replace(person, name=name)
        count = person.embeddings.shape[0]
        report = f"{person.name}: {count} picture{'s' if count > 1 else ''}; " + "; ".join(lines)
        host.current().show_text(report, unique_id)
        return person, report


def _recogniser(analyser: Any) -> str:
    folder = getattr(analyser, "folder", None)
    return str(getattr(folder, "name", "unknown"))


def _identity_file(name: str) -> Path:
    safe = "".join(c if c.isalnum() or c in " ._-" else "_" for c in name).strip(" .").removesuffix(".safetensors")
    # File systems end names at 255 bytes; a temporary name beside it needs some of them.
    short = safe.encode()[:200].decode(errors="ignore").strip(" .") or "identity"
    return host.current().model_folders(FOLDER)[0] / f"{short}.safetensors"


class HotpathIdentitySave:
    DISPLAY_NAME = "Save Identity"
    CATEGORY = CATEGORY
    DESCRIPTION = "Writes an identity to models/identities as safetensors: embeddings and pose, no picture."
    SEARCH_ALIASES = ["store face", "save embeds"]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    OUTPUT_TOOLTIPS = ("The file that was written.",)
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "identity": (IDENTITY, {"tooltip": "The person."}),
                "filename": (
                    "STRING",
                    {"default": "", "tooltip": "Empty: the identity's own name. An older file is replaced."},
                ),
            },
            "hidden": HIDDEN,
        }

    def save(self, identity: Identity, filename: str = "", unique_id: str | None = None) -> tuple[str]:
        path = save_identity(identity, _identity_file(filename.strip() or identity.name))
        host.current().show_text(f"Saved as {path.name} in models/{FOLDER}.", unique_id)
        return (str(path),)


class HotpathIdentityLoad:
    DISPLAY_NAME = "Load Identity"
    CATEGORY = CATEGORY
    DESCRIPTION = "Reads an identity that Save Identity wrote, from models/identities."
    SEARCH_ALIASES = ["load face", "load embeds"]
    RETURN_TYPES = (IDENTITY,)
    RETURN_NAMES = ("identity",)
    OUTPUT_TOOLTIPS = ("The person.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = host.current().model_files(FOLDER, (".safetensors",))
        return {"required": {"file": (files, {"tooltip": "A file in models/identities."})}}

    @classmethod
    def VALIDATE_INPUTS(cls, file: Any) -> bool:
        # A file saved earlier in the same run is not in the list yet; a missing one is reported when the node runs.
        return True

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        try:
            stat = host.current().model_path(FOLDER, file).stat()
        except FileNotFoundError:
            return "missing"
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    def load(self, file: str) -> tuple[Identity]:
        return (load_identity(host.current().model_path(FOLDER, file or "")),)


class HotpathIdentityTokens:
    DISPLAY_NAME = "Identity Tokens"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "What the adapter makes of a person: the face tokens, for InstantID Apply ControlNet without a photo, and a picture "
        "of them. Needs no SDXL model."
    )
    SEARCH_ALIASES = ["face embeds", "resampler"]
    RETURN_TYPES = ("FACE_EMBEDS", "IMAGE", "STRING")
    RETURN_NAMES = ("face_embeds", "picture", "report")
    OUTPUT_TOOLTIPS = (
        "For InstantID Apply ControlNet.",
        "A row per token: red positive, blue negative.",
        "Number and width of the tokens.",
    )
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "instantid": INSTANTID,
                "identity": (IDENTITY, {"tooltip": "The person."}),
                "noise": SETTINGS["noise"],
                "combine_embeds": SETTINGS["combine_embeds"],
            },
            "hidden": HIDDEN,
        }

    def make(
        self, instantid: Any, identity: Identity, noise: float, combine_embeds: str, unique_id: str | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, str]:
        adapter = adopt_adapter(instantid)
        prepared = prepare_identity(adapter, identity.embeddings, combine_embeds, noise)
        pictures, tokens, width = prepared.cond.shape
        report = (
            f"{identity.name}: {pictures * tokens} tokens, {width} wide, for {len(prepared)} blocks ({adapter.name})"
        )
        host.current().show_text(report, unique_id)
        face_embeds = {"cond": prepared.cond.clone(), "uncond": prepared.uncond.clone()}
        return face_embeds, draw_tokens(prepared.cond), report


class HotpathInstantID:
    DISPLAY_NAME = "InstantID"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Puts one person into an SDXL generation: all 70 attention blocks, IdentityNet, and a report of what was done."
    )
    SEARCH_ALIASES = ["face", "identity", "portrait", "likeness", "apply instantid"]
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "STRING")
    RETURN_NAMES = ("model", "positive", "negative", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the person.",
        "The prompt.",
        "The negative prompt.",
        "What was patched, and why.",
    )
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "instantid": INSTANTID,
                "identity": (IDENTITY, {"tooltip": "The person, from Identity from Faces or Load Identity."}),
                "model": MODEL,
                "positive": POSITIVE,
                "negative": NEGATIVE,
                "weight": _number(0.8, -1.0, 5.0, "Strength in attention: likeness."),
                **SETTINGS,
            },
            "optional": {
                "control_net": OPTIONAL_CONTROL_NET,
                "image_kps": KPS,
                "insightface": OPTIONAL_INSIGHTFACE,
                "mask": MASK,
            },
            "hidden": HIDDEN,
        }

    def apply(
        self,
        instantid: Any,
        identity: Identity,
        model: Any,
        positive: Any,
        negative: Any,
        weight: float,
        cn_strength: float,
        start_at: float,
        end_at: float,
        noise: float,
        combine_embeds: str,
        pose: bool,
        face_tokens_for: str,
        patch_mode: str,
        custom_blocks: str,
        control_net: Any = None,
        image_kps: torch.Tensor | None = None,
        insightface: Any = None,
        mask: torch.Tensor | None = None,
        unique_id: str | None = None,
    ) -> tuple[Any, Any, Any, str]:
        settings = InstantIDSettings(
            cn_strength, start_at, end_at, noise, combine_embeds, patch_mode, custom_blocks, face_tokens_for
        )
        person = Person(identity, weight, read_mask(mask))
        analyser = face.adapt(insightface) if insightface is not None else None
        wanted = pose and control_net is not None and cn_strength > 0
        poses = [pose_of(person, image_kps, analyser)] if wanted else []
        *result, report = apply_people(
            model, positive, negative, adopt_adapter(instantid), [person], settings, control_net, poses
        )
        host.current().show_text(report, unique_id)
        return result[0], result[1], result[2], report


class HotpathIdentities:
    DISPLAY_NAME = "InstantID, Several People"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Up to four people in one pass of the UNet, each inside a mask. Two Apply InstantID nodes with combined conditionings "
        "run the UNet once per person."
    )
    SEARCH_ALIASES = ["multi id", "two people", "couple", "group", "regional"]
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "STRING")
    RETURN_NAMES = ("model", "positive", "negative", "report")
    OUTPUT_TOOLTIPS = HotpathInstantID.OUTPUT_TOOLTIPS
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        people: dict[str, Any] = {}
        for n in range(1, PEOPLE + 1):
            if n > 1:
                people[f"identity_{n}"] = (IDENTITY, {"tooltip": f"Person {n}."})
            people[f"mask_{n}"] = ("MASK", {"tooltip": f"Where person {n} acts. Without it: everywhere."})
        for n in range(1, PEOPLE + 1):
            people[f"weight_{n}"] = _number(0.8, -1.0, 5.0, f"Strength of person {n} in attention.")
        return {
            "required": {
                "instantid": INSTANTID,
                "identity_1": (IDENTITY, {"tooltip": "Person 1."}),
                "model": MODEL,
                "positive": POSITIVE,
                "negative": NEGATIVE,
                **{k: v for k, v in SETTINGS.items() if k != "face_tokens_for"},
            },
            "optional": {
                "control_net": OPTIONAL_CONTROL_NET,
                "image_kps": (
                    "IMAGE",
                    {"tooltip": "One picture with a face for each person: their poses. Needs insightface."},
                ),
                "insightface": INSIGHTFACE,
                **people,
            },
            "hidden": HIDDEN,
        }

    def apply(
        self,
        instantid: Any,
        identity_1: Identity,
        model: Any,
        positive: Any,
        negative: Any,
        cn_strength: float,
        start_at: float,
        end_at: float,
        noise: float,
        combine_embeds: str,
        pose: bool,
        patch_mode: str,
        custom_blocks: str,
        control_net: Any = None,
        image_kps: torch.Tensor | None = None,
        insightface: Any = None,
        unique_id: str | None = None,
        **people: Any,
    ) -> tuple[Any, Any, Any, str]:
        settings = InstantIDSettings(
            cn_strength, start_at, end_at, noise, combine_embeds, patch_mode, custom_blocks, ONLY_IDENTITY_NET
        )
        identities = {1: identity_1} | {n: people.get(f"identity_{n}") for n in range(2, PEOPLE + 1)}
        group = [
            Person(identity, people.get(f"weight_{n}", 0.8), read_mask(people.get(f"mask_{n}")))
            for n, identity in identities.items()
            if identity is not None
        ]
        poses = []
        if pose and control_net is not None and cn_strength > 0:
            analyser = face.adapt(insightface) if insightface is not None else None
            if image_kps is not None and analyser is not None:
                poses = poses_in(group, image_kps, analyser)
            elif image_kps is not None:
                raise ValueError("image_kps needs insightface here, to find a face for each person: connect it.")
            else:
                poses = [pose_of(person, None, None) for person in group]
        *result, report = apply_people(
            model, positive, negative, adopt_adapter(instantid), group, settings, control_net, poses
        )
        host.current().show_text(report, unique_id)
        return result[0], result[1], result[2], report


NODES: dict[str, type[Any]] = {
    "HotpathIdentity": HotpathIdentity,
    "HotpathIdentitySave": HotpathIdentitySave,
    "HotpathIdentityLoad": HotpathIdentityLoad,
    "HotpathIdentityTokens": HotpathIdentityTokens,
    "HotpathInstantID": HotpathInstantID,
    "HotpathIdentities": HotpathIdentities,
}
