"""Whether this machine runs our kernels for pictures, and in which order its convolutions are faster: both tried once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.capabilities import dtype_name
from ...attention.choice import fastest, milliseconds
from ...host.errors import kind_and_line

log = logging.getLogger("hotpath.compile")

HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
TRIAL = (2, 640, 64, 64)  # SDXL's middle level at 1024x1024 with CFG
allow_interpreter = False  # for tests


@functools.cache
def kernels_missing(device: torch.device, dtype: torch.dtype) -> str:
    """Why the model's own layers run; '' where our kernels do. Tried once, against torch. Waits for the device."""
    if device.type != "cuda" or dtype not in HALF:
        return f"there are none for {dtype_name(dtype)} on {device.type}"
    try:
        from .group_norm_kernel import INTERPRETED
    except ImportError:
        return "Triton is not installed"
    try:
        if INTERPRETED and not allow_interpreter:
            return "Triton interprets, which is for tests"
        for found, wanted in trial(device, dtype):
            if not torch.allclose(found.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]):
                return "its numbers were not torch's"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a card that Triton does not know
        log.warning("pictures: the model's own layers, because our kernels failed", exc_info=True)
        return kind_and_line(error)
    return ""


def trial(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int] = (2, 40, 9, 5), groups: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """What our kernels make of some numbers, and torch in float32, in both orders and with all that can be added."""
    from .group_norm_kernel import add, group_norm

    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    samples, channels = shape[:2]
    weight, bias, offset, more = (random(channels) for _ in range(4))
    added = random(samples, channels)
    for order in (torch.contiguous_format, torch.channels_last):
        x, y = ((random(*shape) + 3).contiguous(memory_format=order) for _ in range(2))
        plain = F.group_norm(x.float(), groups, weight.float(), bias.float(), 1e-5)
        yield group_norm(x, groups, weight, bias, 1e-5), plain
        moved = x.float() + (added.float() + offset.float())[..., None, None]
        wanted = F.silu(F.group_norm(moved, groups, weight.float(), bias.float(), 1e-5))
        yield group_norm(x, groups, weight, bias, 1e-5, silu=True, added=added, offset=offset), wanted
        sums = x.float() + y.float()
        yield add(x, y), sums
        yield add(x, y, offset, more), sums + (offset.float() + more.float())[:, None, None]


@functools.cache
def channels_last_is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Of a 3x3 convolution as UNets have them; measured once. Waits for the device."""
    channels = TRIAL[1]
    x = torch.randn(TRIAL, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    times = {}
    for name, order in (("as given", torch.contiguous_format), ("channels last", torch.channels_last)):
        given, kernel = x.contiguous(memory_format=order), weight.contiguous(memory_format=order)
        times[name] = milliseconds(functools.partial(F.conv2d, given, kernel, padding=1), device)
    choice = fastest(times)
    log.info("convolutions %s on %s: %s", choice.backend, device, choice.describe())
    return choice.backend == "channels last"
