"""int8 weights that are restored before they are multiplied, as a weight layout of ComfyUI's quantised tensors.

By its own layout's name ComfyUI and comfy-kitchen know a weight that int8 products are made with, rounding activations,
whatever its layer says: the feed-forward blocks of Wan and LTX reach past the layer. This is that layout by another name.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

NAME = "HotpathWeightOnlyINT8"


@functools.cache
def weight_only_int8_layout() -> str:
    """The layout's name in comfy-kitchen's registry, registered when first asked for."""
    from comfy.quant_ops import TensorWiseINT8Layout, register_layout_op
    from comfy_kitchen.tensor.base import dequantize_args, register_layout_class

    class WeightOnlyINT8Layout(TensorWiseINT8Layout):
        """ComfyUI's int8 weights, for products in the dtype of what they are multiplied with."""

    register_layout_class(NAME, WeightOnlyINT8Layout)
    aten = torch.ops.aten

    def restored(operation: Any) -> Any:
        def run(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return operation(*dequantize_args(args), **dequantize_args(kwargs))

        return run

    for operation in (aten.t.default, aten.linear.default, aten.mm.default, aten.addmm.default):
        register_layout_op(operation, WeightOnlyINT8Layout)(restored(operation))
    return NAME
