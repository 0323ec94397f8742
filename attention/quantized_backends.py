"""Lossy attention: SageAttention 1, 2 and 3 and comfy-kitchen's int8 kernel. Products are rounded to 8 or 4 bits.

Each adapter keeps what its library does behind the caller's back away from the caller (SageAttention 1.0.6, 2.2.0 and
sageattn3 as published): keys that are changed in place, masks that are accepted and ignored, values cast to float16,
kernels launched on the current device and not the tensors', or that device made the current one for good.
"""

from __future__ import annotations

import functools
import importlib
import inspect

import torch
from torch import Tensor

from .capabilities import (
    BOOL_MASK,
    FLOAT_MASK,
    FLOATS,
    NO_MASK,
    OTHER_FLOAT_MASK,
    AttentionCall,
    Backend,
    DeviceFacts,
    Run,
    on_device,
)
from .reference import share_heads
from .torch_backends import contiguous_rows, import_fault

# A float16 accumulator adds up to 64 or 128 values with weights up to 1 before it is emptied.
LARGEST_VALUE = 256.0


def _sage_generation() -> int | None:
    """1 or 2 by what the module offers (1.0.6 names no version); None when it cannot be imported."""
    if import_fault("sageattention", "") is not None:
        return None
    module = importlib.import_module("sageattention")
    return 2 if hasattr(module, "sageattn_qk_int8_pv_fp16_cuda") else 1


def _sage1_library() -> str | None:
    cure = "pip install sageattention"
    return import_fault("sageattention", cure) or (
        None if _sage_generation() == 1 else "the installed sageattention is generation 2: choose sage2"
    )


def _sage2_library() -> str | None:
    cure = "it is not on PyPI: build it from the SageAttention repository"
    return import_fault("sageattention", cure) or (
        None if _sage_generation() == 2 else f"the installed sageattention is generation 1 ({cure})"
    )


def within_float16(v: Tensor) -> tuple[Tensor, Tensor | None]:
    """(values that neither float16 nor a float16 accumulator overflows on, factor to give back or None).

    The factor is a power of two, so that dividing and multiplying by it round nothing; it is found on the device.
    """
    if v.dtype == torch.float16:
        return v, None
    excess = v.abs().amax().float() / LARGEST_VALUE
    factor = torch.exp2(torch.ceil(torch.log2(excess.clamp_min(1.0)))).to(v.dtype)
    return v / factor, factor


def where_the_tensors_are(run: Run) -> Run:
    """`run` with the tensors' device as the current one, and afterwards the caller's again."""

    @functools.wraps(run)
    def there(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        with on_device(q.device):
            return run(q, k, v, mask, scale)

    return there


@where_the_tensors_are
def sage_attention_1(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`smooth_k=True` would take the mean off the caller's keys, in place. Leaving it out costs accuracy where keys share
    a direction. So the mean is taken off here, out of place: softmax does not change when all keys move alike.
    """
    if mask is not None:
        raise ValueError("SageAttention 1 takes no mask; it would ignore one.")
    from sageattention import sageattn

    k = k - k.mean(dim=2, keepdim=True)
    q, k, v = contiguous_rows(q, k, v)
    v, factor = within_float16(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale, smooth_k=False)
    return out if factor is None else out * factor


@where_the_tensors_are
def sage_attention_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """The kernel for the architecture; with a mask the Triton one, the only one that does not ignore it."""
    import sageattention

    q, k, v = contiguous_rows(q, k, v)
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
    factor = None
    if mask is not None or capability in ((8, 0), (8, 6)):
        v, factor = within_float16(v)
    if mask is None:
        out: Tensor = sageattention.sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)
    else:
        out = sageattention.sageattn_qk_int8_pv_fp16_triton(
            q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale, attn_mask=mask
        )
    return out if factor is None else out * factor


def _sage2_masks(call: AttentionCall, device: DeviceFacts) -> str | None:
    if call.mask == NO_MASK:
        return None
    if (device.capability or (0, 0)) >= (12, 0):
        return "its kernel that takes masks does not run on compute capability 12"
    module = importlib.import_module("sageattention")
    parameters = inspect.signature(module.sageattn_qk_int8_pv_fp16_triton).parameters
    return None if "attn_mask" in parameters else "this release of sageattention takes no mask"


@where_the_tensors_are
def sage_attention_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """It takes the mean off the caller's keys in place and knows no other scale than 1 / sqrt(D)."""
    if mask is not None:
        raise ValueError("SageAttention 3 takes no mask; it would ignore one.")
    from sageattn3 import sageattn3_blackwell

    if scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    k, v = share_heads(k.clone(), q.shape[1]), share_heads(v, q.shape[1])
    out: Tensor = sageattn3_blackwell(q, k, v, is_causal=False)
    return out


@where_the_tensors_are
def kitchen_int8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    import comfy_kitchen

    q, k, v = contiguous_rows(q, k, v)
    out: Tensor = comfy_kitchen.int8_attention(q, k, v, scale=scale, attn_mask=mask)
    return out


def _kitchen_library() -> str | None:
    if (reason := import_fault("comfy_kitchen", "pip install comfy-kitchen")) is not None:
        return reason
    module = importlib.import_module("comfy_kitchen")
    if not hasattr(module, "int8_attention"):
        return "this release of comfy-kitchen has no int8 attention (pip install -U comfy-kitchen)"
    if not module.int8_attention_is_available():
        return "comfy-kitchen has no int8 attention kernel for this GPU and this torch"
    return None


QUANTIZED_BACKENDS = (
    Backend(
        "sage2", "SageAttention 2, int8 and fp8", sage_attention_2, exact=False, library=_sage2_library,
        distributions=("sageattention",),
        architectures=((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)), largest_width=128,
        masks=(NO_MASK, BOOL_MASK, FLOAT_MASK), further=_sage2_masks,
    ),
    Backend(
        "comfy_kitchen_int8", "comfy-kitchen int8", kitchen_int8, exact=False, library=_kitchen_library,
        distributions=("comfy-kitchen",),
        devices=("cuda", "hip"), least_capability=(7, 5), dtypes=FLOATS, largest_width=256,
        masks=(NO_MASK, BOOL_MASK, FLOAT_MASK, OTHER_FLOAT_MASK),
    ),
    Backend(
        "sage1", "SageAttention 1, int8", sage_attention_1, exact=False, library=_sage1_library,
        distributions=("sageattention",),
        least_capability=(8, 0), dtypes=FLOATS, widths=(64, 96, 128),
    ),
    Backend(
        "sage3", "SageAttention 3, 4 bit", sage_attention_3, exact=False,
        distributions=("sageattn3",),
        library=lambda: import_fault("sageattn3", "it is built from the SageAttention repository, on Blackwell"),
        architectures=((10, 0), (12, 0), (12, 1)), widths=(64, 128),
    ),
)  # fmt: skip
