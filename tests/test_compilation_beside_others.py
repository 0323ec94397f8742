"""Compilation beside others: what packs and ComfyUI do to a model goes on, is named, and is found as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from abc import ABC
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiled_models import assert_same_picture, blocks_of, compiled, sample
from hotpath.patches.compilation import (
    CompilationRefused,
    CompileSettings,
    compile_model,
    compiler_of,
    settings,
)
from hotpath.patches.compilation.graphs import CompiledKind, compile_errors, named_backend
from hotpath.patches.compilation.options import NotTraceable, block_options, options_read_by
from hotpath.products import rerouting
from tiny_native_models import Tiny, make_flux, tiny

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def products_of_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are compared to the last bit here, and oneDNN's products, on CPUs where they are faster, differ in it."""
    monkeypatch.setattr(rerouting, "why_not", lambda *_, **__: "pictures are compared")


def test_the_model_that_came_in_is_left_alone() -> None:
    bench = tiny("flux")
    before = sample(bench)
    wrappers, options = copy.deepcopy(bench.model.wrappers), copy.deepcopy(bench.model.model_options)
    model, compiler = compiled(bench.model)
    sample(bench, model)
    calls = []
    kind = next(iter(compiler.kinds))
    kind._run, run = (lambda *a, **k: calls.append(1) or run(*a, **k)), kind._run
    assert torch.equal(sample(bench), before)
    assert not calls
    sample(bench, model)
    assert calls
    assert bench.model.wrappers == wrappers
    assert bench.model.model_options == options
    assert all("forward" not in vars(block) for block in blocks_of(bench.model))


def test_a_class_that_another_pack_changes_meanwhile_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """AnimateDiff's packs put another norm into torch's class for the length of a sampling, and graphs hold the old one."""
    bench = tiny("z_image")
    model, _ = compiled(bench.model)
    before = sample(bench, model)
    plain = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda layer, x: plain(layer, x) * 0.5)
    expected = sample(bench, bench.model)
    made = sample(bench, model)
    assert torch.equal(made, expected) and not torch.equal(made, before)
    assert f"{__name__} replaced the forward of Linear" in compiler_of(model).report()
    monkeypatch.undo()
    assert torch.equal(sample(bench, model), before)


def test_nothing_stays_on_the_blocks_after_an_interrupt_or_an_error() -> None:
    import comfy.model_management as management

    bench = tiny("z_image")
    model, _ = compiled(bench.model)
    expected = sample(bench, model)

    def interrupt(*_: Any) -> None:
        raise management.InterruptProcessingException()

    stopped = model.clone()
    stopped.model_options["transformer_options"]["patches"] = {"double_block": [interrupt]}
    with pytest.raises(management.InterruptProcessingException):
        sample(bench, stopped)
    assert all("forward" not in vars(block) for block in blocks_of(model))
    broken = bench.text("a portrait", 20)
    broken[0][0] = broken[0][0][..., :-1]
    with pytest.raises(RuntimeError):
        sample(Tiny("broken", model, lambda *_: broken, 16, 1.0), model)
    assert all("forward" not in vars(block) for block in blocks_of(model))
    assert torch.equal(sample(bench, model), expected)


@pytest.mark.long
def test_copies_of_the_options_keep_the_compiler() -> None:
    bench = tiny("flux")
    model, compiler = compiled(bench.model)
    expected, graphs = sample(bench, model), compiler.graphs
    copied = model.clone()
    copied.model_options = copy.deepcopy(copied.model_options)
    copied.wrappers = copy.deepcopy(copied.wrappers)
    assert torch.equal(sample(bench, copied), expected)
    assert compiler.graphs == graphs


def test_patches_of_other_packs_run_as_they_are_and_are_named() -> None:
    bench = tiny("sdxl")
    seen = []

    def foreign(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]) -> Any:
        seen.append(extra_options["block_index"])
        return n * 0.9, context, value

    base = bench.model.clone()
    base.set_model_attn1_patch(foreign)
    model, compiler = compiled(base, regions="transformer blocks")
    assert_same_picture(sample(bench, model), sample(bench, base))
    assert max(seen) == 9
    reasons = compiler.fallbacks()
    assert list(reasons.values()) == [70]
    assert "attn1_patch of" in next(iter(reasons)) and "foreign" in next(iter(reasons))
    strict, _ = compiled(base, regions="transformer blocks", strict=True)
    with pytest.raises(CompilationRefused, match="attn1_patch"):
        sample(bench, strict)


