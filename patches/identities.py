"""Several identities, each with its own region, on one MODEL and one pair of conditionings.

Shared workflows chain two Apply nodes and combine their conditionings, which doubles the UNet's work per person. Here the
UNet runs once: attention adds every identity inside its region, and each IdentityNet is limited to the same region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..face import FaceAnalyser, Faces
from ..host.letters import counted
from ..identity import Identity, InstantIDAdapter, PreparedIdentity
from .identity_conditioning import (
    ALL_NETS,
    ONLY_IDENTITY_NET,
    Conditioning,
    IdentityNet,
    apply_identity_net,
    free_name,
    mark_roles,
    mask_positive,
)
from .instantid import (
    NEVER,
    AttentionSettings,
    add_to_attention,
    blocks_for,
    draw_aligned,
    draw_pose,
    find_poses,
    prepare_identity,
)
from .sdxl_layout import AdaptiveChoice


@dataclass(frozen=True)
class Person:
    """One identity of a picture. region: [M, H, W] in 0..1 where it acts, None for everywhere."""

    identity: Identity
    weight: float
    region: Tensor | None = None


@dataclass(frozen=True)
class Pose:
    """Where a person's key points come from: finished drawings [B, H, W, 3], and what to tell about them."""

    drawing: Tensor
    note: str


@dataclass(frozen=True)
class InstantIDSettings:
    """Everything `apply_people` needs besides the people. cn_strength 0, or no ControlNet, leaves IdentityNet out."""

    cn_strength: float
    start_at: float
    end_at: float
    noise: float
    combine: str
    patch_mode: str
    custom_blocks: str
    seen_by: str
    adaptive: AdaptiveChoice = field(default_factory=AdaptiveChoice)

    def attention(self, weight: float) -> AttentionSettings:
        return AttentionSettings(
            weight, self.start_at, self.end_at, self.patch_mode, self.custom_blocks, adaptive=self.adaptive
        )


def pose_of(person: Person, image: Tensor | None, analyser: FaceAnalyser | None) -> Pose:
    """The pose of a single person: from `image`, a photo or a finished drawing, else the identity's own.

    Raises ValueError when there is neither a picture nor a remembered pose.
    """
    if image is None:
        return _own_pose(person.identity)
    if analyser is None:
        return Pose(image, "image_kps is used as drawn (connect insightface to find the face in a photo)")
    faces = find_poses(analyser, image)
    if not any(len(face) for face in faces):
        return Pose(image, "no face in image_kps, which is used as drawn")
    missing = sum(1 for face in faces if not len(face))
    note = f"the pose is that of image_kps; {missing} of {len(faces)} pictures have none" if missing else ""
    return Pose(draw_aligned(faces), note or "the pose is that of image_kps")


def _own_pose(identity: Identity) -> Pose:
    if identity.keypoints is None or identity.size is None:
        raise ValueError(
            f"{identity.name!r} remembers no pose: connect image_kps (a photo or a key point drawing), or switch pose off."
        )
    return Pose(draw_pose(identity.size, identity.keypoints), "the pose is that of the identity's picture")


def poses_in(people: Sequence[Person], image: Tensor, analyser: FaceAnalyser) -> list[Pose]:
    """A pose for each person from one picture of several faces [1, H, W, 3].

    A face goes to the person whose region covers most of it; people without a region take the rest from left to right.
    Raises ValueError when there are fewer faces than people.
    """
    found = analyser.analyse(image[:1], choose=None, embed=False)[0]
    if len(found) < len(people):
        raise ValueError(
            f"image_kps shows {len(found)} faces for {len(people)} identities: use a picture with a face for each, or "
            "connect fewer identities."
        )
    order = _assign(people, found)
    return [Pose(draw_pose(found.size, found.keypoints[face]), f"face {face + 1} of image_kps") for face in order]


def _assign(people: Sequence[Person], found: Faces) -> list[int]:
    left_to_right = sorted(range(len(found)), key=lambda i: float(found.boxes[i, 0] + found.boxes[i, 2]))
    chosen: dict[int, int] = {}
    coverage = [
        (_coverage(person.region, found, face), number, face)
        for number, person in enumerate(people)
        if person.region is not None
        for face in left_to_right
    ]
    for _, number, face in sorted(coverage, key=lambda entry: -entry[0]):
        if number not in chosen and face not in chosen.values():
            chosen[number] = face
    rest = [face for face in left_to_right if face not in chosen.values()]
    return [chosen[number] if number in chosen else rest.pop(0) for number in range(len(people))]


