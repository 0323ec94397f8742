"""Native models in 8 bits in a real ComfyUI: the rounding itself, the pictures, LoRAs, memory, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hotpath.nodes.acceleration import HotpathPrecision
from hotpath.patches.attention_override import override_of, set_attention
from hotpath.patches.precision import (
    DEFAULT_EXCLUDE,
    SCHEMES,
    PrecisionUnavailable,
    compare,
    quantize_model,
    schemes,
    set_precision,
    unavailable,
)
from hotpath.patches.precision.comparison import output_error
from hotpath.patches.precision.dynamic_fp8 import fp8_scale
from hotpath.patches.precision.schemes import excluded_by, patterns
from tiny_native_models import Z_IMAGE, Tiny, make_z_image
from tiny_native_models import tiny as tiny_on

pytestmark = pytest.mark.comfy
LAYER = "layers.1.attention.qkv"
KEY = f"diffusion_model.{LAYER}.weight"
# Relative error of the picture after two steps; e4m3 has 3 bits of mantissa, int8 has 127 steps to the largest weight.
TOLERANCE = {"fp8": 0.05, "fp8_weights": 0.04, "int8": 0.015, "int8_rotated": 0.015, "int8_weights": 0.01}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """On the CPU, also where there is a GPU: the numbers here are the reference's."""
    return tiny_on(name, dtype, "cpu")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def layer(model, name: str = LAYER):
    """A module of `model` as it is when loaded."""
    import comfy.model_management as management

    management.load_models_gpu([model])
    return model.model.diffusion_model.get_submodule(name)


def weights(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "dtype"), [("z_image", torch.float32), pytest.param("flux", torch.bfloat16, marks=pytest.mark.long)]
)
def test_the_picture_is_close_and_the_original_untouched(name, dtype, scheme):
    import comfy.model_management as management

    case = tiny(name, dtype)
    picture, before = case.sample(), weights(case.model)
    quantised, _ = set_precision(case.model, scheme)
    out = case.sample(quantised)
    assert 0 < relative(out, picture) < TOLERANCE[scheme]
    after = weights(case.model)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    management.unload_all_models()
    assert torch.equal(case.sample(quantised), out), "evicted and reloaded"
    assert torch.equal(case.sample(), picture)
    assert not quantised.is_clone(case.model)


@pytest.mark.parametrize("why", ["", "products of 8 bits overflow"])
def test_int8_on_a_cpu_is_tried_before_it_is_trusted(monkeypatch, why):
    from hotpath.products import int8

    if not why and int8.why_not():
        pytest.skip(f"this CPU is not asked: {int8.why_not()}")
    for module in (int8, schemes):
        monkeypatch.setattr(module, "why_not", lambda: why)
    seen = []
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *given: (seen.append(given[0].shape), real(*given))[1])
    case = tiny("z_image")
    for scheme in ("int8", "int8_rotated"):
        quantised, report = set_precision(case.model, scheme)
        assert 0 < relative(case.sample(quantised), case.sample()) < TOLERANCE[scheme]
        assert bool(seen) == (not why)
        assert ("slower than the original, because products of 8 bits overflow" in report) == bool(why)
        del seen[:]


def test_with_instantid_controlnet_and_attention():
    from instantid_bench import sample, shallow_bench

    bench = shallow_bench()
    expected = sample(*bench.apply())
    quantised, report = quantize_model(bench.model, "int8")
    assert len(report.layers) == 132 and not any("emb" in layer.name for layer in report.layers)
    both, _ = set_attention(quantised, "auto")
    out = sample(*bench.apply(model=both))
    assert 0 < relative(out, expected) < 0.1 and override_of(both).log.calls