def test_only_the_replaced_block_runs_as_it_is() -> None:
    bench = tiny("sdxl")

    def foreign(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        return q + v.mean()

    base = bench.model.clone()
    base.set_model_attn2_replace(foreign, "output", 0, 3)
    model, compiler = compiled(base, regions="transformer blocks")
    assert_same_picture(sample(bench, model), sample(bench, base))
    assert list(compiler.fallbacks().values()) == [1]


def test_blocks_changed_inside_by_another_pack_run_as_they_are() -> None:
    bench = tiny("z_image")
    model, compiler = compiled(bench.model)
    sample(bench, model)
    layer = bench.model.model.diffusion_model.layers[1].feed_forward.w1
    handle = layer.register_forward_hook(lambda module, inputs, output: output * 0.5)
    try:
        assert_same_picture(sample(bench, model), sample(bench))
        assert list(compiler.fallbacks().values()) == [1]
        assert "hooked a Linear" in next(iter(compiler.fallbacks()))
    finally:
        handle.remove()
    layer.forward = lambda x: type(layer).forward(layer, x) * 0.5
    try:
        assert_same_picture(sample(bench, model), sample(bench))
        assert "replaced the forward" in next(iter(compiler.fallbacks()))
    finally:
        del layer.forward
    assert_same_picture(sample(bench, model), sample(bench))
    assert compiler.fallbacks() == {}


def test_a_block_that_does_not_compile_runs_as_it_is() -> None:
    bench = tiny("flux")
    tried = []

    def broken(graph: Any, inputs: Any) -> Any:
        tried.append(1)
        raise ArithmeticError("no such kernel")

    model, _ = compile_model(bench.model, backend=broken)
    compiler = compiler_of(model)
    assert torch.equal(sample(bench, model), sample(bench))
    assert torch.equal(sample(bench, model), sample(bench))
    assert len(tried) == 2  # once per kind, not per block or step
    assert sum(compiler.fallbacks().values()) == 4
    assert all("no such kernel" in reason for reason in compiler.fallbacks())
    assert "no such kernel" in compiler.report()
    strict, _ = compile_model(bench.model, CompileSettings(strict=True), backend=broken)
    with pytest.raises(CompilationRefused, match="no such kernel"):
        sample(bench, strict)


@pytest.mark.parametrize("strict", [False, True])
def test_blocks_that_a_model_does_not_call_by_their_forward_are_named(strict: bool) -> None:
    """Wan-Animate 2 calls other methods of its blocks."""
    import comfy.sample
    import comfy.supported_models
    from tiny_native_models import _patcher, encode

    if not hasattr(comfy.supported_models, "WAN_Animate2"):
        pytest.skip("this ComfyUI has no Wan-Animate 2")
    config = comfy.supported_models.WAN_Animate2(
        {
            "image_model": "wan2.1", "model_type": "animate2", "in_dim": 36, "dim": 64, "num_heads": 1, "ffn_dim": 64,
            "freq_dim": 32, "text_dim": 32, "num_layers": 2, "dtype": torch.float32,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    plain = _patcher(config, 0)
    latent, text = torch.zeros(1, 16, 2, 4, 4), encode("a fox", 4, 32)

    def made(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return comfy.sample.sample(
                model, torch.ones_like(latent), 1, 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=1
            )

    model, compiler = compiled(plain, strict=strict)
    if strict:
        with pytest.raises(CompilationRefused, match="no call of the model went through the forward of its blocks"):
            made(model)
        return
    assert torch.equal(made(model), made(plain)) and compiler.graphs == 0
    assert "  2 WanAnimate2Block: no call of the model went through their forward" in compiler.report().splitlines()


def test_what_cannot_be_traced_holds_nothing_of_the_call() -> None:
    """An error and a frame of torch's that refer to each other would hold the model that is sampled, and its callers'."""

    def breaks(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    def sampled() -> Any:
        given = torch.nn.Identity()
        with pytest.raises(compile_errors()):
            kind(given, (torch.ones(2),), {})
        return weakref.ref(given)

    kind = CompiledKind("Block", breaks, CompileSettings(), named_backend("eager", CompileSettings()))
    gc.disable()
    try:
        assert sampled()() is None
    finally:
        gc.enable()


def test_dynamic_vram_and_compilation_exclude_each_other() -> None:
    import comfy.model_management as management

    bench, loaded = tiny("flux"), []

    class Dynamic(type(bench.model)):
        def is_dynamic(self) -> bool:
            return True

    def load(name: str, disable_dynamic: bool) -> tuple[None, Any]:
        assert (name, disable_dynamic) == ("flux", True)
        loaded.append(make_flux())
        return None, loaded[-1]

    dynamic = Dynamic(bench.model.model, bench.model.load_device, bench.model.offload_device)
    with pytest.raises(ValueError, match="--disable-dynamic-vram"):
        compile_model(dynamic, backend="eager")
    dynamic.cached_patcher_init = (load, ("flux",), 1)
    made, report = compile_model(dynamic, backend="eager")
    assert "DynamicVRAM is off for this model" in report
    # A LoRA before it changed: nothing is read from disk again.
    again, _ = compile_model(dynamic, backend="eager")
    assert len(loaded) == 1 and made.model is again.model is loaded[0].model
    management.load_models_gpu([again])
    del made, again
    gc.collect()
    assert management.current_loaded_models[0].model.model is loaded[0].model, "they can still be sent away"


def test_a_comfyui_from_before_dynamic_vram_compiles_too() -> None:
    from hotpath.patches.compilation import _static_clone

    assert _static_clone(SimpleNamespace(clone=lambda: "a clone")) == ("a clone", "")
    with pytest.raises(ValueError, match="without --fast dynamic_vram"):  # the first to have it load nothing twice
        _static_clone(SimpleNamespace(is_dynamic=lambda: True, clone=lambda: "a clone"))


def test_compiling_twice_and_after_comfyui_compiles_once() -> None:
    from comfy.patcher_extension import WrappersMP
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, set_torch_compile_wrapper

    bench = tiny("flux")
    core = bench.model.clone()
    set_torch_compile_wrapper(core, backend="eager")
    model, report = compile_model(core, backend="eager")
    assert "TorchCompileModel came before" in report
    assert not model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    again, _ = compile_model(model, backend="eager")
    assert len(again.get_wrappers(WrappersMP.APPLY_MODEL, "hotpath_compile")) == 1
    assert_same_picture(sample(bench, again), sample(bench))
    after, theirs = again.clone(), []
    set_torch_compile_wrapper(after, backend=lambda graph, _: theirs.append(graph) or graph)
    assert_same_picture(sample(bench, after), sample(bench))
    assert not theirs and "TorchCompileModel came after" in compiler_of(after).report()
    sample(bench, again)
    assert "came after" not in compiler_of(again).report()


def test_another_packs_compiler_after_ours_is_left_out() -> None:
    """KJNodes' has a wrapper of its own, under the name of ComfyUI's."""
    from comfy.patcher_extension import WrappersMP

    bench, theirs = tiny("flux"), []
    model, compiler = compiled(bench.model)
    after = model.clone()

    def swaps_blocks(executor: Any, *args: Any, **kwargs: Any) -> Any:
        theirs.append(1)
        return executor(*args, **kwargs)

    after.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", swaps_blocks)
    assert_same_picture(sample(bench, after), sample(bench))
    assert not theirs and "TorchCompileModel came after" in compiler.report()


def test_a_block_sees_only_what_concerns_it() -> None:
    block = tiny("sdxl").model.model.diffusion_model.middle_block[1].transformer_blocks[0]
    read = options_read_by(block)

    class Patch:
        compilable = True

    mine, other = Patch(), Patch()
    options = {
        "sigmas": torch.ones(1),
        "uuids": ["a"],
        "cond_or_uncond": [0, 1],
        "block": ("middle", 0),
        "block_index": 4,
        "patches": {"input_block_patch": [print]},
        "patches_replace": {"attn2": {("middle", 0, 4): mine, ("middle", 0, 5): other}},
    }
    made = block_options(options, read)
    assert made.pop("optimized_attention_override", None) is not tiny
    assert made == {
        "block": ("hotpath", 0),
        "block_index": 0,
        "patches_replace": {"attn2": {("hotpath", 0, 0): mine}},
    }
    assert "block" not in block_options({**options, "block_index": 7}, read)
    elsewhere = {**options, "optimized_attention_override": lambda func, *a, **k: func(*a, **k)}
    with pytest.raises(NotTraceable, match="attention is overridden by"):
        block_options(elsewhere, read)


def test_patches_that_a_block_names_act_inside_it() -> None:
    """Cosmos' blocks have one of their own, around their feed-forward layers."""
    import comfy.ops
    from comfy.ldm.cosmos.predict2 import Block
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    with torch.device("meta"):
        cosmos = Block(16, 16, 2, operations=comfy.ops.disable_weight_init)
        residual = ResBlock(32, 32, 0)
    patch = SimpleNamespace()
    patches = {"patches": {name: [patch] for name in ("mlp_patch", "forward_timestep_embed_patch", "post_input")}}
    with pytest.raises(NotTraceable, match=r"mlp_patch of types\.SimpleNamespace acts inside"):
        block_options(patches, options_read_by(cosmos))
    block_options(patches, options_read_by(residual))


def test_options_that_a_block_reads_by_name_reach_it() -> None:
    from comfy.ldm.lightricks.model import BasicTransformerBlock

    block = BasicTransformerBlock(32, 2, 16, context_dim=32, operations=torch.nn)
    read = options_read_by(block)
    assert "stg_skip_self_attn" in read
    assert block_options({"stg_skip_self_attn": True, "sigmas": 1}, read)["stg_skip_self_attn"] is True


def test_classes_of_pythons_own_need_no_source() -> None:
    """LTX-Video's model is an ABC, whose source Python keeps frozen."""

    class Abstract(torch.nn.Module, ABC):
        def forward(self, transformer_options: dict[str, Any]) -> Any:
            return transformer_options["run_ax"]

    assert "run_ax" in options_read_by(Abstract())


def test_nothing_global_is_left_behind() -> None:
    from comfy.ldm.modules import attention

    def state() -> Any:
        import torch._dynamo.config
        import torch._inductor.config

        return (
            torch._dynamo.config.get_config_copy(),
            torch._inductor.config.get_config_copy(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.get_default_dtype(),
            torch.random.get_rng_state().sum(),
            dict(attention.REGISTERED_ATTENTION_FUNCTIONS),
            attention.optimized_attention,
        )

    bench = tiny("flux")
    sample(bench)
    before = state()
    for mode in (mode for mode in settings.MODES if CompileSettings(mode).compiles):
        sample(bench, compiled(bench.model, mode=mode)[0])
    assert state() == before
