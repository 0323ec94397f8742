"""A block's identity attention bound to one model call: only tensors, shapes and constants are left.

What depends on the call (whose rows are in it, the latent's size, the sigma) is settled before the model runs, once per
kind of call, so that nothing is computed, resized or read back inside it, and torch.compile can trace these objects:
every value that may change from step to step or from picture to picture is a tensor, thus an input of its graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.token_attention import attend_text_and_tokens, attend_tokens
from .attention_override import OVERRIDE


class TokenStep:
    """Identities with equally many tokens, added in one launch.

    keys, values: [R, T, C]; rows: [P, B] int32; weights: [P, B] float32; see `attend_tokens`.
    mask_for: makes the mask [P, B, N] float32 for N queries, or None; it is made now for `length`, what the block
    should have. deltas: the identities, for whoever binds this anew.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        weights: Tensor,
        mask_for: Callable[[int], Tensor] | None,
        length: int,
    ) -> None:
        self.keys = keys
        self.values = values
        self.rows = rows
        self.weights = weights
        self.mask_for = mask_for
        self.mask = mask_for(length) if mask_for is not None else None
        self.stats: Tensor | None = None
        self.counts_out = True
        self.deltas: tuple[Any, ...] = ()

    def variant(self, weights: Tensor, stats: Tensor | None, counts_out: bool) -> TokenStep:
        """The same with other weights and a place to count in.

        counts_out: whether `out`, as it comes in, is the block's own attention: not after another step.
        """
        made = object.__new__(TokenStep)
        made.__dict__.update(self.__dict__)
        made.weights, made.stats, made.counts_out = weights, stats, counts_out
        return made

    def with_text(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor | None:
        """The text's attention with these identities in one launch, as the first step; None where that is not served."""
        mask = self.mask
        if self.keys.dtype != q.dtype or (mask is not None and mask.shape[-1] != q.shape[1]):
            return None
        return attend_text_and_tokens(
            q, k, v, self.keys, self.values, self.rows, self.weights, extra_options["n_heads"], mask, self.stats
        )

    def add_to(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """`out` [B, N, C] with these identities."""
        from comfy.ldm.modules.attention import optimized_attention

        keys, values, rows, weights, mask = self.keys, self.values, self.rows, self.weights, self.mask
        if keys.dtype != q.dtype:
            keys, values = keys.to(q.dtype), values.to(q.dtype)
        if mask is not None and mask.shape[-1] != q.shape[1]:
            mask = _other_mask(self, q.shape[1])
        if rows.shape[1] != q.shape[0]:
            rows, weights, mask = _other_batch(rows, weights, mask, q.shape[0], extra_options["cond_or_uncond"])
        stats = self.stats
        if stats is not None and not self.counts_out:
            stats = torch.zeros_like(stats)
        made = attend_tokens(
            q, out, keys, values, rows, weights, extra_options["n_heads"], mask, stats, optimized_attention
        )
        if self.stats is not None and stats is not None and not self.counts_out:
            self.stats[0] += stats[0]
        return made


class ForeignStep:
    """Another pack's callback; what it returns is added."""

    def __init__(self, callback: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.callback = callback
        self.kwargs = kwargs

    def add_to(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return out + _call_foreign(self.callback, self.kwargs, out, q, k, v, extra_options)


class BoundAttention:
    """Text attention, then the steps in the order their nodes came. `base` replaces text attention."""

    def __init__(self, base: Callable[..., Tensor] | None, steps: tuple[TokenStep | ForeignStep, ...]) -> None:
        self.base = base
        self.steps = steps

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        steps = self.steps
        # Text attention that a node chose for the model stays what it is.
        if self.base is None and steps and isinstance(steps[0], TokenStep) and OVERRIDE not in extra_options:
            both = steps[0].with_text(q, k, v, extra_options)
            if both is not None:
                for step in steps[1:]:
                    both = step.add_to(both, q, k, v, extra_options)
                return both
        if self.base is not None:
            out = self.base(q, k, v, extra_options)
        else:
            from comfy.ldm.modules.attention import optimized_attention

            out = optimized_attention(
                q,
                k,
                v,
                extra_options["n_heads"],
                attn_precision=extra_options.get("attn_precision"),
                transformer_options=extra_options,
            )
        for step in steps:
            out = step.add_to(out, q, k, v, extra_options)
        return out.to(q.dtype)


def _call_foreign(callback: Callable[..., Any], kwargs: dict[str, Any], *arguments: Any) -> Any:
    return callback(*arguments, **kwargs)


def _other_mask(step: TokenStep, length: int) -> Tensor:
    assert step.mask_for is not None
    return step.mask_for(length)


def _other_batch(
    rows: Tensor, weights: Tensor, mask: Tensor | None, batch: int, cond_or_uncond: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`rows`, `weights` and `mask` for queries of another `batch`: attention couples compute each positive once for every
    region, one copy of its samples behind the other, and each negative once.

    Raises ValueError for a batch that no such copying gives.
    """
    chunk = rows.shape[1] // len(cond_or_uncond)
    negatives = sum(i == 1 for i in cond_or_uncond)
    copies = (batch // max(chunk, 1) - negatives) // max(len(cond_or_uncond) - negatives, 1)
    samples = [
        sample
        for place, i in enumerate(cond_or_uncond)
        for _ in range(1 if i == 1 else copies)
        for sample in range(place * chunk, (place + 1) * chunk)
    ]
    if len(samples) != batch:
        raise ValueError(
            f"Another pack made {batch} samples of the {rows.shape[1]} that the attention of an identity is for; take one of "
            "the two off the model."
        )
    index = _on_device(tuple(samples), rows.device)
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, index]
    return rows[:, index], weights[:, index], mask


@functools.lru_cache(maxsize=16)
def _on_device(samples: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once: a copy in each of the 70 blocks would wait for the device as often."""
    return torch.tensor(samples, device=device)


def keep_out_of_compiled_graphs() -> None:
    """Other packs' callbacks may read what a graph would bake in. Call it once, before anything is traced."""
    global _call_foreign, _other_mask, _other_batch
    _call_foreign, _other_mask = torch.compiler.disable(_call_foreign), torch.compiler.disable(_other_mask)
    _other_batch = torch.compiler.disable(_other_batch)
