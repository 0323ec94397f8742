"""The nodes: alone, in a workflow without ComfyUI, and in ComfyUI's memory management."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hotpath import host
from hotpath.cache import clear_all
from hotpath.headless.executor import Executor
from hotpath.headless.graph import Graph
from hotpath.nodes import NODE_CLASS_MAPPINGS as NODES
from hotpath.text_to_image import previews
from hotpath.text_to_image.generation import Pipeline
from hotpath.text_to_image.jobs import forget_models
from PIL import Image

SMALL = {"prompt": "a red fox", "negative": "", "width": 64, "height": 48, "steps": 2, "guidance": 0.0, "seed": 3}


def test_load_and_draw(folder, load, draw, headless_host):
    pipeline, report = NODES["HotpathZImageLoader"]().load("tiny")
    assert "tiny: ZImagePipeline, float32 on cpu" in report and not pipeline.model.transformer.loaded
    pictures, latent, report = NODES["HotpathZImage"]().draw(pipeline, **SMALL, batch_size=2, unique_id="4")
    assert torch.equal(pictures, draw(load(), seed=3, pictures=2).pictures) and "seeds 3 to 4" in report
    assert latent["samples"].shape == (2, 4, 6, 8) and headless_host.texts == [("4", report)]
    with torch.no_grad():
        decoded = pipeline.model.vae.managed.module.network.decode(latent["samples"][:1]).sample
    assert torch.allclose((decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1), pictures[0], atol=1e-5)


def test_the_loader_validates_and_notices_changes(folder, tiny_folder):
    loader = NODES["HotpathZImageLoader"]
    assert loader.INPUT_TYPES()["required"]["checkpoint"][0] == ["tiny"]
    assert loader.VALIDATE_INPUTS("tiny") is True and "was not found" in loader.VALIDATE_INPUTS("other")
    shutil.copytree(tiny_folder, folder / "copy")
    before = loader.IS_CHANGED("copy")
    assert before == loader.IS_CHANGED("tiny")
    file = folder / "copy" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("3.0", "2.0"))
    assert loader.IS_CHANGED("copy") != before


def test_a_lora_node_leaves_its_input_alone(folder, headless_host, load):
    place = headless_host.model_folders("loras")[0]
    place.mkdir(parents=True)
    (place / "style.safetensors").write_bytes(b"x")
    node = NODES["HotpathZImageLora"]
    assert node.INPUT_TYPES()["required"]["lora"][0] == ["style.safetensors"]
    bare = Pipeline(load())
    (once,) = node().add(bare, "style.safetensors", 0.5)
    (twice,) = node().add(once, "style.safetensors", 1.0)
    assert [len(p.adapters) for p in (bare, once, twice)] == [0, 1, 2] and once.model is bare.model
    before = node.IS_CHANGED("style.safetensors", strength=1.0)
    (place / "style.safetensors").write_bytes(b"trained on")  # over the older one, as trainers do
    assert node.IS_CHANGED("style.safetensors", strength=1.0) != before
    with pytest.raises(host.ModelNotFound):
        node().add(bare, "../style.safetensors", 1.0)


def test_previews_without_comfyui_only_for_somebody_who_looks(load, headless_host):
    from hotpath.nodes.text_to_image import preview_for

    model = load()
    assert preview_for(model) is None and not model.vae.loaded
    headless_host.on_preview = lambda picture: None
    assert isinstance(preview_for(model), previews.LinearPreview)


def test_a_workflow_without_comfyui(folder, headless_host, draw, load):
    graph = Graph.parse(
        {
            "1": {"class_type": "HotpathZImageLoader", "inputs": {"checkpoint": "tiny"}},
            "2": {
                "class_type": "HotpathZImage",
                "inputs": {"pipeline": ["1", 0], **SMALL, "batch_size": 1},
            },
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "fox"}},
        }
    )
    Executor(headless_host).run(graph)
    found = np.asarray(Image.open(headless_host.output_folder() / "fox_00001_.png"))
    wanted = (draw(load(), seed=3).pictures[0] * 255).clamp(0, 255).byte().numpy()
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.fixture
def comfyui(tmp_path, tiny_folder, monkeypatch):
    """ComfyUI as the host, with the tiny checkpoint in its folders and empty memory management."""
    import comfy.model_management as management
    import folder_paths
    from hotpath.host.comfyui import ComfyUIHost

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    (tmp_path / "models" / "diffusers").mkdir(parents=True)
    (tmp_path / "models" / "diffusers" / "tiny").symlink_to(tiny_folder, target_is_directory=True)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path / "models" / "diffusers")], ["folder"])
    )
    monkeypatch.setattr(ComfyUIHost, "cache_folder", lambda self: tmp_path / "cache")
    management.unload_all_models()
    clear_all()
    before = host.use(ComfyUIHost())
    yield management
    forget_models()
    clear_all()
    management.unload_all_models()
    host.use(before)


def loaded(management, component):
    return any(entry.model is component.managed.patcher for entry in management.current_loaded_models)


@pytest.mark.comfy
def test_each_network_is_comfyuis_for_itself(comfyui):
    with torch.inference_mode():
        pipeline, _ = NODES["HotpathZImageLoader"]().load("tiny")
        first, *_ = NODES["HotpathZImage"]().draw(pipeline, **SMALL, batch_size=1)
    assert not first.is_inference()
    model = pipeline.model
    assert all(loaded(comfyui, component) for component in model.components())
    assert not any(p.is_inference() for c in model.components() for p in c.managed.module.parameters())
    comfyui.unload_all_models()
    again, *_ = NODES["HotpathZImage"]().draw(pipeline, **SMALL, batch_size=1)
    assert torch.equal(again, first)
    # The prompt came from the cache, so the encoder stayed away.
    assert not loaded(comfyui, model.text_encoder)
    assert loaded(comfyui, model.transformer) and loaded(comfyui, model.vae)


@pytest.mark.comfy
def test_the_text_encoder_may_leave_while_the_picture_is_drawn(comfyui):
    pipeline, _ = NODES["HotpathZImageLoader"]().load("tiny")
    model = pipeline.model
    wanted, *_ = NODES["HotpathZImage"]().draw(pipeline, **SMALL, batch_size=1)
    seen = []

    def make_room(*_):
        """What ComfyUI does when another model needs the device: everything but the one at work goes."""
        at_work = [entry for entry in comfyui.current_loaded_models if entry.model is model.transformer.managed.patcher]
        comfyui.free_memory(1 << 60, torch.device("cpu"), keep_loaded=at_work)
        seen.append((loaded(comfyui, model.text_encoder), loaded(comfyui, model.transformer)))

    handle = model.transformer.managed.module.network.register_forward_pre_hook(make_room)
    found, *_ = NODES["HotpathZImage"]().draw(pipeline, **SMALL, batch_size=1, prompt_cache="off")
    handle.remove()
    assert seen == [(False, True)] * 2 and torch.equal(found, wanted)


@pytest.mark.comfy
def test_room_for_activations_is_asked_for(comfyui, monkeypatch):
    asked, load = [], comfyui.load_models_gpu

    def watched(models, memory_required=0, **settings):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **settings)

    monkeypatch.setattr(comfyui, "load_models_gpu", watched)
    pipeline, _ = NODES["HotpathZImageLoader"]().load("tiny")
    NODES["HotpathZImage"]().draw(pipeline, **SMALL, batch_size=1)
    assert len(asked) == 3 and min(asked) > 0


@pytest.mark.comfy
def test_comfyuis_interrupt_ends_it(comfyui, monkeypatch):
    pipeline, _ = NODES["HotpathZImageLoader"]().load("tiny")
    model = pipeline.model
    handle = model.transformer.managed.module.network.layers[0].register_forward_hook(
        lambda *_: comfyui.interrupt_current_processing() or None
    )
    with pytest.raises(comfyui.InterruptProcessingException):
        NODES["HotpathZImage"]().draw(pipeline, **SMALL, batch_size=1)
    handle.remove()
    NODES["HotpathZImage"]().draw(pipeline, **SMALL, batch_size=1)


@pytest.mark.comfy
def test_comfyuis_previewer_is_asked(comfyui, monkeypatch):
    from comfy.cli_args import LatentPreviewMethod, args
    from hotpath.nodes.text_to_image import preview_for

    pipeline, _ = NODES["HotpathZImageLoader"]().load("tiny")
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    assert preview_for(pipeline.model) is None
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    assert isinstance(preview_for(pipeline.model), previews.LinearPreview)  # four channels: not Flux's autoencoder
    monkeypatch.setattr(pipeline.model, "latent_channels", 16)
    shown = preview_for(pipeline.model).picture(torch.zeros(1, 16, 6, 8))
    assert shown.size == (8, 6)
