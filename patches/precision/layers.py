"""Linear layers with 8 bit weights, on ComfyUI's own, which know how to move, offload and take LoRAs.

What differs from ComfyUI's: fp8 activations are scaled by their own largest value, weight-only schemes never round
activations, and torch compiles both without a break in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .dynamic_fp8 import dynamic_fp8_layout


def quantized_operations(compute_dtype: torch.dtype) -> Any:
    """ComfyUI's operations class for a model whose layers may be quantised, activations in `compute_dtype`."""
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor

    layout = dynamic_fp8_layout()
    base = comfy.ops.mixed_precision_ops({}, compute_dtype, full_precision_mm=False, disabled=set())

    class Operations(base):  # type: ignore[misc, valid-type]
        class Linear(base.Linear):  # type: ignore[name-defined]
            def _load_from_state_dict(self, *args: Any) -> None:
                super()._load_from_state_dict(*args)
                held: Any = self._parameters.get("weight")
                if held is not None and getattr(self, "quant_format", None) == "float8_e4m3fn":
                    self.layout_type = layout
                    weight = QuantizedTensor(held._qdata, layout, held._params)
                    self.weight = nn.Parameter(weight, requires_grad=False)

            def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                dynamic = (
                    getattr(self, "layout_type", None) == layout
                    and not self._full_precision_mm
                    and not getattr(self, "comfy_force_cast_weights", False)
                    and len(self.weight_function) == 0
                    and len(self.bias_function) == 0
                )
                # ComfyUI's own path knows the way back, for guides that want gradients; an fp8 product has none.
                if not dynamic or input.numel() == 0 or (torch.is_grad_enabled() and input.requires_grad):
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                out: Tensor = self.forward_comfy_cast_weights(input, input.dtype, weight_only_quant=True)
                return out

            def _forward(self, input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
                if self._full_precision_mm and isinstance(weight, QuantizedTensor):
                    weight = weight.dequantize()
                out: Tensor = super()._forward(input, weight, bias)
                return out

    return Operations
