"""Linear layers with 8 bit weights, on ComfyUI's own, which know how to move, offload and take LoRAs.

What is added to ComfyUI's: activations are scaled by their own largest value (ComfyUI's fp8 casts them at scale 1 where
a checkpoint brings no scale), and weight-only schemes never round activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST_FP8 = 448.0


def fp8_scale(x: Tensor) -> Tensor:
    """The scale that puts the largest magnitude of `x` at e4m3's largest number, float32 scalar on x's device.

    Zeros get a scale all the same: divided by a scale of zero they would be NaN.
    """
    return (x.abs().amax().float() / LARGEST_FP8).clamp_min(torch.finfo(torch.float32).tiny * 2**32)


def quantized_operations(compute_dtype: torch.dtype) -> Any:
    """ComfyUI's operations class for a model whose layers may be quantised, activations in `compute_dtype`."""
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor

    base = comfy.ops.mixed_precision_ops({}, compute_dtype, full_precision_mm=False, disabled=set())

    class Operations(base):  # type: ignore[misc, valid-type]
        class Linear(base.Linear):  # type: ignore[misc, name-defined]
            def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                dynamic = (
                    getattr(self, "quant_format", None) == "float8_e4m3fn"
                    and not self._full_precision_mm
                    and not getattr(self, "comfy_force_cast_weights", False)
                    and not self.weight_function
                    and not self.bias_function
                    and input.dtype == compute_dtype
                )
                if not dynamic or input.numel() == 0:
                    return super().forward(input, *args, **kwargs)
                rows = input.reshape(-1, input.shape[-1])
                rounded = QuantizedTensor.from_float(rows, self.layout_type, scale=fp8_scale(rows))
                out: Tensor = super().forward(rounded, *args, **kwargs)
                return out.reshape(*input.shape[:-1], out.shape[-1])

            def _forward(self, input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
                if self._full_precision_mm and isinstance(weight, QuantizedTensor):
                    weight = weight.dequantize()
                out: Tensor = super()._forward(input, weight, bias)
                return out

    return Operations
