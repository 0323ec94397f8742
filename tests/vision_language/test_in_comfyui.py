"""The models under ComfyUI's memory management, and the nodes in ComfyUI's own executor tables."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hotpath import host
from hotpath.demo.captioner_model import write_folder
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling

pytestmark = pytest.mark.comfy
GREEDY = Sampling(sample=False)


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    """ComfyUI as the host, with one tiny model in its LLM folder and empty memory management."""
    import comfy.model_management as management
    import folder_paths
    from hotpath.host.comfyui import ComfyUIHost

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    write_folder(tmp_path / "models" / "LLM" / "Qwen-VL" / "tiny", "qwen3_vl")
    monkeypatch.setattr(ComfyUIHost, "cache_folder", lambda self: tmp_path / "cache")
    management.unload_all_models()
    before = host.use(ComfyUIHost())
    yield management
    MODELS.clear()
    management.unload_all_models()
    host.use(before)


def text(model, picture, **options):
    settings = {"max_new_tokens": 10, "budget": PRESETS["fast"]} | options
    return answer(model, [Question("Describe.", "", (picture,))], GREEDY, AnswerOptions(**settings))[0].raw


def patcher(model):
    return model.managed.patcher


def loaded(management, model):
    """Whether ComfyUI lists `model` as loaded; others may have left what is theirs in the list."""
    return any(entry.model is patcher(model) for entry in management.current_loaded_models)


def test_an_answer_is_the_same_and_the_weights_are_comfyuis(comfyui, pictures):
    model = MODELS.get("tiny", LoadOptions())
    assert type(model.managed).__name__ == "ComfyUIManaged"
    first = text(model, pictures.a)
    assert loaded(comfyui, model)
    assert text(model, pictures.a, decode="static") == first
    comfyui.unload_all_models()
    assert not loaded(comfyui, model)
    assert text(model, pictures.a) == first


def test_inference_mode_of_comfyui_is_left_and_entered_at_will(comfyui, pictures):
    """ComfyUI runs nodes in inference mode, other threads do not; buffers of one must serve the other."""
    with torch.inference_mode():
        model = MODELS.get("tiny", LoadOptions())
        first = text(model, pictures.a, decode="static")
    assert not any(parameter.is_inference() for parameter in model.network.parameters())
    assert text(model, pictures.a, decode="static") == first
    with torch.inference_mode():
        assert text(model, pictures.a, decode="plain") == first


def test_another_models_need_takes_the_room(comfyui, pictures):
    model = MODELS.get("tiny", LoadOptions())
    first = text(model, pictures.a)
    comfyui.free_memory(1 << 60, torch.device("cpu"))
    assert not loaded(comfyui, model)
    assert text(model, pictures.a) == first


def test_what_hangs_on_the_weights_goes_when_some_of_them_leave(comfyui, pictures, monkeypatch):
    model = MODELS.get("tiny", LoadOptions())
    first = text(model, pictures.a)
    assert {"workspaces", "prefix"} <= set(model.device_state)
    entry = next(entry for entry in comfyui.current_loaded_models if entry.model is patcher(model))
    assert not entry.model_unload(1000)  # a part of it was enough
    assert not model.device_state and loaded(comfyui, model)
    assert text(model, pictures.a) == first
    # Where that alone gives the room, weights stay.
    size = patcher(model).loaded_size()
    with monkeypatch.context() as patched:
        patched.setattr(patcher(model), "load_device", torch.device("meta"))
        patched.setattr(comfyui, "get_free_memory", lambda device: 0 if model.device_state else 5000)
        assert not entry.model_unload(4000)
    assert not model.device_state and patcher(model).loaded_size() == size


def test_not_kept_leaves_at_once(comfyui, pictures):
    model = MODELS.get("tiny", LoadOptions())
    text(model, pictures.a, keep_loaded=False)
    assert not loaded(comfyui, model)
    assert not model.device_state


def test_the_nodes_leave_nothing_of_what_they_are_not_to_keep(comfyui, monkeypatch):
    """Neither in ComfyUI's list nor in memory, and no weight is copied to the CPU in order to be dropped there."""
    from hotpath.nodes import NODE_CLASS_MAPPINGS
    from hotpath.vision_language.loaded_model import NetworkHolder

    moved, to = [], NetworkHolder.to

    def watched(self, *args, **kwargs):
        moved.append((self, sum(p.nbytes for p in self.parameters())))
        return to(self, *args, **kwargs)

    image, listed = torch.rand(1, 64, 64, 3), len(comfyui.current_loaded_models)
    name, kept = "Qwen-VL/tiny", {"keep_model_loaded": False}
    older = {"text": "x", "model": name, "do_sample": False, "image1": image, "max_new_tokens": 4}
    others = {"model_name": name, "custom_prompt": "x", "image": image, "max_tokens": 4, "seed": 1}
    others |= {"quantization": "None (FP16)", "attention_mode": "auto", "preset_prompt": ""}
    gc.collect()
    gc.disable()
    try:
        for node, wanted in (("QwenVL", older), ("AILab_QwenVL", others)):
            work = NODE_CLASS_MAPPINGS[node]()
            with monkeypatch.context() as patched, torch.inference_mode():
                patched.setattr(NetworkHolder, "to", watched)
                getattr(work, work.FUNCTION)(**wanted, **kept)
            assert moved[0][1] > 0 and moved[-1][1] == 0
            network = weakref.ref(moved[0][0])
            moved.clear()
            assert network() is None and MODELS.loaded() == []
            assert len(comfyui.current_loaded_models) == listed
    finally:
        gc.enable()


