"""The first stages of `card.py`: the card's own rates, the Triton kernels on true sizes, the tests that need a card.

python benchmarks/card_checks.py health|kernels|tests [--json FILE] [--tiny]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkout import ROOT
from quiet import alone
from report import processor, versions
from torch import Tensor
from torch.nn import functional

ROW = "row: "  # begins the line of a result
PACKAGES = (
    "torch", "triton", "transformers", "diffusers", "torchao", "numpy", "onnx", "onnxruntime", "insightface", "av",
    "scikit-image", "scenedetect", "comfy-kitchen", "comfy-aimdo", "torchsde", "sageattention",
)  # fmt: skip


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


def copy_rate(numbers: int, device: torch.device) -> float:
    """Bytes per second, read and written."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 9)


def health(tiny: bool) -> dict[str, Any]:
    """The two rates that bound everything else, on random data: zeros would run faster."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found: dict[str, Any] = {"device": processor(device), "cores": os.cpu_count()}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "compute capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory, GiB": round(total / 2**30, 1),
            "free at the start, GiB": round(free / 2**30, 1),
        }
    else:
        found["note"] = "no CUDA: these are the CPU's rates"
    with alone():
        found["copy, GB/s read and written"] = copy_rate((1 << 20) if tiny else (1 << 30), device) / 1e9
        side = 256 if tiny else 8192
        for kind in dict.fromkeys((dtype, torch.float16 if device.type == "cuda" else dtype, torch.float32)):
            a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
            rate = 2 * side**3 / seconds_of(lambda a=a, b=b: a @ b, 9) / 1e12  # type: ignore[misc]
            found[f"{side}x{side}x{side} {str(kind).removeprefix('torch.')}, TFLOP/s"] = rate
        small = torch.zeros(1, device=device)
        start = time.perf_counter()
        for _ in range(1000):
            small.add_(1)
        found["launch, us of Python"] = (time.perf_counter() - start) * 1e3
    return found | versions(*PACKAGES)


def kernels(tiny: bool, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every kernel against its definition in higher precision, and its time beside the same in torch."""
    found: dict[str, Any] = {"wrong": 0, "rows": []}
    for check in CHECKS:
        # Each in a process of its own: after an illegal access nothing runs in the old one.
        command = [sys.executable, __file__, "kernels", "--only", check, *(["--tiny"] if tiny else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith(ROW):
                    row = json.loads(line.removeprefix(ROW))
                    found["wrong"] += not row["result"].startswith("agrees")
                    found["rows"].append(row)
                    save(found)
        if process.returncode:
            found["wrong"] += 1
            found["rows"].append({"kernel": check, "result": f"ended with {process.returncode}"})
            save(found)
    return found


def kernel(check: str, tiny: bool) -> None:
    """The rows of one check, printed one by one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = CHECKS[check](device, tiny)
    while True:
        try:
            row = next(made, None)
        except Exception as error:
            traceback.print_exc()
            row = {"kernel": f"{check}, the next one", "result": f"fails: {type(error).__name__}: {str(error)[:200]}"}
        if row is None:
            return
        print(ROW + json.dumps(row), flush=True)


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


CHECKS = {
    check.__name__: check
    for check in (
        token_attention, window_attention, decode_attention, best_match, memory_read, picture_norms, packed_products,
        delta_rule,
    )
}  # fmt: skip


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


def tests(tiny: bool, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu` over the files that hold such tests, in several processes: one that crashes takes one file along."""
    from card_plan import gpu_tests

    files = [str(ROOT / "tests" / "test_attention_local_window.py")] if tiny else list(gpu_tests())
    report = Path(os.environ.get("TMPDIR", "/tmp")) / f"card_tests_{os.getpid()}.xml"
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--timeout=300", "-p", "no:cacheprovider", "--durations=8",
        f"--junitxml={report}", *files,
    ]  # fmt: skip
    several = min(4, (os.cpu_count() or 1) // 2, len(files))
    if several > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(several), "--dist", "loadfile"]
    process = subprocess.Popen(command, cwd=ROOT)
    found: dict[str, Any] = {}
    try:
        found["exit code"] = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(2)  # pytest then writes what it knows
        found["exit code"] = f"stopped after {seconds:.0f} s"
        process.wait(8)
    cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    report.unlink(missing_ok=True)
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    found |= {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "failures": [_failure(case) for case in bad],
    }
    if len(cases) == len(skipped):
        del found["failed"]  # nothing was tested
    return found


def _failure(case: ElementTree.Element) -> str:
    found = case.find("failure")
    element = found if found is not None else case.find("error")
    message = (element.get("message") or element.text or "") if element is not None else ""
    return f"{case.get('classname')}::{case.get('name')}: {' '.join(message.split())[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("health", "kernels", "tests"))
    parser.add_argument("--only", choices=CHECKS, help="of the kernels this check alone, its rows printed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    def save(found: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))

    if options.what == "tests":
        found = tests(options.tiny, options.seconds)
    else:
        with torch.inference_mode():
            if options.only:
                kernel(options.only, options.tiny)
                return 0
            found = health(options.tiny) if options.what == "health" else kernels(options.tiny, save)
    save(found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