@pytest.mark.long
@pytest.mark.usefixtures("own_graphs")
def test_quantised_with_chosen_attention_and_compiled():
    from hotpath.patches.compilation import compile_model, compiler_of

    case = tiny("z_image", torch.bfloat16)
    model, _ = set_attention(set_precision(case.model, "fp8")[0], "auto")
    compiled, _ = compile_model(model, backend="eager")
    for changes in ({}, {"tokens": 50, "size": (16, 24)}):
        assert relative(case.sample(compiled, **changes), case.sample(model, **changes)) < 0.01
        # Layers and refiners with modulation, and the refiners of the caption without: a graph each, whatever the size.
        assert compiler_of(compiled).graphs == 2 and compiler_of(compiled).fallbacks() == {}


# --- the rounding itself --------------------------------------------------------------------------------------------


def test_fp8_rounds_weights_and_activations_by_their_largest_value():
    case = tiny("z_image")
    quantised, _ = set_precision(case.model, "fp8")
    module, original = layer(quantised), case.model.model.diffusion_model.get_submodule(LAYER)
    x = 30 * torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))

    def rounded(value):
        scale = value.abs().max() / 448
        return (value / scale).to(torch.float8_e4m3fn).float() * scale

    expected = rounded(x) @ rounded(original.weight).T
    torch.testing.assert_close(module(x), expected, rtol=1e-2, atol=1e-2 * float(expected.std()))
    assert relative(module(x), expected) < 1e-3
    assert 0.01 < relative(module(x), original(x)) < 0.06
    # At ComfyUI's scale of 1, values past 448 would be cut off.
    assert relative(module(x * 1e3), original(x * 1e3)) < 0.06
    assert module(torch.zeros(3, 256)).isfinite().all() and float(fp8_scale(torch.zeros(3))) > 0
    assert module(torch.zeros(0, 256)).shape == (0, 768)


def test_gradients_come_back_through_fp8(monkeypatch):
    from hotpath.patches.precision import dynamic_fp8

    case = tiny("z_image")
    quantised, _ = set_precision(case.model, "fp8")
    module, original = layer(quantised), case.model.model.diffusion_model.get_submodule(LAYER)
    product = dynamic_fp8._scaled_product
    monkeypatch.setattr(
        dynamic_fp8, "_scaled_product", torch.no_grad()(product)
    )  # as torch._scaled_mm, without a way back
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outputs = [network(x) for network in (module, original)]
    made, expected = (torch.autograd.grad(out.square().sum(), x)[0] for out in outputs)
    assert relative(*(out.detach() for out in outputs)) < 0.06 and relative(made, expected) < 0.1


def test_int8_rounds_weights_per_channel_and_activations_per_row():
    case = tiny("z_image")
    quantised, _ = set_precision(case.model, "int8")
    module, original = layer(quantised), case.model.model.diffusion_model.get_submodule(LAYER)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7)[:, None]

    def rounded(value):
        scale = value.abs().amax(dim=1, keepdim=True) / 127
        return (value / scale).round().clamp(-128, 127) * scale

    assert relative(module(x), rounded(x) @ rounded(original.weight).T) < 1e-3


@pytest.mark.parametrize(("scheme", "error"), [("fp8_weights", 0.028), ("int8_weights", 0.01)])
def test_weight_only_schemes_leave_activations_alone(scheme, error):
    quantised, report = quantize_model(tiny("z_image").model, scheme)
    module = layer(quantised)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), x @ module.weight.dequantize().T)
    (entry,) = (entry for entry in report.layers if entry.name == LAYER)
    original = tiny("z_image").model.model.diffusion_model.get_submodule(LAYER).weight
    assert (
        entry.error == pytest.approx(relative(module.weight.dequantize(), original), rel=1e-3) and entry.error < error
    )
    assert (entry.before, entry.after) == (768 * 256 * 4, module.weight.nbytes + module.weight.params.scale.nbytes)


