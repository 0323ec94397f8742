"""InstantID on a MODEL and its conditionings: faces to tokens, tokens to attention and to the IdentityNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..face import FaceAnalyser, FaceChoice, Faces, draw_keypoints
from ..host.letters import counted
from ..identity import Identity, InstantIDAdapter, PreparedIdentity, prepare
from ..identity.blocks import ADAPTIVE, Block
from ..identity.contribution_profile import UNKNOWN, ContributionProfile, adapter_key
from .identity_attention import PatchSettings, add_identity
from .sdxl_layout import AdaptiveChoice, choose_blocks, patchable_blocks
from .telemetry import model_key, note_identity

NO_FACE = (
    "No face was found in the reference picture: use one where the face is seen from the front, is larger than about 40 "
    "pixels and is not cut off."
)
NEVER = "start_at lies after end_at, so the identity never acts"


class NoFace(ValueError):
    """There is no face where one is needed."""


@dataclass(frozen=True)
class FaceReading:
    """What the faces of a batch of pictures give: embeddings [N, 1, D] and, per picture, the chosen face."""

    embeddings: Tensor
    faces: tuple[Faces, ...]

    @property
    def missing(self) -> int:
        """Pictures without a face."""
        return sum(1 for face in self.faces if not len(face))


def read_faces(analyser: FaceAnalyser, images: Tensor, choice: FaceChoice | None = None) -> FaceReading:
    """Embed one face of each picture [B, H, W, C]; pictures without one are left out. Raises NoFace when all lack one."""
    if images.ndim == 4 and images.shape[0] == 0:
        raise NoFace("The picture input is an empty batch: connect at least one picture of a face.")
    faces = tuple(analyser.analyse(images, choose=choice or FaceChoice.largest(), embed=True))
    found = [face.embeddings for face in faces if len(face) and face.embeddings is not None]
    if not found:
        raise NoFace(NO_FACE)
    return FaceReading(torch.stack([e[:1] for e in found]), faces)


def draw_poses(faces: Sequence[Faces]) -> Tensor | None:
    """One key point drawing per face found, [N, H, W, 3]; None when none was found.

    Pictures without a face are left out, so that the drawings close up: what the field's Apply nodes do.
    """
    found = [face for face in faces if len(face)]
    return draw_aligned(found) if found else None


def draw_aligned(faces: Sequence[Faces]) -> Tensor:
    """One key point drawing per picture of a batch, [B, H, W, 3]; black where there is no face."""
    drawn = [
        draw_pose(face.size, face.keypoints[0]) if len(face) else torch.zeros(1, 3, *face.size).movedim(1, -1)
        for face in faces
    ]
    return torch.cat([d.movedim(-1, 1) for d in drawn]).movedim(1, -1)


def draw_pose(size: tuple[int, int], keypoints: Tensor) -> Tensor:
    """The drawing [1, H, W, 3] of key points [5, 2] in a picture of `size` (height, width)."""
    drawn = draw_keypoints(*size, keypoints)
    # Channels first in memory: convolutions round differently for the other order, and goldens are bit for bit.
    return drawn.movedim(-1, 0).contiguous()[None].movedim(1, -1)


def find_poses(analyser: FaceAnalyser, images: Tensor) -> tuple[Faces, ...]:
    """The largest face of each picture, without its embedding."""
    return tuple(analyser.analyse(images, choose=FaceChoice.largest(), embed=False))


@dataclass(frozen=True)
class AttentionSettings:
    """How an identity acts in the UNet. start_at, end_at: parts of the schedule in 0..1."""

    weight: float
    start_at: float = 0.0
    end_at: float = 1.0
    patch_mode: str = "full"
    custom_blocks: str = ""
    middle_block: bool = True
    adaptive: AdaptiveChoice = field(default_factory=AdaptiveChoice)


def prepare_identity(
    adapter: InstantIDAdapter, embeddings: Tensor, combine: str = "average", noise: float = 0.0
) -> PreparedIdentity:
    """Tokens and keys and values, in the dtype the adapter was loaded in; see `identity.prepare`."""
    dtype = next(adapter.parameters()).dtype
    return prepare(adapter, adapter.managed, embeddings, combine, noise, dtype)


def blocks_for(model: Any, adapter: InstantIDAdapter, settings: AttentionSettings) -> tuple[tuple[Block, ...], str]:
    """The blocks to patch and a line about them. Raises UnsupportedModel when the adapter does not fit."""
    available = patchable_blocks(model, adapter)
    blocks, line = choose_blocks(available, settings.patch_mode, settings.custom_blocks, settings.adaptive)
    if settings.patch_mode == ADAPTIVE and settings.adaptive.profile is not None:
        line += _what_differs(model, adapter, settings.adaptive.profile)
    elif settings.adaptive.profile is not None:
        line += "; the profile is used by patch_mode adaptive only"
    if not settings.middle_block:
        blocks = tuple(block for block in blocks if block[0] != "middle")
        line = (
            f"{len(blocks)} of {len(available)} blocks patched (the middle block is left out; switch middle_block on)"
        )
    return blocks, line


def _what_differs(model: Any, adapter: InstantIDAdapter, profile: ContributionProfile) -> str:
    """A remark for the report when a profile was measured on something else."""
    pairs = (
        (profile.adapter, adapter_key(adapter), "another adapter"),
        (profile.model, model_key(model), "another model"),
    )
    other = [what for theirs, ours, what in pairs if UNKNOWN not in (theirs, ours) and theirs != ours]
    return f"; the profile was measured with {' and '.join(other)}, so measure again to be sure" if other else ""


def add_to_attention(
    patched: Any,
    adapter: InstantIDAdapter,
    prepared: PreparedIdentity,
    settings: AttentionSettings,
    blocks: Sequence[Block],
    mask: Tensor | None = None,
) -> None:
    """Add one identity to `blocks` of `patched`, a ModelPatcher that is already our clone; a weight of 0 adds nothing."""
    if settings.weight == 0:
        return
    sampling = patched.get_model_object("model_sampling")
    start, end = (sampling.percent_to_sigma(at) for at in (settings.start_at, settings.end_at))
    add_identity(patched, prepared, PatchSettings(settings.weight, start, end), mask, blocks)
    note_identity(
        patched,
        adapter,
        weight=settings.weight,
        start_at=settings.start_at,
        end_at=settings.end_at,
        patch_mode=settings.patch_mode,
        region=mask is not None,
    )


def attach_identity(
    model: Any,
    adapter: InstantIDAdapter,
    prepared: PreparedIdentity,
    settings: AttentionSettings,
    mask: Tensor | None = None,
) -> tuple[Any, str]:
    """A clone of `model` with the identity in its attention, and a line for the report."""
    blocks, line = blocks_for(model, adapter, settings)
    patched = model.clone()
    add_to_attention(patched, adapter, prepared, settings, blocks, mask)
    if settings.weight == 0:
        return patched, "weight is 0: the model is unchanged"
    return patched, f"{line}; {NEVER}" if settings.start_at > settings.end_at else line


def describe_faces(reading: FaceReading) -> str:
    """Such as "1 face, 212x280 px"; with the number of pictures that had none."""
    found = [face for face in reading.faces if len(face)]
    x0, y0, x1, y1 = (float(v) for v in found[0].boxes[0])
    line = f"{counted(len(found), 'face')}, the first {x1 - x0:.0f}x{y1 - y0:.0f} px"
    if reading.missing:
        line += f"; {reading.missing} of {len(reading.faces)} pictures had no face and were left out"
    return line


def identity_from(reading: FaceReading, name: str, recogniser: str) -> Identity:
    """An identity that travels: all embeddings, and the pose of the first face."""
    first = next(face for face in reading.faces if len(face))
    return Identity(reading.embeddings, name or "identity", recogniser, first.keypoints[0].clone(), first.size)


def identity_of_faces(faces: Sequence[Faces], name: str) -> Identity:
    """An identity of faces that were found before, the first of each picture. Raises NoFace when there is none."""
    found = [face for face in faces if len(face)]
    if not found:
        raise NoFace("The faces input holds no face: look at what the face node found.")
    if any(face.embeddings is None for face in found):
        raise NoFace("The faces carry no embeddings: find them with embeddings switched on.")
    embeddings = torch.stack([face.embeddings[:1] for face in found if face.embeddings is not None])
    return Identity(embeddings, name or "identity", "unknown", found[0].keypoints[0].clone(), found[0].size)
