"""GroupNorm of pictures with what stands around it in a UNet, in Triton, whichever way channels and places lie in memory.

Three launches: sums by channel and stretch of places, from them a factor and an offset for every channel, and one pass
over the picture. What is added to all places of a channel before the norm (a convolution's bias, a timestep's embedding)
only moves that channel's mean, so it costs no pass of its own.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...attention.capabilities import FUSES

STRETCHES = 64  # of places, at most: what one program of the second kernel reads
FACTOR_WARPS = 8  # with fewer, the 80 channels of SDXL's widest groups spill
INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


@triton.jit
def _moments(
    X, MEANS, SQUARES, places, channels, x_sample, x_channel, x_place,
    STEPS: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    stretch, stretches = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    held = channel < channels
    start = stretch * (STEPS * PLACES)
    end = tl.minimum(start + STEPS * PLACES, places)
    base = X + sample * x_sample + channel.to(tl.int64) * x_channel
    # Around a number of the channel itself, squares of differences do not drown in those of the mean.
    near = tl.load(base + start.to(tl.int64) * x_place, mask=held, other=0.0).to(tl.float32)
    sums = tl.zeros([PLACES, CHANNELS], tl.float32)
    squares = tl.zeros([PLACES, CHANNELS], tl.float32)
    for step in range(STEPS):
        place = start + step * PLACES + tl.arange(0, PLACES)
        inside = (place < end)[:, None] & held[None, :]
        at = base[None, :] + place.to(tl.int64)[:, None] * x_place
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - near[None, :], 0.0)
        sums += x
        squares += x * x
    count = (end - start).to(tl.float32)
    total = tl.sum(sums, 0)
    out = (sample * stretches + stretch) * channels + channel
    tl.store(MEANS + out, near + total / count, mask=held)
    tl.store(SQUARES + out, tl.maximum(tl.sum(squares, 0) - total * total / count, 0.0), mask=held)


@triton.jit
def _factors(
    MEANS, SQUARES, WEIGHT, BIAS, ADDED, OFFSETS, FACTORS, SHIFTS, eps, places, channels, width, stretches, per_stretch,
    added_sample, ADDS: tl.constexpr, OFFSET: tl.constexpr, STRETCHES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, WIDTH)
    channel = group * width + inner
    held = inner < width
    stretch = tl.arange(0, STRETCHES)
    inside = (stretch < stretches)[:, None] & held[None, :]
    at = (sample * stretches + stretch)[:, None] * channels + channel[None, :]
    moved = tl.zeros([WIDTH], tl.float32)
    if ADDS:
        moved += tl.load(ADDED + sample * added_sample + channel, mask=held, other=0.0).to(tl.float32)
    if OFFSET:
        moved += tl.load(OFFSETS + channel, mask=held, other=0.0).to(tl.float32)
    means = tl.load(MEANS + at, mask=inside, other=0.0) + moved[None, :]
    counts = tl.minimum(places - stretch * per_stretch, per_stretch).to(tl.float32)
    counts = tl.where(inside, counts[:, None], 0.0)
    number = tl.sum(tl.sum(counts, 1), 0)
    mean = tl.sum(tl.sum(counts * means, 1), 0) / number
    apart = tl.where(inside, means - mean, 0.0)
    squares = tl.load(SQUARES + at, mask=inside, other=0.0) + counts * apart * apart
    deviation = tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / number + eps)
    factor = tl.load(WEIGHT + channel, mask=held, other=0.0).to(tl.float32) / deviation
    shift = tl.load(BIAS + channel, mask=held, other=0.0).to(tl.float32) + (moved - mean) * factor
    out = sample * channels + channel
    tl.store(FACTORS + out, factor, mask=held)
    tl.store(SHIFTS + out, shift, mask=held)


@triton.jit
def _tile_of_program(
    sample, places, channels, x_sample, x_channel, x_place, PLACES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A program's channels and which of them there are; where its numbers lie, and which of them there are."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    held = channel < channels
    at = sample * x_sample + place.to(tl.int64)[:, None] * x_place + channel.to(tl.int64)[None, :] * x_channel
    return channel, held, at, (place < places)[:, None] & held[None, :]


@triton.jit
def _apply(
    X, FACTORS, SHIFTS, OUT, places, channels, x_sample, x_channel, x_place,
    SILU: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    channel, held, at, inside = _tile_of_program(
        sample, places, channels, x_sample, x_channel, x_place, PLACES, CHANNELS
    )
    factor = tl.load(FACTORS + sample * channels + channel, mask=held, other=0.0)
    shift = tl.load(SHIFTS + sample * channels + channel, mask=held, other=0.0)
    made = tl.load(X + at, mask=inside, other=0.0).to(tl.float32) * factor[None, :] + shift[None, :]
    if SILU:
        made = made / (1.0 + tl.exp(-made))
    tl.store(OUT + at, made.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _add(
    X, Y, OFFSETS, MORE, OUT, places, channels, x_sample, x_channel, x_place,
    OFFSET: tl.constexpr, MORE_OFFSET: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    channel, held, at, inside = _tile_of_program(
        sample, places, channels, x_sample, x_channel, x_place, PLACES, CHANNELS
    )
    made = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    made += tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        made += tl.load(OFFSETS + channel, mask=held, other=0.0).to(tl.float32)[None, :]
    if MORE_OFFSET:
        made += tl.load(MORE + channel, mask=held, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + at, made.to(OUT.dtype.element_ty), mask=inside)


def _tile(x: Tensor) -> tuple[int, int]:
    """Places and channels of a program, so that neighbours in memory are read together."""
    return (32, 64) if x.stride(1) == 1 else (1024, 2)


def _of(x: Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    """Samples, channels, places, and the strides of the three. Raises ValueError where places are not one row."""
    samples, channels, height, width = x.shape
    if x.numel() == 0 or not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(
            f"a picture of shape {tuple(x.shape)} and strides {x.stride()} is in neither of torch's orders"
        )
    last = x.stride(1) == 1 and channels > 1
    strides = (channels * height * width, 1, channels) if last else (channels * height * width, height * width, 1)
    return samples, channels, height * width, strides


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    added: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """group_norm(x + added + offset), and its SiLU if asked for: like x, in its order.

    x: [N, C, H, W], contiguous or channels last. weight, bias, offset: [C]; added: [N or 1, C], its rows without gaps.
    Sums are float32's. Raises ValueError for other orders.
    """
    samples, channels, places, strides = _of(x)
    tile = _tile(x)
    # Powers of two, so that few sizes of pictures need a program of their own.
    steps = triton.next_power_of_2(triton.cdiv(places, STRETCHES * tile[0]))
    stretches = triton.cdiv(places, steps * tile[0])
    sums = x.new_empty((2, samples, stretches, channels), dtype=torch.float32)
    made = x.new_empty((2, samples, channels), dtype=torch.float32)
    blocks = triton.cdiv(channels, tile[1])
    _moments[(stretches, blocks, samples)](
        x, sums[0], sums[1], places, channels, *strides,
        STEPS=steps, PLACES=tile[0], CHANNELS=tile[1], num_warps=4, **FUSES,
    )  # fmt: skip
    width = channels // groups
    _factors[(groups, samples)](
        sums[0], sums[1], weight, bias, weight if added is None else added, weight if offset is None else offset,
        made[0], made[1], eps, places, channels, width, stretches, steps * tile[0],
        0 if added is None or len(added) == 1 else channels, ADDS=added is not None, OFFSET=offset is not None,
        STRETCHES=STRETCHES, WIDTH=triton.next_power_of_2(width), num_warps=FACTOR_WARPS, **FUSES,
    )  # fmt: skip
    out = torch.empty_like(x)
    _apply[(triton.cdiv(places, tile[0]), blocks, samples)](
        x,
        made[0],
        made[1],
        out,
        places,
        channels,
        *strides,
        SILU=silu,
        PLACES=tile[0],
        CHANNELS=tile[1],
        num_warps=4,
        **FUSES,
    )
    return out


def add(x: Tensor, y: Tensor, offset: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """x + y + offset + more, like x. x, y: [N, C, H, W] in the same order; offset, more: [C]."""
    samples, channels, places, strides = _of(x)
    if y.shape != x.shape or y.stride() != x.stride():
        y = torch.empty_like(x).copy_(y.expand_as(x))
    tile = _tile(x)
    out = torch.empty_like(x)
    _add[(triton.cdiv(places, tile[0]), triton.cdiv(channels, tile[1]), samples)](
        x, y, x if offset is None else offset, x if more is None else more, out, places, channels, *strides,
        OFFSET=offset is not None, MORE_OFFSET=more is not None, PLACES=tile[0], CHANNELS=tile[1], num_warps=4, **FUSES,
    )  # fmt: skip
    return out