@pytest.mark.parametrize("scheme", ["int8_weights", "fp8_weights"])
def test_weight_only_schemes_hold_where_comfyui_reaches_past_the_layer(scheme):
    """As it does in the feed-forward blocks of Wan, LTX and MiniMax."""
    import comfy.ops

    module = layer(quantize_model(tiny("z_image").model, scheme)[0], "layers.1.feed_forward.w2")
    x = torch.randn(7, module.in_features, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 30
    with torch.inference_mode():
        expected = torch.nn.functional.gelu(x, approximate="tanh") @ module.weight.dequantize().T
        torch.testing.assert_close(comfy.ops.linear_input_act(module, x, "gelu_tanh"), expected)


def test_rotation_spreads_outliers():
    """One channel of the activations far above the others: the scale of every row is its, and the others are lost."""
    case = tiny("z_image")
    original = case.model.model.diffusion_model.get_submodule(LAYER)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    x[:, 17] *= 100
    plain, rotated = (
        relative(layer(quantize_model(case.model, scheme)[0])(x), original(x)) for scheme in ("int8", "int8_rotated")
    )
    assert rotated < 0.6 * plain


@pytest.mark.parametrize("scheme", ["fp8", "int8_rotated", "int8_weights"])
def test_torch_compiles_a_layer_without_a_break(scheme):
    import torch._dynamo

    torch._dynamo.reset()
    module = layer(set_precision(tiny("z_image", torch.bfloat16).model, scheme)[0])
    fast = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for mode in (torch.inference_mode, torch.no_grad):
        for tokens in (40, 56):
            x = torch.randn(1, tokens, 256).bfloat16()
            with mode():
                torch.testing.assert_close(fast(x), module(x), atol=2e-2, rtol=2e-2)


def test_compiled_rounding_can_be_fused_with_what_comes_before():
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def keep(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    module = layer(set_precision(tiny("z_image", torch.bfloat16).model, "fp8")[0])
    with torch.inference_mode():
        torch.compile(module, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(
            torch.randn(1, 40, 256).bfloat16()
        )
    assert "aten.clamp.default" in seen
    assert not any("comfy_kitchen" in target for target in seen)  # an operator of its own cannot be looked into


# --- which layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("layers.0.attention.qkv", False),
        ("layers.0.adaLN_modulation.0", True),
        ("x_embedder", True),
        ("cap_embedder.1", True),
        ("final_layer.linear", True),
        ("double_blocks.0.img_mod.lin", True),
        ("double_blocks.0.img_attn.qkv", False),
        ("img_in", True),
        ("input_blocks.4.1.proj_in", False),
        ("input_blocks.4.1.proj_out", False),
        ("proj_out", True),
        ("time_embed.0", True),
        ("input_blocks.1.0.emb_layers.1", True),
        ("blocks.3.self_attn.q", False),
        ("head.head", True),
        ("output_blocks.0.1.transformer_blocks.0.attn1.to_out.0", False),
        ("distilled_guidance_layer.layers.0.in_layer", True),  # Chroma
        ("distilled_guidance_layer.out_proj", True),
        ("adaln_single.linear", True),  # LTX
        ("audio_prompt_adaln_single.linear", True),
        ("audio_patchify_proj", True),
        ("caption_projection.linear_1", True),
        ("transformer_blocks.0.ff.net.0.proj", False),
        ("joint_transformer_blocks.0.modC.1", True),  # AuraFlow
        ("joint_transformer_blocks.0.modX.1", True),
        ("single_layers.0.modCX.1", True),
        ("modF.1", True),
        ("cond_seq_linear", True),
        ("double_layers.0.attn.w1q", False),
        ("blocks.0.mod_x", True),  # Mochi
        ("blocks.0.attn.qkv_x", False),
        ("img_emb.proj.1", True),  # Wan
        ("blocks.0.cross_attn.k_img", False),
        ("vision_in.proj.1", True),  # HunyuanVideo
    ],
)
def test_what_is_left_alone_by_default(name, left):
    assert (excluded_by(name, DEFAULT_EXCLUDE) is not None) == left


def test_patterns():
    assert patterns(None) == DEFAULT_EXCLUDE and patterns("a, b*\n c ,") == ("a", "b*", "c") and patterns("") == ()
    for many in ("a," * 257, "a" * 1001):
        with pytest.raises(ValueError, match="256 patterns of 1000 letters are the most"):
            patterns(many)
    case = tiny("z_image")
    _, report = quantize_model(case.model, "fp8", ["layers.1", "*feed_forward*"])
    names = {entry.name for entry in report.layers}
    assert "layers.0.attention.qkv" in names and not any(
        n.startswith("layers.1.") or "feed_forward" in n for n in names
    )
    assert report.left[LAYER] == "excluded by layers.1"
    assert "x_embedder" in names, "only what is asked for is excluded"


def test_layers_that_do_not_fit_are_left_with_the_reason():
    narrow = make_z_image(cap_feat_dim=40)
    _, report = quantize_model(narrow, "fp8", "")
    assert report.left["cap_embedder.1"] == "its sides are no multiples of 16"
    with pytest.raises(PrecisionUnavailable, match=r"excluded by \*"):
        set_precision(narrow, "fp8", "*")


# --- models with 8 bits already -------------------------------------------------------------------------------------


def fp8_file(layers: tuple[str, ...] = ()):
    """A MODEL as ComfyUI loads a checkpoint: `layers` stored as quantised fp8, or without any all of it plain fp8."""
    import json

    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    state = weights(make_z_image())
    for name in layers:
        weight = state[f"{name}.weight"]
        scale = weight.abs().max() / 448
        configuration = json.dumps({"format": "float8_e4m3fn"}).encode()
        state |= {
            f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn),
            f"{name}.weight_scale": scale,
            f"{name}.comfy_quant": torch.tensor(list(configuration), dtype=torch.uint8),
        }
    stored = torch.float32 if layers else torch.float8_e4m3fn
    config = comfy.supported_models.ZImage({**Z_IMAGE, "dtype": stored})
    config.quant_config = comfy.utils.detect_layer_quantization(state, "") if layers else None
    config.set_inference_dtype(stored, torch.float32)
    cpu = torch.device("cpu")
    model = config.get_model(dict(state), "", cpu)
    model.load_model_weights(dict(state), "")
    return comfy.model_patcher.CoreModelPatcher(model.eval(), cpu, cpu)


