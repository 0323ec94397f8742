"""Regional compilation: the same picture, few graphs, everything followed that may change."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from compiled_models import assert_same_picture, compiled, lora, sample
from hotpath.patches.attention_override import OVERRIDE, set_attention
from hotpath.patches.compilation import (
    CompilationRefused,
    CompileSettings,
    compile_model,
    compiler_of,
    settings,
)
from hotpath.patches.compilation.blocks import LiveParts, constants_of
from hotpath.patches.compilation.graphs import CompiledKind, inductor
from hotpath.patches.compilation.options import NotTraceable
from hotpath.patches.compilation.regions import describe_regions, find_regions
from tiny_native_models import tiny

pytestmark = pytest.mark.comfy


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


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("z_image", 2),
        pytest.param("flux", 2, marks=pytest.mark.long),
        pytest.param("least_sdxl", 12, marks=pytest.mark.long),
    ],
)
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


@pytest.mark.long
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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("compiler", [False, True])
def test_on_a_cpu_products_are_onednns_while_a_model_is_sampled(
    monkeypatch: pytest.MonkeyPatch, compiler: bool
) -> None:
    from hotpath.patches import compilation
    from hotpath.products import rerouting

    bench = tiny("least_sdxl" if compiler else "z_image")
    only = CompileSettings(regions="transformer blocks")
    expected, seen = sample(bench), []
    real = rerouting.product
    monkeypatch.setattr(rerouting, "LARGE", 1024)
    monkeypatch.setattr(rerouting, "product", lambda *given: (seen.append(given[0].shape), real(*given))[1])
    monkeypatch.setattr(rerouting, "why_not", lambda *_, **__: "")
    if not compiler:
        monkeypatch.setattr(compilation, "compiler_problem", lambda _: "there is none.")
    backend = "aot_eager" if compiler else "inductor"
    # Attention, too, as what is compiled then has more in it.
    model, report = compile_model(set_attention(bench.model, "auto")[0], only, backend=backend)
    assert report.splitlines()[-1] == "linear layers in float32 are multiplied by oneDNN, which is faster on this CPU"
    assert_same_picture(sample(bench, model.clone()), expected)
    count = len(seen)
    assert count > 10 and (not compiler or compiler_of(model).fallbacks() == {})
    assert torch.equal(sample(bench), expected)
    assert_same_picture(sample(bench, compilation.uncompiled(model)), expected)
    assert len(seen) == count, "neither the model before it nor what is compared with it"

    monkeypatch.setattr(rerouting, "why_not", lambda *_, **__: "oneDNN is no faster on this CPU")
    model, report = compile_model(bench.model, only, backend=backend)
    assert report.splitlines()[-1].endswith("by torch itself, because oneDNN is no faster on this CPU")
    if not compiler:
        assert torch.equal(sample(bench, model), expected) and len(seen) == count


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


@pytest.mark.long
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


def test_a_kind_that_nobody_holds_is_freed_with_its_graphs() -> None:
    kind = CompiledKind("Block", lambda block, x: x.sin(), CompileSettings(), lambda graph, _: graph.forward)
    kind(torch.nn.Identity(), (torch.zeros(2),), {})
    assert kind.graphs == 1
    held = weakref.ref(kind)
    del kind
    gc.collect()
    assert held() is None


def test_a_graph_for_another_order_or_attention_serves_every_size() -> None:
    """Also where the first picture that it is made with is square."""

    def forward(block: torch.nn.Module, x: torch.Tensor, options: dict) -> torch.Tensor:
        return options[OVERRIDE](x) + 1

    kind = CompiledKind("Block", forward, CompileSettings(), lambda graph, _: graph.forward)
    for override in (torch.sin, torch.cos):
        for shape in ((1, 8, 8, 6), (1, 6, 8, 8), (1, 6, 8, 12), (1, 8, 12, 6)):
            with torch.inference_mode():
                x = torch.zeros(shape) if shape[3] == 6 else torch.zeros(shape).transpose(1, 3)
                kind(torch.nn.Identity(), (x, {OVERRIDE: override}), {})
    assert kind.graphs == 4, "two orders and two attentions"


@pytest.mark.usefixtures("own_graphs")
@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.parametrize(
    "where", [pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["flux", "z_image", "least_sdxl"])
@pytest.mark.usefixtures("own_graphs")
def test_torchs_own_compiler_makes_whole_models(name: str, where: str) -> None:
    """In ComfyUI's inference mode, of blocks that write to their input and of such that do not."""
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with torch.inference_mode():
        bench = tiny(name)
        model, _ = compile_model(bench.model)
        compiler = compiler_of(model)
        assert compiler is not None
        for changes in ({}, {"size": (16, 24), "prompt": "another"}):
            assert_same_picture(sample(bench, model, **changes), sample(bench, **changes))
            assert compiler.fallbacks() == {} and compiler.graphs >= 1
