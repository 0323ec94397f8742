"""Nothing upstream is ever mutated, other packs' patches are good neighbours, and what cannot be is one sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from instantid_bench import (
    SHALLOW,
    attention_patches,
    callback_counts,
    sample,
    shallow_bench,
    shared_bench,
    tiny_adapter,
)
from instantid_scenarios import Bench, mask, photo

pytestmark = pytest.mark.comfy


@pytest.fixture
def bench() -> Bench:
    return shallow_bench()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


class ForeignAttention:
    """What IPAdapter and its relatives leave on a model: open to additions, done in place."""

    def __init__(self, callback: Any, **kwargs: Any) -> None:
        self.callback = [callback]
        self.kwargs = [kwargs]
        self.per_device: dict[str, list[Any]] = {"cpu": [kwargs]}

    def add(self, callback: Any, **kwargs: Any) -> None:
        self.callback.append(callback)
        self.kwargs.append(kwargs)

    def __call__(self, q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        out = optimized_attention(q, k, v, extra_options["n_heads"])
        sigma = extra_options["sigmas"][0].item()
        for callback, kwargs in zip(self.callback, self.kwargs, strict=True):
            if kwargs["sigma_end"] <= sigma <= kwargs["sigma_start"]:
                out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


def tenth_of_q(out: Any, q: Any, k: Any, v: Any, extra_options: Any, **kwargs: Any) -> Any:
    return 0.1 * kwargs.get("strength", 1.0) * q


ALWAYS = {"sigma_start": 999999999.9, "sigma_end": 0.0}


def with_foreign(bench: Bench) -> Any:
    model = bench.model.clone()
    for block in attention_patches(bench.patch()[0]):
        model.set_model_attn2_replace(ForeignAttention(tenth_of_q, **ALWAYS), *block)
    return model


def test_apply_leaves_its_model_alone_and_patches_60_blocks() -> None:
    bench = shared_bench()
    patched = bench.apply()[0]
    assert attention_patches(bench.model) == {}
    assert callback_counts(patched) == [1] * 60
    assert callback_counts(bench.apply(middle_block=True)[0]) == [1] * 70
    assert callback_counts(bench.patch()[0]) == [1] * 70


def test_a_node_that_runs_again_does_not_pile_up_patches(bench: Bench) -> None:
    first = bench.apply(mask=mask(1))[0]
    before = sample(first, bench.positive, bench.negative)
    for _ in range(4):
        second = bench.apply(image=photo(2), model=first, mask=1 - mask(1))[0]
    assert callback_counts(first) == [1] * 10
    assert callback_counts(second) == [2] * 10
    assert torch.equal(sample(first, bench.positive, bench.negative), before)


def test_two_hundred_reapplies_hold_no_more_memory_than_one(bench: Bench) -> None:
    import gc

    from hotpath.patches.identity_attention import IdentityAttention

    def alive() -> int:
        gc.collect()
        return sum(isinstance(o, IdentityAttention) for o in gc.get_objects())

    model = bench.patch()[0]
    before = alive()
    for step in range(200):
        model = bench.patch(weight=0.5 + step / 1000)[0]
    assert alive() <= before
    assert callback_counts(model) == [1] * 11


def test_a_pack_that_adds_in_place_to_its_clone_does_not_reach_upstream(bench: Bench) -> None:
    upstream = bench.apply()[0]
    before = sample(upstream, bench.positive, bench.negative)
    downstream = upstream.clone()
    for patch in attention_patches(downstream).values():
        patch.add(tenth_of_q, **ALWAYS)
    assert callback_counts(upstream) == [1] * 10
    assert torch.equal(sample(upstream, bench.positive, bench.negative), before)
    assert not torch.equal(sample(downstream, bench.positive, bench.negative), before)


def test_ours_on_top_of_a_foreign_patch(bench: Bench) -> None:
    """The foreign objects stay as they were, and the result is what adding to them in place would have given."""
    foreign = with_foreign(bench)
    held = dict(attention_patches(foreign))
    stacked = bench.patch(model=foreign, weight=0.9)[0]
    assert all(patch.callback == [tenth_of_q] for patch in held.values())
    assert attention_patches(foreign) == held
    assert all(patch.base is held[block] for block, patch in attention_patches(stacked).items())

    in_place = with_foreign(bench)
    ours = attention_patches(bench.patch(weight=0.9)[0])
    for block, patch in attention_patches(in_place).items():
        patch.add(ours[block].callback[0], **ALWAYS)
    expected = sample(in_place, bench.positive, bench.negative)
    # In place the identity is added to a zero first, so the last digit may round otherwise.
    assert torch.allclose(sample(stacked, bench.positive, bench.negative), expected, atol=1e-5)
    assert not torch.equal(expected, sample(foreign, bench.positive, bench.negative))


def test_a_foreign_patch_on_top_of_ours(bench: Bench) -> None:
    ours = bench.patch(weight=0.9)[0]
    stacked = ours.clone()
    for patch in attention_patches(stacked).values():
        patch.add(tenth_of_q, strength=0.5, **ALWAYS)
    result = sample(stacked, bench.positive, bench.negative)
    assert not torch.equal(result, sample(ours, bench.positive, bench.negative))
    late = ours.clone()
    for patch in attention_patches(late).values():
        patch.add(tenth_of_q, strength=0.5, sigma_start=0.01, sigma_end=0.0)  # after the last step
    assert torch.equal(sample(late, bench.positive, bench.negative), sample(ours, bench.positive, bench.negative))


def test_a_closed_foreign_patch_becomes_the_base(bench: Bench) -> None:
    from comfy.ldm.modules.attention import optimized_attention

    calls = []

    def doubled(q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> Any:
        calls.append(1)
        return 2 * optimized_attention(q, k, v, extra_options["n_heads"])

    model = bench.model.clone()
    model.set_model_attn2_replace(doubled, "output", 0)  # the whole block, as some packs do
    model.set_model_attn2_replace(doubled, "input", 7, 0)
    only_foreign = sample(model, bench.positive, bench.negative)
    count = len(calls)
    stacked = bench.patch(model=model)[0]
    assert not torch.equal(sample(stacked, bench.positive, bench.negative), only_foreign)
    assert len(calls) == 2 * count


def test_removing_the_identity_is_bypassing_the_node(bench: Bench) -> None:
    plain = sample(bench.model, bench.positive, bench.negative)
    assert torch.equal(sample(bench.apply(weight=0.0)[0], bench.positive, bench.negative), plain)
    assert bench.patch(weight=0)[0] is bench.model


def test_conditioning_that_came_in_is_not_changed(bench: Bench) -> None:
    before = [dict(options) for _, options in bench.positive]
    _, positive, negative = bench.apply(mask=mask(1))
    assert [options.keys() for options in before] == [options.keys() for _, options in bench.positive]
    assert positive[0][1]["control"] is negative[0][1]["control"], "one batch for both needs one object"
    assert "mask" in positive[0][1]
    assert "mask" not in negative[0][1]
    for _, options in (*positive, *negative):
        assert options["control_apply_to_uncond"] is False, "a plain negative beside it stays without IdentityNet"


def test_marked_conditioning_runs_on_an_unpatched_model(bench: Bench) -> None:
    _, positive, negative = bench.apply()
    assert torch.isfinite(sample(bench.model, positive, negative)).all()


def test_interrupt_leaves_nothing_behind(bench: Bench) -> None:
    import comfy.model_management
    import comfy.sample
    from hotpath.patches.identity_attention import IdentityDelta

    model, positive, negative = bench.apply(mask=mask(1))
    expected = sample(model, positive, negative)

    def stop(step: int, *_: Any) -> None:
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    noise = torch.randn(1, 4, 16, 16)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy.sample.sample(
            model, noise, 3, 4.0, "euler", "normal", positive, negative, torch.zeros_like(noise),
            callback=stop, disable_pbar=True, seed=1,
        )  # fmt: skip
    deltas = [c for p in attention_patches(model).values() for c in p.callback if isinstance(c, IdentityDelta)]
    assert len(deltas) == 10
    assert all(not d.prepared._copies and not d.mask._made for d in deltas)
    adapter = tiny_adapter()
    loaded = [m.model for m in comfy.model_management.current_loaded_models]
    assert all(getattr(m, "model", None) is not adapter for m in loaded)
    assert torch.equal(sample(model, positive, negative), expected)


def test_half_precision_models_get_keys_and_values_in_their_dtype() -> None:
    from hotpath_demo import tiny_sdxl

    bench = shallow_bench()
    model = tiny_sdxl.make_sdxl(dtype=torch.bfloat16, **SHALLOW)
    patched = bench.patch(model=model)[0]
    result = sample(patched, bench.positive, bench.negative)
    assert torch.isfinite(result).all()
    assert not torch.equal(result, sample(model, bench.positive, bench.negative))


def test_two_people_are_one_launch_and_equal_two(bench: Bench) -> None:
    from hotpath.patches.bound_attention import TokenStep

    first = bench.apply(mask=mask(1))[0]
    both = bench.apply(image=photo(2), model=first, mask=1 - mask(1), weight=0.5)[0]
    call = shape_of_call()
    for patch in attention_patches(both).values():
        (step,) = patch.bind(call, None).steps
        assert isinstance(step, TokenStep) and step.rows.tolist() == [[0, 1], [2, 3]]
        q = torch.randn(2, step.mask.shape[-1], step.keys.shape[-1])
        options = {"n_heads": q.shape[-1] // 64}
        together = patch.bind(call, None)(q, q, q, options)
        alone = [p.bind(call, None) for p in (single(patch, 0), single(patch, 1))]
        text = torch.nn.functional.scaled_dot_product_attention
        heads = [t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (q, q, q)]
        base = text(*heads).transpose(1, 2).flatten(2)
        parts = [a(q, q, q, options) - base for a in alone]
        assert torch.allclose(together, base + parts[0] + parts[1], atol=1e-4)


def single(patch: Any, number: int) -> Any:
    made = patch.copy()
    made.callback, made.kwargs = [patch.callback[number]], [patch.kwargs[number]]
    return made


def shape_of_call() -> Any:
    from hotpath.patches.model_call import ModelCall

    return ModelCall((0, 1), 16, 16, None, batch=2)


def test_telemetry_counts_the_contribution_of_every_block() -> None:
    """The sums of squares that a recorder gets are those of what hooks around the blocks see."""
    bench = shared_bench()

    class Recorder:
        def __init__(self) -> None:
            self.calls: list[torch.Tensor] = []

        def begin_call(self, timestep: Any, device: torch.device) -> torch.Tensor:
            self.calls.append(torch.zeros(70, 2, device=device))
            return self.calls[-1]

    model = bench.patch(weight=0.7)[0]
    expected = sample(model, bench.positive, bench.negative)
    watched = model.clone()
    recorder = Recorder()
    watched.model_options["transformer_options"]["hotpath_telemetry"] = recorder
    assert torch.equal(sample(watched, bench.positive, bench.negative), expected)
    assert len(recorder.calls) == 2
    assert all((counts > 0).all() for counts in recorder.calls)
    # Twice the weight is four times the sum of squares, in a first step that begins alike.
    twice = bench.patch(weight=1.4)[0].clone()
    other = twice.model_options["transformer_options"]["hotpath_telemetry"] = Recorder()
    sample(twice, bench.positive, bench.negative)
    ratio = other.calls[0][0] / recorder.calls[0][0]
    assert torch.allclose(ratio, torch.tensor([4.0, 1.0]), rtol=1e-3)


def test_other_models_are_refused(bench: Bench) -> None:
    import comfy.model_patcher
    from hotpath.patches.sdxl_layout import UnsupportedModel
    from hotpath_demo import tiny_sdxl

    # SD 1.5 has cross-attention at the first resolution too, where SDXL has none.
    sd15 = tiny_sdxl.make_sdxl(
        model_channels=64, transformer_depth=[1] * 6, transformer_depth_output=[1] * 9, transformer_depth_middle=1
    )
    with pytest.raises(UnsupportedModel, match=r"InstantID has published weights for SDXL only.*input"):
        bench.apply(model=sd15)
    wide = tiny_sdxl.make_sdxl(context_dim=96, **SHALLOW)
    with pytest.raises(UnsupportedModel, match="context of 96"):
        bench.apply(model=wide)

    class Flux(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)

    transformer = comfy.model_patcher.ModelPatcher(Flux(), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"SDXL only, and this model \(Flux\) is no UNet"):
        bench.patch(model=transformer)


def test_no_face_is_one_sentence(bench: Bench) -> None:
    with pytest.raises(ValueError, match="No face was found in the reference picture"):
        bench.apply(image=torch.zeros(2, 64, 64, 3))
    with pytest.raises(ValueError, match="empty batch"):
        bench.apply(image=torch.zeros(0, 64, 64, 3))


def test_pictures_without_a_face_are_left_out(bench: Bench) -> None:
    some = torch.cat((torch.zeros(1, 96, 80, 3), photo(1)))
    expected = sample(*bench.advanced())
    both = sample(*bench.advanced(image=some, image_kps=photo(1)))
    assert torch.allclose(both, expected, atol=1e-3)
    drawn = bench.call("FaceKeypointsPreprocessor", faceanalysis=bench.faces, image=some)[0]
    assert drawn.shape == some.shape
    assert drawn[0].max() == 0
    assert drawn[1].max() == 1


def test_options_of_a_patched_model_can_be_copied_deeply(bench: Bench) -> None:
    model, positive, negative = bench.apply(mask=mask(1))
    copied = model.clone()
    copied.model_options = copy.deepcopy(model.model_options)
    assert torch.equal(sample(copied, positive, negative), sample(model, positive, negative))


def test_masks_of_every_shape_mean_the_same(bench: Bench) -> None:
    plain = mask(1)
    expected = sample(*bench.apply(mask=plain))
    for same in (plain[0], plain > 0.5, plain[:, None], plain[..., None]):
        assert torch.equal(sample(*bench.apply(mask=same)), expected)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (mask(1)[:0], r"The mask is a tensor of \[0, 96, 64\]"),
        (photo(1), r"The mask is a tensor of \[1, 96, 80, 3\]"),
        (mask(1) * float("nan"), "not finite"),
    ],
)
def test_a_mask_that_is_none_is_one_sentence(bench: Bench, wrong: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        bench.apply(mask=wrong)
    with pytest.raises(ValueError, match=sentence):
        bench.patch(mask=wrong)


def test_too_few_masks_for_the_batch_is_one_sentence(bench: Bench) -> None:
    patched = bench.apply(mask=mask(1, count=2))
    with pytest.raises(ValueError, match="The mask has 2 pictures and the latent batch 3"):
        sample(*patched, batch=3)
    assert sample(*patched, batch=2).shape[0] == 2


def test_two_threads_prepare_with_one_adapter(bench: Bench) -> None:
    import threading

    from hotpath.cache import clear_all

    clear_all()
    failed: list[BaseException] = []

    def prepare(seed: int) -> None:
        try:
            with torch.inference_mode():
                bench.patch(image=photo(seed))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=prepare, args=(seed,)) for seed in range(40, 46)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
