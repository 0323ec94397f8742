"""InstantID with the right defaults: all 70 blocks, one person or several in one pass, and a report of what was done."""

from __future__ import annotations

from typing import Any

import torch

from .. import face, host
from ..identity import Identity, adopt_adapter
from ..identity.blocks import PATCH_MODES
from ..identity.contribution_profile import ContributionProfile
from ..patches.identities import InstantIDSettings, Person, apply_people, pose_of, poses_in
from ..patches.identity_conditioning import ALL_NETS, ONLY_IDENTITY_NET
from ..patches.mask import read_mask
from ..patches.sdxl_layout import AdaptiveChoice
from .identity_sockets import COMBINE_EMBEDS, IDENTITY, NEGATIVE_NOISE, PERSON
from .sockets import BLOCK_PROFILE, END_AT, HIDDEN, INSIGHTFACE, INSTANTID, MODEL, NEGATIVE, POSITIVE, START_AT, number

CATEGORY = "Hotpath/InstantID"
PEOPLE = 4

# In the order of the outputs: a bypassed node passes the input in an output's own place, else the first one of its type, which
# would be the prompt for the negative output, too.
BYPASSED = {"model": MODEL, "positive": POSITIVE, "negative": NEGATIVE}
SETTINGS: dict[str, Any] = {
    "cn_strength": number(0.8, 0.0, 10.0, "Strength of IdentityNet: pose and shape of the face. 0 leaves it out."),
    "start_at": START_AT,
    "end_at": END_AT,
    "noise": NEGATIVE_NOISE,
    "combine_embeds": COMBINE_EMBEDS,
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
            "tooltip": "Attention blocks that carry the identity: full 70, balanced 55, fast 20, output_only 36, custom, or "
            "adaptive, by a profile that Block Telemetry measured.",
        },
    ),
    "custom_blocks": (
        "STRING",
        {
            "default": "",
            "tooltip": "For patch_mode custom: a list such as output.0, output.1, input.7.0-4, middle, or numbers "
            "from 0 to 69.",
        },
    ),
}
KPS = (
    "IMAGE",
    {"tooltip": "Sets the pose: a photo (with insightface connected) or a finished key point drawing."},
)
OPTIONAL_INSIGHTFACE = ("FACEANALYSIS", {"tooltip": "Finds the face in image_kps. Not needed for a finished drawing."})
OPTIONAL_CONTROL_NET = ("CONTROL_NET", {"tooltip": "IdentityNet. Without it, likeness comes from attention alone."})
PROFILE = (
    BLOCK_PROFILE,
    {"tooltip": "For patch_mode adaptive: from Load Block Profile or Block Telemetry Report. Without it: all blocks."},
)
ADAPTIVE_SHARE = number(
    0.95, 0.05, 1.0, "For patch_mode adaptive: the part of the measured contribution that the kept blocks must carry."
)
MASK = ("MASK", {"tooltip": "Where this identity acts. Any size; one mask, or one per picture of the batch."})


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
                **BYPASSED,
                "instantid": INSTANTID,
                "identity": PERSON,
                "weight": number(0.8, -1.0, 5.0, "Strength in attention: likeness."),
                **SETTINGS,
            },
            "optional": {
                "control_net": OPTIONAL_CONTROL_NET,
                "image_kps": KPS,
                "insightface": OPTIONAL_INSIGHTFACE,
                "mask": MASK,
                "profile": PROFILE,
                "adaptive_share": ADAPTIVE_SHARE,
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
        profile: ContributionProfile | None = None,
        adaptive_share: float = 0.95,
        unique_id: str | None = None,
    ) -> tuple[Any, Any, Any, str]:
        settings = InstantIDSettings(
            cn_strength,
            start_at,
            end_at,
            noise,
            combine_embeds,
            patch_mode,
            custom_blocks,
            face_tokens_for,
            AdaptiveChoice(profile, adaptive_share),
        )
        person = Person(identity, weight, read_mask(mask))
        analyser = face.adapt(insightface) if insightface is not None else None
        wanted = pose and control_net is not None and cn_strength > 0
        poses = [pose_of(person, image_kps, analyser)] if wanted else []
        result = apply_people(
            model, positive, negative, adopt_adapter(instantid), [person], settings, control_net, poses
        )
        host.current().show_text(result[-1], unique_id)
        return result


class HotpathIdentities:
    DISPLAY_NAME = "InstantID, Several People"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Puts up to four people into one picture, each inside a mask, in one pass of the UNet. Two Apply InstantID "
        "nodes with combined conditionings run the UNet once per person."
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
            people[f"weight_{n}"] = number(0.8, -1.0, 5.0, f"Strength of person {n} in attention.")
        return {
            "required": {
                **BYPASSED,
                "instantid": INSTANTID,
                "identity_1": (IDENTITY, {"tooltip": "Person 1."}),
                **{k: v for k, v in SETTINGS.items() if k != "face_tokens_for"},
            },
            "optional": {
                "control_net": OPTIONAL_CONTROL_NET,
                "image_kps": (
                    "IMAGE",
                    {"tooltip": "A picture with a face for each person, which sets their poses. Needs insightface."},
                ),
                "insightface": INSIGHTFACE,
                **people,
                "profile": PROFILE,
                "adaptive_share": ADAPTIVE_SHARE,
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
        profile: ContributionProfile | None = None,
        adaptive_share: float = 0.95,
        unique_id: str | None = None,
        **people: Any,
    ) -> tuple[Any, Any, Any, str]:
        settings = InstantIDSettings(
            cn_strength,
            start_at,
            end_at,
            noise,
            combine_embeds,
            patch_mode,
            custom_blocks,
            ONLY_IDENTITY_NET,
            AdaptiveChoice(profile, adaptive_share),
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
        result = apply_people(model, positive, negative, adopt_adapter(instantid), group, settings, control_net, poses)
        host.current().show_text(result[-1], unique_id)
        return result


NODES: dict[str, type[Any]] = {
    "HotpathInstantID": HotpathInstantID,
    "HotpathIdentities": HotpathIdentities,
}
