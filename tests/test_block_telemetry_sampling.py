"""Telemetry of real sampling on the tiny SDXL, against plain hooks on the UNet's linear layers; patch mode adaptive."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.comparison.measures import measure
from hotpath.identity.blocks import INDEX, SDXL_BLOCKS
from instantid_bench import apply, attention_patches, sample, several, shared_bench
from instantid_scenarios import Bench, mask

pytestmark = pytest.mark.comfy


@pytest.fixture
def bench() -> Bench:
    return shared_bench()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def recorded(bench: Bench, model: Any, keep_runs: bool = False) -> tuple[Any, Any]:
    return bench.call("HotpathBlockTelemetry", model=model, keep_runs=keep_runs)


def report(bench: Bench, telemetry: Any, after: Any, save: bool = False, name: str = "portrait") -> Any:
    return bench.call("HotpathBlockTelemetryReport", telemetry=telemetry, after=after, name=name, save=save)


@contextmanager
def hooked(model: Any) -> Iterator[tuple[Any, dict[float, np.ndarray]]]:
    """A clone whose energies are computed by hooks: the block's own attention from its to_q, to_k and to_v, what was
    added from the input of its to_out. Nothing of the pack is used for it."""
    from comfy.patcher_extension import WrappersMP
    from hotpath.patches.sdxl_layout import cross_attention_blocks

    energies: dict[float, np.ndarray] = {}
    sigma = [0.0]
    seen: dict[Any, torch.Tensor] = {}
    handles = []

    def note_sigma(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        sigma[0] = float(t[0])
        return executor(x, t, *args, **kwargs)

    def keep(place: Any) -> Any:
        return lambda module, args, output: seen.__setitem__(place, output)

    def measure_block(block: Any, heads: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            q, k, v = (seen[block, part].unflatten(-1, (heads, -1)).transpose(1, 2) for part in ("q", "k", "v"))
            own = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            added = args[0] - own
            at = energies.setdefault(sigma[0], np.zeros((70, 2)))
            at[INDEX[block]] += float(added.square().sum()), float(own.square().sum())

        return hook

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note_sigma", note_sigma)
    for block, attention in cross_attention_blocks(model).items():
        for part in ("q", "k", "v"):
            handles.append(getattr(attention, f"to_{part}").register_forward_hook(keep((block, part))))
        handles.append(attention.to_out[0].register_forward_pre_hook(measure_block(block, attention.heads)))
    try:
        yield watched, energies
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    "changes", [{}, {"mask": mask(4)}, {"weight": -0.5, "start_at": 0.3, "end_at": 0.9}, {"patch_mode": "balanced"}]
)
def test_energies_are_those_of_plain_hooks(bench: Bench, changes: dict[str, Any]) -> None:
    model, positive, negative, _ = apply(bench, **changes)
    watched, telemetry = recorded(bench, model)
    with hooked(watched) as (hooked_model, expected):
        sample(hooked_model, positive, negative, steps=3)
    found = telemetry.contributions()
    patched = [INDEX[block] for block in attention_patches(model)]
    assert found.calls >= len(found.sigmas) > 0 and found.runs == 1
    by_sigma = dict(zip(found.sigmas, range(len(found.sigmas)), strict=True))
    for sigma, energies in expected.items():
        acted = energies[:, 0] > 1e-6 * energies[:, 1]
        assert set(np.flatnonzero(acted)) <= set(patched)
        if not acted.any():  # out of start_at and end_at
            assert sigma not in by_sigma or not found.identity[by_sigma[sigma]].any()
            continue
        step = by_sigma[sigma]
        assert found.identity[step][patched] == pytest.approx(energies[patched, 0], rel=2e-3)
        assert found.own[step][patched] == pytest.approx(energies[patched, 1], rel=1e-4)
    assert (found.measured == np.isin(np.arange(70), patched)).all()


def test_two_people_count_together(bench: Bench) -> None:
    model, positive, negative, _ = several(bench)
    watched, telemetry = recorded(bench, model)
    with hooked(watched) as (hooked_model, expected):
        sample(hooked_model, positive, negative)
    found = telemetry.contributions()
    totals = sum(expected.values())
    assert found.identity.sum(0) == pytest.approx(totals[:, 0], rel=2e-3)
    assert found.own.sum(0) == pytest.approx(totals[:, 1], rel=1e-4)
    assert [entry["region"] for entry in telemetry.settings] == [True, True]


def test_the_picture_is_the_same_and_upstream_models_are_left_alone(bench: Bench) -> None:
    model, positive, negative, _ = apply(bench)
    plain = sample(model, positive, negative)
    watched, telemetry = recorded(bench, model)
    assert torch.equal(sample(watched, positive, negative), plain)
    calls = telemetry.contributions().calls
    assert torch.equal(sample(model, positive, negative), plain)
    assert telemetry.contributions().calls == calls
    assert "hotpath_telemetry" not in model.model_options["transformer_options"]


def test_copies_record_and_runs_add_up_when_they_should(bench: Bench) -> None:
    model, positive, negative, _ = apply(bench)
    for keep, runs in ((False, 1), (True, 2)):
        watched, telemetry = recorded(bench, model, keep)
        clone = watched.clone()
        clone.model_options = copy.deepcopy(clone.model_options)
        sample(watched, positive, negative)
        once = telemetry.contributions()
        sample(clone, positive, negative)
        twice = telemetry.contributions()
        assert twice.runs == runs
        assert twice.own.sum() == pytest.approx(once.own.sum() * runs)


def test_a_profile_is_measured_kept_and_used(bench: Bench, headless_host: Any) -> None:
    """End to end: the blocks kept carry the share, by the hooks' own energies, and the picture stays near."""
    model, positive, negative, _ = apply(bench)
    watched, telemetry = recorded(bench, model)
    with hooked(watched) as (hooked_model, energies):
        full = sample(hooked_model, positive, negative)
    picture, text, profile = report(bench, telemetry, full, save=True)
    assert picture.ndim == 4 and "70 of 70 blocks measured over 2 steps" in text
    assert "saved as portrait.json in models/block_profiles" in text
    (file,) = bench.nodes["HotpathLoadBlockProfile"].INPUT_TYPES()["required"]["file"][0]
    loaded, said = bench.call("HotpathLoadBlockProfile", file=file)
    assert loaded == profile and "portrait: 70 blocks over 2 steps, 1 run" in said and "weight 0.7" in said
    assert profile.model != "unknown" and profile.adapter != "unknown"

    sizes = np.mean([np.sqrt(e[:, 0] / e[:, 1]) for e in energies.values()], axis=0)
    assert [profile.size[b] for b in SDXL_BLOCKS] == pytest.approx(sizes, rel=2e-3)
    differences = {}
    for share in (0.3, 0.9):
        fewer, positive, negative, line = apply(bench, patch_mode="adaptive", profile=loaded, adaptive_share=share)
        kept = [INDEX[block] for block in attention_patches(fewer)]
        assert sizes[kept].sum() / sizes.sum() >= share - 1e-6
        assert np.sort(sizes)[::-1][: len(kept) - 1].sum() / sizes.sum() < share
        assert f"{len(kept)} of 70 blocks patched" in line and "measured with" not in line
        latent = sample(fewer, positive, negative)
        differences[share] = float((latent - full).square().mean().sqrt() / full.std())
    without, positive, negative, _ = apply(bench, weight=0.0)
    nothing = float((sample(without, positive, negative) - full).square().mean().sqrt() / full.std())
    # Less of the identity, further from the picture with all of it.
    assert 0 < differences[0.9] < differences[0.3] < nothing


