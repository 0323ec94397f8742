"""The Triton kernels on true sizes, each beside its definition in higher precision and the same in torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from quiet import alone
from torch import Tensor
from torch.nn import functional


def seconds_of(run: Callable[[], object], rounds: int) -> float:
    """Median seconds of one call by the device's own clock; by the host's where there is no CUDA.

    The device is kept busy while Python queues the call, so that a short kernel is not timed as the time of its launch.
    """
    for _ in range(3):
        run()
    if not torch.cuda.is_available():
        spans = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            spans.append(time.perf_counter() - start)
        return statistics.median(spans)
    pairs = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1000


def _row(
    name: str,
    error: float,
    allowed: float,
    fused: Callable[[], object],
    plain: Callable[[], object] | None,
    floor_bytes: float,
) -> dict[str, Any]:
    """plain: the same in torch, None where it would need more memory than there is."""
    agrees = error <= allowed  # not so for NaN
    with alone():
        torch_seconds = seconds_of(plain, 5) if plain else None
        seconds = seconds_of(fused, 15)
    row = {
        "kernel": name,
        "result": f"agrees, error {error:.1e}" if agrees else f"DIFFERS: error {error:.1e}, allowed {allowed:.0e}",
        "us": round(seconds * 1e6, 1),
        "GB/s of the least bytes": round(floor_bytes / seconds / 1e9, 1),
    }
    if torch_seconds is not None:
        row |= {"torch, us": round(torch_seconds * 1e6, 1), "times as fast": round(torch_seconds / seconds, 2)}
    return row


def token_attention(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    from hotpath.attention.token_attention import attend_tokens, attend_tokens_reference

    sizes = ((64, 2, 64, 16),) if tiny else ((4096, 10, 64, 16), (1024, 20, 64, 16), (4096, 8, 160, 64))
    for queries, heads, dim, tokens in sizes:
        for dtype, allowed in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
            width = heads * dim
            q, out = torch.randn(2, 2, queries, width, device=device).to(dtype)
            keys, values = torch.randn(2, 2, tokens, width, device=device).to(dtype)
            table = (torch.tensor([[0, 1]], dtype=torch.int32, device=device), torch.full((1, 2), 0.8, device=device))
            wanted = attend_tokens_reference(q.double(), out.double(), keys.double(), values.double(), *table, heads)
            made = attend_tokens(q, out, keys, values, *table, heads)
            yield _row(
                f"token attention, 2 x {queries} x {heads} x {dim}, {tokens} tokens, {dtype}".replace("torch.", ""),
                _error(made, wanted), allowed,
                lambda q=q, out=out, k=keys, v=values, t=table, h=heads: attend_tokens(q, out, k, v, *t, h),
                lambda q=q, out=out, k=keys, v=values, t=table, h=heads: attend_tokens_reference(q, out, k, v, *t, h),
                3 * q.nbytes,
            )  # fmt: skip


def window_attention(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    from hotpath.attention import local_window

    for height, width in ((6, 9),) if tiny else ((28, 49), (70, 126)):
        for dtype, allowed in ((torch.float16, 5e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
            frames, channels, values, window = (1, 16, 32, 15) if tiny else (5, 64, 1024, 15)
            q = torch.randn(frames, channels, height, width, device=device) * channels**-0.5
            k, v = (torch.randn(1, c, height, width, device=device) for c in (channels, values))
            bias = torch.randn(frames, window * window, height, width, device=device)
            q, k, v, bias = (x.to(memory_format=torch.channels_last) for x in (q, k, v.to(dtype), bias))
            fused, _ = local_window.select_local_window(device)
            # Equal to the definition, which would take 8 GB for its unfolded values.
            wanted = local_window.local_window_banded(q, k, v.float(), bias, window)
            yield _row(
                f"window attention, {frames} x {height} x {width}, {dtype}".replace("torch.", ""),
                _error(fused(q, k, v, bias, window), wanted), allowed,
                lambda f=fused, q=q, k=k, v=v, b=bias, w=window: f(q, k, v, b, w),
                lambda q=q, k=k, v=v, b=bias, w=window: local_window.local_window_banded(q, k, v, b, w),
                q.nbytes + k.nbytes + v.nbytes + bias.nbytes + frames * v.nbytes,
            )  # fmt: skip


def decode_attention(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """One new token of each row over its cache, as Qwen3-VL 4B decodes: 8 key heads with 4 queries each."""
    from hotpath.vision_language.decode_attention import ATTEND, PARTS, TORCH, attend_reference

    attend = ATTEND[PARTS if device.type == "cuda" else TORCH]
    for batch, length in ((2, 96),) if tiny else ((1, 1536), (16, 1536), (1, 16384)):
        for dtype, allowed in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
            heads, groups, dim, last = 8, 4, 128, length * 3 // 4
            q = torch.randn(batch, heads, groups, dim, device=device).to(dtype)
            keys, values = torch.randn(2, batch, heads, length, dim, device=device).to(dtype)
            bias = torch.zeros(batch, 1, 1, length, device=device, dtype=dtype)
            bias[..., last + 1 :] = float("-inf")
            slot = torch.full((1,), last, device=device)
            wanted = attend_reference(q.double(), keys.double(), values.double(), bias.double(), slot)
            yield _row(
                f"decode attention, {batch} rows over {last + 1} of {length}, {dtype}".replace("torch.", ""),
                _error(attend(q, keys, values, bias, slot), wanted), allowed,
                lambda q=q, k=keys, v=values, b=bias, s=slot: attend(q, k, v, b, s),
                lambda q=q, k=keys, v=values, b=bias, s=slot: attend_reference(q, k, v, b, s),
                2 * q.nbytes + (keys.nbytes + values.nbytes) * (last + 1) // length,
            )  # fmt: skip


def best_match(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    from hotpath.attention import best_match as matching

    for places in (200,) if tiny else (5184, 32640):
        # A smooth field of noise: neighbours are alike, as in a picture, so that near ties are common.
        theta, phi = (_smooth(places, 256, seed, device) for seed in (1, 2))
        search = matching.MeasuredMatch()
        score, index = search(theta, phi)
        exact_score, _ = matching.best_match(theta, phi)
        reached = torch.einsum("nc,nc->n", theta.double(), phi[index].double())
        error = max(float((reached - exact_score.double()).abs().max()), float((score - exact_score).abs().max()))
        yield _row(
            f"best match, {places} x {places} x 256 ({search.status})", error, 2e-6, lambda s=search, t=theta, p=phi: s(t, p),
            lambda t=theta, p=phi: matching.best_match(t, p), theta.nbytes + phi.nbytes,
        )  # fmt: skip


def memory_read(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    from hotpath.attention import topk_memory

    for queries, keys in ((50, 400),) if tiny else ((5 * 1372, 23720), (8820, 98200)):
        query, memory = (torch.randn(n, 64, device=device) for n in (queries, keys))
        selection, shrinkage = torch.rand(queries, 64, device=device), 1 + torch.rand(keys, device=device)
        values = torch.randn(keys, 1024, device=device, dtype=torch.float32 if device.type == "cpu" else torch.float16)
        few = slice(0, min(queries, 64))
        wanted = topk_memory.read_top_k_reference(query[few], selection[few], memory, shrinkage, values, 30).readout
        run = lambda q=query, s=selection, m=memory, w=shrinkage, v=values: topk_memory.read_top_k(q, s, m, w, v, 30)  # noqa: E731
        yield _row(
            f"memory read, {queries} queries, {keys} keys", _error(run().readout[few], wanted), 5e-3, run, None,
            (query.nbytes + selection.nbytes + memory.nbytes + values.nbytes),
        )  # fmt: skip


def picture_norms(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """GroupNorm with SiLU and what is added before it, as SDXL's residual blocks have it at 1024x1024 with CFG."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor) -> Tensor:
        return functional.silu(functional.group_norm(x + added[..., None, None], 32, weight, bias, 1e-5))

    for channels, side in ((64, 4),) if tiny else ((320, 128), (640, 64), (1280, 32), (2560, 32), (960, 128)):
        for order in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(2, channels, side, side, device=device, dtype=torch.float16).contiguous(memory_format=order)
            weight, bias = torch.randn(2, channels, device=device, dtype=torch.float16)
            added = torch.randn(2, channels, device=device, dtype=torch.float16)
            fused = plain
            if device.type == "cuda":
                from hotpath.patches.compilation.group_norm_kernel import group_norm

                fused = lambda x, w, b, a: group_norm(x, 32, w, b, 1e-5, silu=True, added=a)  # noqa: E731
            wanted = plain(x.double(), weight.double(), bias.double(), added.double())
            yield _row(
                f"norm of 2 x {channels} x {side} x {side}, {'channels last' if order == torch.channels_last else 'planes'}",
                _error(fused(x, weight, bias, added), wanted), 2e-3,
                lambda f=fused, x=x, w=weight, b=bias, a=added: f(x, w, b, a),
                lambda x=x, w=weight, b=bias, a=added: plain(x, w, b, a),
                3 * x.nbytes,
            )  # fmt: skip


