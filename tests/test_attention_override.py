"""One MODEL's attention in a real ComfyUI: the same picture, a record of what ran, and nothing left behind."""

from __future__ import annotations

import copy
import sys

import pytest
import sage_modules
import torch
from attention_calls import flags
from hotpath import host
from hotpath.attention import compiled, dispatch
from hotpath.attention.capabilities import DeviceFacts
from hotpath.attention.dispatch import AttentionDispatcher, AttentionUnavailable
from hotpath.attention.quantized_backends import QUANTIZED_BACKENDS
from hotpath.attention.torch_backends import TORCH_BACKENDS
from hotpath.nodes.acceleration import HotpathAttention, HotpathAttentionReport
from hotpath.patches import attention_override
from hotpath.patches.attention_override import OVERRIDE, AttentionOverride, attention_report, override_of, set_attention
from tiny_native_models import Tiny
from tiny_native_models import tiny as tiny_on

pytestmark = pytest.mark.comfy
MODELS = ("z_image", "flux", "sdxl")


def tiny(name: str) -> Tiny:
    """On the CPU, also where there is a GPU: what is said of backends here is what a CPU says."""
    return tiny_on(name, device="cpu")


def everything_global() -> tuple:
    import comfy.ldm.modules.attention as attention

    return (
        dict(attention.REGISTERED_ATTENTION_FUNCTIONS),
        attention.optimized_attention,
        *flags(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_default_dtype(),
    )


def with_pytorch(model):
    """ComfyUI's own choice of torch's attention, the nearest thing to compare with."""
    import comfy.ldm.modules.attention as attention

    patched = model.clone()
    patched.set_model_optimized_attention(attention.attention_pytorch)
    return patched


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "auto") for name in MODELS), ("z_image", "sdpa"), ("z_image", "sage"), ("flux", "flex")],
)
def test_the_same_picture(name, backend):
    case, before = tiny(name), everything_global()
    untouched = case.sample()
    patched, report = set_attention(case.model, backend)
    assert "sdpa_flash: available" in report and "sage1, lossy: not here, it is for cuda" in report
    out = case.sample(patched)
    torch.testing.assert_close(out, case.sample(with_pytorch(case.model)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, untouched, atol=2e-3, rtol=1e-3)
    assert torch.equal(case.sample(), untouched) and everything_global() == before
    assert OVERRIDE not in case.model.model_options["transformer_options"]


def test_the_report_says_what_ran_in_the_last_run(monkeypatch):
    case, shown = tiny("z_image"), []
    from hotpath.host.comfyui import ComfyUIHost

    monkeypatch.setattr(ComfyUIHost, "show_text", lambda self, text, node_id=None: shown.append((node_id, text)))
    node = HotpathAttention()
    patched, first = node.patch(case.model, "flash2", False, unique_id="7")
    assert "Nothing was sampled yet" in first and shown == [("7", first)]
    (report,) = HotpathAttentionReport().show(case.model)
    assert report == "No Hotpath Attention on this model."
    case.sample(patched, steps=2)
    case.sample(patched, steps=1)
    (report,) = HotpathAttentionReport().show(patched, unique_id="8")
    # Three layers at 64 picture and 32 caption tokens; two refiners for each.
    assert "3 calls, 1 x 4 heads x 96 by 96, width 64, float32, no mask: sdpa_flash" in report
    assert "2 calls, 1 x 4 heads x 64 by 64" in report and "2 calls, 1 x 4 heads x 32 by 32" in report
    assert "flash2: it is for cuda, this is cpu" in report
    assert shown[-2] == ("7", report), "under the node that chose, after sampling"
    assert shown[-1] == ("8", report)
    assert HotpathAttentionReport.IS_CHANGED() != HotpathAttentionReport.IS_CHANGED()


def test_strict_stops_with_the_reason():
    case = tiny("z_image")
    patched, _ = set_attention(case.model, "sage2", strict=True)
    with pytest.raises(AttentionUnavailable, match=r"sage2 cannot compute 1 x 4 heads.*it is for cuda"):
        case.sample(patched)
    with pytest.raises(ValueError, match="no attention backend"):
        set_attention(case.model, "fastest")


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A dispatcher that takes the CPU for an H200 with SageAttention 1."""
    monkeypatch.setitem(sys.modules, "sageattention", sage_modules.sage1())
    fake = AttentionDispatcher(
        [TORCH_BACKENDS[0], *QUANTIZED_BACKENDS], device=lambda _: DeviceFacts("cuda", "NVIDIA H200", (9, 0))
    )
    monkeypatch.setattr(dispatch, "dispatcher", lambda: fake)
    monkeypatch.setattr(attention_override, "dispatcher", lambda: fake)
    return fake


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_on_a_lossy_kernel(name, pretend_gpu):
    case = tiny(name)
    patched, _ = set_attention(case.model, "sage1", strict=True)
    assert pretend_gpu.choices.folder == host.current().cache_folder() / "attention"
    out, expected = case.sample(patched), case.sample()
    assert {event.used for event in override_of(patched).log.events()} == {"sage1"}
    assert 0 < (out - expected).norm() < 0.05 * expected.norm()


# --- ComfyUI's attention contract -----------------------------------------------------------------------------------


def tensors(*shapes):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("mask", [None, (5, 7), (2, 5, 7), (2, 1, 5, 7), (1, 1, 1, 7), (2, 4, 5, 7)])
def test_every_form_of_a_call(mask, skip_reshape, skip_output_reshape):
    import comfy.ldm.modules.attention as attention

    q, k, v = tensors((2, 5, 64), (2, 7, 64), (2, 7, 64))
    if skip_reshape:
        q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in (q, k, v))
    m = None if mask is None else torch.randn(mask, generator=torch.Generator().manual_seed(1))
    for given in (m, None if m is None else m > -1):
        options = {"mask": given, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        override = override_of(set_attention(tiny("z_image").model, "auto")[0])
        out = override(None, q, k, v, 4, **options, scale=0.3)
        torch.testing.assert_close(out, attention.attention_pytorch(q, k, v, 4, **options, scale=0.3))


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_shared_heads(skip_reshape):
    import comfy.ldm.modules.attention as attention

    q, k, v = tensors((2, 5, 64), (2, 7, 32), (2, 7, 32))
    if skip_reshape:
        q = q.unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in (k, v))
    override = override_of(set_attention(tiny("z_image").model, "auto")[0])
    options = {"skip_reshape": skip_reshape, "enable_gqa": True}
    torch.testing.assert_close(
        override(None, q, k, v, 4, **options), attention.attention_pytorch(q, k, v, 4, **options)
    )


@pytest.mark.parametrize("apart", ["v", "kv"])
def test_keys_and_values_whose_heads_are_apart(apart):
    """The values of Stable Diffusion 3 come as [B, N, heads, D]."""
    import comfy.ldm.modules.attention as attention

    q, k, v = tensors((2, 5, 64), (2, 7, 64), (2, 7, 64))
    k, v = (x.unflatten(-1, (4, 16)) if name in apart else x for name, x in (("k", k), ("v", v)))
    override = override_of(set_attention(tiny("z_image").model, "auto")[0])
    torch.testing.assert_close(override(None, q, k, v, 4), attention.attention_pytorch(q, k, v, 4))


@pytest.mark.parametrize("apart", [False, True])
def test_tiles_of_queries_with_whole_keys_and_values(apart):
    """HyperTile's, which are rows of the batch."""
    import comfy.ldm.modules.attention as attention

    q, k, v = tensors((8, 5, 64), (2, 20, 64), (2, 20, 64))
    v = v.unflatten(-1, (4, 16)) if apart else v
    override = override_of(set_attention(tiny("z_image").model, "auto")[0])
    torch.testing.assert_close(override(None, q, k, v, 4), attention.attention_pytorch(q, k, v, 4))


def test_calls_through_comfyui_with_containers_and_full_precision(pretend_gpu):
    import comfy.ldm.modules.attention as attention

    patched, _ = set_attention(tiny("z_image").model, "sage1", strict=True)
    override = override_of(patched)
    options = patched.model_options["transformer_options"]
    q, k, v = tensors(*[(1, 70, 128)] * 3)
    expected = attention.attention_pytorch(q, k, v, 2)
    held = [attention.AttentionTensorContainer(x) for x in (q, k, v)]
    out = attention.optimized_attention(*held, 2, transformer_options=options)
    assert all(container.tensor is None for container in held)
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    exact = attention.optimized_attention(q, k, v, 2, transformer_options=options, low_precision_attention=False)
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=1e-5)
    assert [event.used for event in override.log.events()] == ["sage1", "sdpa"]


