"""Work that looks at one pixel at a time, done on a CPU for some rows of the pictures at a time.

Formulas of colour make a dozen pictures on their way. Whole, each is fetched from the system, written to memory and read from
it again; of a strip they stay in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

NUMBERS = 3 << 16  # in a strip of the largest picture


def by_strips(work: Callable[..., Tensor], *pictures: Tensor, rows: int = -2, made: int = -2) -> Tensor:
    """work(*pictures), which must not look beyond a pixel, nor change what it is given.

    rows: the dimension, from the end, that counts the rows of each of the pictures; made: of the result.
    """
    count, numbers = pictures[0].shape[rows], max(picture.numel() for picture in pictures)
    step = max(1, NUMBERS * count // max(1, numbers))
    if any(picture.device.type != "cpu" or picture.requires_grad for picture in pictures) or step >= count:
        return work(*pictures)
    result: Tensor | None = None
    for first in range(0, count, step):
        part = work(*(picture.narrow(rows, first, min(step, count - first)) for picture in pictures))
        if result is None:
            shape = list(part.shape)
            shape[made] = count
            result = part.new_empty(shape)
        result.narrow(made, first, part.shape[made]).copy_(part)
    assert result is not None
    return result
