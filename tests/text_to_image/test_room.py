"""Room on the device: tiles, neighbours that are sent away, a second GPU, what is told when there is none."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from counted_calls import count_calls
from hotpath import host
from hotpath.text_to_image import decoding, denoising
from hotpath.text_to_image.denoising import Guidance


@pytest.mark.parametrize("needed", [1, 1 << 60])
def test_tiles_only_without_room(load, draw, monkeypatch, needed):
    model = load()
    size = {"width": 128, "height": 96}  # tiles of this VAE are 64 pixels
    whole = draw(model, **size, tiling="never")
    monkeypatch.setattr(decoding, "activation_bytes", lambda *a: needed)
    found = draw(model, **size)
    if needed == 1:
        assert "decoded whole: about 0 MiB" in found.report and torch.equal(found.pictures, whole.pictures)
    else:
        assert "decoded in tiles: about" in found.report
        assert torch.equal(found.pictures, draw(model, **size, tiling="always").pictures)
        assert not torch.equal(found.pictures, whole.pictures) and torch.equal(found.latents, whole.latents)
    # The VAE of everybody else is as it was.
    assert not model.vae.managed.module.network.use_tiling
    assert "whole: the picture is no larger than a tile of 64 pixels" in draw(model, tiling="always").report


def full_device(monkeypatch, layer, side):
    """`layer` as on a device that has room for `side` pixels or latents; returns what it held when it ran out."""
    forward, held = layer.forward, []

    def limited(x, *args, **kwargs):
        if max(x.shape[-2:]) > side:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise RuntimeError("MPS backend out of memory (MPS allocated: 5.60 GB)")  # no OutOfMemoryError on Macs
        assert not any(activations() is not None for activations in held), "the failed try still holds its memory"
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", limited)
    return held


def test_tiles_when_the_whole_runs_out_of_memory(load, draw, monkeypatch):
    model = load()
    wanted = draw(model, width=128, height=96, tiling="always").pictures
    network = model.vae.managed.module.network
    held = full_device(monkeypatch, network.decoder, 8)
    found = draw(model, width=128, height=96)
    assert "decoded in tiles: whole it ran out of memory" in found.report and torch.equal(found.pictures, wanted)
    assert len(held) == 1 and not network.use_tiling
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, width=128, height=96, tiling="never")


def test_an_image_is_read_in_tiles_when_it_must_be(load, draw, monkeypatch):
    model, image = load(), torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(3))
    over = {"image": image, "strength": 0.5, "width": 128, "height": 96}
    whole = draw(model, **over, tiling="never").latents
    wanted = draw(model, **over, tiling="always").latents
    network = model.vae.managed.module.network
    held = full_device(monkeypatch, network.encoder, 64)
    assert torch.equal(draw(model, **over).latents, wanted) and not torch.equal(wanted, whole)
    assert len(held) == 1 and not network.use_tiling
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, **over, tiling="never")


def test_room_is_made_before_tiles(load, monkeypatch):
    model = load()
    free = [100]
    monkeypatch.setattr(host.current(), "free_memory", lambda device: free[0])
    monkeypatch.setattr(host.current(), "make_room", lambda nbytes, device: free.__setitem__(0, 300))
    monkeypatch.setattr(decoding, "activation_bytes", lambda *a: 200)
    plan = decoding.plan(model, "auto", 2048, 2048, 512)
    assert not plan.tiled and free == [300]


def test_a_full_device_is_a_sentence(load, draw, monkeypatch):
    model = load()
    said = rf"{model.device} ran out of memory at 64 x 48 \(denoise\): choose one picture at a time or a smaller width and h"
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")):

        def full(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(denoising, "denoise", full)
        with pytest.raises(torch.OutOfMemoryError, match=said):
            draw(model, pictures_at_a_time=2)


def test_room_is_asked_for_what_is_drawn(load, draw, monkeypatch):
    model = load()
    asked = count_calls(monkeypatch, model.transformer, "resident")
    draw(model)
    draw(model, pictures_at_a_time=64)
    draw(model, pictures=3, pictures_at_a_time=64)
    draw(model, guidance=Guidance(1.0), negative="blurry " * 40)
    (one,), (same,), (three,), (long,) = asked
    assert one == same and three == 3 * one and long > one


def test_the_program_stays_near_the_device():
    """A GPU that is many steps behind would hear an interrupt when all is queued."""
    from hotpath.text_to_image.interruption import LEAD, Lead

    made, passed = [], []

    def mark():
        number = len(made)
        made.append(number)
        return SimpleNamespace(synchronize=lambda: passed.append(number))

    lead = Lead(mark)
    for _ in range(LEAD + 5):
        lead.step()
        assert len(made) - len(passed) <= LEAD
    assert passed == [0, 1, 2, 3, 4]


def test_a_second_gpu_is_the_current_one_while_it_computes(load, monkeypatch):
    """Else kernels without a tensor's device, and the marks that are waited for, would be the first one's."""
    from hotpath.text_to_image import interruption

    marks, entered = [], []
    event = SimpleNamespace(record=lambda stream: marks.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert interruption.recorded_event(torch.device("cuda", 1)) is event and marks == ["stream of cuda:1"]
    model = load()
    monkeypatch.setattr(model.vae.managed, "device", torch.device("cuda", 1))
    monkeypatch.setattr(model.vae.managed.module, "to", lambda device: None)
    monkeypatch.setattr(host.current(), "free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    with model.vae.resident():
        assert entered == [torch.device("cuda", 1)]


class Device:
    """A host's handle of a network that is on a device with little room, or waits beside it."""

    def __init__(self, nbytes):
        self.device, self.released = torch.device("cuda"), 0
        self.module = torch.nn.Module()
        self.module.network = torch.nn.Linear(nbytes // 4, 1, bias=False)

    def release(self):
        self.released += 1


@pytest.mark.parametrize(("free", "sent_away"), [(1000, 0), (120, 0), (119, 1)])
def test_a_network_without_room_sends_its_neighbours_away(headless_host, monkeypatch, free, sent_away):
    from hotpath.text_to_image.component import Component

    asked = []
    monkeypatch.setattr(headless_host, "free_memory", lambda device: free)
    monkeypatch.setattr(headless_host, "make_room", lambda nbytes, device: asked.append(nbytes))

    class Owner:
        def load(self):
            raise AssertionError("nothing is read here")

        def all(self):
            return components

    owner = Owner()
    components = [Component(name, owner.load, owner.all) for name in ("a", "b", "never read")]
    components[0]._managed, components[1]._managed = Device(100), Device(48)
    components[0]._make_room(20)
    assert (components[0]._managed.released, components[1]._managed.released) == (0, sent_away)
    assert asked == [120] * sent_away and not components[2].loaded and components[0].note() == ""


def test_layers_without_room_wait_in_the_machines_memory(headless_host, monkeypatch):
    """As many as must, more when a larger picture needs room, fewer when the network is brought anew and there is enough."""
    from hotpath.host.streamed_layers import StreamedLayer, whole_bytes
    from hotpath.text_to_image.component import Component

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(25, 1, bias=False) for _ in range(10))
            self.embedder = torch.nn.Linear(25, 4, bias=False)

    class Managed(Device):
        def __init__(self, module, device):
            assert device is None
            self.device, self.module, self.released = torch.device("cuda"), module, 0

    class Owner:
        def load(self):
            return Network()

        def all(self):
            return [component]

    owner = Owner()
    component = Component("transformer", owner.load, owner.all)
    monkeypatch.setattr(headless_host, "manage", Managed)
    room, brought = [0], [False]

    def held():
        return sum(weight.nbytes for weight in component.managed.module.parameters())

    monkeypatch.setattr(headless_host, "free_memory", lambda device: room[0] - (held() if brought[0] else 0))
    monkeypatch.setattr(Component, "_arriving", lambda self: 0 if brought[0] else held())

    def streamed(free, extra):
        room[0], before = free, component.managed
        component._make_room(extra)
        if component.managed is not before:
            assert before.released == 1
        layers = component.managed.module.network.layers
        count = sum(isinstance(layer, StreamedLayer) for layer in layers)
        assert whole_bytes(component.managed.module) == 1400
        assert component.note() == (
            f"{count} of 10 layers of the transformer wait in the machine's memory, because cuda has no room for them"
            if count
            else ""
        )
        return count

    assert streamed(1500, 100) == 0
    assert streamed(1500, 101) == 3  # one, and those two that are there at any time
    assert streamed(1500, 0) == 0  # not brought yet
    assert streamed(1000, 100) == 7
    brought[0] = True
    assert streamed(1000, 50) == 7  # what is there stays there
    assert streamed(1000, 350) == 10
    brought[0] = False
    assert streamed(1000, 180) == 8
    assert streamed(1000, 100) == 8  # one less is not worth the way
    assert streamed(100, 100) == 10


def test_nobody_sends_away_what_another_computes_with(load):
    model = load()
    order = []
    with model.transformer.resident():
        thread = threading.Thread(target=lambda: (model.release(), order.append("released")))
        thread.start()
        thread.join(0.2)
        order.append("computed")
    thread.join()
    assert order == ["computed", "released"]