def test_layers_that_came_quantised_are_emulated_as_before():
    """Where there are no fp8 products ComfyUI restores such weights, and a model made of this one does so too."""
    model = fp8_file((LAYER,))
    before = layer(model)
    assert before._full_precision_mm
    quantised, report = quantize_model(model, "int8_weights")
    assert report.left[LAYER] == "it is quantised already"
    make, arguments = quantised.cached_patcher_init
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    for made in (quantised, make(*arguments)):
        torch.testing.assert_close(layer(made)(x), before(x))


def test_a_file_in_fp8_does_not_grow():
    model = fp8_file()
    with pytest.raises(PrecisionUnavailable, match="its weights have 8 bits already"):
        quantize_model(model, "fp8_weights")
    faster, report = quantize_model(model, "int8")
    assert report.whole < 1.05 * report.original
    kept = "x_embedder"
    assert kept in report.left and layer(faster, kept).weight.dtype == torch.float8_e4m3fn
    x = torch.randn(3, 64)
    assert torch.equal(layer(faster, kept)(x), layer(model, kept)(x))
    patched = [made.clone() for made in (faster, model)]
    for made in patched:
        made.add_patches(lora(), 0.8)
    assert torch.equal(layer(patched[0], kept)(x), layer(patched[1], kept)(x))


# --- memory and reports ---------------------------------------------------------------------------------------------


def test_memory_is_stated_and_smaller():
    import comfy.model_management as management

    case = tiny("flux")
    quantised, report = quantize_model(case.model, "int8")
    assert report.whole == quantised.model_size() == management.module_size(quantised.model)
    assert report.original == management.module_size(case.model.model) == case.model.model_size()
    saved = sum(entry.before - entry.after for entry in report.layers)
    # What else ComfyUI notes beside each weight is some bytes.
    assert report.original - report.whole == pytest.approx(saved, rel=0.01)
    text = report.describe()
    assert f"{len(report.layers)} layers quantised" in text and "the original keeps its own weights" in text
    assert text.count(" %  ") == 10 and report.describe(10000).count(" %  ") == len(report.layers)
    assert "weight errors" not in report.describe(0)
    assert report.layers[0].error == max(entry.error for entry in report.layers)


