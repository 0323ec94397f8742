"""Identities in the cross-attention of a ComfyUI MODEL.

`IdentityAttention` replaces a block's attention with `text attention + sum of identities`. It speaks the protocol of
IPAdapter and its relatives in both directions: they may `.add` their callbacks to ours, and ours is added to a *copy* of
theirs. Nothing that came in is mutated, so a node that re-runs never piles up patches on a cached model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.token_attention import attend_tokens
from ..identity.blocks import INDEX, Block
from ..identity.prepared import PreparedIdentity
from .mask import AttentionMask
from .model_call import ModelCall, current_call, note_model_calls

CLEANUP_KEY = "hotpath_identity"
ALWAYS = (999999999.9, 0.0)  # what percent_to_sigma gives for 0 and 1


@dataclass(frozen=True)
class PatchSettings:
    """How strongly, and between which sigmas, one identity acts. sigma_start is the larger one."""

    weight: float
    sigma_start: float = ALWAYS[0]
    sigma_end: float = ALWAYS[1]


class IdentityDelta:
    """One identity in one block. Callable as other packs' attention objects call their callbacks."""

    def __init__(
        self, prepared: PreparedIdentity, index: int, settings: PatchSettings, mask: AttentionMask | None
    ) -> None:
        self.prepared = prepared
        self.index = index
        self.settings = settings
        self.mask = mask

    def add_to(self, out: Tensor, q: Tensor, heads: int, call: ModelCall) -> Tensor:
        """`out` [B, N, C] with this identity added, in out's dtype."""
        from comfy.ldm.modules.attention import optimized_attention

        keys, values = self.prepared.keys_values(self.index, q.device, q.dtype)
        rows = call.rows(q.shape[0], q.device)
        mask = self.mask.at(call, q.shape[0], q.shape[1], q.device) if self.mask is not None else None
        return attend_tokens(q, keys[rows], values[rows], out, heads, self.settings.weight, mask, optimized_attention)

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **_: Any) -> Tensor:
        """The same as a delta, for an attention object of another pack, which adds it and minds the sigmas itself."""
        return self.add_to(torch.zeros_like(q), q, extra_options["n_heads"], current_call(extra_options))


@functools.cache
def _keep_out_of_compiled_graphs() -> None:
    """Without this, torch.compile bakes weights and identities into its graph (see model_call).

    Done with the first patch and not by a decorator, because it imports torch's compiler, which takes seconds.
    """
    IdentityAttention.__call__ = torch.compiler.disable(IdentityAttention.__call__)  # type: ignore[method-assign]


class IdentityAttention:
    """A block's attention with identities, and other packs' callbacks, added to it in the order they came.

    base: replaces text attention when another pack had done so without being open to additions.
    """

    def __init__(self, base: Callable[..., Tensor] | None = None) -> None:
        _keep_out_of_compiled_graphs()
        self.base = base
        self.callback: list[Callable[..., Any]] = []
        self.kwargs: list[dict[str, Any]] = []

    def add(self, callback: Callable[..., Any], **kwargs: Any) -> None:
        """Append `callback(out, q, k, v, extra_options, **kwargs) -> delta`, active in sigma_end <= sigma <= sigma_start."""
        self.callback.append(callback)
        self.kwargs.append(kwargs)

    def copy(self) -> IdentityAttention:
        made = IdentityAttention(self.base)
        made.callback, made.kwargs = list(self.callback), [dict(k) for k in self.kwargs]
        return made

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        dtype = q.dtype
        heads = extra_options["n_heads"]
        if self.base is not None:
            out = self.base(q, k, v, extra_options)
        else:
            from comfy.ldm.modules.attention import optimized_attention

            out = optimized_attention(
                q, k, v, heads, attn_precision=extra_options.get("attn_precision"), transformer_options=extra_options
            )
        call = current_call(extra_options)
        for callback, kwargs in zip(self.callback, self.kwargs, strict=True):
            start, end = kwargs.get("sigma_start", ALWAYS[0]), kwargs.get("sigma_end", ALWAYS[1])
            always = start >= ALWAYS[0] and end <= ALWAYS[1]
            if not always and not end <= call.sigma <= start:
                continue
            if isinstance(callback, IdentityDelta):
                out = callback.add_to(out, q, heads, call)
            else:
                out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out.to(dtype)


