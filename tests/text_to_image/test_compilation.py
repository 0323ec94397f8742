"""Regional compilation: one graph for every prompt and size, the same pictures, and no stop where it cannot run.

Graphs run as they are traced here; that the compiler's own code draws the same is shown on a GPU, in test_on_gpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hotpath import host
from hotpath.host.compiling import StopOnItsWay
from hotpath.products import int8
from hotpath.text_to_image import compilation, precision
from hotpath.text_to_image.denoising import Guidance

SIZES = ((64, 48), (48, 64), (128, 64), (80, 48), (32, 160), (64, 48))
PROMPTS = ("a red fox", "a " + "very " * 30 + "long prompt", "x")


def test_one_graph_for_every_prompt_and_size(load, draw, graphs):
    model, plain = load(compile="regional"), load()
    assert "compile: regional" in draw(model).report
    first = len(graphs)
    assert first == 1  # blocks of both lists, whatever their weights
    for prompt in PROMPTS:
        for width, height in SIZES:
            found = draw(model, prompt, width=width, height=height, guidance=Guidance(2.0), negative="blurry, dark")
            wanted = draw(plain, prompt, width=width, height=height, guidance=Guidance(2.0), negative="blurry, dark")
            assert (found.pictures - wanted.pictures).abs().max() < 1e-5
    assert len(graphs) == first
    draw(model, steps=5, seed=3)
    assert len(graphs) == first


def test_a_leaving_and_returning_network_is_not_compiled_again(load, draw, graphs):
    model = load(compile="regional")
    wanted = draw(model).pictures
    model.release()
    assert torch.equal(draw(model).pictures, wanted) and len(graphs) == 1


def test_a_compiler_that_fails_is_left_out(load, draw, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no such operator")

    planned = compilation.plan
    monkeypatch.setattr(compilation, "plan", lambda *asked: replace(planned(*asked), backend=broken))
    model = load(compile="regional")
    found = draw(model)
    assert "compile: none instead of regional, because RuntimeError: no such operator" in found.report
    assert torch.equal(found.pictures, draw(load()).pictures)
    assert torch.equal(draw(model).pictures, found.pictures)
    torch._dynamo.reset()


def test_a_stop_of_an_older_comfyui_is_no_compiler_that_fails(load, draw, monkeypatch):
    stop = type("InterruptProcessingException", (Exception,), {})

    def stopped(graph, inputs):
        raise StopOnItsWay(stop())

    planned = compilation.plan
    monkeypatch.setattr(compilation, "plan", lambda *asked: replace(planned(*asked), backend=stopped))
    model = load(compile="regional")
    with pytest.raises(stop):
        draw(model)
    assert model.compilation.mode == "regional"
    torch._dynamo.reset()


def test_a_failing_network_is_not_blamed_on_the_compiler(load, draw, graphs, monkeypatch):
    model = load(compile="regional")
    draw(model)

    def broken(*args, **kwargs):
        raise ValueError("the network's own")

    monkeypatch.setattr(model.transformer.managed.module.network, "forward", broken)
    with pytest.raises(ValueError, match="the network's own"):
        draw(model)
    assert model.compilation.mode == "regional"


def test_without_triton_on_cuda(monkeypatch):
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    plan = compilation.plan("regional", torch.device("cuda"))
    assert plan.mode == "none" and "triton package is not installed" in plan.note


@pytest.mark.parametrize(("compile", "torchao"), [("none", False), ("regional", False), ("none", True)])
def test_int8_products(load, draw, monkeypatch, graphs, compile, torchao):
    """Pictures differ slightly, and the report says so."""
    if torchao or host.current().device().type != "cpu":
        pytest.importorskip("torchao")
    if host.current().device().type == "cpu":
        monkeypatch.setattr(precision, "by_torchao", lambda device: torchao)
    monkeypatch.setattr(precision, "unavailable", lambda *_: None)  # in float32 where this CPU has no other way
    exact, model = draw(load()), load(precision="int8", compile=compile)
    found = draw(model)
    difference = (found.pictures - exact.pictures).abs().mean()
    assert 0 < difference < 0.03 and "precision: int8" in found.report
    assert len(graphs) == (compile == "regional")
    network = model.transformer.managed.module.network
    packed = [
        name
        for name, layer in network.named_modules()
        if "Int8" in f"{type(getattr(layer, 'weight', None))}{type(layer)}"
    ]
    assert any("layers.0.feed_forward.w1" in name for name in packed)
    assert not [name for name in packed if "adaLN" in name or "embedder" in name or "final" in name]
    with torch.inference_mode():  # as ComfyUI measures and moves it, layer by layer or whole
        assert model.transformer.managed.module.state_dict()
        model.transformer.managed.module.to("cpu")
        network.layers[0].feed_forward.w1.to("cpu")
    model.release()
    assert torch.equal(draw(model).pictures, found.pictures)


def test_a_cpu_that_cannot_multiply_8_bits_is_a_line_in_the_report(load, draw, monkeypatch):
    if host.current().device().type != "cpu":
        pytest.skip("asks what a CPU does")
    monkeypatch.setattr(int8, "why_not", lambda: "products of 8 bits overflow on this CPU")
    said = draw(load(precision="int8")).report
    assert "precision: none instead of int8, because products of 8 bits overflow on this CPU" in said


def test_float8_says_why_not(load, draw, monkeypatch):
    if host.current().device().type == "cpu":
        assert (
            "precision: none instead of float8, because there are no float8 products on cpu"
            in draw(load(precision="float8")).report
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "compute capability 8.9, and this device has 8.6" in str(
        precision.unavailable("float8", torch.device("cuda"), torch.bfloat16)
    )
    assert precision.unavailable("int8", torch.device("cuda"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert precision.unavailable("float8", torch.device("cuda"), torch.bfloat16) is None
    assert "the dtype is float32" in str(precision.unavailable("float8", torch.device("cuda"), torch.float32))
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    assert "torchao package is not installed" in str(
        precision.unavailable("int8", torch.device("cuda"), torch.bfloat16)
    )
    # Where no package helps, none is named.
    for place, method in (("cpu", "float8"), ("mps", "float8"), ("mps", "int8"), ("xpu", "int8")):
        said = precision.unavailable(method, torch.device(place), torch.bfloat16)
        assert said == f"there are no {method} products on {place}"


def test_a_gpu_that_torchao_refuses_is_a_line_in_the_report(monkeypatch, load, draw):
    """RDNA3 says compute capability 11.0, and torchao has float8 for MI300 and MI350 alone of AMD's."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert precision.unavailable("float8", torch.device("cuda"), torch.bfloat16) is None  # MI300 says 9.4
    monkeypatch.setattr(precision, "by_torchao", lambda device: True)
    assert precision.unavailable("int8", torch.device("cpu"), torch.float32) is None
    state = torch.get_rng_state()
    assert precision.refusal("int8", torch.device("cpu"), torch.float32) is None
    assert torch.equal(torch.get_rng_state(), state)

    def refuse(module, method):
        raise AssertionError("Float8 dynamic activation quantization is only supported on CUDA>=8.9 and MI300+")

    monkeypatch.setattr(precision, "_pack", refuse)
    said = draw(load(precision="int8")).report
    assert "precision: none instead of int8, because torchao refuses it on this device (AssertionError: Float8" in said


