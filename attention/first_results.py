"""The first result of a kernel for each kind of call, beside plain torch's: compilers have made wrong code for some cards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MANY = 4096  # kinds that are remembered
FAR = 0.02  # of what was computed: more than half precision and another order of sums can be apart

_compared: set[tuple[Any, ...]] = set()


def compare(made: Tensor, kind: tuple[Any, ...], reference: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
    """Raise ArithmeticError where `made` is not the reference's; a kind that was right is not looked at again.

    reference: (what `made` should be, what it was added to if to anything). Waits for the device the first time, and does nothing
    while a graph is captured or traced, where nobody may wait.
    """
    if kind in _compared or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return
    try:
        wanted, before = (None if part is None else part.float() for part in reference())
    except torch.OutOfMemoryError:  # the kernel needs less, and has what it needs
        return
    assert wanted is not None
    if not wanted.isfinite().all():  # what it was given says nothing
        return
    size, added = wanted.norm(), (wanted if before is None else wanted - before).norm()
    off = (made.float() - wanted).norm()
    if not off <= FAR * added + torch.finfo(made.dtype).eps * size:
        raise ArithmeticError(f"its result is {float(off / size):.2g} of its size from plain torch's")
    if len(_compared) >= MANY:
        _compared.clear()
    _compared.add(kind)