def test_what_it_cannot_read_goes_to_comfyui():
    override = override_of(set_attention(tiny("z_image").model, "auto")[0])
    asked = []

    def comfyui(*args, **kwargs):
        asked.append((args[3], kwargs))
        return args[0]

    q = torch.zeros(1, 4, 8, dtype=torch.float8_e4m3fn)
    assert override(comfyui, q, q, q, 2, transformer_options={}) is q
    assert asked[0][0] == 2 and asked[0][1]["transformer_options"] == {} and "ComfyUI's" in override.log.report()
    settings = {"mask": q, "attn_precision": torch.float32, "skip_reshape": True, "skip_output_reshape": True}
    override(comfyui, q, q, q, 2, transformer_options={}, **settings)
    assert asked[1][1] == settings | {"transformer_options": {}}


# --- other nodes on the same model ----------------------------------------------------------------------------------


def test_another_packs_override_stays_and_uses_ours():
    case = tiny("z_image")
    seen = []

    def louder(func, q, k, v, *args, **kwargs):
        seen.append(q.shape)
        return 1.05 * func(q, k, v, *args, **kwargs)

    theirs = case.model.clone()
    theirs.model_options["transformer_options"][OVERRIDE] = louder
    expected = case.sample(theirs)
    seen.clear()
    both, report = set_attention(theirs, "sdpa_math")
    assert "stays in front of this one" in report
    torch.testing.assert_close(case.sample(both), expected, atol=1e-4, rtol=1e-4)
    assert seen and override_of(both).log.calls == len(seen)
    assert theirs.model_options["transformer_options"][OVERRIDE] is louder


