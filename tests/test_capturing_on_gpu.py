"""CUDA graphs on a card, under torch's own allocator and under cudaMallocAsync: in processes of their own, which settle that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_interpreter import run_apart

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
import torch
from hotpath.host.capturing import GraphMemory, captured, trim

MIB = 1 << 20
device = torch.device("cuda", torch.cuda.current_device())
assert torch.cuda.get_allocator_backend() == sys.argv[2], torch.cuda.get_allocator_backend()
x = torch.randn(64, 4096, device=device, dtype=torch.half)  # few rows: products that are cut along their depth need a workspace
weight = torch.randn(4096, 4096, device=device, dtype=torch.half) / 64
memory = GraphMemory()


def step():
    return (x @ weight) @ weight


def waits():
    made = step()
    made.sum().item()
    return made


def free():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


first, out = captured(step, 1, memory=memory)
for _ in range(2):
    try:
        captured(waits, 1, memory=memory)
    except RuntimeError:
        pass
    else:
        sys.exit("a wait was captured")
# What was there before the capture that broke off is given back.
large = torch.empty(1024 * MIB, dtype=torch.uint8, device=device)
held = free()
del large
assert free() - held > 900 * MIB, (free() - held) / MIB
# Others come and go, with workspaces of their own.
second, other = captured(step, 1, memory=memory)
for _ in range(40):
    captured(step, 1)
captured(step, 1, memory=memory)
spoil = [torch.full((32 * MIB,), 255, dtype=torch.uint8, device=device) for _ in range(16)]
for graph, result in ((first, out), (second, other)):
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(result, step(), atol=2e-2, rtol=2e-2)
assert all(bool((block == 255).all()) for block in spoil)
del spoil


def wide():
    return torch.empty(1024 * MIB, dtype=torch.uint8, device=device).fill_(1)[:1].clone()


third, small = captured(wide, 1, memory=memory)
third.replay()
before = free()
del third, small, first, out, second, other, graph, result
trim(device)
assert free() - before > 900 * MIB, (free() - before) / MIB
print("equal")
"""


@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_graphs_leave_the_allocator_and_each_other_alone(backend: str) -> None:
    done = run_apart(
        SCRIPT, Path(__file__).parent, Path(backend), PYTORCH_CUDA_ALLOC_CONF=f"backend:{backend}"
    )  # fmt: skip
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout + done.stderr[-3000:]