def test_keys_values_and_activations_are_asked_for(comfyui, pictures, monkeypatch):
    model = MODELS.get("tiny", LoadOptions())
    asked = []
    load = comfyui.load_models_gpu

    def watched(models, memory_required=0, **settings):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **settings)

    monkeypatch.setattr(comfyui, "load_models_gpu", watched)
    text(model, pictures.a)
    assert asked and asked[0] >= model.cache_bytes(600)


def test_interrupt_is_comfyuis(comfyui, pictures, monkeypatch):
    import comfy.model_management as management

    model = MODELS.get("tiny", LoadOptions())
    wanted = text(model, pictures.a)
    steps = []
    check = management.throw_exception_if_processing_interrupted

    def stop_at_fourth():
        steps.append(1)
        if len(steps) == 4:
            management.interrupt_current_processing()
        check()

    for decode in ("plain", "static"):
        steps.clear()
        monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", stop_at_fourth)
        with pytest.raises(management.InterruptProcessingException):
            text(model, pictures.a, decode=decode, max_new_tokens=400)
        assert len(steps) == 4
        monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", check)
        assert text(model, pictures.a) == wanted


def test_two_nodes_share_one_copy_in_comfyuis_list(comfyui, pictures):
    from hotpath.nodes import NODE_CLASS_MAPPINGS

    (model, _) = NODE_CLASS_MAPPINGS["HotpathVLMLoader"]().load("tiny")
    image = torch.rand(1, 64, 64, 3)
    node = NODE_CLASS_MAPPINGS["QwenVL"]()
    node.inference(
        text="x", model="Qwen-VL/tiny", do_sample=False, max_new_tokens=4, keep_model_loaded=True, image1=image
    )
    NODE_CLASS_MAPPINGS["HotpathVLM"]().ask([model], ["x"], images=[image], max_new_tokens=[4])
    listed = [entry.model for entry in comfyui.current_loaded_models if entry.model is not None]
    assert [it for it in listed if type(it.model) is type(model.managed.module)] == [patcher(model)]


def test_kept_models_go_when_everything_is_unloaded(comfyui, pictures):
    gone, held = MODELS.get("tiny", LoadOptions()), MODELS.get("tiny", LoadOptions(quantization="int8"))
    for model in (gone, held):
        text(model, pictures.a)
    comfyui.free_memory(1 << 60, torch.device("cpu"))  # another model wants the room: the weights wait on the CPU
    watched = [weakref.ref(it) for it in (gone, gone.network.lm_head.weight)]
    del model, gone
    assert all(it() is not None for it in watched)
    gc.disable()
    try:
        comfyui.unload_all_models()
        assert [it() for it in watched] == [None, None]
    finally:
        gc.enable()
    assert MODELS.loaded() == [held] and text(held, pictures.a)
    assert not any(entry.is_dead() for entry in comfyui.current_loaded_models)


def test_a_dropped_model_leaves_no_weights(comfyui, pictures):
    model = MODELS.get("tiny", LoadOptions())
    text(model, pictures.a, keep_loaded=False)
    weights = weakref.ref(model.network)
    del model
    gc.collect()
    assert weights() is None
