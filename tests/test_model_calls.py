"""Model calls out of the ordinary: guiders with other orders, other packs' forwards, batches that grow inside the UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from instantid_bench import apply, attention_patches, sample, shallow_bench, shared_bench
from instantid_scenarios import Bench, mask, photo

pytestmark = pytest.mark.comfy


@pytest.fixture
def bench() -> Bench:
    return shallow_bench()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-4 * b.abs().max())


def run_guider(guider: Any) -> torch.Tensor:
    import comfy.samplers

    latent = torch.zeros(1, 4, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", 2)
    found: torch.Tensor = guider.sample(
        noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
    )
    return found


def roles_by_index(model: Any, run: Callable[[Any], Any]) -> dict[int, int]:
    """The role that every index of `cond_or_uncond` had while `run` sampled."""
    from comfy.patcher_extension import WrappersMP
    from hotpath.patches.model_call import current_call

    seen: dict[int, int] = {}

    def spy(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(zip(args[3]["cond_or_uncond"], current_call({}).roles, strict=True))
        return executor(x, t, *args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    run(watched)
    return seen


def dual_cfg(model: Any, positive: Any, middle: Any, negative: Any) -> torch.Tensor:
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    guider = Guider_DualCFG(model)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(4.0, 2.0)
    return run_guider(guider)


def zeroed(positive: Any) -> Any:
    import nodes

    return nodes.ConditioningZeroOut().zero_out(positive)[0]


@pytest.mark.parametrize("negative", ["zeroed out", "its own", "marked"])
@pytest.mark.parametrize("positive", ["marked", "plain"])
def test_dual_cfg_knows_its_negative_by_name(bench: Bench, positive: str, negative: str) -> None:
    model, marked, its_negative = bench.apply()
    first = marked if positive == "marked" else bench.positive
    last = {"zeroed out": zeroed(first), "its own": bench.negative, "marked": its_negative}[negative]
    before = [dict(entry[1].get("model_conds", {})) for entry in first]
    seen = roles_by_index(model, lambda watched: dual_cfg(watched, first, bench.positive, last))
    assert seen[0] == 1, "it comes first in the guider's list"
    assert seen[2] == 0
    assert [dict(entry[1].get("model_conds", {})) for entry in first] == before


def test_perp_neg_with_everything_made_of_the_positive(bench: Bench) -> None:
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    model, positive, _ = bench.apply()

    def run(watched: Any) -> None:
        guider = Guider_PerpNeg(watched)
        guider.set_conds(positive, zeroed(positive), zeroed(positive))
        guider.set_cfg(4.0, 1.0)
        run_guider(guider)

    assert roles_by_index(model, run) == {0: 0, 1: 1, 2: 1}


def test_a_negative_that_is_computed_by_itself(bench: Bench) -> None:
    """Self-attention guidance and two models for one guider ask for the negative alone, at index 0."""
    from comfy_extras.nodes_custom_sampler import Guider_DualModel

    model, positive, _ = bench.apply()
    roles: list[tuple[int, ...]] = []

    def spy(executor: Any, *args: Any, **kwargs: Any) -> Any:
        from hotpath.patches.model_call import current_call

        roles.append(current_call({}).roles)
        return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    watched, other = model.clone(), model.clone()
    for patched in (watched, other):
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    guider = Guider_DualModel(watched, other)
    guider.set_conds(positive, zeroed(positive))
    guider.set_cfg(4.0)
    run_guider(guider)
    assert set(roles) == {(0,), (1,)}


def fixed_forward(unet: Any) -> Any:
    """A forward as packs wrote them when ComfyUI had no other arguments."""
    original = unet.forward

    def forward(
        x: Any,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Any = None,
    ) -> Any:
        return original(x, timesteps, context=context, y=y, control=control, transformer_options=transformer_options)

    return forward


def anything_to_fixed(unet: Any) -> Any:
    inner = fixed_forward(unet)
    return lambda *args, **kwargs: inner(*args, **kwargs)


def past_the_wrappers(unet: Any) -> Any:
    """A forward of its own, which knows nothing of ComfyUI's wrappers of the diffusion model."""

    def forward(
        x: Any, timesteps: Any = None, context: Any = None, y: Any = None, control: Any = None,
        transformer_options: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return unet._forward(x, timesteps, context, y, control, transformer_options, **kwargs)

    return forward


@pytest.mark.parametrize("other", [fixed_forward, anything_to_fixed, past_the_wrappers])
def test_a_forward_that_another_pack_replaced(bench: Bench, other: Any) -> None:
    model, positive, negative = apply(bench, model=bench.model)[:3]
    expected = sample(model, positive, negative)
    replaced = model.clone()
    replaced.add_object_patch("diffusion_model.forward", other(model.model.diffusion_model))
    for _ in range(2):
        assert torch.equal(sample(replaced, positive, negative), expected)
    assert torch.equal(sample(model, positive, negative), expected), "ours is as it was"


@pytest.mark.parametrize("other", [fixed_forward, anything_to_fixed, past_the_wrappers])
def test_telemetry_counts_whatever_the_forward_is(other: Any) -> None:
    import numpy as np
    from hotpath.patches.telemetry import record_blocks

    bench = shared_bench()
    model = bench.patch(weight=0.7)[0]

    def energies(patched: Any) -> Any:
        watched, recorder = record_blocks(patched)
        sample(watched, bench.positive, bench.negative)
        return recorder.contributions().identity

    expected = energies(model)
    replaced = model.clone()
    replaced.add_object_patch("diffusion_model.forward", other(model.model.diffusion_model))
    assert (expected > 0).all()
    assert np.array_equal(energies(replaced), expected)


def test_an_error_of_the_model_is_not_tried_again(bench: Bench) -> None:
    calls = []

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(x)
        raise TypeError("unsupported operand")

    model = bench.patch()[0].clone()
    model.add_object_patch("diffusion_model.forward", forward)
    with pytest.raises(TypeError, match="unsupported operand"):
        sample(model, bench.positive, bench.negative)
    assert len(calls) == 1


def couple(model: Any, regions: int) -> Any:
    """As attention couples do: every positive once per region in cross-attention, and their mean behind it."""
    layout: list[list[int]] = []

    def split(q: Any, k: Any, v: Any, extra_options: Any) -> Any:
        indices = extra_options["cond_or_uncond"]
        layout.append([1 if i == 1 else regions for i in indices])

        def copied(x: torch.Tensor) -> torch.Tensor:
            chunks = zip(x.chunk(len(indices)), layout[-1], strict=True)
            return torch.cat([chunk.repeat(count, 1, 1) for chunk, count in chunks])

        return copied(q), copied(k), copied(v)

    def join(out: torch.Tensor, extra_options: Any) -> torch.Tensor:
        counts = layout.pop()
        parts = out.chunk(sum(counts))
        joined = []
        for count in counts:
            here, parts = parts[:count], parts[count:]
            joined.append(torch.stack(here).mean(0))
        return torch.cat(joined)

    made = model.clone()
    made.set_model_attn2_patch(split)
    made.set_model_attn2_output_patch(join)
    return made


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_couples_that_copy_the_positive(bench: Bench, batch: int) -> None:
    """Regions that are all alike are the picture without regions: no sample got another's identity, weight or mask."""
    model = bench.patch(mask=mask(1, count=batch), weight=0.9)[0]
    model = bench.patch(model=model, image=photo(2), mask=1 - mask(1, count=batch), end_at=0.6)[0]
    expected = sample(model, bench.positive, bench.negative, batch=batch)
    assert alike(sample(couple(model, 3), bench.positive, bench.negative, batch=batch), expected)
    assert not alike(expected, sample(bench.model, bench.positive, bench.negative, batch=batch))


def test_attention_couples_with_a_foreign_object_around_ours(bench: Bench) -> None:
    """A pack that puts our callbacks into its own object asks each of them for what it adds."""

    class Theirs:
        def __init__(self, callbacks: list[Any]) -> None:
            self.callbacks = callbacks

        def __call__(self, q: Any, k: Any, v: Any, extra_options: Any) -> Any:
            from comfy.ldm.modules.attention import optimized_attention

            out = optimized_attention(q, k, v, extra_options["n_heads"])
            return out + sum(callback(out, q, k, v, extra_options) for callback in self.callbacks)

    ours = bench.patch(weight=0.9)[0]
    model = bench.model.clone()
    for block, patch in attention_patches(ours).items():
        model.set_model_attn2_replace(Theirs(patch.callback), *block)
    expected = sample(ours, bench.positive, bench.negative)
    assert alike(sample(couple(model, 2), bench.positive, bench.negative), expected)


def test_each_positive_is_copied_and_each_negative_is_not() -> None:
    from hotpath.patches.bound_attention import _other_batch

    rows = torch.arange(6, dtype=torch.int32)[None]
    mask = torch.arange(6.0)[None, :, None]
    found = _other_batch(rows, rows + 0.5, mask, 14, [0, 1, 0])
    samples = [0, 1, 0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 4, 5]
    assert found[0].tolist() == [samples] and found[1].tolist() == [[i + 0.5 for i in samples]]
    assert found[2].flatten().tolist() == samples
    assert torch.equal(_other_batch(rows, rows, mask[:, :1], 14, [0, 1, 0])[2], mask[:, :1])


@pytest.mark.parametrize("samples", [0, 2])
def test_a_batch_that_no_copying_gives_is_one_sentence(samples: int) -> None:
    from hotpath.patches.bound_attention import _other_batch

    rows, weights = torch.zeros(1, samples, dtype=torch.int32), torch.ones(1, samples)
    with pytest.raises(ValueError, match=f"made 7 samples of the {samples}"):
        _other_batch(rows, weights, None, 7, [0, 0])


def test_conditioning_with_hooks_keeps_its_role(bench: Bench) -> None:
    """A LoRA schedule computes the conditionings that it is on by themselves; one of no weights changes nothing."""
    import comfy.hooks

    model, positive, negative = bench.apply()
    expected = sample(model, positive, negative)
    hooks = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.5, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
    hooks.set_keyframes_on_hooks(keyframes)
    scheduled = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    seen = roles_by_index(model, lambda watched: sample(watched, scheduled, negative))
    assert seen == {0: 0, 1: 1}
    assert alike(sample(model, scheduled, negative), expected)


def test_a_wrapper_that_runs_each_conditioning_by_itself(bench: Bench) -> None:
    """Packs split the batch in `model_function_wrapper` and say so in `cond_or_uncond`."""
    model = bench.patch(weight=0.9, mask=mask(1))[0]
    expected = sample(model, bench.positive, bench.negative)

    def apart(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        made = []
        for place, index in enumerate(arguments["cond_or_uncond"]):
            part = slice(place, place + 1)
            c = {
                name: value[part] if isinstance(value, torch.Tensor | tuple) else value
                for name, value in arguments["c"].items()
            }
            c["transformer_options"] = {**c["transformer_options"], "cond_or_uncond": [index]}
            made.append(apply_model(arguments["input"][part], arguments["timestep"][part], **c))
        return torch.cat(made)

    split = model.clone()
    split.set_model_unet_function_wrapper(apart)
    assert alike(sample(split, bench.positive, bench.negative), expected)


def test_tensors_of_a_call_go_to_the_device_that_asks() -> None:
    from hotpath.patches.model_call import ModelCall

    call = ModelCall((0, 1), 8, 8, None, batch=2)
    here = call.weights((0.5,))
    there = call.of(torch.empty(2, 4, 4, device="meta")).weights((0.5,))
    assert (here.device.type, there.device.type) == ("cpu", "meta")


def test_only_cpus_and_cuda_are_asked_for_float64() -> None:
    """Metal and Intel's cards have none; "meta" stands for them."""
    from hotpath.patches.identity_attention import PatchSettings
    from hotpath.patches.model_call import ModelCall
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[tuple[str, torch.dtype]] = set()

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.add((out.device.type, out.dtype))
            return out

    settings = (PatchSettings(0.5, 14.6, 0.03),)
    for device in ("meta", "cpu"):
        call = ModelCall((0, 1), 8, 8, torch.tensor([3.0]), batch=2, device=torch.device(device))
        with Watched():
            call.weights_now(settings)
    assert ("cpu", torch.float64) in seen and ("meta", torch.float64) not in seen


@pytest.mark.parametrize("size", [(4, 4), (4, 11), (5, 512), (16, 16), (31, 9), (512, 4)])
@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_a_mask_fits_every_block_of_small_and_long_latents(size: tuple[int, int], scale: int) -> None:
    """Also where a pack shrinks the UNet's inside further."""
    import math

    from hotpath.patches.mask import AttentionMask
    from hotpath.patches.model_call import ModelCall

    length = math.ceil(size[0] / scale) * math.ceil(size[1] / scale)
    made = AttentionMask(torch.full((1, 64, 64), 0.5)).at(ModelCall((0, 1), *size, None, batch=2), length)
    assert made.shape == (2, length) and made.max() == 0.5


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_an_older_comfyui_says_what_it_computes_in(cast: torch.dtype | None) -> None:
    from hotpath.patches.model_call import dtype_inside

    older = SimpleNamespace(manual_cast_dtype=cast, get_dtype=lambda: torch.float16)
    assert dtype_inside(older, torch.float32) == (cast or torch.float16)
    assert dtype_inside(object(), torch.float32) == torch.float32


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64), (36, 124)])
def test_a_mask_lies_over_the_queries_as_over_the_picture(size: tuple[int, int]) -> None:
    from hotpath.patches.mask import AttentionMask
    from hotpath.patches.model_call import ModelCall

    rows, columns = size[0] // 2, size[1] // 2
    picture, wanted = torch.zeros(1, 8 * size[0], 8 * size[1]), torch.zeros(rows, columns)
    picture[:, : 4 * size[0], : 4 * size[1]] = wanted[: rows // 2, : columns // 2] = 1
    made = AttentionMask(picture).at(ModelCall((0, 1), *size, None, batch=2), rows * columns)
    assert torch.equal(made.view(2, rows, columns), wanted.expand(2, -1, -1))