def _is_open(patch: Any) -> bool:
    """Whether `patch` takes additions as IPAdapter's does."""
    return callable(getattr(patch, "add", None)) and isinstance(getattr(patch, "callback", None), list)


def _copy_open(patch: Any) -> Any:
    """A copy of an open attention patch, of its own class, whose lists can grow without the original's growing."""
    if isinstance(patch, IdentityAttention):
        return patch.copy()
    made = copy.copy(patch)
    made.callback = list(patch.callback)
    if isinstance(getattr(patch, "kwargs", None), list):
        made.kwargs = [dict(k) for k in patch.kwargs]
    for name, value in vars(made).items():
        # IPAdapter keeps a copy of all kwargs per device. It would be too short once a callback is added.
        if isinstance(value, dict):
            stale = any(isinstance(v, list) and len(v) == len(made.callback) for v in value.values())
            setattr(made, name, {} if stale else dict(value))
    return made


def _copy_patches_on_clone(_: Any, clone: Any) -> None:
    """Packs that add to a patch in place do so on their clone; give it patches of its own."""
    replaced = clone.model_options.get("transformer_options", {}).get("patches_replace", {})
    attn2 = replaced.get("attn2", {})
    for block, patch in attn2.items():
        if _is_open(patch):
            attn2[block] = _copy_open(patch)


def _identities_on(model: Any) -> Iterable[IdentityDelta]:
    replaced = model.model_options.get("transformer_options", {}).get("patches_replace", {})
    for patch in replaced.get("attn2", {}).values():
        for callback in getattr(patch, "callback", None) or ():
            if isinstance(callback, IdentityDelta):
                yield callback


def _drop_device_copies(model: Any) -> None:
    for delta in _identities_on(model):
        delta.prepared.drop_copies()
        if delta.mask is not None:
            delta.mask.drop_copies()


def add_identity(
    model: Any,
    prepared: PreparedIdentity,
    settings: PatchSettings,
    mask: Tensor | None,
    blocks: Iterable[Block],
) -> None:
    """Add one identity to `blocks` of `model`, a ModelPatcher that is already our clone.

    Keys and values go by each block's absolute place in the adapter, whichever blocks are left out. Settings with
    weight 0 add nothing.
    """
    if settings.weight == 0:
        return
    attention_mask = AttentionMask(mask) if mask is not None else None
    present = model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})
    for block in blocks:
        held = present.get(block)
        if held is not None and _is_open(held):
            patch = _copy_open(held)
        else:
            # A patch for the whole block (without transformer index) would be shadowed by ours, so it becomes the base.
            patch = IdentityAttention(base=held if held is not None else present.get(block[:2]))
        delta = IdentityDelta(prepared, INDEX[block], settings, attention_mask)
        patch.add(
            delta, weight=settings.weight, sigma_start=settings.sigma_start, sigma_end=settings.sigma_end, mask=mask
        )
        model.set_model_attn2_replace(patch, *block)
    _install_callbacks(model)
    note_model_calls(model)


def _install_callbacks(model: Any) -> None:
    from comfy.patcher_extension import CallbacksMP

    for call_type, callback in (
        (CallbacksMP.ON_CLONE, _copy_patches_on_clone),
        (CallbacksMP.ON_CLEANUP, _drop_device_copies),
    ):
        if not model.get_callbacks(call_type, CLEANUP_KEY):
            model.add_callback_with_key(call_type, CLEANUP_KEY, callback)
