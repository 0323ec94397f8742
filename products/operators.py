"""Functions of this room as opaque operators, so that a compiled model keeps one graph and never sees inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_libraries: list[Any] = []  # an operator lives as long as the library that defined it


def operator(name: str, arguments: str, function: Callable[..., Tensor], result: Callable[..., Tensor]) -> Any:
    """`function` as `torch.ops.hotpath.<name>`, registered when first asked for. result: an empty tensor like what it gives."""
    if not hasattr(torch.ops.hotpath, name):  # another copy of the pack may have been loaded before
        library = torch.library.Library("hotpath", "FRAGMENT")
        library.define(f"{name}({arguments}) -> Tensor")
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hotpath::{name}", result, lib=library)
        _libraries.append(library)
    return getattr(torch.ops.hotpath, name).default
