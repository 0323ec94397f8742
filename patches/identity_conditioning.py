"""The IdentityNet ControlNet and the face tokens on a ComfyUI CONDITIONING.

In a CONDITIONING entry, `cross_attn_controlnet` replaces the prompt for *every* ControlNet of the chain, so a depth or
pose net would get sixteen face tokens instead of the text it was trained on. `ONLY_IDENTITY_NET` gives the tokens to the
IdentityNet alone, as the original pipeline does; `ALL_NETS` is what the field's nodes do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .mask import fit_batch
from .model_call import COND, OURS, UNCOND, mark

ONLY_IDENTITY_NET = "IdentityNet only"
ALL_NETS = "every ControlNet"

TOKENS = f"{OURS}face_tokens"

Conditioning = list[list[Any]]


@dataclass(frozen=True)
class IdentityNet:
    """One IdentityNet on both conditionings.

    hint: [B, H, W, 1, 3 or 4] key point drawings; alpha is dropped. tokens: (cond, uncond) [N, T, C]. percent_range: start
    and end of the schedule in 0..1. region: [M, H, W] in 0..1, where its output
    counts (needs seen_by ONLY_IDENTITY_NET), or None.
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

    mask: [M, H, W] or [H, W], limits the positive only. What came in is not changed.
    """
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


def face_token_link(net: Any, name: str, region: Tensor | None) -> Any:
    """A link in a chain of ControlNets: `net` alone gets the tokens called `name` and is limited to `region`.

    The nets before it in the chain are given the prompt, as without it.
    """
    from comfy.controlnet import ControlBase

    class FaceTokenLink(ControlBase):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.regions: dict[tuple[Any, ...], Tensor] = {}

        def get_control(
            self, x_noisy: Tensor, t: Tensor, cond: Mapping[str, Any], batched_number: int, transformer_options: Any
        ) -> Any:
            before = None
            if self.previous_controlnet is not None:
                before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
            given = {**cond, "crossattn_controlnet": cond[name]} if name in cond else cond
            control = net.get_control(x_noisy, t, given, batched_number, transformer_options)
            if control is None:
                return before
            if region is not None:
                control = {
                    kind: [x if x is None else x * self.region_like(x, batched_number) for x in outputs]
                    for kind, outputs in control.items()
                }
            return self.control_merge(control, before, output_dtype=None)

        def region_like(self, x: Tensor, batched_number: int) -> Tensor:
            assert region is not None
            key = (x.shape[0], x.shape[-2:], x.device, x.dtype)
            if key not in self.regions:
                whole = region[None] if region.ndim == 2 else region
                small = F.interpolate(whole[:, None].float(), size=x.shape[-2:], mode="bilinear")
                rows = fit_batch(small, x.shape[0] // batched_number).repeat(batched_number, 1, 1, 1)
                self.regions[key] = rows.to(x.device, x.dtype)
            return self.regions[key]

        def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
            super().pre_run(model, percent_to_timestep_function)
            net.pre_run(model, percent_to_timestep_function)

        def cleanup(self) -> None:
            super().cleanup()
            self.regions.clear()
            net.cleanup()

        def get_models(self) -> list[Any]:
            return [*super().get_models(), *net.get_models()]

        def get_extra_hooks(self) -> list[Any]:
            return [*super().get_extra_hooks(), *net.get_extra_hooks()]

        def inference_memory_requirements(self, dtype: Any) -> int:
            return max(super().inference_memory_requirements(dtype), net.inference_memory_requirements(dtype))

        def copy(self) -> Any:
            made = face_token_link(net.copy(), name, region)
            self.copy_to(made)
            return made

        def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> Any:
            made = face_token_link(net.deepclone_multigpu(load_device), name, region)
            self.copy_to(made)
            if autoregister:
                self.multigpu_clones[load_device] = made
            return made

    return FaceTokenLink()
