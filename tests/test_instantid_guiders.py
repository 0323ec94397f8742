"""Guiders, compilers, devices and context windows are understood: everybody gets the tokens of his role."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from instantid_bench import attention_patches, in_windows, sample, shallow_bench
from instantid_scenarios import Bench, mask, photo
from tiny_native_models import LEAST_SDXL

pytestmark = pytest.mark.comfy


@pytest.fixture
def bench() -> Bench:
    return shallow_bench()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def roles_seen(model: Any, run: Any) -> dict[int, int]:
    """Role by index of conditioning, as identity attention sees it while `run` samples."""
    from comfy.patcher_extension import WrappersMP
    from hotpath.patches import model_call

    seen: dict[int, int] = {}

    def spy(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        options = args[3]
        call = model_call.current_call({"original_shape": x.shape, **options})
        seen.update(zip(options["cond_or_uncond"], call.roles, strict=True))
        return executor(x, t, *args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    run(watched)
    return seen


def run_guider(guider: Any) -> None:
    import comfy.samplers

    latent = torch.zeros(1, 4, 8, 8)
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", 2)
    guider.sample(torch.randn(1, 4, 8, 8), latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)


def test_dual_cfg_gives_the_positive_tokens_to_the_positive(bench: Bench) -> None:
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    model, positive, negative = bench.apply()

    def run(watched: Any) -> None:
        guider = Guider_DualCFG(watched)
        guider.set_conds(positive, bench.positive, negative)  # positive, middle, negative
        guider.set_cfg(4.0, 2.0)
        run_guider(guider)

    assert roles_seen(model, run) == {0: 1, 1: 1, 2: 0}  # its order is negative, middle, positive


def test_perp_neg_runs_with_three_conditionings(bench: Bench) -> None:
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    model, positive, negative = bench.apply()

    def run(watched: Any) -> None:
        guider = Guider_PerpNeg(watched)
        guider.set_conds(positive, negative, bench.negative)
        guider.set_cfg(4.0, 1.0)
        run_guider(guider)

    assert roles_seen(model, run) == {0: 0, 1: 1, 2: 1}


def with_pytorch_attention(model: Any) -> Any:
    """What a GPU has anyway: ComfyUI's attention for the CPU reads the free memory, which breaks graphs."""
    from comfy.ldm.modules.attention import attention_pytorch

    made = model.clone()
    options = made.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
    return made


