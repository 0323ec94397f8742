"""Models in 8 bits with what else there is: files that came so, LoRAs, patches of other nodes, merging, saving."""

from __future__ import annotations

import pytest
import torch
from hotpath.patches.precision import DEFAULT_EXCLUDE, PrecisionUnavailable, quantize_model, set_precision
from quantised_models import KEY, LAYER, TOLERANCE, fp8_file, layer, lora, relative, tiny, weights
from tiny_native_models import make_z_image

pytestmark = pytest.mark.comfy


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
    from hotpath.patches.face_token_link import face_token_link
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


def test_what_a_model_keeps_in_float32_stays_so():
    """As MiniMax H3 does its first and last layers, whatever it computes in."""
    model = make_z_image(dtype=torch.bfloat16)
    first = model.model.diffusion_model.x_embedder.float()
    with torch.no_grad():
        first.weight.normal_(), first.bias.normal_()
    patched, report = quantize_model(model, "int8_weights")
    kept = patched.model.diffusion_model.x_embedder
    assert "x_embedder" in report.left and kept.bias_comfy_model_dtype == torch.float32
    for name, given in first.named_parameters():
        held = kept.get_parameter(name)
        assert torch.equal(held, given) and held.dtype == torch.float32 and held.data_ptr() != given.data_ptr()


def test_a_model_with_layers_beside_its_network_is_built_anew(monkeypatch):
    """Stable Audio's come from the checkpoint, which is not there any more."""
    model = make_z_image()

    def needs_the_checkpoint(*_, **__):
        raise RuntimeError("missing seconds_total_embedder")

    monkeypatch.setattr(type(model.model.model_config), "get_model", needs_the_checkpoint)
    patched, report = quantize_model(model, "int8_weights")
    assert report.layers and type(patched.model.diffusion_model) is type(model.model.diffusion_model)


def test_other_devices_of_a_multi_gpu_split_get_the_quantised_model_too():
    original = make_z_image()
    original.cached_patcher_init = (make_z_image, ())
    device = torch.device("cpu", 0)
    split = original.clone()
    split.set_additional_models("multigpu", [original.deepclone_multigpu(device)])
    split.add_patches(lora(), 0.8)
    quantised, _ = set_precision(split, "int8_weights")
    [other] = quantised.get_additional_models_with_key("multigpu")
    assert other.load_device == device and other.is_multigpu_base_clone and other.model is not quantised.model
    for name in (LAYER, "x_embedder"):  # one whose LoRA is in its 8 bit weight, and one with a LoRA of its own
        assert torch.equal(layer(other, name).weight.float(), layer(quantised, name).weight.float())
    assert not hasattr(layer(split.get_additional_models_with_key("multigpu")[0]).weight, "_layout_cls")


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