def test_a_profile_of_something_else_is_used_with_a_remark(bench: Bench, headless_host: Any) -> None:
    from hotpath_demo import tiny_sdxl

    model, positive, negative, _ = apply(bench)
    watched, telemetry = recorded(bench, model)
    latent = sample(watched, positive, negative)
    *_, profile = report(bench, telemetry, latent)
    other = tiny_sdxl.make_sdxl(seed=9)
    *_, line = apply(bench, model=other, patch_mode="adaptive", profile=profile, adaptive_share=0.5)
    assert "the profile was measured with another model, so measure again to be sure" in line


def test_without_a_profile_adaptive_is_full_and_says_so(bench: Bench) -> None:
    model, *_, line = apply(bench, patch_mode="adaptive")
    assert len(attention_patches(model)) == 70
    assert "patch_mode adaptive needs a profile, and none is connected, so all 70 blocks are patched" in line
    model, *_, line = several(bench, patch_mode="adaptive")
    assert len(attention_patches(model)) == 70 and "needs a profile" in line


def test_a_record_of_nothing_says_what_to_connect(bench: Bench) -> None:
    _, telemetry = recorded(bench, apply(bench)[0])
    with pytest.raises(ValueError, match="Nothing was measured: connect model of Block Telemetry to the sampler"):
        report(bench, telemetry, torch.zeros(1, 4, 8, 8))


def test_models_with_nothing_to_record_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="Nothing acts on the attention of this model"):
        recorded(bench, bench.model)

    class Network:
        pass

    class DiT:
        model = type("Flux", (), {"diffusion_model": Network()})()

    with pytest.raises(ValueError, match=r"cross-attention blocks of a UNet, and this model \(Flux\) has none"):
        recorded(bench, DiT())


