"""float8 and int8 arithmetic for the transformer's large products, by torchao, on a CPU by our own layers; the reason where
it cannot run.

Weights are packed once with a scale per row; activations are scaled per token while it runs. Embedders, modulation and the
final layer stay as they are: they are small, and they set the scale of everything behind them.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..attention.capabilities import dtype_name, on_device
from ..host.errors import kind_and_line
from ..products import int8

log = logging.getLogger("hotpath.text_to_image")

PRECISIONS = ("none", "float8", "int8")
PACKED_LISTS = ("noise_refiner", "layers")
TRIED = 256  # sides of the layer, and tokens, that a method is tried with; no kernel refuses these for their size
TOLERATED = 0.1  # of a product's length, between its 8 bits and float32; they cost a hundredth or three
MULTIPLE = 16  # the float8 and int8 products want both sides of a weight to be a multiple of it


@dataclass(frozen=True)
class PrecisionPlan:
    """What the blocks' products are computed in, and the line for the report."""

    method: str
    note: str


def plan(asked: str, device: torch.device, dtype: torch.dtype) -> PrecisionPlan:
    """The plan for one of PRECISIONS on `device`, for a network of `dtype`. Raises ValueError for another word."""
    if asked not in PRECISIONS:
        raise ValueError(f"{asked!r} is no precision: choose {', '.join(PRECISIONS)}.")
    if asked == "none":
        return PrecisionPlan("none", "")
    reason = unavailable(asked, device, dtype) or refusal(asked, device, dtype)
    if reason is not None:
        return PrecisionPlan("none", f"precision: none instead of {asked}, because {reason}")
    return PrecisionPlan(asked, f"precision: {asked} weights and activations in the blocks; pictures differ slightly")


def by_torchao(device: torch.device) -> bool:
    """Whether packed layers are torchao's; on a CPU ours are faster, and right where its own overflow."""
    return device.type != "cpu"


def unavailable(method: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `method` cannot run on `device` for a network of `dtype`; None when it can."""
    if method == "int8" and not by_torchao(device):
        return int8.why_not() or None
    # Before the package is looked for: no package would help here.
    if not by_torchao(device) or device.type not in ("cuda", "cpu"):
        return f"there are no {method} products on {device.type}"
    if importlib.util.find_spec("torchao") is None:
        return "the torchao package is not installed (pip install torchao)"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        needed = {"float8": (8, 9), "int8": (8, 0)}[method]
        # AMD's numbers count another thing; `refusal` asks torchao.
        if capability < needed and torch.version.hip is None:
            return f"it needs compute capability {needed[0]}.{needed[1]}, and this device has {capability[0]}.{capability[1]}"
        if method == "float8" and dtype != torch.bfloat16:
            return f"its products are made for bfloat16, and the dtype is {dtype_name(dtype)}"
    try:
        import torchao.quantization  # noqa: F401 - made for another torch, it fails here
    except Exception as error:
        return f"the torchao package cannot be loaded ({type(error).__name__}: {str(error)[:200]})"
    return None


def refusal(method: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torchao will not pack a layer on `device`, or multiplies wrong there, found out with a small one; None when all is
    well. Which GPUs of AMD have its products, for example, it knows alone."""
    if not by_torchao(device):
        return None
    # Without weights of its own, which would be drawn from everybody's generator.
    layer = nn.Linear(TRIED, TRIED, bias=False, device="meta")
    try:
        with torch.inference_mode(False), torch.no_grad(), on_device(device):
            # Rows of every size: torch 2.6 for AMD takes the scales of the one for those of the other (ROCm/pytorch #2739).
            weight, rows = (made.to(device, dtype) for made in _trial())
            layer.weight = nn.Parameter(weight, requires_grad=False)
            tried = nn.Sequential(layer)
            _pack(tried, method)
            found, wanted = tried(rows).float(), rows.float() @ weight.float().T
            right = bool((found - wanted).norm() <= TOLERATED * wanted.norm())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an assertion of its own, or of a kernel that is not there
        return f"torchao refuses it on this device ({kind_and_line(error, 200)})"
    return None if right else "torchao's products come out wrong on this device"


def _trial() -> tuple[Tensor, Tensor]:
    """A weight [TRIED, TRIED] and as many tokens, each row with a scale of its own."""
    private = torch.Generator("cpu").manual_seed(0)
    sizes = torch.logspace(-1, 1, TRIED).unsqueeze(1)
    weight = torch.randn(TRIED, TRIED, generator=private) * sizes
    return weight, torch.randn(TRIED, TRIED, generator=private) * sizes.flip(0)


def _pack(module: nn.Module, method: str) -> None:
    """Pack the linear layers of `module` in place, where it lies."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    if method == "float8":
        config: Any = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    else:
        config = Int8DynamicActivationInt8WeightConfig()
    # Else it sets torch's compiler for the whole process, and up to 0.17 TensorFloat-32 for everybody's float32 products
    # (pytorch/ao #423).
    config.set_inductor_config = False
    quantize_(module, config, filter_fn=is_packed)


class TorchaoLinear(nn.Linear):
    """With a weight of torchao's, which can neither be moved nor be listed in inference mode; ComfyUI does both there."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False):
            super()._save_to_state_dict(*args, **kwargs)


def apply(transformer: Any, plan: PrecisionPlan, device: torch.device) -> int:
    """Pack the blocks' linear layers in place, one block at a time on `device`; returns how many layers."""
    if plan.method == "none":
        return 0
    packed = 0
    for block in host.each([block for name in PACKED_LISTS for block in getattr(transformer, name)], plan.method):
        before = next(block.parameters()).device
        block.to(device)
        if by_torchao(device):
            packed += _packed_by_torchao(block, plan.method, device)
        else:
            packed += int8.replace_linears(block, is_packed)
        block.to(before)
    log.info("%d layers packed to %s", packed, plan.method)
    return packed


def _packed_by_torchao(block: nn.Module, method: str, device: torch.device) -> int:
    with on_device(device):
        _pack(block, method)
    layers = [layer for key, layer in block.named_modules() if is_packed(layer, key)]
    for layer in layers:
        layer.__class__ = TorchaoLinear
    return len(layers)


def is_packed(layer: nn.Module, name: str) -> bool:
    """Whether `layer`, `name` within its block, is one of the large products."""
    if not isinstance(layer, nn.Linear) or "adaLN_modulation" in name:
        return False
    return all(side % MULTIPLE == 0 for side in layer.weight.shape)