def test_the_error_on_the_users_own_latent():
    case = tiny("z_image")
    state = torch.get_rng_state()
    quantised, report = set_precision(case.model, "fp8", None, case.latent(2), case.text("a lighthouse", 20))
    assert torch.equal(torch.get_rng_state(), state)
    assert report.count("relative error") == 3 and "PSNR" in report
    errors = compare(case.model, quantised, case.latent(), case.text("a lighthouse", 20))
    assert all(0 < e.relative < 0.05 and e.cosine > 0.998 and 30 < e.psnr < 80 for e in errors)
    assert [e.sigma for e in errors] == sorted((e.sigma for e in errors), reverse=True)
    same = compare(case.model, case.model, case.latent(), case.text("a lighthouse", 20))
    assert all(e.relative == 0 and e.psnr == float("inf") for e in same)


def test_error_measures():
    a = torch.tensor([0.0, 1.0, 2.0, 4.0])
    error = output_error(a, a + torch.tensor([0.0, 0.0, 0.4, 0.0]), 1.0)
    assert error.relative == pytest.approx(0.4 / 21**0.5) and error.psnr == pytest.approx(26.0206, abs=1e-3)
    assert output_error(a, -a, 1.0).cosine == pytest.approx(-1)


def test_the_two_models_share_no_storage():
    case = tiny("z_image")
    quantised, _ = set_precision(case.model, "fp8")
    ours = {value.data_ptr() for value in quantised.model.state_dict().values() if value.numel()}
    theirs = {value.data_ptr() for value in case.model.model.state_dict().values() if value.numel()}
    assert not ours & theirs


# --- LoRA -----------------------------------------------------------------------------------------------------------


def lora(scale: float = 0.3) -> dict:
    generator = torch.Generator().manual_seed(9)
    up, down = torch.randn(768, 4, generator=generator), torch.randn(4, 256, generator=generator)
    embedder = torch.randn(256, 64, generator=generator)
    return {
        KEY: ("diff", (scale * up @ down / 32,)),
        "diffusion_model.x_embedder.weight": ("diff", (scale * embedder / 8,)),
    }


@pytest.mark.parametrize("scheme", ["fp8", "int8", pytest.param("int8_rotated", marks=pytest.mark.long), "fp8_weights"])
def test_a_lora_before_and_after(scheme):
    case = tiny("z_image")
    patched = case.model.clone()
    patched.add_patches(lora(), 0.8)
    picture, plain = case.sample(patched), case.sample()
    change = relative(plain, picture)
    assert change > 0.1

    quantised, report = quantize_model(patched, scheme)
    assert report.baked == 1 and "LoRA patches of 1 layers" in report.describe()
    assert set(quantised.patches) == {"diffusion_model.x_embedder.weight"} and set(patched.patches) == set(lora())
    assert relative(case.sample(quantised), picture) < TOLERANCE[scheme]

    after = set_precision(case.model, scheme)[0].clone()
    after.add_patches(lora(), 0.8)
    assert relative(case.sample(after), picture) < 1.5 * TOLERANCE[scheme] < change
    assert torch.equal(case.sample(), plain)


def test_a_lora_in_a_model_on_another_device_is_there_once():
    """ComfyUI's first device is not the only one that a model can be loaded on."""
    model = make_z_image()
    model.load_device = torch.device("cpu:0")
    model.add_patches(lora(), 0.8)
    patched = layer(model).weight.clone()
    made = layer(quantize_model(model, "int8_weights")[0]).weight.dequantize()
    assert relative(made, patched) < TOLERANCE["int8_weights"]


