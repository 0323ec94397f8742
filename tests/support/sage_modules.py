"""Modules that behave as the published attention libraries do, traps included, on any device.

`sage1` as sageattention 1.0.6, `sage2` as 2.2.0, `sage3` as sageattn3: the same signatures, the same refusals, the same
things done to the caller's tensors. Products of q and k are rounded to int8 per block of 64 keys, as theirs are.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


def _int8(x: Tensor) -> Tensor:
    """[B, H, N, D] rounded to int8 with a scale per 64 rows, as float32."""
    rows = x.shape[2]
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -rows % 64)).unflatten(2, (-1, 64))
    scale = padded.abs().amax(dim=(-1, -2), keepdim=True).clamp_min(1e-7) / 127
    return ((padded / scale).round() * scale).flatten(2, 3)[:, :, :rows]


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    logits = _int8(q) @ _int8(k).transpose(-1, -2) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    # Sums of float16 values in float16, as their accumulators are.
    summed = (weights.half().float() @ v.float()).half().float()
    return (summed / weights.sum(-1, keepdim=True)).to(dtype)


def _laid_out(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if layout == "HND" else tuple(t.transpose(1, 2) for t in tensors)


def sage1() -> types.ModuleType:
    module = types.ModuleType("sageattention")

    def sageattn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        smooth_k: bool = True,
        **kwargs: Any,  # attn_mask ends here
    ) -> Tensor:
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        assert q.size(-1) in (64, 96, 128), "headdim should be in [64, 96, 128]."
        assert q.stride(-1) == 1 and k.stride(-1) == 1 and v.stride(-1) == 1
        if smooth_k:
            k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
        (out,) = _laid_out(
            tensor_layout,
            _attention(
                *_laid_out(tensor_layout, q, k, v.to(torch.float16)), sm_scale or q.size(-1) ** -0.5, None, q.dtype
            ),
        )
        return out

    module.sageattn = sageattn
    module.sageattn_varlen = lambda *a, **k: None
    return module


def sage2(masks: bool = True) -> types.ModuleType:
    module = types.ModuleType("sageattention")

    def check(q: Tensor) -> None:
        assert q.dtype in (torch.float16, torch.bfloat16), "Input tensors must be in dtype of torch.float16 or bfloat16"
        if q.size(-1) > 128:
            raise ValueError(f"Unsupported head_dim: {q.size(-1)}")

    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
        sm_scale: float | None = None, return_lse: bool = False, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        check(q)
        return _attention(q, k - k.mean(2, keepdim=True), v, sm_scale or q.size(-1) ** -0.5, None, q.dtype)

    def with_mask(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
        attn_mask: Tensor | None = None, sm_scale: float | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        check(q)
        assert attn_mask is None or attn_mask.dtype in (torch.bool, q.dtype)
        v = v.to(torch.float16)
        return _attention(q, k - k.mean(2, keepdim=True), v, sm_scale or q.size(-1) ** -0.5, attn_mask, q.dtype)

    def without_mask(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
        sm_scale: float | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        return with_mask(q, k, v, sm_scale=sm_scale)

    module.sageattn = sageattn
    module.sageattn_qk_int8_pv_fp16_cuda = sageattn
    module.sageattn_qk_int8_pv_fp16_triton = with_mask if masks else without_mask
    return module


def sage3() -> types.ModuleType:
    module = types.ModuleType("sageattn3")

    def sageattn3_blackwell(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
        per_block_mean: bool = True, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        k -= k.mean(dim=-2, keepdim=True)
        return _attention(q, k, v, q.size(-1) ** -0.5, None, q.dtype)

    module.sageattn3_blackwell = sageattn3_blackwell
    return module
