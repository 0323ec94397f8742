"""Attention of every place to the window of places around it in another map, without unfolding that map.

ColorMNet's short-term memory uses it with a 15x15 window: an unfolded value would be 225 times the value. Ways to the
same numbers: `local_window_reference` unfolds (for tests), `local_window_banded` multiplies row by row and reads the
window as a diagonal band (portable), a Triton kernel keeps everything in registers, and `correlation_sampler` has the
logits computed by the extension that the original uses.

Offsets run row by row: offset i of a window of side s is (i // s - s // 2, i % s - s // 2).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .capabilities import FUSES, float32_products, on_device, one_line, padded
from .first_results import compare

log = logging.getLogger("hotpath.attention")

QUERY_TILE = 16  # queries that one program of the kernel serves

_failed: dict[torch.device, str] = {}  # where the kernel did not run, and why

AUTOMATIC, SAMPLER = "automatic", "spatial_correlation_sampler"
BACKENDS = (AUTOMATIC, "banded", SAMPLER)


def local_window_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, backend: str = AUTOMATIC
) -> Tensor:
    """softmax over the window of (query . key + bias), times value. Places outside the map take no part.

    query: [T, C, H, W], already scaled; key: [1, C, H, W]; value: [1, V, H, W]; bias: [T, window^2, H, W]; query, key
    and bias float32, value of any float dtype. backend: one of BACKENDS. Returns [T, V, H, W] in the value's dtype.
    """
    if torch.is_grad_enabled() and (query.requires_grad or value.requires_grad):
        # Training: the other two write in place, or have no backward pass.
        return local_window_reference(query, key, value, bias, window)
    implementation, _ = select_local_window(query.device, query.dtype, backend)
    if implementation is local_window_triton:
        try:
            made = local_window_triton(query, key, value, bias, window)
            kind = ("window", query.device, value.dtype, *query.shape[1:], value.shape[1], window)
            compare(made, kind, lambda: (local_window_banded(query, key, value, bias, window), None))
            return made
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, a driver too old, a card that Triton does not know
            _failed[query.device] = f"the fused kernel failed on {query.device} ({one_line(error)})"
            log.warning("local attention runs banded: %s", _failed[query.device])
        return local_window_banded(query, key, value, bias, window)
    return implementation(query, key, value, bias, window)


def select_local_window(
    device: torch.device, dtype: torch.dtype = torch.float32, backend: str = AUTOMATIC
) -> tuple[Any, str]:
    """The implementation for queries of `dtype` on `device`, and why it was chosen. backend: one of BACKENDS; what
    cannot run gives way to the automatic choice, and the sentence says so. Raises ValueError for an unknown one."""
    if backend not in BACKENDS:
        raise ValueError(f"There is no local attention {backend!r}; choose one of {', '.join(BACKENDS)}.")
    asked = ""
    if backend == SAMPLER:
        from .correlation_sampler import local_window_sampler, sampler_unavailable

        refusal = sampler_unavailable(device, dtype)
        if refusal is None:
            return local_window_sampler, f"{SAMPLER}: asked for"
        asked = f"; not {SAMPLER}: {refusal}"
    if backend == "banded":
        return local_window_banded, "banded: asked for"
    reason = _failed.get(device) or triton_unavailable(device)
    if reason is None:
        return local_window_triton, f"triton: fused kernel{asked}"
    return local_window_banded, f"banded: {reason}{asked}"


def triton_unavailable(device: torch.device) -> str | None:
    """Why the Triton kernel cannot run on `device`; None when it can."""
    if device.type != "cuda":
        return f"the fused kernel needs CUDA, this is {device.type}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    except Exception as error:  # a build for another torch
        return f"Triton cannot be imported ({one_line(error)})"
    return None


def local_window_reference(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int) -> Tensor:
    """The definition, with the window unfolded: window^2 copies of key and value."""
    frames, channels, height, width = query.shape
    places, radius = height * width, window // 2
    inside = F.unfold(query.new_ones(1, 1, height, width), window, padding=radius)
    keys = F.unfold(key, window, padding=radius).view(channels, window * window, places)
    values = F.unfold(value.float(), window, padding=radius).view(value.shape[1], window * window, places)
    logits = torch.einsum("tcn,cwn->twn", query.flatten(2), keys) + bias.flatten(2)
    weights = logits.masked_fill(inside == 0, float("-inf")).softmax(dim=1)
    out = torch.einsum("twn,vwn->tvn", weights, values)
    return out.view(frames, -1, height, width).to(value.dtype)


def local_window_banded(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int) -> Tensor:
    """One row of the window at a time: the products of a row of queries with a row of keys, of which a diagonal band
    lies inside the window, are one batched matrix product; the band is read, and for the values written, in place
    through strides. Peak memory: window^2 logits per place and window rows of W x (W + window - 1) products.
    """
    frames, _, height, width = query.shape
    radius = window // 2
    q = query.permute(0, 2, 3, 1)  # [T, H, W, C]
    k = F.pad(key[0], (radius, radius, radius, radius)).permute(1, 2, 0)  # [H', W', C]
    inside = F.pad(query.new_ones(height, width), (radius, radius, radius, radius))
    band = bias.permute(0, 2, 3, 1).reshape(frames, height, width, window, window).clone()
    for row in range(window):
        products = torch.matmul(q, k[row : row + height].transpose(1, 2))  # [T, H, W, W']
        band[..., row, :] += _diagonals(products, window)
        outside = inside[row : row + height].unfold(1, window, 1) == 0  # [H, W, window]
        band[..., row, :].masked_fill_(outside, float("-inf"))
    return sum_values(band, value, window)


def sum_values(band: Tensor, value: Tensor, window: int) -> Tensor:
    """softmax over the window of logits [T, H, W, window, window], times value [1, V, H, W]: [T, V, H, W]."""
    frames, height, width = band.shape[:3]
    radius = window // 2
    v = F.pad(value[0], (radius, radius, radius, radius)).permute(1, 2, 0)
    weights = band.flatten(3).softmax(dim=-1).view_as(band).to(value.dtype)
    out: Tensor | None = None
    spread = value.new_zeros(frames, height, width, width + 2 * radius)
    for row in range(window):
        _diagonals(spread, window).copy_(weights[..., row, :])
        part = torch.matmul(spread, v[row : row + height])
        out = part if out is None else out.add_(part)
    assert out is not None
    return out.permute(0, 3, 1, 2)


def _diagonals(products: Tensor, window: int) -> Tensor:
    """View of contiguous [T, H, W, W + window - 1] as [T, H, W, window]: entry (x, i) is column x + i of row x."""
    frames, height, width, wide = products.shape
    strides = products.stride()
    return products.as_strided((frames, height, width, window), (strides[0], strides[1], wide + 1, 1))


def local_window_triton(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int) -> Tensor:
    """The fused kernel: for a tile of queries of one row, all window rows in turn with a running softmax (Dao et al.
    2022), the value in slices of channels. Nothing of size window^2 but the bias is read, nothing of it is written.
    """
    import triton

    from .local_window_kernel import local_window_kernel

    frames, channels, height, width = query.shape
    q = query.permute(0, 2, 3, 1).contiguous()
    k = key[0].permute(1, 2, 0).contiguous()
    v = value[0].permute(1, 2, 0).contiguous()
    b = bias.permute(0, 2, 3, 1).contiguous()
    out = torch.empty(frames, height, width, v.shape[-1], dtype=value.dtype, device=value.device)
    form = kernel_form(v.element_size(), float32_products(value.device), channels, v.shape[-1], window)
    grid = (triton.cdiv(width, QUERY_TILE), frames * height, triton.cdiv(v.shape[-1], form["SLICE"]))
    with on_device(value.device):
        local_window_kernel[grid](q, k, v, b, out, height, width, channels, v.shape[-1], **form, **FUSES)
    return out.permute(0, 3, 1, 2)


def kernel_form(value_bytes: int, precision: str, channels: int, value_channels: int, window: int) -> dict[str, Any]:
    """What the kernel is compiled for. value_bytes: of one element. A wide slice repeats the logits less often; these
    are the widest that keep everything in registers: in half precision, in float32, and without tensor cores.
    """
    slice_, warps, stages = (64, 8, 1) if precision == "ieee" else (256, 8, 2) if value_bytes < 4 else (128, 4, 2)
    return {
        "WINDOW": window,
        "TILE": QUERY_TILE,
        "REACH": padded(QUERY_TILE + window - 1),
        "CHANNELS": padded(channels),
        "SLICE": min(slice_, padded(value_channels)),
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
    }
