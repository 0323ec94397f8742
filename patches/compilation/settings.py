"""What can be chosen about compilation, and whether this machine can compile at all."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch

from ...host.errors import kind_and_line, no_compiler

KEY = "hotpath_compile"  # of all that is put on a MODEL here
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "cudagraphs")
REGIONS = ("all blocks", "transformer blocks")
GRAPH_MODES = ("reduce-overhead", "max-autotune", "cudagraphs")


class CompilationRefused(RuntimeError):
    """In strict mode, something could not be compiled or recorded."""


@dataclass(frozen=True)
class CompileSettings:
    """How a model is compiled.

    mode: "default" lets Inductor fuse; "reduce-overhead" also records the whole model call as a CUDA graph per size;
    "max-autotune-no-cudagraphs" lets Inductor try kernels on this GPU (slow to start); "max-autotune" does both;
    "cudagraphs" records and compiles nothing: the model's own kernels, without Python between them, after one step.
    regions: "all blocks" takes every kind of block that repeats (a UNet's residual blocks too), "transformer blocks"
    only those with attention.
    dynamic: one graph for all sizes and token counts. Off makes one per size, each a little faster.
    strict: raise where a block would fall back to running as it is.
    captured_sizes: how many CUDA graphs are kept. They share the activations of the largest; each has its own inputs.
    """

    mode: str = "default"
    regions: str = "all blocks"
    dynamic: bool = True
    strict: bool = False
    captured_sizes: int = 4

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"There is no compile mode {self.mode!r}; choose one of {', '.join(MODES)}.")
        if self.regions not in REGIONS:
            raise ValueError(f"There are no regions {self.regions!r}; choose one of {', '.join(REGIONS)}.")
        if self.captured_sizes < 1:
            raise ValueError(f"captured_sizes is {self.captured_sizes}; at least one size is kept.")

    @property
    def records(self) -> bool:
        """Whether whole model calls are recorded as CUDA graphs."""
        return self.mode in GRAPH_MODES

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled at all."""
        return self.mode != "cudagraphs"

    @property
    def graph_key(self) -> tuple[Any, ...]:
        """What the graphs of two settings must have in common to be shared."""
        return self.dynamic, tuple(sorted((name, repr(value)) for name, value in self.inductor_options().items()))

    def inductor_options(self) -> dict[str, Any]:
        """Inductor's settings for this compile alone; nothing is set for the process.

        Inductor's own CUDA graphs stay off in every mode: they would record each of a UNet's 70 blocks by itself,
        where one recording of the whole call does (see `recording`).
        """
        if not self.mode.startswith("max-autotune"):
            return {}
        options = dict(torch._inductor.list_mode_options("max-autotune-no-cudagraphs", self.dynamic))
        options.pop("triton.cudagraphs", None)
        return options


@functools.cache
def compiler_problem(device_type: str) -> str | None:
    """Why Inductor cannot compile for `device_type` ("cuda", "cpu", ...) here, in one sentence, or None if it can."""
    if device_type == "cuda":
        try:
            from torch.utils._triton import has_triton
        except ImportError:
            return "this torch has no Inductor; update torch."
        try:
            usable = has_triton()
        except Exception as error:  # what a Triton for another torch, driver or system raises when it is imported
            return f"Triton cannot be used ({kind_and_line(error)}); install it in the version your torch asks for."
        if not usable:
            return (
                "Triton is missing or does not know this GPU; install `triton` (on Windows `triton-windows`) in the "
                "version your torch asks for."
            )
        return None
    if device_type == "cpu":
        compiler = os.environ.get("CXX", "cl" if os.name == "nt" else "g++")
        if shutil.which(compiler) is None and (os.name == "nt" or shutil.which("clang++") is None):
            return f"{no_compiler(compiler)}."
        return None
    return f"compilation is set up for CUDA and CPU, and this model runs on {device_type}."
