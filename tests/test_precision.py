"""Native models in 8 bits in a real ComfyUI: the pictures, memory, what is refused, and the node."""

from __future__ import annotations

import importlib

import pytest
import torch
from hotpath import host
from hotpath.nodes.acceleration import HotpathPrecision
from hotpath.patches.attention_override import override_of, set_attention
from hotpath.patches.precision import (
    SCHEMES,
    PrecisionUnavailable,
    compare,
    quantize_model,
    schemes,
    set_precision,
    trial,
    unavailable,
)
from hotpath.patches.precision.comparison import output_error
from quantised_models import LAYER, TOLERANCE, layer, relative, tiny, weights
from tiny_native_models import make_z_image
from tiny_native_models import tiny as tiny_on

pytestmark = pytest.mark.comfy


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


def test_memory_is_stated_and_smaller(monkeypatch):
    import comfy.model_management as management

    case, asked = tiny("flux"), []
    monkeypatch.setattr(host.current(), "make_room", lambda nbytes, device: asked.append((nbytes, device)))
    quantised, report = quantize_model(case.model, "int8")
    largest = max(entry.before for entry in report.layers)  # in float32
    assert len(asked) == 1 and asked[0][0] > 4 * largest and asked[0][1] == case.model.load_device
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
    ("scheme", "products", "kernels", "refused"),
    [
        ("fp8", True, "eager", ""),
        ("fp8", False, "hip", "ComfyUI has no fp8 products for this AMD GPU: choose fp8_weights"),
        ("int8", False, "hip", ""),
        ("int8", True, "eager", "ComfyUI has no int8 products for this AMD GPU: choose int8_weights"),
        ("int8_rotated", True, None, "ComfyUI has no int8 products for this AMD GPU: choose int8_weights"),
    ],
)
def test_what_an_amd_gpu_cannot_do_is_refused(monkeypatch, scheme, products, kernels, refused):
    """By torch's own int8 products RDNA 2 hangs, and RDNA 3 under Windows ends the process."""
    import comfy.model_management as management
    import comfy_kitchen

    def capable(name):
        assert name == "int8_linear"
        if kernels is None:
            raise KeyError(name)
        return kernels

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(management, "supports_fp8_compute", lambda device: products)
    monkeypatch.setattr(comfy_kitchen.registry, "get_capable_backend", capable)
    assert (unavailable(SCHEMES[scheme], torch.device("cuda")) or "") == refused


@pytest.mark.parametrize(("scheme", "place"), [("int8", "cpu_int8._product"), ("fp8", "dynamic_fp8.fp8_product")])
@pytest.mark.parametrize("how", ["wrong", "not a number", "absent"])
def test_products_that_come_out_wrong_are_not_trusted(monkeypatch, scheme, place, how):
    """As comfy-kitchen's int8 on a Tesla T4 (#55) and on a Radeon 9070 (ComfyUI #15084) did."""
    module, name = place.split(".")
    module = importlib.import_module(f"hotpath.patches.precision.{module}")
    right = getattr(module, name)

    def product(x, *others):
        if how == "absent":
            raise RuntimeError("no kernel image is available")
        made = right(x, *others)
        return made.roll(1, dims=-1) if how == "wrong" else made * float("nan")

    trial.refusal.cache_clear()
    monkeypatch.setattr(module, name, product)
    words = {"absent": r"a small product of it fails on this device \(RuntimeError: no kernel image is available\)"}
    said = words.get(how, "its products come out wrong on this device")
    with pytest.raises(PrecisionUnavailable, match=f"{scheme} cannot be used, because {said}: choose {scheme}_weights"):
        set_precision(tiny("z_image").model, scheme)
    trial.refusal.cache_clear()
    monkeypatch.setattr(module, name, right)
    assert set_precision(tiny("z_image").model, scheme)


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
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)
    with pytest.raises(
        PrecisionUnavailable, match=r"as those of GGUF files are; load the model from its safetensors file\.$"
    ):
        quantize_model(model, "fp8")


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
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    with pytest.raises(PrecisionUnavailable, match=r"TorchCompileModel .* put Hotpath Precision before that node"):
        set_precision(TorchCompileModel.execute(case.model, "inductor").args[0], "fp8")
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
    # ComfyUI with float8 layers alone, before quantised layers, and with their first form.
    with monkeypatch.context() as older:
        older.delattr(comfy.quant_ops, "TensorWiseINT8Layout")
        with pytest.raises(PrecisionUnavailable, match="update ComfyUI"):
            set_precision(case.model, "fp8")
    monkeypatch.delattr(comfy.ops, "mixed_precision_ops")
    with pytest.raises(PrecisionUnavailable, match="update ComfyUI"):
        set_precision(case.model, "fp8")
    monkeypatch.setattr(comfy.ops, "mixed_precision_ops", lambda layers, dtype: None, raising=False)
    with pytest.raises(PrecisionUnavailable, match="update ComfyUI"):
        set_precision(case.model, "fp8")


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
