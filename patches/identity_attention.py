"""Identities in the cross-attention of a ComfyUI MODEL.

`IdentityAttention` replaces a block's attention with `text attention + sum of identities`. It speaks the protocol of
IPAdapter and its relatives in both directions: they may `.add` their callbacks to ours, and where theirs stands already
it becomes the text attention that ours adds to. Nothing that came in is mutated, so a node that re-runs never piles up
patches on a cached model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..identity.blocks import INDEX, Block
from ..identity.prepared import PreparedIdentity
from . import bound_attention
from .bound_attention import BoundAttention, ForeignStep, TokenStep
from .mask import AttentionMask, block_length
from .model_call import ALWAYS, ModelCall, current_call, note_model_calls

CLEANUP_KEY = "hotpath_identity"
MAX_BOUND = 32  # kinds of calls per run: cond and uncond apart or together, positions of a context window


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

    @property
    def tokens(self) -> int:
        return self.prepared.tokens(self.index)

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **_: Any) -> Tensor:
        """What this identity adds, [B, N, C], for an attention object of another pack, which minds the sigmas itself."""
        call = current_call(extra_options).of(q)
        step = _token_step([self], call, q.shape[1], call.weights((self.settings.weight,)))
        return step.add_to(torch.zeros_like(q), q, k, v, extra_options)


class IdentityAttention:
    """A block's attention with identities, and other packs' callbacks, added to it in the order they came.

    base: replaces text attention when another pack had done so.
    """

    def __init__(self, block: Block, base: Callable[..., Tensor] | None = None) -> None:
        _keep_out_of_compiled_graphs()
        self.block = block
        self.base = base
        self.callback: list[Callable[..., Any]] = []
        self.kwargs: list[dict[str, Any]] = []
        self._bound: dict[tuple[Any, ...], BoundAttention] = {}

    def add(self, callback: Callable[..., Any], **kwargs: Any) -> None:
        """Append `callback(out, q, k, v, extra_options, **kwargs) -> delta`, active in sigma_end <= sigma <= sigma_start."""
        self.callback.append(callback)
        self.kwargs.append(kwargs)
        self._bound.clear()

    def copy(self) -> IdentityAttention:
        made = IdentityAttention(self.block, self.base)
        made.callback, made.kwargs = list(self.callback), [dict(k) for k in self.kwargs]
        return made

    def __deepcopy__(self, _: dict[int, Any]) -> IdentityAttention:
        """Other packs copy the options of a MODEL deeply; what is bound to a device stays here."""
        return self.copy()

    def to(self, place: Any) -> IdentityAttention:
        """ComfyUI asks patches to move before it samples; IPAdapter's, which may be our base, keeps copies per device."""
        move = getattr(self.base, "to", None)
        if move is not None:
            moved = move(place)
            if moved is not self.base:
                self.base = moved
                self._bound.clear()
        return self

    def drop_bound(self) -> None:
        """Let go of what was put on devices for sampling."""
        self._bound.clear()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """For whatever goes past ComfyUI's wrappers; elsewhere the result of `bind` stands in this place."""
        call = current_call(extra_options).of(q)
        return self.bind(call, call.counts)(q, k, v, extra_options)

    def bind(self, call: ModelCall, counts: Tensor | None) -> BoundAttention:
        """What this block does in `call`; made once per kind of call.

        counts: [70, 2] for telemetry, see `attend_tokens`; a row per block.
        """
        active, limited = [], False
        for callback, kwargs in zip(self.callback, self.kwargs, strict=True):
            start, end = kwargs.get("sigma_start", ALWAYS[0]), kwargs.get("sigma_end", ALWAYS[1])
            if start >= ALWAYS[0] and end <= ALWAYS[1]:
                active.append(True)
            elif isinstance(callback, IdentityDelta) and not call.sigma_is_near:
                # Reading the sigma would wait for the device, so there the weight is taken to 0 instead.
                active.append(True)
                limited = True
            else:
                active.append(end <= call.sigma <= start)
        key = (call.kind, tuple(active))
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= MAX_BOUND:
                self._bound.clear()
            bound = self._bound[key] = BoundAttention(self.base, tuple(self._steps(call, active)))
        if limited or counts is not None:
            bound = BoundAttention(self.base, tuple(_for_this_call(bound.steps, call, counts)))
        return bound

    def _steps(self, call: ModelCall, active: Sequence[bool]) -> Iterable[TokenStep | ForeignStep]:
        """Identities that stand side by side with equally many tokens are one step."""
        length = block_length(self.block, call.height, call.width)

        def kind(entry: tuple[Any, Any]) -> Any:
            return entry[0].tokens if isinstance(entry[0], IdentityDelta) else id(entry)

        entries = [e for e, on in zip(zip(self.callback, self.kwargs, strict=True), active, strict=True) if on]
        for _, group in itertools.groupby(entries, kind):
            members = list(group)
            deltas = [callback for callback, _ in members if isinstance(callback, IdentityDelta)]
            if deltas:
                yield _token_step(deltas, call, length, call.weights(tuple(d.settings.weight for d in deltas)))
            else:
                yield ForeignStep(*members[0])


