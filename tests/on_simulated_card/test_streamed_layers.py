"""Models larger than the card: their layers take turns on it, each copied while another computes, with the whole's numbers."""

from __future__ import annotations

import gc
import os
import types
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from hotpath import host
from hotpath.host import pinned_memory, streamed_layers
from hotpath.host.streamed_layers import PLACES, StreamedLayer, lending

DEVICE = torch.device("cuda")
LARGE = 256  # a layer of LARGE x LARGE weights


def network(count: int) -> Any:
    torch.manual_seed(0)
    whole = torch.nn.Module()
    whole.layers = torch.nn.ModuleList(torch.nn.Linear(LARGE, LARGE) for _ in range(count))
    return whole.requires_grad_(False)


def run(whole: Any, x: torch.Tensor, passes: int) -> torch.Tensor:
    for _ in range(passes):
        for layer in whole.layers:
            x = layer(x).tanh()
    return x


@pytest.mark.parametrize("refused", [False, True])
def test_memory_is_not_pinned_where_that_is_not_wanted_or_not_to_be_had(
    card: Any, headless_host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: bool
) -> None:
    pinned_memory._tell_of_slow_copies.cache_clear()
    if refused:
        monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *_: 2)  # of memory there is no more
    else:
        monkeypatch.setattr(headless_host, "locked_memory", lambda: None)  # as by --disable-pinned-memory
    whole, x = network(2), torch.randn(4, LARGE, device=DEVICE)
    expected = run(network(2).to(DEVICE), x, 1).cpu()
    card.waits.clear()
    streamed_layers.stream(whole.layers, 2)
    assert not card.registered
    assert caplog.text.count("no more memory can be pinned") == refused
    if refused:  # which the driver would tell of the next kernel
        assert card.waits.count("torch.cuda.synchronize()") == 2
    with lending(whole, DEVICE):
        assert torch.equal(run(whole, x, 1).cpu(), expected)


def test_on_windows_some_of_what_may_be_pinned_is_left_to_others(
    card: Any, headless_host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pinned_memory._tell_of_slow_copies.cache_clear()
    gc.collect()  # layers of other tests
    whole = network(4)
    layer = streamed_layers.nbytes(whole.layers[0])
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=8 * layer))
    monkeypatch.setattr(headless_host, "locked_memory", lambda: layer)  # by the host itself
    streamed_layers.stream(whole.layers, 4)
    assert len(card.registered) == 2  # with the host's own three of the four that Windows pins
    assert caplog.text.count("no more memory can be pinned") == 1
    del whole.layers[0]
    gc.collect()
    assert len(card.registered) == 1
    again = network(2)
    streamed_layers.stream(again.layers, 2)
    assert len(card.registered) == 2


@pytest.mark.parametrize(("layers", "count"), [(5, 5), (6, 4), (3, 3), (4, 1)])
def test_two_places_for_all_layers(card: Any, layers: int, count: int) -> None:
    whole, x = network(layers), torch.randn(4, LARGE, device=DEVICE)
    expected = run(network(layers).to(DEVICE), x, 3).cpu()
    streamed_layers.stream(whole.layers, count)
    whole.to(DEVICE)
    weights = whole.layers[-1].weights
    assert card.registered[weights.memory.data_ptr()] == weights.nbytes
    before, card.peak = card.held, card.held
    card.waits.clear()
    with torch.inference_mode(), lending(whole, DEVICE):
        made = run(whole, x, 3)
        assert not card.waits
        assert card.peak - before < (PLACES + 1) * weights.nbytes
        with lending(whole, DEVICE):  # a call within a call takes the same places
            pass
    assert len(card.waits) == 1  # for copies that nobody used
    assert torch.equal(made.cpu(), expected)
    del made
    assert card.held <= before and all(
        part.layer.weight.device.type == "cpu" for part in whole.layers if streamed(part)
    )
    address = weights.memory.data_ptr()
    del whole, weights
    gc.collect()
    assert address not in card.registered


def streamed(layer: Any) -> bool:
    return isinstance(layer, StreamedLayer)


