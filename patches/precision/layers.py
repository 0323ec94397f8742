"""Linear layers with 8 bit weights, on ComfyUI's own, which know how to move, offload and take LoRAs.

What differs from ComfyUI's: fp8 activations are scaled by their own largest value, weight-only schemes never round
activations, torch compiles both without a break in the graph, and int8 products on a CPU are tried before they are trusted.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cpu_int8 import cpu_int8_layout
from .dynamic_fp8 import dynamic_fp8_layout, fp8_scale
from .schemes import PrecisionUnavailable, Scheme, rotation
from .weight_only_int8 import weight_only_int8_layout

# What a quantised weight is called in a state dict beside `weight`, in one format or another.
ENTRIES = ("comfy_quant", "weight_scale", "weight_scale_2", "weight_s_rel", "weight_s_channel", "weight_codebook")

REMEMBERED = 16  # classes, each small


def quantized_entries(value: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    """A float32 weight [N, K] as entries of a ComfyUI checkpoint, and what they restore to, float32."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[scheme.format]["comfy_tensor_layout"]
    configuration: dict[str, Any] = {"format": scheme.format}
    if scheme.weight_only:
        configuration["full_precision_matrix_mult"] = True
    if scheme.format == "float8_e4m3fn":
        rounded = QuantizedTensor.from_float(value, layout, scale=fp8_scale(value))
    else:
        options: dict[str, Any] = {"per_channel": True}
        if size := rotation(scheme, value.shape[1]):
            options |= {"convrot": True, "convrot_groupsize": size}
            configuration |= {"convrot": True, "convrot_groupsize": size}
        rounded = QuantizedTensor.from_float(value, layout, **options)
    entries: dict[str, Tensor] = dict(rounded.state_dict("weight"))
    entries["comfy_quant"] = torch.tensor(list(json.dumps(configuration).encode()), dtype=torch.uint8)
    return entries, rounded.dequantize().float()


def emulated_formats(device: torch.device) -> set[str]:
    """ComfyUI's names of the weight formats that `device` has no products for: it restores such weights first."""
    from comfy import model_management as management

    have = {
        "nvfp4": management.supports_nvfp4_compute,
        "mxfp8": management.supports_mxfp8_compute,
        "float8_e4m3fn": management.supports_fp8_compute,
        "float8_e5m2": management.supports_fp8_compute,
    }
    return {name for name, supported in have.items() if device.type == "cpu" or not supported(device)}


def quantized_operations(compute_dtype: torch.dtype, device: torch.device, theirs: Collection[str] = ()) -> Any:
    """ComfyUI's operations class for a model whose layers may be quantised, activations in `compute_dtype`.

    theirs: names of layers that their checkpoint brought quantised. What `device` has no products for is emulated in them,
    as ComfyUI does; the others were quantised here, where the device was asked before.
    """
    on_cpu = cpu_int8_layout() if device.type == "cpu" else None
    layouts = _Layouts(dynamic_fp8_layout(), weight_only_int8_layout(), on_cpu)
    return _operations(compute_dtype, layouts, frozenset(theirs), frozenset(emulated_formats(device)))


class _Layouts(NamedTuple):
    """What the weights are called that we multiply ourselves; None where ComfyUI's way will do."""

    dynamic_fp8: str | None
    weight_only_int8: str | None
    int8: str | None


# One class for all models that are alike: a compiler has code of its own for every class, and keeps it.
@lru_cache(maxsize=REMEMBERED)
def _operations(compute_dtype: torch.dtype, layouts: _Layouts, theirs: frozenset[str], emulated: frozenset[str]) -> Any:
    import comfy.float
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor

    dynamic_fp8 = layouts.dynamic_fp8
    base = comfy.ops.mixed_precision_ops({}, compute_dtype, full_precision_mm=False, disabled=set(emulated))

    def layout_of_ours(layer: Any) -> str | None:
        """What a quantised layer's weight is called for it to be multiplied as we do it; None where ComfyUI's way will do."""
        if layer.quant_format == "float8_e4m3fn":
            return dynamic_fp8
        if layer.quant_format != "int8_tensorwise":
            return None
        return layouts.weight_only_int8 if layer._full_precision_mm_config else layouts.int8

    def entry(name: str) -> property:
        """Part of the quantised weight under its name in a state dict: who merges models looks for it on the layer."""

        def get(self: Any) -> Any:
            if isinstance(self._parameters.get("weight"), QuantizedTensor):
                entries = self.state_dict()
                if name in entries:
                    return entries[name]
            raise AttributeError(name)

        return property(get)

    class Operations(base):  # type: ignore[misc, valid-type]
        class Linear(base.Linear):  # type: ignore[name-defined]
            came_quantized = False

            def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
                given: Any = state.get(f"{prefix}weight")
                bias: Any = state.get(f"{prefix}bias")
                plain = f"{prefix}comfy_quant" not in state
                self.came_quantized = prefix.rstrip(".") in theirs
                self._disabled_formats = set(emulated) if self.came_quantized else set()
                super()._load_from_state_dict(state, prefix, *args)
                held: Any = self._parameters.get("weight")
                if held is None:
                    return
                if plain:
                    # What stays does so in its own type: the weights of an fp8 file, and float32 where a model insists on it.
                    if given.dtype.itemsize == 1 or given.dtype.itemsize > held.dtype.itemsize:
                        self.weight = nn.Parameter(given.to(held.device), requires_grad=False)
                    if bias is not None and bias.dtype.itemsize > self._parameters["bias"].dtype.itemsize:
                        self.bias = nn.Parameter(bias.to(held.device, copy=True), requires_grad=False)
                        self.bias_comfy_model_dtype = bias.dtype
                    return
                if (layout := layout_of_ours(self)) is not None:
                    self.layout_type = layout
                    weight = QuantizedTensor(held._qdata, layout, held._params)
                    self.weight = nn.Parameter(weight, requires_grad=False)

            def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                dynamic = (
                    getattr(self, "layout_type", None) == dynamic_fp8
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

            def set_weight(
                self,
                weight: Tensor,
                inplace_update: bool = False,
                seed: int | None = None,
                return_weight: bool = False,
                **kwargs: Any,
            ) -> Tensor | None:
                if getattr(self, "layout_type", None) is not None:
                    if inplace_update:
                        # Putting the old weight back would leave the new one's scale.
                        raise PrecisionUnavailable(
                            "Hook LoRAs cannot change 8 bit weights while sampling: use Load LoRA instead, or exclude the "
                            "layers they change in Hotpath Precision."
                        )
                    made: Tensor | None = super().set_weight(weight, False, seed, return_weight, **kwargs)
                    return made
                rounded: Tensor = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed or 0)
                if return_weight:
                    return rounded
                if inplace_update:
                    self.weight.data.copy_(rounded)
                else:
                    self.weight = nn.Parameter(rounded, requires_grad=False)
                return None

    for name in ENTRIES:
        setattr(Operations.Linear, name, entry(name))
    return Operations