def test_a_lora_in_a_model_that_is_loaded_in_part():
    case = tiny("z_image")
    patched = case.model.clone()
    patched.add_patches(lora(), 0.8)
    picture = case.sample(patched)
    quantised = set_precision(case.model, "fp8")[0]
    quantised.add_patches(lora(), 0.8)
    import comfy.model_management as management

    management.unload_all_models()
    quantised.patch_model(torch.device("cpu"), lowvram_model_memory=200_000)
    module = quantised.model.diffusion_model.get_submodule(LAYER)
    assert module.weight_function, "its LoRA is added when it runs"
    x = torch.randn(3, 256)
    held = patched.patch_weight_to_device(KEY, return_weight=True)
    assert relative(module(x), x @ held.T) < 0.05
    quantised.unpatch_model(torch.device("cpu"))
    assert relative(case.sample(quantised), picture) < 0.08


def test_a_lora_that_changes_a_shape_leaves_its_layer():
    case = tiny("z_image")
    patched = case.model.clone()
    wider = ("diff", (torch.zeros(784, 256), {"pad_weight": True}))
    patched.add_patches({KEY: wider})
    _, report = quantize_model(patched, "fp8")
    assert report.left[LAYER] == "its LoRA changes its shape" and report.baked == 0


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "capability", "words"),
    [
        ("fp8", (8, 6), "need compute capability 8.9, a card has 8.6: choose int8"),
        ("fp8", (7, 0), "choose fp8_weights"),
        ("fp8", (9, 0), None),
        ("int8", (7, 0), "choose int8_weights"),
        ("int8_rotated", (7, 5), None),
        ("fp8_weights", (6, 1), None),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(monkeypatch, scheme, capability, words):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    reason = unavailable(SCHEMES[scheme], torch.device("cuda"))
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("scheme", "products", "refused"), [("fp8", True, False), ("fp8", False, True), ("int8", False, False)]
)
def test_what_an_amd_gpu_cannot_do_is_refused(monkeypatch, scheme, products, refused):
    import comfy.model_management as management

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(management, "supports_fp8_compute", lambda device: products)
    reason = unavailable(SCHEMES[scheme], torch.device("cuda"))
    assert (reason == "ComfyUI has no fp8 products for this AMD GPU: choose fp8_weights") if refused else reason is None


def test_apple_gpus_have_no_8_bit_floats():
    for scheme in ("fp8", "fp8_weights"):
        assert unavailable(SCHEMES[scheme], torch.device("mps")).endswith("choose int8_weights")
    assert unavailable(SCHEMES["int8_weights"], torch.device("mps")) is None


def test_weights_of_another_pack_are_left():
    class Packed(torch.Tensor):
        """As GGUF packs keep their weights."""

    model = make_z_image()
    module = model.model.diffusion_model.get_submodule(LAYER)
    module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)
    _, report = quantize_model(model, "fp8")
    assert report.left[LAYER] == "its weight is in another pack's format"


def test_refusals_name_the_cure(monkeypatch):
    case = tiny("z_image")
    assert "int8_weights" in unavailable(SCHEMES["int8_rotated"], torch.device("mps"))
    with pytest.raises(ValueError, match="there are fp8"):
        set_precision(case.model, "fp4")
    quantised, _ = set_precision(case.model, "int8", "")
    with pytest.raises(PrecisionUnavailable, match="quantised already"):
        set_precision(quantised, "fp8", "")
    compiled = case.model.clone()
    compiled.add_object_patch("diffusion_model.layers.0", torch.nn.Identity())
    with pytest.raises(PrecisionUnavailable, match="put Hotpath Precision before that node"):
        set_precision(compiled, "fp8")
    bypassed = case.model.clone()
    bypassed.set_injections("bypass_lora", [])
    with pytest.raises(PrecisionUnavailable, match=r"\(bypass_lora\): put Hotpath Precision before that node"):
        set_precision(bypassed, "fp8")
    import comfy.model_patcher
    import comfy.ops

    foreign = comfy.model_patcher.ModelPatcher(torch.nn.Linear(16, 16), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(PrecisionUnavailable, match="Linear is no model of ComfyUI's own"):
        set_precision(foreign, "fp8")
    from hotpath_demo import portraits

    with pytest.raises(
        PrecisionUnavailable, match=r"must be divisible by num_groups.*layers of its own\. Load it with"
    ):
        set_precision(portraits.load_sdxl(), "fp8")
    # ComfyUI before quantised layers, and with their first form.
    monkeypatch.delattr(comfy.ops, "mixed_precision_ops")
    with pytest.raises(PrecisionUnavailable, match="update ComfyUI"):
        set_precision(case.model, "fp8")
    monkeypatch.setattr(comfy.ops, "mixed_precision_ops", lambda layers, dtype: None, raising=False)
    with pytest.raises(PrecisionUnavailable, match="update ComfyUI"):
        set_precision(case.model, "fp8")


# --- in ComfyUI -----------------------------------------------------------------------------------------------------


def test_patches_of_other_nodes_travel_along():
    case = tiny("z_image")
    upstream = case.model.clone()
    upstream.model_options["transformer_options"]["a_flag"] = 3
    upstream.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.5)
    quantised, _ = set_precision(upstream, "int8")
    assert quantised.model_options["transformer_options"]["a_flag"] == 3
    assert relative(case.sample(quantised), case.sample(upstream)) < TOLERANCE["int8"]
    quantised.model_options["transformer_options"]["a_flag"] = 4
    assert upstream.model_options["transformer_options"]["a_flag"] == 3


