"""A copy of a ComfyUI MODEL with 8 bit linear layers, and a table of what was rounded and by how much.

The diffusion model is built anew from its own configuration, as ComfyUI builds one from a quantised checkpoint, and
filled with the quantised state. Everything else of the MODEL is carried over. The original keeps its weights: the two are
two models to ComfyUI's memory management, and either can be evicted for the other.
"""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import host
from ..compilation.wrapping import CORE_KEY
from .control_lora import KEY, share_weights
from .layers import quantized_entries, quantized_operations
from .schemes import (
    MULTIPLE,
    SCHEMES,
    PrecisionUnavailable,
    Scheme,
    excluded_by,
    patterns,
    slow_on_a_cpu,
    unavailable,
)
from .trial import refusal

log = logging.getLogger("hotpath.precision")

PREFIX = "diffusion_model."
QUANTIZED = "it is quantised already"
PACKED = "its weight is in another pack's format"
COPIES = 8  # of the largest weight, in float32: room for it as it came, patched, rounded and restored, generously
# Bookkeeping of one loaded model that its copy must not share.
RUNTIME = ("dynamic_vbars", "dynamic_pins", "dynamic_patchers")


@dataclass(frozen=True)
class LayerError:
    """A quantised weight: relative error ||W - W'|| / ||W|| in the Frobenius norm, and bytes before and after."""

    name: str
    error: float
    before: int
    after: int