@torch.no_grad()
def packed_products(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """One token with a matrix of Qwen3-VL 4B's feed-forward part, in the forms that a decode step reads."""
    from hotpath.vision_language.decode_products import Part
    from hotpath.vision_language.gguf.packing import Packer
    from hotpath.vision_language.quantization import Int4Linear, ScaledLinear

    outputs, inputs = (64, 512) if tiny else (19456, 2560)
    plain = torch.nn.Linear(inputs, outputs, bias=False)
    packer = Packer("none", torch.device("cuda"), torch.bfloat16)
    forms: dict[str, Any] = {
        "bfloat16": plain.to(torch.bfloat16), "int8": ScaledLinear(plain, torch.int8), "int4": Int4Linear(plain),
        "float8": ScaledLinear(plain, torch.float8_e4m3fn),
    }  # fmt: skip
    forms |= {
        name: packer.layer([_blocks(kind, outputs, inputs)])
        for name, kind in (("Q4_K", 12), ("Q6_K", 14), ("Q3_K", 11))
    }
    for name, layer in forms.items():
        part, x = Part(layer.to(device)), torch.randn(inputs, device=device, dtype=torch.bfloat16)
        result = torch.empty(outputs, device=device, dtype=torch.bfloat16)
        wanted = functional.linear(x.float(), layer.weight.float()) if part.plain else layer(x.float())
        by_torch = lambda layer=layer, x=x: layer(x)  # noqa: E731
        if device.type != "cuda":
            yield _row(f"product with {name}", _error(by_torch(), wanted), 2e-2, by_torch, None, part.nbytes)
            continue
        for config in part.configs:
            part.config = config
            part(x, result)
            yield _row(
                f"product with {name}, {outputs} x {inputs}, {config}", _error(result, wanted), 1e-2,
                lambda p=part, x=x, r=result: p(x, r), by_torch, part.nbytes,
            )  # fmt: skip


@torch.no_grad()
def delta_rule(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A layer of linear attention with Qwen3.5 4B's heads between its products: one token, and a question with a picture."""
    from hotpath.vision_language import linear_attention

    keys, heads, key, value, reach = (1, 2, 16, 16, 4) if tiny else (16, 32, 128, 128, 4)
    channels = 2 * keys * key + heads * value

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    weights = linear_attention.Weights(random(channels, reach), None, random(heads), random(heads), random(value), 1e-6)
    for n in (1, 40) if tiny else (1, 32, 1100):
        given = random(1, n, channels), random(1, n, heads * value), random(1, n, heads), random(1, n, heads)
        seen, state = random(1, channels, reach), torch.zeros(1, heads, key, value, device=device)

        def run(way: Any, given: Any = given, seen: Tensor = seen, state: Tensor = state) -> Tensor:
            made: Tensor = way(*given, weights, seen.clone(), state.clone(), None)
            return made

        wanted = run(linear_attention.by_torch, [part.float() for part in given], seen.float())
        by_torch = lambda run=run: run(linear_attention.by_torch)  # noqa: E731
        ours = (lambda run=run: run(linear_attention.by_kernels)) if device.type == "cuda" else by_torch
        moved = sum(part.nbytes for part in given) + 4 * state.nbytes
        yield _row(
            f"linear attention, {n} tokens",
            _error(ours(), wanted),
            2e-2,
            ours,
            None if ours is by_torch else by_torch,
            moved,
        )


def _blocks(kind: int, outputs: int, inputs: int) -> Any:
    """A matrix of a GGUF's type with random codes and scales."""
    from hotpath.vision_language.gguf.matrix import Matrix
    from hotpath.vision_language.gguf.types import TYPES

    found = TYPES[kind]
    blocks = torch.randint(256, (outputs * inputs // found.values, found.nbytes), dtype=torch.uint8)
    for place in {12: (1, 3), 14: (209,), 11: (109,)}[kind]:  # upper bytes of float16 numbers
        blocks[:, place] = 0x28
    return Matrix(found, blocks, outputs, inputs)


def _smooth(places: int, channels: int, seed: int, device: torch.device) -> Tensor:
    """[places, channels] of unit length, each like its neighbours."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, max(places // 8, 2), generator=random)
    fine = torch.nn.functional.interpolate(coarse, places, mode="linear")[0].T.contiguous().to(device)
    return torch.nn.functional.normalize(fine, dim=1)


def _error(made: Tensor, wanted: Tensor) -> float:
    """||made - wanted|| / ||wanted||."""
    wanted = wanted.double()
    return float((made.double() - wanted).norm() / wanted.norm())


CHECKS = {
    check.__name__: check
    for check in (
        token_attention, window_attention, decode_attention, best_match, memory_read, picture_norms, packed_products,
        delta_rule,
    )
}  # fmt: skip