def test_a_control_lora_borrows_weights_with_their_scale():
    import comfy.controlnet
    from hotpath.patches.identity_conditioning import face_token_link
    from instantid_bench import sample, shallow_bench

    bench = shallow_bench()
    own = ("input_hint_block", "zero_convs", "middle_block_out")
    state = {k: v for k, v in bench.control_net.control_model.state_dict().items() if k.startswith(own)}
    hint = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))

    def picture(model):
        """With one in a link of ours, and one before it in the chain."""
        first, second = (comfy.controlnet.ControlLora(state).set_cond_hint(hint, 0.5, (0.0, 1.0)) for _ in range(2))
        chain = face_token_link(second, "none", None).set_previous_controlnet(first)
        positive = [[c, {**o, "control": chain, "control_apply_to_uncond": True}] for c, o in bench.positive]
        return sample(model, positive, bench.negative, steps=1)

    # What Control-LoRAs borrow, less the first layers, which stay whole by default too.
    quantised, report = quantize_model(bench.model, "int8", f"{','.join(DEFAULT_EXCLUDE)}, output_blocks")
    assert len(report.layers) > 20
    assert relative(picture(quantised), picture(bench.model)) < TOLERANCE["int8"]


def test_quantised_models_can_be_merged():
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model, other = make_z_image(seed=1), tiny("z_image").model
    rest = [key.removesuffix(".weight") for key in weights(model) if key != f"{LAYER}.weight"]
    quantised, _ = quantize_model(model, "int8", rest)
    whole = [m.model.diffusion_model.get_submodule(LAYER).weight for m in (model, other)]
    for pair, share in (((quantised, other), 0.5), ((other, quantised), 0.5), ((quantised, quantised), 1.0)):
        held = layer(ModelMergeSimple().merge(*pair, 0.5)[0]).weight
        held = held.dequantize() if hasattr(held, "_layout_cls") else held
        assert relative(held, share * whole[0] + (1 - share) * whole[1]) < TOLERANCE["int8"]


def test_a_hook_lora_says_that_it_cannot():
    import comfy.hooks
    import comfy.sample

    case = tiny("z_image")
    quantised, _ = set_precision(case.model, "fp8")

    def sampled(model, patches):
        hook = comfy.hooks.WeightHook(strength_model=0.8, strength_clip=0.0)
        hook.weights, hook.need_weight_init = patches, False
        group = comfy.hooks.HookGroup()
        group.add(hook)
        prompt = [[c, {**o, "hooks": group}] for c, o in case.text("a lighthouse", 20)]
        latent = torch.zeros(1, 16, 16, 16)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(11))
        return comfy.sample.sample(
            model, noise, 1, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=11
        )

    held = layer(quantised).weight.dequantize()
    with pytest.raises(PrecisionUnavailable, match="use Load LoRA instead, or exclude the layers"):
        sampled(quantised, lora())
    assert torch.equal(layer(quantised).weight.dequantize(), held)
    unrounded = {key: patch for key, patch in lora().items() if key != KEY}
    assert relative(sampled(quantised, unrounded), sampled(case.model, unrounded)) < TOLERANCE["fp8"]


