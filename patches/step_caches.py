"""Steps that ComfyUI's EasyCache and LazyCache skip: they answer from what they remember, and the model does not run."""

from __future__ import annotations

from typing import Any

OPTION = "easycache"  # where ComfyUI's step caches keep themselves while they sample


def spared(guider: Any) -> int:
    """How many evaluations of the model a step cache answered so far in the sampling that `guider` runs."""
    cache = guider.model_options.get("transformer_options", {}).get(OPTION)
    return int(getattr(cache, "total_steps_skipped", 0))
