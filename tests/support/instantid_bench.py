"""The tiny SDXL bench with our nodes, for tests; and a MODEL's attention patches as plain data."""

from __future__ import annotations

from functools import cache
from typing import Any

from instantid_scenarios import Bench


@cache
def tiny_adapter() -> Any:
    from hotpath.identity.adapter import InstantIDAdapter
    from hotpath_demo import tiny_sdxl

    state = tiny_sdxl.make_adapter_state(dim=20 * 64, depth=4)
    return InstantIDAdapter(state["image_proj"], state["ip_adapter"], "tiny.bin", "tiny")


@cache
def shared_bench() -> Bench:
    """One per process: the models are never mutated, which is what the tests are about."""
    from hotpath.nodes import NODE_CLASS_MAPPINGS
    from hotpath_demo import tiny_sdxl

    return Bench(NODE_CLASS_MAPPINGS, tiny_adapter(), tiny_sdxl, tiny_sdxl.make_sdxl(), tiny_sdxl.make_identity_net())


def attention_patches(model: Any) -> dict[Any, Any]:
    return model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})


def callback_counts(model: Any) -> list[int]:
    return [len(patch.callback) for patch in attention_patches(model).values()]