def test_a_choice_of_comfyui_or_of_ours_is_replaced():
    case = tiny("z_image")
    patched, report = set_attention(with_pytorch(case.model), "sdpa_math")
    assert "ComfyUI's choice of a node before this one is replaced" in report
    again, report = set_attention(patched, "sdpa")
    assert "(sdpa_math) is replaced" in report
    case.sample(again)
    assert override_of(again).log.calls and not override_of(patched).log.calls


def test_an_override_after_ours_is_reported():
    case = tiny("z_image")
    patched, _ = set_attention(case.model, "auto")
    hidden = with_pytorch(patched)
    case.sample(hidden)
    assert "a node after this one replaces attention" in attention_report(hidden)


def test_a_lora_after_it_works_as_without():
    case = tiny("z_image")
    delta = {"diffusion_model.layers.0.attention.qkv.weight": ("diff", (torch.full((768, 256), 0.01),))}
    plain, patched = case.model.clone(), set_attention(case.model, "auto")[0]
    plain.add_patches(delta, 0.7)
    downstream = patched.clone()
    downstream.add_patches(delta, 0.7)
    out = case.sample(downstream)
    torch.testing.assert_close(out, case.sample(plain), atol=2e-3, rtol=1e-3)
    assert not torch.allclose(out, case.sample(patched), atol=1e-3)
    assert override_of(downstream) is override_of(patched)


def test_with_instantid_and_its_controlnet():
    from instantid_bench import sample, shallow_bench

    bench = shallow_bench()
    expected = sample(*bench.apply())
    patched, _ = set_attention(bench.model, "auto")
    torch.testing.assert_close(sample(*bench.apply(model=patched)), expected, atol=5e-3, rtol=1e-3)
    assert override_of(patched).log.calls
    after, positive, negative = bench.apply()
    after, _ = set_attention(after, "auto")
    torch.testing.assert_close(sample(after, positive, negative), expected, atol=5e-3, rtol=1e-3)


def test_evicted_and_reloaded():
    import comfy.model_management as management

    case = tiny("flux")
    patched, _ = set_attention(case.model, "auto")
    first = case.sample(patched)
    management.unload_all_models()
    assert torch.equal(case.sample(patched), first)


def test_deep_copies_of_options_keep_one_record():
    patched, _ = set_attention(tiny("flux").model, "auto")
    copied = copy.deepcopy(patched.model_options)["transformer_options"][OVERRIDE]
    assert isinstance(copied, AttentionOverride) and copied is override_of(patched)


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "sage1"])
def test_a_block_compiles_without_a_break(backend, pretend_gpu):
    import torch._dynamo

    torch._dynamo.reset()
    case = tiny("z_image")
    patched, _ = set_attention(case.model, backend)
    override = override_of(patched)
    override.begin(patched)
    compiled.prepare()
    block = case.model.model.diffusion_model.layers[0].attention
    import comfy.ldm.modules.attention as attention

    options = patched.model_options["transformer_options"]

    def attend_block(x):
        q, k, v = block.qkv(x).chunk(3, dim=-1)
        return attention.attention_pytorch(q, k, v, 4, transformer_options=options)

    fast = torch.compile(attend_block, backend="aot_eager", fullgraph=True)
    for tokens in (70, 96, 128):
        x = torch.randn(1, tokens, 256)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), attend_block(x), atol=2e-2, rtol=2e-2)
    assert ("compiled into a graph" in override.log.report()) == (backend == "auto")


def test_a_graph_made_with_an_earlier_choice_is_told_of():
    """ComfyUI's TorchCompileModel drops the guards that would tell one choice from another."""
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    case, reports = tiny("flux"), []
    torch._dynamo.reset()
    for backend in ("sdpa_math", "sdpa"):
        patched, _ = set_attention(case.model, backend)
        set_torch_compile_wrapper(patched, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
        with torch.inference_mode():
            case.sample(patched, steps=1)
        reports.append(attention_report(patched))
    torch._dynamo.reset()
    assert "compiled into a graph" in reports[0]
    assert "TorchCompileModel goes on with a graph that it made before this choice" in reports[1]
