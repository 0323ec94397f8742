"""The Triton kernels behind `best_match.best_match_fused`; imported only where Triton is.

What they cost for 1920x1080 at half size (32640 places against as many, 256 channels), computed, not measured: 545 GFLOP on
half-precision tensor cores are 0.7 ms at an H200's 790 TFLOP/s, where the same in float32 outside of them takes 8 ms at the
card's 67 and writes and reads 8.5 GB of products. What is moved here is 33 MB of features and 67 MB of maxima, 21 us at
4.8 TB/s. Deciding in float32 costs 64 keys for each group that half precision leaves in doubt.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_maxima(
    theta_pointer,
    phi_pointer,
    maxima_pointer,
    queries,
    keys,
    groups,
    channels,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: QUERIES rows of theta against STEPS times KEYS rows of phi.

    theta [N, C], phi [M, C], both half; maxima [groups, N] float32: the highest product of each query with the GROUP keys
    of each group. It lies group by group, so that neighbouring queries are stored together.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    c = tl.arange(0, CHANNELS)
    theta_at = query.to(tl.int64)[:, None] * channels + c[None, :]
    theta = tl.load(theta_pointer + theta_at, mask=(query < queries)[:, None] & (c < channels)[None, :], other=0.0)
    first = tl.program_id(1) * STEPS
    for step in range(STEPS):
        key = (first + step) * KEYS + tl.arange(0, KEYS)
        phi_at = key.to(tl.int64)[None, :] * channels + c[:, None]
        phi = tl.load(phi_pointer + phi_at, mask=(key < keys)[None, :] & (c < channels)[:, None], other=0.0)
        products = tl.where((key < keys)[None, :], tl.dot(theta, phi), float("-inf"))
        highest = tl.max(tl.reshape(products, (QUERIES, KEYS // GROUP, GROUP)), axis=2)
        group = (first + step) * (KEYS // GROUP) + tl.arange(0, KEYS // GROUP)
        maxima_at = group.to(tl.int64)[None, :] * queries + query[:, None]
        tl.store(maxima_pointer + maxima_at, highest, mask=(query < queries)[:, None] & (group < groups)[None, :])


@triton.jit
def settle(
    theta_pointer,
    phi_pointer,
    order_pointer,
    count_pointer,
    score_pointer,
    index_pointer,
    queries,
    keys,
    groups,
    channels,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: QUERIES rows of theta against the groups of keys that any of them has in doubt, in float32.

    order [tiles, groups] int32: the first count[tile] of a row are those groups, lowest first, so that of equal products
    the first key stays. PRECISION: as `capabilities.float32_products` says.
    """
    tile = tl.program_id(0)
    query = tile * QUERIES + tl.arange(0, QUERIES)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    where = tl.zeros([QUERIES], tl.int32)
    count = tl.load(count_pointer + tile)
    done = 0
    while done < count:
        group = tl.load(order_pointer + tile * groups + done)
        key = group * GROUP + tl.arange(0, GROUP)
        products = tl.zeros([QUERIES, GROUP], tl.float32)
        for part in range(0, CHANNELS, CHUNK):
            c = part + tl.arange(0, CHUNK)
            theta_at = query.to(tl.int64)[:, None] * channels + c[None, :]
            theta = tl.load(
                theta_pointer + theta_at, mask=(query < queries)[:, None] & (c < channels)[None, :], other=0.0
            )
            phi_at = key.to(tl.int64)[None, :] * channels + c[:, None]
            phi = tl.load(phi_pointer + phi_at, mask=(key < keys)[None, :] & (c < channels)[:, None], other=0.0)
            products = tl.dot(theta, phi, products, input_precision=PRECISION)
        products = tl.where((key < keys)[None, :], products, float("-inf"))
        found = tl.max(products, axis=1)
        # The lowest of equals: what else Triton's argmax may give depends on the layout.
        place = tl.min(tl.where(products == found[:, None], key[None, :], 2147483647), axis=1)
        better = found > best
        best = tl.where(better, found, best)
        where = tl.where(better, place, where)
        done += 1
    tl.store(score_pointer + query, best, mask=query < queries)
    tl.store(index_pointer + query, where.to(tl.int64), mask=query < queries)