@dataclass(frozen=True)
class QuantizationReport:
    """layers: quantised, worst first. left: the others by name, with the reason. baked: layers with a LoRA in them."""

    scheme: Scheme
    device: torch.device
    layers: tuple[LayerError, ...]
    left: dict[str, str]
    baked: int
    whole: int  # bytes of the quantised model
    original: int

    def describe(self, worst: int = 10) -> str:
        before, after = sum(x.before for x in self.layers), sum(x.after for x in self.layers)
        lines = [
            f"Precision: {self.scheme.name}, {self.scheme.what}",
            f"{len(self.layers)} layers quantised, {_megabytes(before)} to {_megabytes(after)}; {len(self.left)} left alone",
            f"Memory: this model {_megabytes(self.whole)}, the original {_megabytes(self.original)}; "
            "the original keeps its own weights as long as something uses it",
        ]
        if self.device.type == "cpu" and (reason := slow_on_a_cpu(self.scheme)):
            lines.append(
                f"Here this is a reference, rounding as on a GPU and slower than the original, because {reason}."
            )
        if self.baked:
            lines.append(f"LoRA patches of {self.baked} layers are in the quantised weights.")
        if worst:
            lines.append("Largest weight errors:")
        lines += [f"  {100 * layer.error:.2f} %  {layer.name}" for layer in self.layers[:worst]]
        reasons: dict[str, int] = {}
        for reason in self.left.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        if reasons:
            lines.append("Left alone:")
            lines += [f"  {count} layers: {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1])]
        return "\n".join(lines)


def quantize_model(
    model: Any, scheme_name: str, exclude: str | Iterable[str] | None = None
) -> tuple[Any, QuantizationReport]:
    """A MODEL like `model`, a ModelPatcher, with its linear layers in `scheme_name`. `model` stays as it is.

    Raises PrecisionUnavailable where the device or the model cannot take it, ValueError for an unknown scheme.
    """
    if scheme_name not in SCHEMES:
        raise ValueError(f"{scheme_name!r} is no precision; there are {', '.join(SCHEMES)}.")
    scheme = SCHEMES[scheme_name]
    if (reason := unavailable(scheme, model.load_device)) is not None:
        raise PrecisionUnavailable(f"{scheme.name} cannot be used, because {reason}.")
    if not all(hasattr(model.model, name) for name in ("model_config", "diffusion_model", "get_dtype_inference")):
        raise PrecisionUnavailable(
            f"{type(model.model).__name__} is no model of ComfyUI's own and cannot be built anew: load it with ComfyUI's nodes."
        )
    _refuse_replaced_modules(model)
    dtype = model.model.get_dtype_inference()
    if (reason := refusal(scheme, model.load_device, dtype)) is not None:
        raise PrecisionUnavailable(f"{scheme.name} cannot be used, because {reason}.")

    import comfy.model_management

    _unload_clones(model)
    source = model.model
    state, layers, left, baked = _quantized_state(model, scheme, patterns(exclude))
    if not layers:
        why = "; ".join(sorted(set(left.values()))) or "it has no linear layers"
        if PACKED in left.values():
            why = f"{PACKED}, as those of GGUF files are; load the model from its safetensors file"
        raise PrecisionUnavailable(f"No layer of this model can be computed in {scheme.name}: {why}.")
    theirs = {name for name, reason in left.items() if reason == QUANTIZED}
    network = _built(source, state, dtype, model.load_device, model.offload_device, theirs)
    patched = _patcher_over(model, _with_diffusion_model(source, network, model.offload_device), baked)
    original = comfy.model_management.module_size(source)
    layers.sort(key=lambda layer: -layer.error)
    report = QuantizationReport(
        scheme, model.load_device, tuple(layers), left, sum(key.endswith(".weight") for key in baked),
        patched.model_size(), original,
    )  # fmt: skip
    log.info("precision: %s, %d layers, %s", scheme.name, len(layers), _megabytes(report.whole))
    return patched, report


def _unload_clones(model: Any) -> None:
    """Restore what loaded clones of `model` may have patched in place, on whatever device they are."""
    from comfy import model_management as management

    ours = [
        x for x in management.current_loaded_models if getattr(x.model, "clone_base_uuid", 0) == model.clone_base_uuid
    ]
    others = [x for x in management.current_loaded_models if x not in ours]
    for device in {loaded.device for loaded in ours}:
        management.free_memory(1e30, device, others)


def _refuse_replaced_modules(model: Any) -> None:
    """Raises PrecisionUnavailable where a node put modules in the place of the model's own, or will at loading: they hold the
    original's weights."""
    from comfy.patcher_extension import WrappersMP

    if model.injections:
        raise PrecisionUnavailable(
            f"A node before this one changes layers when the model is loaded ({', '.join(map(str, model.injections))}): put "
            "Hotpath Precision before that node."
        )
    for key, value in model.object_patches.items():
        holder = getattr(value, "__self__", value)
        if key.startswith(PREFIX.rstrip(".")) and isinstance(holder, nn.Module):
            raise PrecisionUnavailable(
                f"A node before this one replaced {key} (compiled it, say): put Hotpath Precision before that node."
            )
    if model.get_wrappers(WrappersMP.APPLY_MODEL, CORE_KEY):
        raise PrecisionUnavailable("A TorchCompileModel compiled the original: put Hotpath Precision before that node.")


def _quantized_state(
    model: Any, scheme: Scheme, exclude: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[LayerError], dict[str, str], set[str]]:
    """(state dict for `_built`, errors, layers left with the reason, keys whose patches are in the state)."""
    network: nn.Module = model.model.diffusion_model
    state: dict[str, Tensor] = dict(network.state_dict())
    layers: list[LayerError] = []
    left: dict[str, str] = {}
    baked: set[str] = set()
    linear = {name: module for name, module in network.named_modules() if _is_linear(module)}

    def leave(name: str, reason: str) -> None:
        left[name] = reason
        # A linear layer takes the tensor it is given, where others copy; the two models must not share storage.
        if (held := state.get(f"{name}.weight")) is not None:
            state[f"{name}.weight"] = held.clone()

    most = max((module.weight.numel() for module in linear.values() if module.weight is not None), default=0)
    host.current().make_room(COPIES * most * torch.float32.itemsize, model.load_device)
    with host.tracked(host.current(), len(linear), "quantising") as progress:
        for name, module in linear.items():
            progress.update()
            reason = _refusal(name, module, scheme, exclude)
            if reason is not None:
                leave(name, reason)
                continue
            weight = module.weight.detach()
            key = f"{PREFIX}{name}.weight"
            value = _in_float32(weight, model.load_device)
            if key in model.patches:
                value = _patched(model.patches[key], value, key)
                if value.shape != weight.shape:
                    leave(name, "its LoRA changes its shape")
                    continue
                baked.add(key)
            entries, restored = quantized_entries(value, scheme)
            entries = {suffix: tensor.to(model.offload_device) for suffix, tensor in entries.items()}
            state.pop(f"{name}.weight")
            state.update({f"{name}.{suffix}": tensor for suffix, tensor in entries.items()})
            error = float((restored - value).norm() / value.norm().clamp_min(1e-30))
            size = sum(tensor.nbytes for suffix, tensor in entries.items() if suffix != "comfy_quant")
            layers.append(LayerError(name, error, weight.nbytes, size))
    return state, layers, left, baked


def _is_linear(module: nn.Module) -> bool:
    """torch's, and ComfyUI's for quantised models, which does not derive from it."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "comfy_cast_weights"))


def _refusal(name: str, module: Any, scheme: Scheme, exclude: tuple[str, ...]) -> str | None:
    pattern = excluded_by(name, exclude)
    if pattern is not None:
        return f"excluded by {pattern}"
    weight = module.weight
    if weight is None or weight.ndim != 2:
        return "its weight is no matrix"
    if hasattr(weight, "_layout_cls"):
        return QUANTIZED
    if type(weight.detach()) is not Tensor:
        return PACKED
    if scheme.weight_only and weight.element_size() == 1:
        return "its weights have 8 bits already"
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        return f"its sides are no multiples of {MULTIPLE}"
    return None


def _in_float32(weight: Tensor, device: torch.device) -> Tensor:
    """A copy of `weight` on `device`. It goes there as it is: converted first, twice as much or more would be sent."""
    moved = weight.to(device)
    return moved.to(torch.float32, copy=moved is weight)


def _patched(patches: Any, value: Tensor, key: str) -> Tensor:
    import comfy.lora

    patched: Tensor = comfy.lora.calculate_weight(patches, value, key)
    return patched


def _built(
    source: Any,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    load_device: torch.device,
    offload_device: torch.device,
    theirs: Collection[str],
) -> nn.Module:
    """The diffusion model of `source` (a BaseModel) anew, with `state` in it. theirs: layers that came quantised."""
    from comfy.model_base import BaseModel

    configuration = object.__new__(
        type(source.model_config)
    )  # its __getattr__ answers everything, copy's questions too
    configuration.__dict__.update(source.model_config.__dict__)
    configuration.custom_operations = quantized_operations(dtype, load_device, theirs)
    try:
        # Not by the configuration's `get_model`: for Stable Audio that wants layers of the checkpoint that are not the network's.
        alike = BaseModel(configuration, source.model_type, offload_device, unet_model=type(source.diffusion_model))
        network: nn.Module = alike.diffusion_model
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # layers that its loader made otherwise
        raise PrecisionUnavailable(
            f"This {type(source).__name__} cannot be built anew from its configuration ({error}): its loader gave it layers of "
            "its own. Load it with ComfyUI's Load Checkpoint or Load Diffusion Model."
        ) from error
    outcome = network.load_state_dict(dict(state), strict=False)
    wrong = [*outcome.missing_keys, *outcome.unexpected_keys]
    if wrong:
        raise PrecisionUnavailable(
            f"This {type(source).__name__} cannot be built anew from its configuration: {', '.join(wrong[:3])} do not fit. "
            "A node before this one changed its layers; put Hotpath Precision before it."
        )
    return network.eval().requires_grad_(False)


def _with_diffusion_model(source: Any, network: nn.Module, device: torch.device) -> Any:
    """A BaseModel like `source` around `network`: own modules, parameters and bookkeeping, same everything else."""
    made = copy.copy(source)
    for name in RUNTIME:
        made.__dict__.pop(name, None)
    made._parameters = {name: copy.deepcopy(value) for name, value in source._parameters.items()}
    made._buffers = {name: copy.deepcopy(value) for name, value in source._buffers.items()}
    made._modules = {
        name: network if name == "diffusion_model" else copy.deepcopy(module)
        for name, module in source._modules.items()
    }
    made.device = device
    made.current_patcher = None
    made.current_weight_patches_uuid = None
    made.model_loaded_weight_memory = made.model_offload_buffer_memory = made.lowvram_patch_counter = 0
    made.model_lowvram = False
    return made


def _patcher_over(model: Any, made: Any, baked: set[str]) -> Any:
    """A clone of `model` that patches `made` instead, without the patches that are in its weights already."""
    from comfy.patcher_extension import WrappersMP

    patched = model.clone(model_override=(made, ({}, {}, {}, set())))
    patched.size = 0
    patched.parent = None
    patched.hook_backup = {}
    patched.patches = {key: value for key, value in patched.patches.items() if key not in baked}
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, share_weights)
    # Not a clone of the original any more: other weights, another identity.
    patched.patches_uuid, patched.clone_base_uuid = uuid.uuid4(), uuid.uuid4()
    patched.cached_patcher_init = (_patcher_again, (made, patched.load_device, patched.offload_device))
    # ComfyUI's multi-GPU split has the original on its other devices, and LoRAs that are in our weights would miss there.
    if others := patched.get_additional_models_with_key("multigpu"):
        copies = [patched.deepclone_multigpu(other.load_device) for other in others]
        for copied in copies:
            copied.is_multigpu_base_clone = True
        patched.set_additional_models("multigpu", copies)
    return patched


def _patcher_again(
    made: Any, load_device: torch.device, offload_device: torch.device, disable_dynamic: bool = False
) -> Any:
    """A fresh MODEL of the same quantised weights: ComfyUI asks for one when it compiles, or uses several GPUs."""
    import comfy.model_patcher

    state = dict(made.diffusion_model.state_dict())
    theirs = {name for name, layer in made.diffusion_model.named_modules() if getattr(layer, "came_quantized", False)}
    network = _built(made, state, made.get_dtype_inference(), load_device, offload_device, theirs)
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher(_with_diffusion_model(made, network, offload_device), load_device, offload_device)


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
