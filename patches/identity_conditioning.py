"""The IdentityNet ControlNet and the face tokens on a ComfyUI CONDITIONING.

In a CONDITIONING entry, `cross_attn_controlnet` replaces the prompt for *every* ControlNet of the chain, so a depth or
pose net would get sixteen face tokens instead of the text it was trained on. `ONLY_IDENTITY_NET` gives the tokens to the
IdentityNet alone, as the original pipeline does; `ALL_NETS` is what the field's nodes do.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..identity.prepared import COND, UNCOND
from .conditioning_roles import OURS, mark
from .face_token_link import face_token_link
from .sdxl_layout import check_identity_net

ONLY_IDENTITY_NET = "IdentityNet only"
ALL_NETS = "every ControlNet"

TOKENS = f"{OURS}face_tokens"

Conditioning = list[list[Any]]


@dataclass(frozen=True)
class IdentityNet:
    """One IdentityNet on both conditionings.

    hint: key point drawings [B, H, W, C] of 1, 3 or 4 channels; alpha is dropped. tokens: (cond, uncond), [N, T, C].
    percent_range: start and end in the schedule, 0..1. seen_by: ALL_NETS or ONLY_IDENTITY_NET. region: [M, H, W] in 0..1, where
    its output counts (with ONLY_IDENTITY_NET), or None. name: of the tokens, see `free_name`.
    """

    control_net: Any
    hint: Tensor
    strength: float
    percent_range: tuple[float, float]
    tokens: tuple[Tensor, Tensor]
    seen_by: str = ALL_NETS
    region: Tensor | None = None
    name: str = TOKENS

    def chained_to(self, previous: Any) -> Any:
        """A copy of the ControlNet with this hint, after `previous` (None for the first of the chain)."""
        hint = self.hint[..., :3] if self.hint.shape[-1] >= 3 else self.hint[..., :1].expand(*self.hint.shape[:-1], 3)
        net = self.control_net.copy().set_cond_hint(hint.movedim(-1, 1), self.strength, self.percent_range)
        if self.seen_by == ALL_NETS:
            return net.set_previous_controlnet(previous)
        return face_token_link(net, self.name, self.region).set_previous_controlnet(previous)


def apply_identity_net(
    positive: Conditioning, negative: Conditioning, identity_net: IdentityNet, mask: Tensor | None = None
) -> tuple[Conditioning, Conditioning]:
    """Both conditionings with the IdentityNet chained on, the same copy of it for both so that CFG stays one batch.

    mask: [M, H, W] or [H, W], limits the positive only. What came in is not changed. Raises UnsupportedModel for a
    ControlNet of another kind of model.
    """
    check_identity_net(identity_net.control_net, identity_net.tokens[0].shape[-1])
    copies: dict[Any, Any] = {}
    results: list[Conditioning] = []
    for role, conditioning in ((COND, positive), (UNCOND, negative)):
        entries: Conditioning = []
        for cross_attention, options in conditioning:
            changed = dict(options)
            previous = changed.get("control")
            if previous not in copies:
                copies[previous] = identity_net.chained_to(previous)
            changed["control"] = copies[previous]
            changed["control_apply_to_uncond"] = False
            if identity_net.seen_by == ALL_NETS:
                changed["cross_attn_controlnet"] = identity_net.tokens[role]
            else:
                from comfy.conds import CONDCrossAttn

                tokens = CONDCrossAttn(identity_net.tokens[role])
                changed["model_conds"] = {**changed.get("model_conds", {}), identity_net.name: tokens}
            entries.append([cross_attention, changed])
        results.append(entries)
    positive, negative = results
    return mark_roles(mask_positive(positive, mask) if mask is not None else positive, negative)


def free_name(*conditionings: Conditioning) -> str:
    """A name for face tokens that none of `conditionings` has: a node before this one may have put its person's there."""
    taken = {name for entries in conditionings for _, options in entries for name in options.get("model_conds", {})}
    return next(name for number in itertools.count() if (name := f"{TOKENS}_{number}") not in taken)


def mark_roles(positive: Conditioning, negative: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both conditionings, marked so that identity attention knows them apart in any guider; nothing else changes."""
    marked = []
    for role, conditioning in ((COND, positive), (UNCOND, negative)):
        marked.append([[cross_attention, mark(options, role)] for cross_attention, options in conditioning])
    return marked[0], marked[1]


def mask_positive(positive: Conditioning, mask: Tensor) -> Conditioning:
    """The positive conditioning limited to `mask` [M, H, W]."""
    mask = mask[None] if mask.ndim < 3 else mask
    return [[c, {**options, "mask": mask, "set_area_to_bounds": False}] for c, options in positive]