class ForeignAttention:
    """Another pack's open attention patch: text attention, then callbacks that each give a delta."""

    def __init__(self) -> None:
        self.callback: list[Any] = []
        self.kwargs: list[dict[str, Any]] = []

    def add(self, callback: Any, **kwargs: Any) -> None:
        self.callback.append(callback)
        self.kwargs.append(kwargs)

    def __call__(self, q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        out = optimized_attention(q, k, v, extra_options["n_heads"])
        for callback, kwargs in zip(self.callback, self.kwargs, strict=True):
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


def half_of_the_query(out: Any, q: Any, k: Any, v: Any, extra_options: Any, weight: float) -> Any:
    return weight * q


@pytest.mark.parametrize("sd15", [False, True], ids=["sdxl", "sd15"])
def test_other_adapters_and_their_unets_are_measured_too(bench: Bench, sd15: bool, headless_host: Any) -> None:
    from hotpath.patches.sdxl_layout import transformer_blocks
    from hotpath_demo import tiny_sdxl

    changes: dict[str, Any] = {}
    if sd15:  # its layout: 16 blocks, one transformer deep
        changes = {
            "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2], "transformer_depth_middle": 1,
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
            "model_channels": 64,
        }  # fmt: skip
    model = tiny_sdxl.make_sdxl(**changes) if sd15 else bench.model
    blocks = list(transformer_blocks(model))
    assert len(blocks) == (16 if sd15 else 70)
    patched = model.clone()
    for block in blocks:
        attention = ForeignAttention()
        attention.add(half_of_the_query, weight=0.5)
        patched.set_model_attn2_replace(attention, *block)
    plain = sample(patched, bench.positive, bench.negative)
    watched, telemetry = recorded(bench, patched)
    latent = sample(watched, bench.positive, bench.negative)
    assert torch.equal(latent, plain)
    found = telemetry.contributions()
    assert found.measured.all() and len(found.blocks) == len(blocks)
    if not sd15:
        with hooked(watched) as (hooked_model, expected):
            sample(hooked_model, bench.positive, bench.negative)
        found = telemetry.contributions()
        totals = sum(expected.values())
        assert found.identity.sum(0) == pytest.approx(totals[:, 0], rel=1e-4)
        assert found.own.sum(0) == pytest.approx(totals[:, 1], rel=1e-4)
    picture, text, profile = report(bench, telemetry, latent)
    assert picture.ndim == 4 and f"{len(blocks)} of {len(blocks)} blocks measured" in text
    assert (profile is None) == sd15
    if sd15:
        assert "A profile is about SDXL's 70 blocks, and this model has others" in text
    # The patch that came in is the same as before.
    assert attention_patches(patched)[blocks[0]].callback == [half_of_the_query]


def test_a_comparison_of_full_and_adaptive_reports_the_difference(bench: Bench, headless_host: Any) -> None:
    from hotpath_demo import NODE_CLASS_MAPPINGS as demo

    def picture(latent: torch.Tensor) -> torch.Tensor:
        return demo["HotpathDemoDecode"]().decode({"samples": latent})[0]

    model, positive, negative, _ = apply(bench)
    watched, telemetry = recorded(bench, model)
    full = sample(watched, positive, negative)
    *_, profile = report(bench, telemetry, full)
    fewer, *conditioning, _ = apply(bench, patch_mode="adaptive", profile=profile, adaptive_share=0.95)
    a, b = picture(full), picture(sample(fewer, *conditioning))
    _, text, _, ssim, _, passed = bench.call("HotpathCompare", image_a=a, image_b=b, min_ssim=0.5, min_cosine=0.98)
    expected = measure(a[0], b[0])
    assert ssim == expected.ssim < 1 and passed == (ssim >= 0.5) and f"SSIM {ssim:.4f}" in text


def test_a_compiled_callback_adds_to_the_call_it_runs_in(bench: Bench) -> None:
    patched = bench.model.clone()
    attention = ForeignAttention()
    attention.add(half_of_the_query, weight=0.5)
    block = SDXL_BLOCKS[0]
    patched.set_model_attn2_replace(attention, *block)
    watched, telemetry = recorded(bench, patched)
    (callback,) = attention_patches(watched)[block].callback

    def run(q: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        return q + callback(q * 3, q, q, q, transformer_options, weight=0.5)

    def as_comfyui_does(guards: Any) -> list[bool]:
        return ["transformer_options" not in guard.name for guard in guards]

    compiled = torch.compile(run, backend="eager", options={"guard_filter_fn": as_comfyui_does})
    for size in (1.0, 2.0, 3.0):
        telemetry.begin_call(torch.tensor([size]), torch.device("cpu"))
        q = torch.full((1, 4, 8), size)
        assert torch.equal(compiled(q, {"hotpath_telemetry": telemetry}), q * 1.5)
    found = telemetry.contributions()
    assert found.sigmas.tolist() == [3, 2, 1]
    assert found.identity[:, 0].tolist() == [32 * 0.25 * s * s for s in (3, 2, 1)]
    assert found.own[:, 0].tolist() == [32 * 9 * s * s for s in (3, 2, 1)]
