"""torch.compile for one function, with the plain function as the way out and a sentence on what happened."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..host.compiling import inductor

log = logging.getLogger("hotpath.colorization")


class MaybeCompiled:
    """Calls `function`, compiled if asked for. A compiler that is missing or fails is reported once, not raised: the
    film is coloured either way, only slower."""

    def __init__(self, function: Callable[..., Any], wanted: bool, name: str) -> None:
        self._plain = function
        self._call: Callable[..., Any] = (
            torch.compile(function, dynamic=False, backend=inductor()) if wanted else function
        )
        self._wanted = wanted
        self.name = name
        self.status = "compiled" if wanted else "not compiled: not asked for"

    def __call__(self, *args: Any) -> Any:
        if not self._wanted:
            return self._plain(*args)
        try:
            return self._call(*args)
        except Exception as error:
            if _is_from_compiler(error):
                self._wanted = False
                self.status = f"not compiled: {type(error).__name__}, {_first_line(error)}"
                log.warning("%s runs %s", self.name, self.status)
                return self._plain(*args)
            raise


def _is_from_compiler(error: BaseException) -> bool:
    """Whether the compiler raised, and not the function: out of memory and wrong shapes are for the caller."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
