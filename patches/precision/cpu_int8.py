"""int8 products on a CPU, as a weight layout of ComfyUI's quantised tensors.

By its own layout's name ComfyUI multiplies with whatever torch has, and on processors without VNNI that overflows. Here the
product is `products.int8`, which is tried before it is trusted. A rotated weight meets rows that are rotated alike.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from ...products.int8 import int8_linear
from ...products.operators import operator

NAME = "HotpathCpuINT8"


@functools.cache
def _rotation(size: int) -> Tensor:
    """The matrix [size, size], float32, by which ComfyUI's layout turns each `size` numbers of a weight's row."""
    from comfy_kitchen.backends.eager.quantization import dequantize_int8_convrot_weight

    # Older releases have no function for the way there, so it is the way back, transposed.
    with torch.inference_mode(False):
        back: Tensor = dequantize_int8_convrot_weight(torch.eye(size, dtype=torch.int8), torch.ones(size, 1), size)
        return back.T.contiguous()


def _multiplied(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotated: int) -> Tensor:
    """As `int8_linear`. rotated: how many numbers of a weight's row were turned together, or 0."""
    if rotated:
        x = (x.float().reshape(-1, rotated) @ _rotation(rotated)).to(x.dtype).reshape(x.shape)
    return int8_linear(x, weight, scale, bias)


def _result(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotated: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _product(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x [..., K] times the quantised weight [N, K], transposed."""
    parameters = weight._params
    rotated = parameters.convrot_groupsize if getattr(parameters, "convrot", False) else 0
    made: Tensor = torch.ops.hotpath.int8_layer.default(x, weight._qdata, parameters.scale, bias, rotated)
    return made


@functools.cache
def cpu_int8_layout() -> str:
    """The layout's name in comfy-kitchen's registry, registered when first asked for."""
    from comfy.quant_ops import QuantizedTensor, TensorWiseINT8Layout, register_layout_op
    from comfy_kitchen.tensor.base import dequantize_args, register_layout_class

    class CpuINT8Layout(TensorWiseINT8Layout):
        """ComfyUI's int8 weights, with another idea of what a product with them is."""

    # Not at the first product, which a compiler may be tracing.
    operator("int8_layer", "Tensor x, Tensor weight, Tensor scale, Tensor? bias, int rotated", _multiplied, _result)
    register_layout_class(NAME, CpuINT8Layout)

    def ours(weight: Any, x: Any, transposed: bool) -> bool:
        is_ours = getattr(weight, "_layout_cls", None) == NAME and not isinstance(x, QuantizedTensor)
        return is_ours and bool(getattr(weight._params, "transposed", False)) == transposed

    def restored(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return operation(*dequantize_args(args), **dequantize_args(kwargs))

    aten = torch.ops.aten

    # torch takes a linear layer apart into t and mm or addmm unless it runs in inference mode, hence all four.
    @register_layout_op(aten.t.default, CpuINT8Layout)
    def _transposed(tensor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = tensor._params
        turned = not getattr(before, "transposed", False)
        parameters = dataclasses.replace(before, orig_shape=tuple(reversed(before.orig_shape)), transposed=turned)
        return QuantizedTensor(tensor._qdata, NAME, parameters)

    @register_layout_op(aten.linear.default, CpuINT8Layout)
    def _linear(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = args[:2]
        if not ours(weight, x, transposed=False):
            return restored(aten.linear.default, args, kwargs)
        return _product(x, weight, args[2] if len(args) > 2 else None)

    @register_layout_op(aten.mm.default, CpuINT8Layout)
    def _mm(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = args
        return (
            _product(x, weight, None) if ours(weight, x, transposed=True) else restored(aten.mm.default, args, kwargs)
        )

    @register_layout_op(aten.addmm.default, CpuINT8Layout)
    def _addmm(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias, x, weight = args
        if kwargs or not ours(weight, x, transposed=True):
            return restored(aten.addmm.default, args, kwargs)
        return _product(x, weight, bias)

    return NAME
