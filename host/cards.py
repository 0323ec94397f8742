"""What torch can do with the card of this machine, where it is not all that a card can."""

from __future__ import annotations

import torch

# NVIDIA's cards of the Turing generation without tensor cores: their convolutions in float16 give NaN.
WITHOUT_FLOAT16 = ("GTX 16", "MX450", "MX550", "T500", "T550", "T600", "T1000", "T1200", "T2000", "CMP 30HX")


def computes_in(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether networks can be computed in `dtype` on `device`, an accelerator."""
    if device.type == "mps" and dtype == torch.bfloat16:
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type == "cuda" and dtype == torch.float16:
        return not any(name in torch.cuda.get_device_name(device) for name in WITHOUT_FLOAT16)
    return True


def why_no_gpu() -> str:
    """Why torch sees no GPU of NVIDIA or AMD, with the cure."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA and ROCm: install the build for your GPU"
    return "torch sees no GPU, so the driver is missing or hidden: install the driver, or unset CUDA_VISIBLE_DEVICES"


def numbered(device: torch.device) -> torch.device:
    """`device` with the number that "cuda" or "xpu" without one means."""
    if device.type in ("cuda", "xpu") and device.index is None:
        return torch.device(device.type, (torch.cuda if device.type == "cuda" else torch.xpu).current_device())
    return device
