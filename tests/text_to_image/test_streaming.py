"""Layers of the transformer that wait in the machine's memory: the same pictures, whatever else is asked for."""

from __future__ import annotations

import pytest
import torch
from hotpath.host import streamed_layers
from hotpath.host.layer_weights import Weights
from hotpath.text_to_image import precision
from hotpath.text_to_image.adapters import Adapter
from hotpath.text_to_image.generation import Pipeline
from safetensors.torch import save_file

LAYERS = ("layers.0.attention.to_q", "layers.1.feed_forward.w1", "noise_refiner.0.attention.to_k")


@pytest.fixture
def stream(monkeypatch):
    """Leaves layers of a checkpoint's transformer in memory and lends copies of them, as to a card."""
    monkeypatch.setattr(Weights, "copied", lambda self, device: self.on(self.memory.clone()))
    monkeypatch.setattr(precision, "unavailable", lambda *_: None)  # in float32 where this CPU has no other way

    def streaming(model, count):
        layers = model.transformer.managed.module.network.layers
        streamed_layers.stream(layers, count)
        return layers

    return streaming


def alike(found, wanted):
    """To rounding: weights that were lent are multiplied in their own order, others as oneDNN keeps them."""
    return bool((found.pictures - wanted.pictures).abs().max() < 1e-5)


@pytest.mark.parametrize("options", [{}, {"compile": "regional"}, {"precision": "int8", "compile": "regional"}])
def test_the_same_picture(load, draw, stream, graphs, options):
    model = load(**options)
    whole = draw(model)
    made = len(graphs)
    assert made == ("compile" in options)
    for count in (1, 2):
        stream(model, count)
        found = draw(model)
        assert alike(found, whole)
        assert f"{count} of 2 layers of the transformer wait in the machine's memory" in found.report
    assert len(graphs) == made  # weights that were lent are no other kind of weights
    stream(model, 0)
    found = draw(model)
    assert alike(found, whole) and "machine's memory" not in found.report


@pytest.mark.parametrize("options", [{}, {"precision": "int8"}])
def test_files_of_lora_change_layers_that_wait(load, draw, stream, tmp_path, options):
    model, seeded = load(**options), torch.Generator().manual_seed(5)
    network, tensors = model.transformer.managed.module.network, {}
    for name in LAYERS:
        out, inner = network.get_submodule(name).weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(3, inner, generator=seeded) * 0.1
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 3, generator=seeded)
    save_file(tensors, tmp_path / "a.safetensors")
    changed = Pipeline(model, (Adapter(tmp_path / "a.safetensors", 0.7),))
    plain, wanted = draw(model), draw(changed)
    assert not alike(plain, wanted)
    for count in (1, 2):
        stream(model, count)
        for _ in range(2):
            found = draw(changed)
            assert alike(found, wanted) and "3 layers changed" in found.report
        assert alike(draw(model), plain)