def _token_step(deltas: Sequence[IdentityDelta], call: ModelCall, length: int, weights: Tensor) -> TokenStep:
    device, dtype, index = call.device, call.dtype, deltas[0].index
    if len(deltas) == 1:
        keys, values = deltas[0].prepared.keys_values(index, device, dtype)
    else:
        pairs = [delta.prepared.keys_values(index, torch.device("cpu"), delta.prepared.dtype) for delta in deltas]
        keys, values = (torch.cat(part).to(device, dtype) for part in zip(*pairs, strict=True))
    masks = [delta.mask for delta in deltas]
    mask_for = None
    if any(mask is not None for mask in masks):

        @functools.lru_cache(maxsize=8)
        def mask_for(length: int) -> Tensor:
            return torch.stack(
                [
                    mask.at(call, length) if mask is not None else torch.ones(call.batch, length, device=device)
                    for mask in masks
                ]
            )

    step = TokenStep(keys, values, call.rows(len(deltas)), weights, mask_for, length)
    step.deltas = tuple(deltas)
    return step


def _for_this_call(
    steps: Sequence[TokenStep | ForeignStep], call: ModelCall, counts: Tensor | None
) -> Iterable[TokenStep | ForeignStep]:
    """The same steps with the weights at this call's sigma, counting into `counts`."""
    first = True
    for step in steps:
        if isinstance(step, TokenStep):
            stats = counts[step.deltas[0].index] if counts is not None else None
            yield step.variant(call.weights_now(tuple(d.settings for d in step.deltas)), stats, first)
            first = False
        else:
            yield step


@functools.cache
def _keep_out_of_compiled_graphs() -> None:
    """What reads Python values of the moment, and other packs' callbacks, which may.

    Done with the first patch and not by decorators, because it imports torch's compiler, which takes seconds.
    """
    for owner, name in ((IdentityAttention, "__call__"), (IdentityDelta, "__call__")):
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
    bound_attention.keep_out_of_compiled_graphs()


def _copy_patches_on_clone(_: Any, clone: Any) -> None:
    """Packs that add to a patch in place do so on their clone; give it patches of its own."""
    replaced = clone.model_options.get("transformer_options", {}).get("patches_replace", {})
    attn2 = replaced.get("attn2", {})
    for block, patch in attn2.items():
        if isinstance(patch, IdentityAttention):
            attn2[block] = patch.copy()


def _drop_device_copies(model: Any) -> None:
    replaced = model.model_options.get("transformer_options", {}).get("patches_replace", {})
    for patch in replaced.get("attn2", {}).values():
        if isinstance(patch, IdentityAttention):
            patch.drop_bound()
        for callback in getattr(patch, "callback", None) or ():
            if isinstance(callback, IdentityDelta):
                callback.prepared.drop_copies()
                if callback.mask is not None:
                    callback.mask.drop_copies()


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
        if isinstance(held, IdentityAttention):
            patch = held.copy()
        else:
            # Whatever stood there becomes the attention that ours adds to. A patch for the whole block (without
            # transformer index) would be shadowed by ours, so it takes part as well.
            patch = IdentityAttention(block, base=held if held is not None else present.get(block[:2]))
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