def _coverage(region: Tensor, found: Faces, face: int) -> float:
    """Mean of the region over a face's box."""
    height, width = found.size
    plane = region if region.ndim == 2 else region[0]
    plane = F.interpolate(plane[None, None].float(), size=(height, width), mode="bilinear")[0, 0]
    x0, y0, x1, y1 = (round(v) for v in found.boxes[face].tolist())
    inside = plane[max(0, y0) : max(1, y1), max(0, x0) : max(1, x1)]
    return float(inside.mean()) if inside.numel() else 0.0


def apply_people(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    adapter: InstantIDAdapter,
    people: Sequence[Person],
    settings: InstantIDSettings,
    control_net: Any = None,
    poses: Sequence[Pose] = (),
) -> tuple[Any, Conditioning, Conditioning, str]:
    """A clone of `model` with every person in its attention, and both conditionings with an IdentityNet per person.

    poses: one per person, or none to leave IdentityNet out. With one person, the region also limits the positive
    prompt, as in the single-identity nodes. Returns model, positive, negative and a report.
    """
    blocks, line = blocks_for(model, adapter, settings.attention(1.0))
    if all(person.weight == 0 for person in people):
        line = "no block is patched: weight is 0"
    elif settings.start_at > settings.end_at:
        line += f"; {NEVER}"
    lines = [line]
    patched = model.clone()
    prepared = [prepare_identity(adapter, p.identity.embeddings, settings.combine, settings.noise) for p in people]
    for person, identity in zip(people, prepared, strict=True):
        add_to_attention(patched, adapter, identity, settings.attention(person.weight), blocks, person.region)
        pictures = counted(len(person.identity.embeddings), "picture")
        lines.append(f"{person.identity.name}: weight {person.weight:g}, {pictures}")

    if len(people) == 1 and people[0].region is not None:
        positive = mask_positive(positive, people[0].region)
    with_nets = control_net is not None and settings.cn_strength > 0 and len(poses) == len(people)
    if with_nets:
        if len(people) > 1 and settings.seen_by == ALL_NETS:
            # Every net of a chain would see the last person's tokens.
            settings = replace(settings, seen_by=ONLY_IDENTITY_NET)
            lines.append("with several identities, face tokens go to their IdentityNets only")
        positive, negative = _with_identity_nets(
            positive, negative, people, prepared, settings, control_net, poses, lines
        )
    else:
        lines.append("IdentityNet is left out: likeness comes from attention alone, and the pose is free")
        positive, negative = mark_roles(positive, negative)
    return patched, positive, negative, "\n".join(lines)


def _with_identity_nets(
    positive: Conditioning,
    negative: Conditioning,
    people: Sequence[Person],
    prepared: Sequence[PreparedIdentity],
    settings: InstantIDSettings,
    control_net: Any,
    poses: Sequence[Pose],
    lines: list[str],
) -> tuple[Conditioning, Conditioning]:
    several = len(people) > 1
    for person, identity, pose in zip(people, prepared, poses, strict=True):
        # One sequence: of a batch of them, ComfyUI would give each picture of the latent batch another photo's.
        # Copies: what other packs do to a CONDITIONING must not reach the cache.
        cond, uncond = (tokens.clone().float().flatten(0, 1)[None] for tokens in (identity.cond, identity.uncond))
        net = IdentityNet(
            control_net,
            pose.drawing,
            settings.cn_strength,
            (settings.start_at, settings.end_at),
            (cond, uncond),
            settings.seen_by,
            person.region if several else None,
            free_name(positive, negative),
        )
        positive, negative = apply_identity_net(positive, negative, net)
        lines.append(f"IdentityNet {settings.cn_strength:g}: {pose.note}")
    return positive, negative


def merge_people(first: Identity, others: Sequence[Identity]) -> Identity:
    """One identity from several pictures' identities; `first` gives the name and the pose."""
    for other in others:
        first = first.merged(other)
    return first
