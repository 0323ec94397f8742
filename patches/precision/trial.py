"""Products of a scheme are compared with plain torch's before a model is packed for it.

What multiplies 8 bit weights is made for a few kinds of devices: comfy-kitchen's int8 products have come out wrong on Turing
(its #55) and as NaN on RDNA4 (ComfyUI #15084), where a picture is noise or black and nothing says why.
"""

from __future__ import annotations

import functools

import torch

from ...attention.capabilities import on_device
from ...host.errors import kind_and_line
from .layers import quantized_entries, quantized_operations
from .schemes import Scheme

# Tokens, inputs and outputs, with each size of the rotation; outputs that no tile divides.
SHAPES = ((256, 1024, 512), (77, 320, 336), (300, 48, 80))
TOLERATED = 0.1  # of a product's length; 8 bits cost a hundredth (int8) or five (fp8)


@functools.cache
def refusal(scheme: Scheme, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `scheme` is not to be used on `device` by a model that computes in `dtype`; None when its products are right."""
    if scheme.weight_only:
        return None
    try:
        with torch.no_grad(), on_device(device):
            right = all(_is_right(scheme, device, dtype, *shape) for shape in SHAPES)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel that is not there
        return f"a small product of it fails on this device ({kind_and_line(error, 200)}): choose {instead(scheme)}"
    return None if right else f"its products come out wrong on this device: choose {instead(scheme)}"


def instead(scheme: Scheme) -> str:
    """What keeps the memory low without such products."""
    return f"{scheme.name[:4].rstrip('_')}_weights"


def _is_right(scheme: Scheme, device: torch.device, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> bool:
    private = torch.Generator("cpu").manual_seed(0)
    # Rows of all sizes: what takes one row's scale for another's is found out.
    weight = torch.randn(outputs, inputs, generator=private) * torch.logspace(-1, 0, outputs).unsqueeze(1)
    rows = torch.randn(tokens, inputs, generator=private) * torch.logspace(0, -1, tokens).unsqueeze(1)
    bias = torch.randn(outputs, generator=private)
    weight, rows, bias = weight.to(device), rows.to(device, dtype), bias.to(device, dtype)
    entries, restored = quantized_entries(weight, scheme)
    layer = quantized_operations(dtype, device).Linear(inputs, outputs, bias=True, device=device, dtype=dtype)
    layer.load_state_dict(entries | {"bias": bias}, strict=False)
    wanted = rows.float() @ restored.T + bias.float()
    difference = layer(rows).float() - wanted
    return bool(difference.norm() <= TOLERATED * wanted.norm())
