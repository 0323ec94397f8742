"""Compiled models of the tests: made, sampled, and compared with what they were made of."""

from __future__ import annotations

from typing import Any

import torch
from hotpath.patches.compilation import CompileSettings, RegionalCompiler, compile_model, compiler_of
from hotpath.patches.compilation.regions import find_regions
from tiny_native_models import Tiny

# ComfyUI computes attention in another order on CPUs than torch does; latents of these models go up to some hundreds.
CLOSE = 2e-5


def sample(bench: Tiny, model: Any = None, **changes: Any) -> torch.Tensor:
    with torch.inference_mode():
        return bench.sample(model, **changes)


def assert_same_picture(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert (made - expected).abs().max() <= CLOSE * expected.abs().max()


def compiled(model: Any, **changes: Any) -> tuple[Any, RegionalCompiler]:
    made, _ = compile_model(model, CompileSettings(**changes), backend="eager")
    compiler = compiler_of(made)
    assert compiler is not None
    return made, compiler


def lora(model: Any, seed: int = 0, part: str = "") -> dict[str, Any]:
    """Differences for some weights, in the form of a LoRA that stores them whole."""
    generator = torch.Generator().manual_seed(seed)
    weights = {k: w for k, w in model.model.state_dict().items() if k.endswith("weight") and w.ndim == 2 and part in k}
    return {
        key: ("diff", (0.05 * weight.std() * torch.randn(weight.shape, generator=generator),))
        for key, weight in list(weights.items())[::2]
    }


def blocks_of(model: Any) -> list[Any]:
    return [region.module for region in find_regions(model.model.diffusion_model, "all blocks")]