def test_weights_are_sent_to_the_device_as_they_are():
    from hotpath.patches.precision.quantize import _in_float32
    from torch.utils._python_dispatch import TorchDispatchMode

    sent = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if out.device != args[0].device:
                sent.append(out.dtype)
            return out

    weight = torch.ones(3, dtype=torch.bfloat16)
    with Watched():
        assert _in_float32(weight, torch.device("meta")).dtype == torch.float32
    assert sent == [torch.bfloat16]
    weight = torch.ones(3)
    assert _in_float32(weight, torch.device("cpu")).data_ptr() != weight.data_ptr()


def test_another_copy_can_be_made_of_it():
    """ComfyUI asks the loader for one when it compiles, and for every further GPU."""
    case = tiny("z_image")
    quantised, _ = set_precision(case.model, "fp8")
    make, arguments = quantised.cached_patcher_init
    again = make(*arguments, disable_dynamic=True)
    assert again.model is not quantised.model
    assert torch.equal(case.sample(again), case.sample(quantised))


def test_a_saved_model_is_what_comfyui_reads():
    case = tiny("z_image")
    quantised, _ = set_precision(case.model, "int8_rotated")
    state = quantised.model.diffusion_model.state_dict()
    assert state[f"{LAYER}.weight"].dtype == torch.int8
    assert bytes(state[f"{LAYER}.comfy_quant"].tolist()) == (
        b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    )
    import comfy.utils

    found = comfy.utils.detect_layer_quantization(state, "")
    assert found is not None


def test_nothing_global_is_left(monkeypatch):
    import comfy.ops
    import comfy.quant_ops
    from comfy_kitchen.tensor import base

    def globals_():
        return (
            {name: dict(algorithm) for name, algorithm in comfy.quant_ops.QUANT_ALGOS.items()},
            set(base.LAYOUTS) - {"HotpathDynamicFP8", "HotpathWeightOnlyINT8"},
            comfy.ops.mixed_precision_ops,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            torch.get_rng_state().tolist(),
        )

    before = globals_()
    case = tiny("z_image")
    set_precision(case.model, "fp8", None, case.latent(), case.text("x", 20))
    assert globals_() == before


def test_the_node():
    case = tiny("z_image")
    inputs = HotpathPrecision.INPUT_TYPES()
    assert inputs["required"]["scheme"][0] == list(SCHEMES)
    model, report = HotpathPrecision().quantize(
        case.model,
        "int8",
        inputs["required"]["exclude"][1]["default"],
        case.latent(),
        case.text("x", 20),
        unique_id="3",
    )
    assert "Against the original" in report and relative(case.sample(model), case.sample()) < TOLERANCE["int8"]


class TestOnCUDA:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_the_kernels_round_as_the_reference(self, scheme):
        """The GPU's products against the same quantised weights multiplied in float32."""
        case = tiny_on("z_image", torch.bfloat16)
        if (reason := unavailable(SCHEMES[scheme], torch.device("cuda"))) is not None:
            pytest.skip(reason)
        module = layer(set_precision(case.model, scheme)[0])
        x = torch.randn(64, 256, device="cuda").bfloat16()
        weight = module.weight.dequantize().float().cuda()
        with torch.inference_mode():
            assert relative(module(x), x.float() @ weight.T) < (0.04 if scheme == "fp8" else 0.02)

    @pytest.mark.parametrize("scheme", ["fp8", "int8"])
    def test_inductor(self, scheme):
        module = layer(set_precision(tiny_on("z_image", torch.bfloat16).model, scheme)[0])
        fast = torch.compile(module, fullgraph=True)
        for tokens in (64, 96):
            x = torch.randn(1, tokens, 256, device="cuda").bfloat16()
            with torch.inference_mode():
                assert relative(fast(x), module(x)) < 0.03
