"""Models larger than the device: streamed layers give the same tokens and are not the host's."""

from __future__ import annotations

import pytest
import torch
from hotpath import host
from hotpath.vision_language import decoding, loading
from hotpath.vision_language.decode_path import choose_path
from hotpath.vision_language.generation import workspace
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prompts import Question


def managed_bytes(model):
    return sum(parameter.nbytes for parameter in model.holder.parameters())


@pytest.mark.parametrize("quantization", ["none", "int4"])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_streamed_layers_write_the_same(load, ask, pictures, kind, quantization):
    whole = load(kind, quantization=quantization)
    shown = (pictures.a,) if whole.processor is not None else ()
    question = Question("Describe.", "", shown)
    wanted = ask(whole, question).raw
    size, layers = managed_bytes(whole), decoding.text_decoder(whole.network).layers
    for count in (1, 3, 99):
        model = load(kind, quantization=quantization, stream_layers=count)
        made = ask(model, question, decode="static")
        assert made.raw == wanted
        streamed = min(count, len(layers))
        assert f"{streamed} of {len(layers)} decoder layers are streamed" in made.report
        assert "plain, because some of its layers are streamed" in made.report
        each = sum(parameter.nbytes for parameter in layers[0].parameters())
        assert managed_bytes(model) == size - streamed * each


def test_streamed_weights_do_not_move_with_the_model(load):
    model = load("qwen3_vl", stream_layers=2)
    MODELS._models.clear()
    model.holder.to("meta")
    layers = decoding.text_decoder(model.network).layers
    assert next(layers[0].parameters()).device.type == "meta"
    assert not list(layers[-1].parameters())
    assert next(layers[-1].layer.parameters()).device.type == "cpu"


def test_as_many_layers_as_do_not_fit(load, monkeypatch):
    model = load("qwen3_vl")
    layers = decoding.text_decoder(model.network).layers
    room = loading.RESERVE + sum(t.nbytes for t in [*model.network.parameters(), *model.network.buffers()])
    asked = []
    monkeypatch.setattr(host.current(), "make_room", lambda nbytes, device: asked.append(nbytes))
    for missing, count in ((0, 0), (1, 3), (room, len(layers))):
        monkeypatch.setattr(host.current(), "free_memory", lambda device, free=room - missing: free)
        told = loading.stream_layers(model.network, torch.device("cuda"), -1)
        assert told == (f"{count} of {len(layers)} decoder layers are streamed from CPU memory" if count else "")
    assert asked[0] == room


def test_weights_that_moved_make_new_buffers(load, pictures):
    """A host may take weights out and bring them back elsewhere; a recorded graph would read the old place."""
    model = load("qwen3_vl")
    path = choose_path(model, "static")
    first = workspace(model, path, 1, 100)
    assert workspace(model, path, 1, 100) is first
    layer = decoding.text_decoder(model.network).layers[1].mlp.down_proj
    layer.weight.data = layer.weight.data.clone()
    assert workspace(model, path, 1, 100) is not first


def test_the_loader_node_offers_it(llm):
    from hotpath.nodes import NODE_CLASS_MAPPINGS

    _, report = NODE_CLASS_MAPPINGS["HotpathVLMLoader"]().load("qwen3_vl", stream_layers=1)
    assert "1 of 4 decoder layers are streamed" in report
    assert LoadOptions().stream_layers == -1
