"""Regional compilation: the same picture, few graphs, everything followed that may change, nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hotpath.patches.compilation import (
    CompilationRefused,
    CompileSettings,
    RegionalCompiler,
    compile_model,
    compiler_of,
    settings,
)
from hotpath.patches.compilation.blocks import LiveParts, constants_of
from hotpath.patches.compilation.graphs import CompiledKind, inductor
from hotpath.patches.compilation.options import NotTraceable, block_options, options_read_by
from hotpath.patches.compilation.regions import describe_regions, find_regions
from tiny_native_models import Tiny, tiny

pytestmark = pytest.mark.comfy

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


@pytest.mark.parametrize(
    ("name", "regions", "expected"),
    [
        ("sdxl", "all blocks", "17 ResBlock in 12 kinds, 70 BasicTransformerBlock in 2 kinds"),
        ("sdxl", "transformer blocks", "70 BasicTransformerBlock in 2 kinds"),
        ("z_image", "all blocks", "7 JointTransformerBlock in 2 kinds"),
        ("flux", "transformer blocks", "2 DoubleStreamBlock in 1 kind, 2 SingleStreamBlock in 1 kind"),
    ],
)
def test_repeated_blocks_are_found_in_the_module_tree(name: str, regions: str, expected: str) -> None:
    assert describe_regions(find_regions(tiny(name).model.model.diffusion_model, regions)) == expected


@pytest.mark.parametrize(("name", "graphs"), [("z_image", 2), ("flux", 2), ("least_sdxl", 12)])
@pytest.mark.usefixtures("own_graphs")
def test_one_graph_per_kind_serves_prompts_and_sizes(name: str, graphs: int) -> None:
    bench = tiny(name)
    model, compiler = compiled(bench.model)
    assert_same_picture(sample(bench, model), sample(bench))
    assert compiler.graphs == graphs
    assert compiler.fallbacks() == {}
    for changes in ({"prompt": "another", "tokens": 50}, {"size": (16, 24)}, {"size": (24, 8), "prompt": "third"}):
        assert_same_picture(sample(bench, model, **changes), sample(bench, **changes))
        assert compiler.graphs == graphs, changes


def test_another_model_of_the_architecture_uses_the_same_graphs() -> None:
    from tiny_native_models import make_z_image

    bench = tiny("z_image")
    first, compiler = compiled(bench.model)
    sample(bench, first)
    graphs = compiler.graphs
    other = make_z_image(seed=3)
    expected = sample(bench, other)
    assert (expected - sample(bench)).abs().max() > 0.01
    model, others = compiled(other)
    assert_same_picture(sample(bench, model), expected)
    assert others.kinds == compiler.kinds
    assert others.graphs == graphs


def test_loras_of_any_strength_are_followed_without_a_new_graph() -> None:
    bench = tiny("z_image")
    model, compiler = compiled(bench.model)
    plain = sample(bench, model)
    graphs = compiler.graphs
    for strength, part in ((1.0, ""), (0.3, ""), (1.0, "attention"), (1.0, "layers.1")):
        changed = model.clone()
        changed.add_patches(lora(model, part=part), strength)
        expected = bench.model.clone()
        expected.add_patches(lora(model, part=part), strength)
        made = sample(bench, changed)
        assert_same_picture(made, sample(bench, expected))
        assert (made - plain).abs().max() > 1e-3
    assert compiler.graphs == graphs
    assert torch.equal(sample(bench, model), plain)


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
    assert "test_compilation replaced the forward of Linear" in compiler_of(model).report()
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


def test_models_are_evicted_and_reloaded_under_compile() -> None:
    import comfy.model_management as management

    bench = tiny("z_image")
    model, compiler = compiled(bench.model)
    patched = model.clone()
    patched.add_patches(lora(model))
    expected, graphs = sample(bench, patched), compiler.graphs
    management.unload_all_models()
    assert torch.equal(sample(bench, patched), expected)
    assert compiler.graphs == graphs


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


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny("flux")
    monkeypatch.setattr(settings.shutil, "which", lambda _: None)
    settings.compiler_problem.cache_clear()
    try:
        if bench.model.load_device.type != "cpu":
            pytest.skip("asks for the C++ compiler that only a CPU needs")
        model, report = compile_model(bench.model)
        assert report.startswith("Not compiled: there is no C++ compiler")
        # Recording needs none of it, but a card.
        for strict in (False, True):
            graphs = CompileSettings(mode="cudagraphs", strict=strict)
            if strict:
                with pytest.raises(CompilationRefused, match="CUDA graphs need a CUDA device"):
                    compile_model(bench.model, graphs)
            else:
                made, report = compile_model(bench.model, graphs)
                assert report.startswith("Not recorded: CUDA graphs need") and compiler_of(made) is None
        assert compiler_of(model) is None
        with pytest.raises(CompilationRefused, match=r"C\+\+ compiler"):
            compile_model(bench.model, CompileSettings(strict=True))
    finally:
        settings.compiler_problem.cache_clear()


def test_a_cards_compilers_start_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.patches import compilation
    from hotpath.patches.compilation import graphs
    from torch._inductor import async_compile

    started: list[str] = []
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append("processes"))
    monkeypatch.setattr(async_compile.AsyncCompile, "use_process_pool", lambda: started.append("asked"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    graphs.start_workers.cache_clear()
    model = tiny("flux").model.clone()
    compile_model(model)
    assert not started  # a CPU's kernels are compiled by other means
    model.load_device = torch.device("cuda")
    compile_model(model, backend="eager")
    assert not started
    for _ in range(2):
        compile_model(model)
    assert started[0] == "processes" and started.count("processes") == 1
    graphs.start_workers.cache_clear()


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="no compile mode 'fast'; choose one of default"):
        CompileSettings(mode="fast")
    with pytest.raises(ValueError, match="transformer blocks"):
        CompileSettings(regions="everything")
    assert CompileSettings(mode="max-autotune").inductor_options()["max_autotune"] is True
    assert "triton.cudagraphs" not in CompileSettings(mode="max-autotune").inductor_options()


def test_dynamic_vram_and_compilation_exclude_each_other() -> None:
    bench = tiny("flux")
    asked = []

    class Dynamic(type(bench.model)):
        def is_dynamic(self) -> bool:
            return True

        def clone(self, disable_dynamic: bool = False, **_: Any) -> Any:
            asked.append(disable_dynamic)
            return bench.model.clone()

    dynamic = Dynamic(bench.model.model, bench.model.load_device, bench.model.offload_device)
    with pytest.raises(ValueError, match="--disable-dynamic-vram"):
        compile_model(dynamic, backend="eager")
    dynamic.cached_patcher_init = (lambda: None, ())
    _, report = compile_model(dynamic, backend="eager")
    assert asked == [True]
    assert "DynamicVRAM is off for this model" in report


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


def test_a_graph_holds_no_constant_of_another_block() -> None:
    bench = tiny("flux")
    first, second = bench.model.model.diffusion_model.single_blocks
    assert constants_of(first) == constants_of(second)
    second.num_heads, heads = 4, second.num_heads
    try:
        assert constants_of(first) != constants_of(second)
    finally:
        second.num_heads = heads
    norm = second.pre_norm
    norm.eps, eps = 0.5, norm.eps
    try:
        assert constants_of(first) != constants_of(second)
    finally:
        norm.eps = eps
    assert LiveParts(first).state(torch.device("cpu")) == LiveParts(second).state(torch.device("cpu"))
    with pytest.raises(NotTraceable, match="weights lie on cpu"):
        LiveParts(first).state(torch.device("meta"))
    second.linear1.weight_function = [lambda weight: weight]
    try:
        with pytest.raises(NotTraceable, match="not loaded whole"):
            LiveParts(second).state(torch.device("cpu"))
    finally:
        second.linear1.weight_function = []


@torch.inference_mode()
def test_what_a_graph_knows_of_weights_is_part_of_a_kind() -> None:
    from hotpath.patches.precision import quantize_model

    model, _ = quantize_model(tiny("z_image").model, "fp8_weights")
    first, second = model.model.diffusion_model.layers[:2]
    layer = second.attention.out
    cpu = torch.device("cpu")

    def alike() -> bool:
        return (constants_of(first), LiveParts(first).state(cpu)) == (
            constants_of(second),
            LiveParts(second).state(cpu),
        )

    assert alike()
    layer._full_precision_mm = not layer._full_precision_mm
    assert not alike()
    layer._full_precision_mm = not layer._full_precision_mm
    weight = layer.weight
    held, meaning = weight._params, type(weight._params)
    weight._params = meaning(held.scale.expand(256, 1), held.orig_dtype, held.orig_shape)
    assert not alike(), "a scale per row is another product"
    weight._params = held
    layer.comfy_force_cast_weights = True
    assert not alike()
    del layer.comfy_force_cast_weights
    assert alike()
    norm = second.attention_norm1
    norm.weight = torch.nn.Parameter(norm.weight.detach().repeat_interleave(2)[::2], requires_grad=False)
    assert not alike(), "compiled kernels are for one layout in memory"


@pytest.mark.usefixtures("own_graphs")
def test_more_sizes_than_torch_keeps_graphs_for_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    import torch._dynamo

    bench = tiny("flux")
    model, compiler = compiled(bench.model, dynamic=False, regions="transformer blocks")
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (8, 10, 12):
            made = sample(bench, model, size=(8, width), steps=1)
        assert_same_picture(made, sample(bench, size=(8, 12), steps=1))
        assert compiler.graphs == 4, "two sizes of two kinds"
        reasons = compiler.fallbacks()
        assert list(reasons.values()) == [2, 2]
        assert all("no more than 2 graphs" in r and "with dynamic one graph serves all sizes" in r for r in reasons)
        warned = len(caplog.records)
        sample(bench, model, size=(8, 12))
        assert len(caplog.records) == warned, "torch warns at every try"
        assert_same_picture(sample(bench, model, size=(8, 8)), sample(bench, size=(8, 8)))
        assert compiler.fallbacks() == {} and compiler.graphs == 4


def test_calls_beyond_torchs_limit_are_remembered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo
    from hotpath.patches.compilation import graphs
    from hotpath.patches.compilation.options import NotTraceable

    monkeypatch.setattr(graphs, "REMEMBERED", 3)
    kind = CompiledKind(
        "Block", lambda block, x: x.sin(), CompileSettings(dynamic=False), lambda graph, _: graph.forward
    )
    with torch._dynamo.config.patch(recompile_limit=1):
        kind(torch.nn.Identity(), (torch.zeros(2),), {})
        for width in range(3, 15):
            for _ in range(2):
                with pytest.raises(NotTraceable, match="no more than 1 graphs"):
                    kind(torch.nn.Identity(), (torch.zeros(width),), {})
            assert 1 <= len(kind._beyond) <= 3
    assert kind.graphs == 1


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


def test_options_that_a_block_reads_by_name_reach_it() -> None:
    from comfy.ldm.lightricks.model import BasicTransformerBlock

    block = BasicTransformerBlock(32, 2, 16, context_dim=32, operations=torch.nn)
    read = options_read_by(block)
    assert "stg_skip_self_attn" in read
    assert block_options({"stg_skip_self_attn": True, "sigmas": 1}, read)["stg_skip_self_attn"] is True


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


@pytest.mark.usefixtures("own_graphs")
def test_static_sizes_have_a_graph_each() -> None:
    bench = tiny("flux")
    model, compiler = compiled(bench.model, dynamic=False)
    for count, size in ((2, (16, 16)), (4, (16, 24)), (4, (16, 16))):
        assert_same_picture(sample(bench, model, size=size), sample(bench, size=size))
        assert compiler.graphs == count


def test_inductor_compiles_a_block_for_the_cpu() -> None:
    if problem := settings.compiler_problem("cpu"):
        pytest.skip(problem)
    # One small block: compiling a whole model for a CPU takes minutes on a machine that has other things to do.
    block = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16), torch.nn.GELU()).eval()
    chosen = CompileSettings()
    kind = CompiledKind("Block", type(block).forward, chosen, inductor(chosen.inductor_options()))
    with torch.inference_mode():
        for tokens in (8, 20):
            x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
            torch.testing.assert_close(kind(block, (x,), {}), block(x))
        block[1].weight = torch.nn.Parameter(2 * block[1].weight)
        torch.testing.assert_close(kind(block, (x,), {}), block(x))
    assert kind.graphs == 1


def test_attention_of_a_node_that_runs_again_needs_no_new_graph() -> None:
    from hotpath.patches.attention_override import attention_report, set_attention

    bench = tiny("z_image")
    graphs = []
    for _ in range(3):
        chosen, _ = set_attention(bench.model, "sdpa_math")
        model, compiler = compiled(chosen)
        assert_same_picture(sample(bench, model), sample(bench))
        assert compiler.fallbacks() == {}
        graphs.append(compiler.graphs)
    assert graphs[0] == graphs[1] == graphs[2]
    assert "compiled into a graph" in attention_report(model)
