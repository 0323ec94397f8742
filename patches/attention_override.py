"""The attention of one ComfyUI MODEL, through ComfyUI's own override, with a record of what computed what.

The override is looked up in `transformer_options` at every call, so a clone carries it and the model it came from does
not. Another pack's override keeps running: ours becomes the attention that it calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import host
from ..attention.compiled import number_of, prepare
from ..attention.dispatch import POLICIES, AttentionPolicy, attend, dispatcher, keep_choices_in
from ..attention.events import AttentionEvent, AttentionLog

KEY = "hotpath_attention"
OVERRIDE = "optimized_attention_override"  # ComfyUI's name for attention that a node puts in the place of its own
MOST_SAMPLES = 1 << 15  # CUDA launches no larger grid; ComfyUI's own attention splits such batches


class AttentionOverride:
    """Called by ComfyUI in place of its attention: `override(func, q, k, v, heads, ...)`, func being what it replaces.

    below: an override of another pack that stays. It is called first, with ours as the attention it may use.
    """

    def __init__(
        self, policy: AttentionPolicy, below: Callable[..., Tensor] | None = None, node_id: str | None = None
    ) -> None:
        self.policy = policy
        self.below = below
        self.node_id = node_id
        self.log = AttentionLog(policy.backend + (", strict" if policy.strict else ""))
        number_of(self.log)

    def __deepcopy__(self, memo: object) -> AttentionOverride:
        return self

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.below is not None:
            return self.below(functools.partial(self.compute, func), *args, **kwargs)
        return self.compute(func, *args, **kwargs)

    def compute(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """ComfyUI's attention contract: q, k, v [B, N, heads * D] (k and v also [B, N, heads, D]), or [B, heads, N, D] with
        skip_reshape; returns [B, N, heads * D], or [B, heads, N, D] with skip_output_reshape. mask as in its
        attention_pytorch.
        """
        if not q.dtype.is_floating_point or q.dtype.itemsize == 1 or q.shape[0] > MOST_SAMPLES:
            self.log.note(
                AttentionEvent(self.policy.backend, "ComfyUI's", "its own dtype or batch size", "other calls")
            )
            return func(
                q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape, **kwargs,
            )  # fmt: skip
        if not skip_reshape:
            key_heads = k.shape[-1] * heads // q.shape[-1] if kwargs.get("enable_gqa", False) else heads
            q, k, v = (
                _by_heads(q, heads),
                _by_heads(_in_rows_of(q, k), key_heads),
                _by_heads(_in_rows_of(q, v), key_heads),
            )
        if mask is not None:
            while mask.ndim < 4:
                mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
        out = attend(
            q, k, v, mask, kwargs.get("scale"), policy=self.policy, record=self.log,
            exact=kwargs.get("low_precision_attention", True) is False,
        )  # fmt: skip
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def begin(self, _: Any) -> None:
        """Before a run of the model: counting starts at zero."""
        prepare()
        self.log.begin()

    def end(self, _: Any) -> None:
        """After it: the report appears under the node, if one is known."""
        if self.node_id is not None:
            host.current().show_text(self.log.report(), self.node_id)


def _in_rows_of(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values [b, N, ...] as [B, ...] for queries of batch B: ComfyUI counts their tokens through, whatever b is.

    HyperTile cuts its queries into tiles, which are rows of the batch, and leaves keys and values whole.
    """
    return x if x.shape[0] == q.shape[0] else x.reshape(q.shape[0], -1, *x.shape[2:])


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * D], or [B, N, heads, D] as Stable Diffusion 3 gives its values, as [B, heads, N, D]."""
    return (x if x.ndim == 4 else x.unflatten(-1, (heads, x.shape[-1] // heads))).transpose(1, 2)


def override_of(model: Any) -> AttentionOverride | None:
    """The override that `set_attention` put on `model`, also under another pack's that wraps it."""
    found = model.model_options.get("transformer_options", {}).get(OVERRIDE)
    return found if isinstance(found, AttentionOverride) else model.get_attachment(KEY)


def set_attention(model: Any, backend: str, strict: bool = False, node_id: str | None = None) -> tuple[Any, str]:
    """A clone of `model` (a ModelPatcher) whose attention is computed by `backend`, and what is to be said of it.

    backend: one of POLICIES. strict: sampling raises AttentionUnavailable where `backend` cannot compute a call, instead
    of taking an exact one. node_id: the node under which the report appears after sampling.
    """
    from comfy.patcher_extension import CallbacksMP

    policy = AttentionPolicy(backend, strict)
    keep_choices_in(host.current().cache_folder())
    patched = model.clone()
    held = patched.model_options.get("transformer_options", {}).get(OVERRIDE)
    below, said = _below(held)
    override = AttentionOverride(policy, below, node_id)
    override.log.preface = tuple(filter(None, (said,)))
    patched.model_options["transformer_options"] = {
        **patched.model_options.get("transformer_options", {}),
        OVERRIDE: override,
    }
    patched.set_attachments(KEY, override)
    for kind, callback in ((CallbacksMP.ON_PRE_RUN, override.begin), (CallbacksMP.ON_CLEANUP, override.end)):
        patched.remove_callbacks_with_key(kind, KEY)
        patched.add_callback_with_key(kind, KEY, callback)
    return patched, "\n".join((override.log.report(), *_availability(patched.load_device)))


def _below(held: Any) -> tuple[Callable[..., Tensor] | None, str]:
    """(what stays of the override that was there, what is to be said of it)."""
    if held is None:
        return None, ""
    if isinstance(held, AttentionOverride):
        return held.below, f"The choice of a node before this one ({held.policy.backend}) is replaced."
    name = getattr(held, "__qualname__", type(held).__qualname__)
    if name.startswith("ModelPatcher.set_model_optimized_attention"):
        return None, "ComfyUI's choice of a node before this one is replaced."
    pack = getattr(held, "__module__", "?")
    return held, f"Another pack's attention ({pack}) stays in front of this one, which gets what that hands on."


def _availability(device: Any) -> list[str]:
    """One line per backend: whether it can run on `device`, else why not."""
    lines = [f"On {device}:"]
    for name, reason in dispatcher().available(device).items():
        kind = "" if dispatcher().backends[name].exact else ", lossy"
        lines.append(f"  {name}{kind}: {'available' if reason is None else 'not here, ' + reason}")
    return lines


def attention_report(model: Any) -> str:
    """What computed the attention of `model` in its last run."""
    override = override_of(model)
    if override is None:
        return "No Hotpath Attention on this model."
    return override.log.report()


__all__ = ["POLICIES", "AttentionOverride", "attention_report", "override_of", "set_attention"]