def compiled_like_core(model: Any, graphs: list[Any], **options: Any) -> Any:
    """A clone compiled as ComfyUI's TorchCompileModel does it, which drops guards; `graphs` collects what was traced."""
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    def collect(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = with_pytorch_attention(model)
    set_torch_compile_wrapper(
        compiled, backend=collect, options={"guard_filter_fn": skip_torch_compile_dict}, dynamic=False, **options
    )
    return compiled


def alike(made: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to rounding; random weights give latents in the hundreds."""
    return bool((made - expected).abs().max() < 1e-5 * expected.abs().max())


@pytest.mark.long
def test_compiled_models_follow_every_change_in_one_graph(bench: Bench) -> None:
    """No graph break, nothing baked in; a graph of the plain model is not taken for the patched one or the reverse."""
    from hotpath_demo import tiny_sdxl

    torch._dynamo.reset()
    model = with_pytorch_attention(tiny_sdxl.make_sdxl(**LEAST_SDXL))
    graphs: list[Any] = []
    compiled = compiled_like_core(model, graphs, fullgraph=True)
    plain = sample(model, bench.positive, bench.negative)
    assert alike(sample(compiled, bench.positive, bench.negative), plain)
    counted: list[int] = []
    settings: list[dict[str, Any]] = [
        {"weight": 0.8},
        {"weight": 0.2},
        {"weight": 0.8, "image": photo(2)},
        {"weight": 0.8, "mask": mask(4)},
        {"weight": 0.3, "mask": 1 - mask(4)},
        {"weight": 0.8},
    ]
    for changes in settings:
        expected = sample(bench.patch(model=model, **changes)[0], bench.positive, bench.negative)
        result = sample(bench.patch(model=compiled, **changes)[0], bench.positive, bench.negative)
        assert alike(result, expected), changes
        assert not alike(result, plain), changes
        counted.append(len(graphs))
    assert alike(sample(compiled, bench.positive, bench.negative), plain)
    # One graph without a patch, one with it, one with a mask.
    assert counted == [2, 2, 2, 3, 3, 3]
    inside = [str(node.target) for node in graphs[1].graph.nodes if "attend_tokens" in str(node.target)]
    assert inside == ["hotpath.attend_tokens"] * len(attention_patches(bench.patch(model=model)[0]))
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_first", [True, False])
def test_models_whose_graphs_break_follow_every_change(bench: Bench, compiled_first: bool) -> None:
    """As with ComfyUI's own attention on a CPU: what comes after a break was made for other patches, or for none."""
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    from hotpath_demo import tiny_sdxl

    torch._dynamo.reset()
    model = tiny_sdxl.make_sdxl(**LEAST_SDXL)

    def compiled(base: Any) -> Any:
        made = base.clone()
        guards = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(made, backend="eager", options=guards, dynamic=False)
        return made

    def drawn(made: Any) -> torch.Tensor:
        return sample(made, bench.positive, bench.negative, steps=1)

    plain = drawn(model)
    settings: list[dict[str, Any] | None] = [
        None,
        {"weight": 0.8},
        {"weight": 0.2},
        {"weight": 0.8, "mask": mask(4)},
        None,
    ]
    for changes in settings:
        if changes is None:
            assert alike(drawn(compiled(model)), plain)
            continue
        expected = drawn(bench.patch(model=model, **changes)[0])
        if compiled_first:
            made = bench.patch(model=compiled(model), **changes)[0]
        else:
            made = compiled(bench.patch(model=model, **changes)[0])
        assert alike(drawn(made), expected) and not alike(expected, plain), changes
        assert not isinstance(made.model.diffusion_model, torch._dynamo.OptimizedModule)
    torch._dynamo.reset()


def test_graphs_of_another_node_are_kept_apart_by_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that node compiles, once for a structure; nodes that compile alike share graphs, as torch does it."""
    from types import SimpleNamespace

    from hotpath.patches import others_graphs
    from hotpath.patches.bound_attention import BoundAttention

    monkeypatch.setattr(others_graphs, "MOST", 2)
    settings = {"backend": "inductor", "mode": "max-autotune-no-cudagraphs", "options": {"guard_filter_fn": len}}
    model = SimpleNamespace(current_patcher=SimpleNamespace(model_options={others_graphs.SETTINGS: settings}))
    compiled = torch.compile(torch.nn.Linear(2, 2))
    first, again, other = (others_graphs._compiled_apart(model, compiled, name) for name in ("a", "a", "b"))
    assert first is again is not other and first._orig_mod is compiled._orig_mod
    others_graphs._compiled_apart(model, compiled, "c")
    assert others_graphs._compiled_apart(model, compiled, "a") is not first, "only so many are kept"
    assert settings["options"] == {"guard_filter_fn": len}
    wrapper = torch._TorchCompileInductorWrapper
    backends = [
        others_graphs.Apart(wrapper(mode, {}, None), name) for mode, name in (("default", "a"), ("default", "b"))
    ]
    assert backends[0] == others_graphs.Apart(wrapper("default", {}, None), "a") != backends[1]
    bases = [lambda *_: None for _ in range(2)]
    structures = [others_graphs.structure_of({0: BoundAttention(base, ())}) for base in (*bases, bases[0])]
    assert structures[0] == structures[2] != structures[1]
    bases[:] = [lambda *_: None for _ in range(8)]  # what takes their place in memory is another
    assert not {others_graphs.structure_of({0: BoundAttention(base, ())}) for base in bases} & {*structures}
    model.current_patcher.model_options.clear()
    assert others_graphs._compiled_apart(model, compiled, "d") is None, "nobody says how"
    assert others_graphs._is_compiled(compiled) and not others_graphs._is_compiled(compiled._orig_mod)
    monkeypatch.delitem(sys.modules, "torch._dynamo.eval_frame")
    assert not others_graphs._is_compiled(compiled._orig_mod) and "torch._dynamo.eval_frame" not in sys.modules


@pytest.mark.long
def test_a_range_of_sigmas_needs_no_graph_of_its_own_on_a_device(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading the sigma would wait, the weight is a tensor that becomes 0: the same graph in and out of range."""
    from hotpath.patches.model_call import ModelCall
    from hotpath_demo import tiny_sdxl

    torch._dynamo.reset()
    model = with_pytorch_attention(tiny_sdxl.make_sdxl(**LEAST_SDXL))
    graphs: list[Any] = []
    compiled = compiled_like_core(model, graphs, fullgraph=True)
    ranges: list[dict[str, Any]] = [{"start_at": 0.5}, {"end_at": 0.5}, {"start_at": 0.2, "end_at": 0.7}]

    def drawn(base: Any, chosen: dict[str, Any]) -> torch.Tensor:
        return sample(bench.patch(model=base, **chosen)[0], bench.positive, bench.negative, steps=3)

    expected = [drawn(model, chosen) for chosen in ranges]
    monkeypatch.setattr(ModelCall, "sigma_is_near", False)
    monkeypatch.setattr(ModelCall, "sigma", property(lambda _: pytest.fail("the sigma was read")))
    for changes, wanted in zip(ranges, expected, strict=True):
        assert alike(drawn(model, changes), wanted)
        assert alike(drawn(compiled, changes), wanted), changes
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_cfg_split_over_devices_gives_the_same_picture(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's multi-GPU sampling, one thread per device, with two names of the CPU for the devices."""
    from hotpath.patches.model_call import ModelCall

    model = bench.apply(mask=mask(1), end_at=0.7)[0]
    second = bench.apply(model=model, image=photo(2), mask=1 - mask(1))[0]
    expected = sample(second, bench.positive, bench.negative)
    other = second.clone()
    other.load_device, other.is_multigpu_base_clone = torch.device("cpu", 0), True
    split = second.clone()
    split.set_additional_models("multigpu", [other])
    seen: list[tuple[int, ...]] = []
    kind = ModelCall.__post_init__

    def spy(call: ModelCall) -> None:
        seen.append(call.roles)
        kind(call)

    monkeypatch.setattr(ModelCall, "__post_init__", spy)
    try:
        result = sample(split, bench.positive, bench.negative)
    finally:
        # ComfyUI's clones for the devices and the model refer to each other. Collected as a ring, they stay in its list of
        # loaded models for as long as the bench lives; freed one by one, each hands its entry to what it was made of.
        split.remove_additional_models("multigpu")
    assert set(seen) == {(0,), (1,)}, "one conditioning per device"
    assert alike(result, expected)


def test_masks_follow_context_windows() -> None:
    from hotpath.patches.mask import AttentionMask
    from hotpath.patches.model_call import ModelCall

    frames = torch.linspace(0, 1, 6)[:, None, None].expand(6, 8, 8)
    call = ModelCall((0, 1), 16, 16, None, (3, 4), 6, batch=4)
    made = AttentionMask(frames).at(call, 256)
    assert made.shape == (4, 256)
    assert torch.allclose(made[:, 0], torch.tensor([0.6, 0.8, 0.6, 0.8]))
    short = AttentionMask(frames[:4]).at(call, 256)  # the last one is repeated
    assert torch.allclose(short[:2, 0], torch.tensor([0.6, 0.6]))


def test_comfyuis_own_context_windows(bench: Bench) -> None:
    """Windows over a batch of frames: each frame keeps its own mask, so sampling in one window or two agrees."""
    from comfy.patcher_extension import WrappersMP
    from hotpath.patches import model_call

    seen = []

    def spy(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(model_call.current_call({"original_shape": x.shape, **args[3]}).window)
        return executor(x, t, *args, **kwargs)

    model = bench.patch(mask=mask(4, count=6))[0]
    whole = sample(model, bench.positive, bench.negative, steps=1, batch=6, size=(8, 8))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    result = sample(in_windows(model), bench.positive, bench.negative, steps=1, batch=6, size=(8, 8))
    assert alike(result, whole)
    # ComfyUI puts the frame before a window in front of it, and takes it away again.
    assert set(seen) == {(0, 1, 2, 3), (1, 2, 3, 4, 5)}


def test_animatediff_windows_are_read() -> None:
    from hotpath.patches.model_call import current_call

    options = {
        "original_shape": [2, 4, 8, 8],
        "cond_or_uncond": [1, 0],
        "ad_params": {"sub_idxs": [2, 3], "full_length": 8},
    }
    call = current_call(options)
    assert (call.window, call.full_length, call.roles) == ((2, 3), 8, (1, 0))


def test_a_negative_made_of_the_positive_gets_the_unconditional_tokens(bench: Bench) -> None:
    import nodes

    model, positive, _ = bench.apply()
    negative = nodes.ConditioningZeroOut().zero_out(positive)[0]
    assert roles_seen(model, lambda watched: sample(watched, positive, negative)) == {0: 0, 1: 1}


def test_a_conditioning_on_its_own_keeps_its_role(bench: Bench) -> None:
    """Guidance that runs the negative alone, as self-attention guidance does."""
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    model, _, negative = bench.apply()

    def run(watched: Any) -> None:
        guider = Guider_Basic(watched)
        guider.set_conds(negative)
        run_guider(guider)

    assert set(roles_seen(model, run).values()) == {1}