def test_the_next_layer_is_copied_while_one_computes(card: Any) -> None:
    whole, x = network(4), torch.randn(4, LARGE, device=DEVICE)
    streamed_layers.stream(whole.layers, 4)
    queued: list[str] = []

    def note(word: str, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            queued.append(word)
            return call(*args, **kwargs)

        return noted

    for i, layer in enumerate(whole.layers):
        layer.layer.forward = note(f"compute {i}", layer.layer.forward)
    take = streamed_layers._Place.take
    with pytest.MonkeyPatch.context() as patched, lending(whole, DEVICE):
        names = {layer: f"copy {i}" for i, layer in enumerate(whole.layers)}
        patched.setattr(streamed_layers._Place, "take", lambda place, layer: note(names[layer], take)(place, layer))
        run(whole, x, 1)
    assert queued == [
        "copy 0",
        "copy 1",
        "compute 0",
        "copy 2",
        "compute 1",
        "copy 3",
        "compute 2",
        "copy 0",
        "compute 3",
    ]


def test_a_pass_that_breaks_off_leaves_the_next_one_right(card: Any) -> None:
    whole, x = network(4), torch.randn(4, LARGE, device=DEVICE)
    expected = run(network(4).to(DEVICE), x, 1).cpu()
    streamed_layers.stream(whole.layers, 4)
    with lending(whole, DEVICE):
        for stop in (1, 2, 3):
            part = torch.nn.Module()
            part.layers = list(whole.layers)[:stop]  # type: ignore[assignment]
            run(part, x, 1)
            with pytest.raises(RuntimeError):
                whole.layers[stop](torch.ones(1, 3, device=DEVICE))
            assert torch.equal(run(whole, x, 1).cpu(), expected)


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_answers_of_a_model_larger_than_the_card(card: Any, load_llm: Any, quantization: str) -> None:
    from hotpath.vision_language.answering import AnswerOptions, answer
    from hotpath.vision_language.loaded_model import LoadOptions
    from hotpath.vision_language.loading import MODELS
    from hotpath.vision_language.prompts import Question
    from hotpath.vision_language.sampling import Sampling

    load_llm("qwen3")  # writes the model's folder
    questions, written = [Question("x"), Question("and y?")], []
    for count in (0, 3, 4):
        options = LoadOptions(dtype="float32", quantization=quantization, stream_layers=count)
        model = MODELS.get("qwen3", options, must_see=False)
        written.append([made.raw for made in answer(model, questions, Sampling(sample=False), AnswerOptions(6))])
        assert len(card.registered) == count
        MODELS.clear()
        del model
        gc.collect()
    assert written[0] == written[1] == written[2]
    assert not card.registered


@pytest.fixture(
    params=[pytest.param("headless", marks=pytest.mark.long), pytest.param("ComfyUI", marks=pytest.mark.comfy)]
)
def here(request: pytest.FixtureRequest, headless_host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "headless":
        yield headless_host
        return
    from hotpath.host.comfyui import ComfyUIHost

    made = ComfyUIHost()
    monkeypatch.setattr(made, "model_folders", headless_host.model_folders)
    before = host.use(made)
    with torch.inference_mode():  # as nodes run there
        yield made
    host.use(before)


def test_pictures_of_a_model_larger_than_the_card(card: Any, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.demo.z_image_model import TINY, Widths, write_checkpoint
    from hotpath.text_to_image.generation import Pipeline, Request, generate
    from hotpath.text_to_image.jobs import forget_models
    from hotpath.text_to_image.loading import MODELS

    widths = Widths({**TINY.transformer, "n_layers": 6}, {**TINY.text_encoder, "num_hidden_layers": 8}, TINY.vae)
    write_checkpoint(here.model_folders("diffusers")[0] / "tiny", widths)
    request = Request("a red fox", width=64, height=48, steps=2, prompt_cache="off")
    limit = [1 << 40]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (limit[0] - card.held, limit[0]))
    try:
        pipeline = Pipeline(MODELS.get("tiny"))
        whole = generate(pipeline, request)
        assert "wait in the machine's memory" not in whole.report
        model = pipeline.model
        sizes = [streamed_layers.nbytes(part.managed.module) for part in model.components()]
        model.release()
        # Half of the larger network, beside what a picture needs.
        limit[0] = card.held + max(sizes) // 2 + (1 << 20)
        card.peak = card.held
        for _ in range(2):
            found = generate(pipeline, request)
            assert "layers of the transformer wait in the machine's memory, because cuda" in found.report
            assert "7 of 7 layers of the text encoder wait" in found.report and found.encoded == 1
            assert torch.equal(found.pictures, whole.pictures)
            assert card.peak < limit[0]
        limit[0] = 1 << 40
        model.release()
        found = generate(pipeline, request)
        assert "machine's memory" not in found.report and torch.equal(found.pictures, whole.pictures)
    finally:
        forget_models()
