"""The tiny SDXL bench with our nodes, for tests; and a MODEL's attention patches as plain data."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import torch
from instantid_scenarios import Bench, mask, photo
from instantid_scenarios import sample as sample_as_the_goldens

DEFAULTS: dict[str, Any] = {
    "weight": 0.7,
    "cn_strength": 0.5,
    "start_at": 0.0,
    "end_at": 1.0,
    "noise": 0.2,
    "combine_embeds": "average",
    "pose": True,
    "face_tokens_for": "IdentityNet only",
    "patch_mode": "full",
    "custom_blocks": "",
}


# One transformer where SDXL has two or ten, at each of its 11 places.
SHALLOW: dict[str, Any] = {
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
}


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


@cache
def shallow_bench() -> Bench:
    """With 11 blocks instead of 70, for tests that are not about the list of blocks. One per process, never mutated."""
    from hotpath.nodes import NODE_CLASS_MAPPINGS
    from hotpath_demo import tiny_sdxl

    with mock.patch.dict(tiny_sdxl.UNET_CONFIG, SHALLOW):
        model, identity_net = tiny_sdxl.make_sdxl(), tiny_sdxl.make_identity_net()
    return Bench(NODE_CLASS_MAPPINGS, tiny_adapter(), tiny_sdxl, model, identity_net)


def sample(model: Any, positive: Any, negative: Any, steps: int = 2, **changes: Any) -> torch.Tensor:
    """In fewer steps than the goldens, and of a smaller size whose sides differ."""
    return sample_as_the_goldens(model, positive, negative, steps=steps, **{"size": (8, 12), **changes})


def attention_patches(model: Any) -> dict[Any, Any]:
    return model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})


def callback_counts(model: Any) -> list[int]:
    return [len(patch.callback) for patch in attention_patches(model).values()]


def in_windows(model: Any) -> Any:
    """A clone of `model` that sees four frames at a time, two of them again the next time."""
    import comfy.context_windows as windows

    model = model.clone()
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID),
        context_length=4,
        context_overlap=2,
        dim=0,
    )
    return model


def identity(bench: Bench, seed: int = 1) -> Any:
    return bench.call("HotpathIdentity", insightface=bench.faces, image=photo(seed), name=f"person {seed}")[0]


def apply(bench: Bench, **changes: Any) -> Any:
    inputs = {
        "instantid": bench.instantid,
        "identity": identity(bench),
        "model": bench.model,
        "positive": bench.positive,
        "negative": bench.negative,
        "control_net": bench.control_net,
        **DEFAULTS,
    }
    return bench.call("HotpathInstantID", **{**inputs, **changes})


def several(bench: Bench, **changes: Any) -> Any:
    inputs = {k: v for k, v in DEFAULTS.items() if k not in ("weight", "face_tokens_for")} | {
        "instantid": bench.instantid,
        "identity_1": identity(bench, 1),
        "identity_2": identity(bench, 2),
        "mask_1": mask(3),
        "mask_2": 1 - mask(3),
        "model": bench.model,
        "positive": bench.positive,
        "negative": bench.negative,
        "control_net": bench.control_net,
    }
    return bench.call("HotpathIdentities", **{**inputs, **changes})
