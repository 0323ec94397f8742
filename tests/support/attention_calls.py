"""Calls of attention, devices, and dispatchers over backends whose times and libraries a test chooses."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from hotpath.attention import compiled
from hotpath.attention.capabilities import (
    AttentionCall,
    Backend,
    DeviceFacts,
)
from hotpath.attention.choice import MeasuredChoices
from hotpath.attention.dispatch import (
    BACKENDS,
    AttentionDispatcher,
    AttentionPolicy,
    attend,
)
from hotpath.attention.events import AttentionLog
from hotpath.attention.quantized_backends import QUANTIZED_BACKENDS
from hotpath.attention.torch_backends import TORCH_BACKENDS, sdpa

CPU = torch.device("cpu")
HOPPER = DeviceFacts("cuda", "NVIDIA H200", (9, 0))
ADA = DeviceFacts("cuda", "NVIDIA GeForce RTX 4090", (8, 9))
TURING = DeviceFacts("cuda", "NVIDIA GeForce RTX 2080", (7, 5))
BLACKWELL = DeviceFacts("cuda", "NVIDIA GeForce RTX 5090", (12, 0))
AUTO = AttentionPolicy()
BY_NAME = {backend.name: backend for backend in BACKENDS}


def qkv(
    batch: int = 2,
    heads: int = 4,
    queries: int = 70,
    keys: int = 90,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    key_heads: int | None = None,
    value_width: int | None = None,
    device: torch.device = CPU,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (
        (batch, heads, queries, width),
        (batch, key_heads or heads, keys, width),
        (batch, key_heads or heads, keys, value_width or width),
    )
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def masks(queries: int = 70, keys: int = 90, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(1, 1, queries, keys, generator=generator) > 0.3
    return {
        "bool": allowed,
        "keys only": allowed[:, :, :1],
        "per sample": torch.rand(2, 1, queries, keys, generator=generator) > 0.3,
        "per head": torch.rand(2, 4, queries, keys, generator=generator) > 0.3,
        "float": torch.randn(1, 1, queries, keys, generator=generator).to(dtype),
    }


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


def fake(name: str, run=sdpa, **fields) -> Backend:
    return Backend(
        name, name, run, devices=("cpu", "cuda"), dtypes=frozenset({torch.float32, torch.bfloat16}), **fields
    )


class Clock:
    """Says how long each backend takes, and what was timed."""

    def __init__(self, **times: float) -> None:
        self.times, self.timed = times, []

    def __call__(self, run, device) -> float:
        run()
        name = run.func.__name__
        self.timed.append(name)
        return self.times[name]


def named(name: str, inner=sdpa):
    def run(q, k, v, mask, scale):
        return inner(q, k, v, mask, scale)

    run.__name__ = name
    return run


def measured(tmp_path=None, versions=None, backends=None, device=HOPPER, **times) -> tuple[AttentionDispatcher, Clock]:
    clock = Clock(**(times or {"sdpa_cudnn": 3.0, "sdpa_flash": 1.0, "flash2": 2.0}))
    backends = backends or [fake(name, named(name)) for name in clock.times]
    choices = MeasuredChoices(tmp_path, versions or {"torch": "1"})
    return AttentionDispatcher([*backends, *TORCH_BACKENDS[:1]], choices, lambda _: device, clock), clock


def with_library(monkeypatch, module=None, device=HOPPER) -> AttentionDispatcher:
    """Install a fake library; a dispatcher that believes in a device, on which comfy-kitchen has no kernel."""
    for name in ("sageattention", "sageattn3"):
        monkeypatch.setitem(sys.modules, name, None)
    if module is not None:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return AttentionDispatcher([TORCH_BACKENDS[0], *QUANTIZED_BACKENDS], device=lambda _: device)


def call(**changes) -> AttentionCall:
    return replace(AttentionCall(CPU, torch.bfloat16, 2, 24, 24, 4096, 4096, 128, 128), **changes)


def flags() -> tuple:
    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        tuple(getattr(torch._C, "_get_sdp_priority_order", list)()),  # from torch 2.6 on
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


def biased(dtype=torch.float16, **sizes):
    """Keys with a direction that all of them share, as real ones have."""
    q, k, v = qkv(dtype=dtype, **sizes)
    return q, k + 16 * torch.sin(torch.arange(k.shape[-1], dtype=torch.float32)).to(dtype), v


def compiled_attention(policy: str, log: AttentionLog | None, backend: str = "aot_eager", dynamic: bool | None = None):
    import torch._dynamo

    torch._dynamo.reset()
    compiled.prepare()
    chosen = AttentionPolicy(policy)

    def block(q, k, v, mask=None):
        return 2 * attend(q, k, v, mask, policy=chosen, record=log)

    return torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
