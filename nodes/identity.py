"""Identities that travel without a photo: made of pictures, saved, loaded, and looked at as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import face, host
from ..face import Faces
from ..identity import Identity, adopt_adapter, load_identity, save_identity
from ..identity.drawing import draw_tokens
from ..patches.identities import merge_people
from ..patches.instantid import describe_faces, identity_from, identity_of_faces, prepare_identity, read_faces
from .identity_sockets import COMBINE_EMBEDS, IDENTITY, NEGATIVE_NOISE
from .saved_files import ReadsSavedFile
from .sockets import HIDDEN, INSTANTID

CATEGORY = "Hotpath/InstantID"
FOLDER = "identities"
UNNAMED = "identity"

CHOICES = ["largest", "highest score", "centre", "left to right"]


class HotpathIdentity:
    DISPLAY_NAME = "Identity from Faces"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Makes an identity of a person, which needs no photo any more: from pictures, faces found before, and other "
        "identities of the same person. It keeps them all."
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
                "identity": (
                    IDENTITY,
                    {"tooltip": "Another identity of the same person, joined with what is made here."},
                ),
                "name": ("STRING", {"default": UNNAMED, "tooltip": "Shown in reports and used as file name."}),
                "which_face": (
                    CHOICES,
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
            reading = read_faces(analyser, image, face.choose_face(which_face))
            made.append(identity_from(reading, name, _recogniser(analyser)))
            lines.append(describe_faces(reading))
        if identity is not None:
            made.append(identity)
            lines.append(f"joined with {identity.name} (pictures: {identity.embeddings.shape[0]})")
        if not made:
            raise ValueError("Nothing to make an identity of: connect image (with insightface), faces or identity.")
        person = merge_people(made[0], made[1:])
        # Without a name of its own, what is made of Ann and new pictures of hers is Ann.
        given = (known for known in (name, *(one.name for one in made)) if known.strip() and known != UNNAMED)
        person = replace(person, name=next(given, UNNAMED))
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
    SEARCH_ALIASES = ["save face", "store face", "save embeds"]
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


class HotpathIdentityLoad(ReadsSavedFile):
    SAVED_IN = FOLDER
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
        return {"required": {"file": (cls.files(".safetensors"), {"tooltip": "A file in models/identities."})}}

    def load(self, file: str) -> tuple[Identity]:
        return (load_identity(host.current().model_path(FOLDER, file or "")),)


class HotpathIdentityTokens:
    DISPLAY_NAME = "Identity Tokens"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Gives what the adapter makes of a person: the face tokens, for InstantID Apply ControlNet without a photo, "
        "and a picture of them. Needs no SDXL model."
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
                "noise": NEGATIVE_NOISE,
                "combine_embeds": COMBINE_EMBEDS,
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
        # One sequence: of a batch of them, ComfyUI would give each picture of the latent batch another photo's.
        face_embeds = {
            role: tokens.flatten(0, 1)[None].clone()
            for role, tokens in (("cond", prepared.cond), ("uncond", prepared.uncond))
        }
        return face_embeds, draw_tokens(prepared.cond), report


NODES: dict[str, type[Any]] = {
    "HotpathIdentity": HotpathIdentity,
    "HotpathIdentitySave": HotpathIdentitySave,
    "HotpathIdentityLoad": HotpathIdentityLoad,
    "HotpathIdentityTokens": HotpathIdentityTokens,
}
