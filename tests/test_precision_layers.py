"""Layers in 8 bits: the rounding itself, with the compiler, and which layers are rounded."""

from __future__ import annotations

import pytest
import torch
from hotpath.patches.precision import DEFAULT_EXCLUDE, PrecisionUnavailable, quantize_model, set_precision
from hotpath.patches.precision.dynamic_fp8 import fp8_scale
from hotpath.patches.precision.layers import quantized_operations
from hotpath.patches.precision.schemes import excluded_by, patterns
from quantised_models import LAYER, layer, relative, tiny
from tiny_native_models import make_z_image

pytestmark = pytest.mark.comfy


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


def test_rotation_spreads_outliers(monkeypatch):
    """One channel of the activations far above the others: the scale of every row is its, and the others are lost."""
    from comfy_kitchen.backends.eager import quantization
    from hotpath.patches.precision import cpu_int8

    monkeypatch.delattr(quantization, "rotate_int8_convrot_weight", raising=False)  # older ComfyUIs have none
    cpu_int8._rotation.cache_clear()
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
        ("first", True),  # Krea 2
        ("tproj.1", True),
        ("last.linear", True),
        ("blocks.0.mlp.gate", False),
        ("input_proj", True),  # Ideogram 4
        ("adaln_proj", True),
        ("llm_cond_proj", True),
        ("layers.0.feed_forward.w1", False),
        ("final_layer2.linear", True),  # HiDream-O1
        ("language_model.layers.0.self_attn.q_proj", False),
        ("blocks.0.norm1.linear", True),  # CogVideoX, OmniGen2, Boogu
        ("double_stream_layers.0.img_norm2.linear", True),
        ("double_stream_layers.0.img_feed_forward.linear_1", False),
        ("transformer.project_in", True),  # Stable Audio, MiniMax Music
        ("diffusion_transformer.transformer.project_out", True),
        ("transformer.layers.0.ff.ff.2", False),
        ("video_patch_proj", True),  # MiniMax H3
        ("blocks.0.adaln_proj.linear", True),
        ("blocks.0.attn.out_proj", False),
        ("vid_in.proj", True),  # SeedVR2
        ("emb_in.proj_out", True),
        ("vid_out.proj", True),
        ("blocks.0.attn.proj_out.vid", False),
        ("img2shape_512.out_layer", True),  # Trellis 2
        ("structure_model.input_layer", True),
        ("repo_layers.0.final_map", True),  # TripoSplat
        ("transformer_blocks.0.attn1.to_gate_logits", True),  # LTX 2.3
        ("visual_transformer_blocks.0.feed_forward.out_layer", False),  # Kandinsky 5
        ("out_layer.out_layer", True),
        ("text_proj", True),  # Ernie-Image
        ("detokenizer.proj_out", True),  # ACE-Step 1.5
        ("decoder.layers.0.mlp.gate_proj", False),
        ("audio_injector.injector_adain_layers.0.linear", True),  # Wan S2V
        ("audio_injector.injector.0.q", False),
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


def test_models_that_are_alike_have_layers_of_one_class():
    """A compiler has code of its own for every class, and keeps it: with another class each a model was compiled anew."""
    cpu, dtype = torch.device("cpu"), torch.float32
    first = quantized_operations(dtype, cpu).Linear
    assert quantized_operations(dtype, cpu, ()).Linear is first
    for other in ((torch.bfloat16, cpu), (dtype, cpu, ("a",))):
        assert quantized_operations(*other).Linear is not first
