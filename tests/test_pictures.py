"""A UNet's convolutional half by our own kernels: their numbers are torch's, in the interpreter and on a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_interpreter import interpret

INTERPRETED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from hotpath.patches.compilation import group_norm_kernel
from hotpath.patches.compilation.group_norm_kernel import group_norm
from hotpath.patches.compilation.picture_kernels import TOLERANCE, trial

cpu = torch.device("cpu")
group_norm_kernel.STRETCHES = 4
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    limit = TOLERANCE.get(dtype, 2e-5)
    # Channels in a group: 1, 10, 20, 3, 1; one place; more places than the stretches hold in one step.
    shapes = (((2, 8, 9, 5), 8), ((1, 20, 1, 1), 2), ((1, 40, 3, 2), 2), ((1, 6, 13, 12), 2), ((3, 1, 5, 7), 1))
    for shape, groups in shapes if dtype == torch.float32 else shapes[2:3]:
        for found, wanted in trial(cpu, dtype, shape, groups):
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), wanted, atol=limit, rtol=limit)

# A mean a thousand times as large as what varies around it leaves the small numbers right.
x = 1000 + torch.randn(1, 8, 13, 12, generator=torch.Generator().manual_seed(0))
for order in (torch.contiguous_format, torch.channels_last):
    given = x.contiguous(memory_format=order)
    made = group_norm(given, 2, torch.ones(8), torch.zeros(8), 1e-5)
    assert made.stride() == given.stride()
    wanted = torch.nn.functional.group_norm(x.double(), 2)
    torch.testing.assert_close(made.double(), wanted, atol=2e-4, rtol=0)

try:
    group_norm(x.transpose(2, 3), 2, torch.ones(8), torch.zeros(8), 1e-5)
except ValueError as error:
    assert "neither of torch's orders" in str(error)
else:
    raise AssertionError("another order was accepted")
print("equal")
"""


def test_kernels_are_torchs_numbers_in_the_interpreter() -> None:
    interpret(INTERPRETED, Path(__file__).parent / "support")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 320, 128, 128), 32), ((2, 2560, 32, 32), 32), ((1, 960, 75, 53), 32)]
)
def test_kernels_are_torchs_numbers_on_the_gpu(shape, groups, dtype):
    from hotpath.patches.compilation import picture_kernels

    card = torch.device("cuda", 0)
    assert picture_kernels.kernels_missing(card, dtype) == ""
    limit = picture_kernels.TOLERANCE[dtype]
    for found, wanted in picture_kernels.trial(card, dtype, shape, groups):
        torch.testing.assert_close(found.float(), wanted, atol=limit, rtol=limit)
