"""fp8 products whose activations are scaled on the fly, as a weight layout of ComfyUI's quantised tensors.

ComfyUI's own fp8 layer makes a quantised tensor of its input, at scale 1 unless the checkpoint brings one, and torch's
compiler cannot follow that object. Here only the weight is such a tensor, and the product with it rounds the input: plain
operations, which a compiler traces and fuses with what came before.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

NAME = "HotpathDynamicFP8"
LARGEST = 448.0  # of e4m3
FP8 = torch.float8_e4m3fn


def fp8_scale(x: Tensor) -> Tensor:
    """The scale that puts the largest magnitude of `x` at e4m3's largest number, float32 scalar on x's device.

    Zeros get a scale all the same: divided by a scale of zero they would be NaN.
    """
    return (torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) / LARGEST).clamp_min(1e-30)


def _traced() -> bool:
    """Whether torch's compiler looks at this; Dynamo does not, it is the stage after it that sees into weights like ours."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def fp8_product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias with x rounded to fp8. x [..., K]; weight [K, N] e4m3 with the columns contiguous; bias [N].

    Returns [..., N] in x's dtype. On the CPU, which has no fp8 products, the same rounding is multiplied in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    scale = fp8_scale(rows)
    if _traced() or x.device.type == "cpu":
        rounded = (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)
    else:
        import comfy_kitchen

        rounded = comfy_kitchen.quantize_per_tensor_fp8(rows.contiguous(), scale, FP8)
    # cuBLAS has no fp8 product with a float32 result and a bias.
    apart = x.dtype == torch.float32 or x.device.type == "cpu"
    out = _scaled_product(rounded, weight, scale, weight_scale, None if apart else bias, x.dtype)
    if apart and bias is not None:
        out = out + bias
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _scaled_product(
    rows: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if rows.device.type == "cpu":
        return ((rows.float() @ weight.float()) * (scale * weight_scale)).to(dtype)
    if torch.version.hip is not None:
        from comfy_kitchen.scaled_mm_v2 import scaled_mm_v2

        found: Tensor = scaled_mm_v2(rows, weight, scale_a=scale, scale_b=weight_scale, bias=bias, out_dtype=dtype)
        return found
    # This one, and not its successor, is what torch's compiler tunes. Fast accumulation adds up in the tensor cores'
    # own registers, as fp8 inference does everywhere; what it costs is in the error report.
    product: Tensor = torch._scaled_mm(
        rows, weight, scale_a=scale, scale_b=weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=True
    )
    return product


@functools.cache
def dynamic_fp8_layout() -> str:
    """The layout's name in comfy-kitchen's registry, registered when first asked for."""
    from comfy.quant_ops import QuantizedTensor, TensorCoreFP8E4M3Layout, register_layout_op
    from comfy_kitchen.tensor.base import dequantize_args, register_layout_class

    class DynamicFP8Layout(TensorCoreFP8E4M3Layout):
        """ComfyUI's e4m3 weights, with another idea of what a product with them is."""

    register_layout_class(NAME, DynamicFP8Layout)

    def ours(weight: Any, x: Any) -> bool:
        return getattr(weight, "_layout_cls", None) == NAME and not isinstance(x, QuantizedTensor)

    def restored(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return operation(*dequantize_args(args), **dequantize_args(kwargs))

    aten = torch.ops.aten

    # torch takes a linear layer apart into t and mm or addmm unless it runs in inference mode, hence all four.
    @register_layout_op(aten.t.default, DynamicFP8Layout)
    def _transposed(tensor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parameters = dataclasses.replace(tensor._params, orig_shape=tuple(reversed(tensor._params.orig_shape)))
        return QuantizedTensor(tensor._qdata.t(), NAME, parameters)

    @register_layout_op(aten.linear.default, DynamicFP8Layout)
    def _linear(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = args[:2]
        if not ours(weight, x):
            return restored(aten.linear.default, args, kwargs)
        return fp8_product(x, weight._qdata.t(), weight._params.scale, args[2] if len(args) > 2 else None)

    @register_layout_op(aten.mm.default, DynamicFP8Layout)
    def _mm(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = args
        if not ours(weight, x):
            return restored(aten.mm.default, args, kwargs)
        return fp8_product(x, weight._qdata, weight._params.scale, None)

    @register_layout_op(aten.addmm.default, DynamicFP8Layout)
    def _addmm(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias, x, weight = args
        if kwargs or not ours(weight, x):
            return restored(aten.addmm.default, args, kwargs)
        return fp8_product(x, weight._qdata, weight._params.scale, bias)

    return NAME
