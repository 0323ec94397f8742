"""float32 that means float32 on CUDA, for as long as a job runs: no TF32 in convolutions, recurrent layers and products.

torch has two ways to set it: `allow_tf32` with `set_float32_matmul_precision` and, from 2.9 on, `fp32_precision`. The first
refuses to be read, and with it `cudnn.flags`, once another pack has used the second and the two differ; so both are set, each
where it can be read, and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

EXACT = "ieee"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, cuDNN and cuBLAS multiply float32 as such. What was set before is set again behind it, whatever happens."""
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    places: list[Any] = [getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), products]
    newer = [(place, place.fp32_precision) for place in places if hasattr(place, "fp32_precision")]
    switches: tuple[tuple[Callable[[], Any], Callable[[Any], Any], Any], ...] = (
        (lambda: cudnn.allow_tf32, _allow_in_cudnn, False),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    )
    older: list[tuple[Callable[[Any], Any], Any]] = []
    for read, write, off in switches:
        with suppress(RuntimeError):
            older.append((write, read()))
            write(off)
    try:
        for place, _ in newer:
            place.fp32_precision = EXACT
        yield
    finally:
        for write, as_set in older:
            write(as_set)
        for place, precision in newer:
            place.fp32_precision = precision


def _allow_in_cudnn(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