@pytest.mark.parametrize("method", ["int8", "float8"])
def test_torchao_sets_nothing_for_the_whole_process(monkeypatch, method):
    """It would set the compiler's options for every model and, up to 0.17, TensorFloat-32 for every float32 product."""
    library = pytest.importorskip("torchao.quantization.quant_api")
    called = []
    for place in (library.torchao.quantization.utils, library):  # by which of the names differs between releases
        monkeypatch.setattr(place, "recommended_inductor_config_setter", lambda: called.append(1), raising=False)
    before = torch.get_float32_matmul_precision(), torch._inductor.config.coordinate_descent_tuning
    monkeypatch.setattr(precision, "by_torchao", lambda device: True)
    precision.refusal(method, torch.device("cpu"), torch.float32)
    assert not called
    assert before == (torch.get_float32_matmul_precision(), torch._inductor.config.coordinate_descent_tuning)
    assert compilation.plan("regional", torch.device("cpu"), True).backend is not compilation.INDUCTOR


def test_a_gpu_on_which_torchao_multiplies_wrong_is_a_line_in_the_report(monkeypatch, load, draw):
    """torch 2.6 for AMD applied the scales of the weight's rows to those of the activations (ROCm/pytorch #2739)."""
    monkeypatch.setattr(precision, "by_torchao", lambda device: True)
    monkeypatch.setattr(precision, "unavailable", lambda *_: None)
    pack = precision._pack

    def swapped(module, method):
        sizes = module[0].weight.abs().amax(dim=1)
        pack(module, method)

        def exchange(layer, inputs, out):
            of_rows = inputs[0].abs().amax(dim=1)
            return out / sizes / of_rows[:, None] * of_rows * sizes[:, None]

        module[0].register_forward_hook(exchange)

    monkeypatch.setattr(precision, "_pack", swapped)
    said = draw(load(precision="int8")).report
    assert "precision: none instead of int8, because torchao's products come out wrong on this device" in said


def test_a_torchao_of_another_torch_is_a_line_in_the_report(draw, load, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("hotpath.text_to_image.precision.by_torchao", lambda device: True)
    model = load(precision="int8")
    assert "precision: none instead of int8, because the torchao package cannot be loaded" in draw(model).report
