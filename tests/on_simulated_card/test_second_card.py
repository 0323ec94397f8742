"""Networks elsewhere than on the host's card: a vision-language model on another one, with all that is its own, and a VAE that
stays on the CPU. The host's memory management follows them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.cache import clear_all
from hotpath.demo.captioner_model import write_folder
from hotpath.nodes import NODE_CLASS_MAPPINGS
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.loaded_model import LoadedModel
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.pictures import Picture
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from simulated_card import OnCard
from torch import nn

FIRST, SECOND = (torch.device("cuda", index) for index in range(2))


@pytest.fixture
def loaded(card: Any, headless_host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Loads by the node, on one of two cards."""
    monkeypatch.setattr(card, "count", 2)
    folder = headless_host.model_folders("LLM")[0]
    folder.mkdir(parents=True)
    write_folder(folder / "qwen3_vl", "qwen3_vl")
    clear_all()
    node = NODE_CLASS_MAPPINGS["HotpathVLMLoader"]()
    yield lambda **settings: node.load("qwen3_vl", dtype="float32", **settings)
    MODELS.clear()
    clear_all()


def asked(model: LoadedModel, decode: str) -> list[str]:
    picture = Picture(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    questions = [Question(text, "", (picture,)) for text in ("Describe.", "And now in other words, please.")]
    settings = AnswerOptions(max_new_tokens=4, budget=PRESETS["fast"], decode=decode)
    return [made.raw for made in answer(model, questions, Sampling(sample=False), settings)]


def places() -> set[torch.device]:
    """Cards that hold anything."""
    gc.collect()
    return {thing.device for thing in gc.get_objects() if type(thing) is OnCard}


@pytest.mark.parametrize("streamed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_everything_of_a_model_is_on_its_card(card: Any, loaded: Any, streamed: int) -> None:
    model, report = loaded(device="cuda:1", stream_layers=streamed)
    assert "on cuda:1" in report
    before = places()
    found = {decode: asked(model, decode) for decode in ("plain", "graph", "graph")}
    assert {parameter.device for parameter in model.network.parameters() if parameter.device.type != "cpu"} == {SECOND}
    assert places() - before == {SECOND} and torch.cuda.current_device() == 0
    assert bool(card.replays) != bool(streamed) and "features" in model.device_state
    other, report = loaded(stream_layers=streamed)
    assert other is not model and " on " not in report.splitlines()[0]
    # What the first one saw is of use here.
    assert asked(other, "graph") == found["graph"] == found["plain"]
    assert asked(model, "graph") == found["graph"]
    model.release()
    assert not any(parameter.is_cuda for parameter in model.network.parameters())
    assert asked(other, "graph") == found["graph"]


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_what_the_host_does_not_look_after_leaves_with_the_others(
    loaded: Any, headless_host: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A model on the CPU beside a card, and one on a card beside a host that computes on the CPU."""
    monkeypatch.setattr(headless_host, "_device", torch.device("cpu" if kind == "cuda" else "cuda"))
    model, report = loaded(device="cuda:1" if kind == "cuda" else "cpu")
    found = asked(model, "plain")
    where = {parameter.device for parameter in model.network.parameters()}
    assert where == {SECOND if kind == "cuda" else torch.device("cpu")} and f"on {where.pop()}" in report
    with model.lock:
        model.device_state["prefixes"] = "something"
    MODELS.let_go()
    assert not model.device_state and not any(parameter.is_cuda for parameter in model.network.parameters())
    assert asked(model, "plain") == found


@pytest.mark.comfy
@pytest.mark.parametrize("older", [False, True])
def test_comfyui_looks_after_a_second_card(card: Any, monkeypatch: pytest.MonkeyPatch, older: bool) -> None:
    """One that knew of one card only is told of the other."""
    import comfy.model_management as management
    from hotpath.host import unloading
    from hotpath.host.comfyui import ComfyUIHost

    monkeypatch.setattr(card, "count", 2)
    unloading.before_unloading_all(MODELS.let_go)
    management.unload_all_models()
    if older:
        monkeypatch.delattr(management, unloading._OURS)
        monkeypatch.delattr(management, "get_all_torch_devices", raising=False)
        monkeypatch.setattr(
            management, "unload_all_models", lambda: management.free_memory(1e30, management.get_torch_device())
        )
        monkeypatch.setattr(unloading, "_listeners", [])
    else:
        monkeypatch.setattr(management, "get_all_torch_devices", lambda: [FIRST, SECOND], raising=False)
    here = ComfyUIHost()
    first, second = here.manage(nn.Linear(8, 8)), here.manage(nn.Linear(8, 8), SECOND)
    with first.resident() as one, second.resident() as other:
        assert (one.weight.device, other.weight.device) == (FIRST, SECOND)
    here.make_room(1 << 60, SECOND)
    assert one.weight.is_cuda and not other.weight.is_cuda
    with second.resident(keep=False):
        assert other.weight.device == SECOND
    assert one.weight.is_cuda and not other.weight.is_cuda
    with second.resident():
        pass
    management.unload_all_models()
    assert not one.weight.is_cuda and not other.weight.is_cuda
    assert here.compute_dtype(supported=(torch.bfloat16,), device=SECOND) == torch.bfloat16


@pytest.mark.comfy
def test_a_vae_stays_on_the_cpu_where_comfyui_was_told_so(
    card: Any, headless_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By --cpu-vae, for images that are read and pictures that are drawn."""
    from comfy.cli_args import args
    from hotpath import host
    from hotpath.demo.z_image_model import write_checkpoint
    from hotpath.host.comfyui import ComfyUIHost
    from hotpath.text_to_image.generation import Pipeline, Request, generate
    from hotpath.text_to_image.jobs import forget_models
    from hotpath.text_to_image.loading import MODELS as CHECKPOINTS
    from hotpath.text_to_image.loading import LoadOptions

    here = ComfyUIHost()
    monkeypatch.setattr(here, "model_folders", headless_host.model_folders)
    write_checkpoint(here.model_folders("diffusers")[0] / "tiny")
    image = torch.rand(1, 32, 32, 3)
    request = Request("a fox", width=32, height=32, steps=2, strength=0.7, image=image, prompt_cache="off")
    found = []
    before = host.use(here)
    try:
        with torch.inference_mode():
            for told in (False, True):
                monkeypatch.setattr(args, "cpu_vae", told)
                model = CHECKPOINTS.get("tiny", LoadOptions(dtype="float32"))
                found.append(generate(Pipeline(model), request))
                places = [next(part.managed.module.parameters()).device.type for part in model.components()]
                assert places == ["cuda", "cuda", "cpu" if told else "cuda"]
                assert ("the VAE computes on cpu in float32, as ComfyUI was started" in found[-1].report) == told
                model = CHECKPOINTS.get("tiny")
                kept = model.vae_dtype == model.dtype
                assert model.dtype == torch.bfloat16 and kept != told
                forget_models()
                del model
                gc.collect()
    finally:
        host.use(before)
    assert (found[0].pictures - found[1].pictures).abs().max() < 1e-4
    assert found[1].pictures.std() > 0
