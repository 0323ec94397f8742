"""A tiny Z-Image checkpoint of the true architecture, written once, and diffusers' own pipeline on it as the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath.cache import clear_all
from hotpath.demo.z_image_model import write_checkpoint
from hotpath.text_to_image.generation import Drawn, Pipeline, Request, generate
from hotpath.text_to_image.jobs import forget_models
from hotpath.text_to_image.loading import MODELS, LoadOptions, ZImage

SMALL = {"width": 64, "height": 48, "steps": 2}


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> None:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="(transformers|diffusers)")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def library(tiny_folder: Path) -> Callable[..., Any]:
    """(pipeline class name, arguments) -> (pictures [B, H, W, 3], latents) as diffusers draws them."""
    import diffusers

    loaded = diffusers.ZImagePipeline.from_pretrained(tiny_folder)

    def draw(name: str = "ZImagePipeline", seeds: tuple[int, ...] = (0,), **arguments: Any) -> torch.Tensor:
        pipeline = getattr(diffusers, name)(**loaded.components)
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return torch.from_numpy(pipeline(generator=generators, output_type="np", **arguments).images)

    return draw


@pytest.fixture
def folder(headless_host: Any, tiny_folder: Path) -> Iterator[Path]:
    """models/diffusers of the test's host with the tiny checkpoint in it; nothing loaded or cached survives the test."""
    found = headless_host.model_folders("diffusers")[0]
    found.mkdir(parents=True)
    (found / "tiny").symlink_to(tiny_folder, target_is_directory=True)
    clear_all()
    yield found
    forget_models()
    clear_all()


@pytest.fixture
def load(folder: Path) -> Callable[..., ZImage]:
    return lambda name="tiny", **options: MODELS.get(name, LoadOptions(**options))


@pytest.fixture
def draw() -> Callable[..., Drawn]:
    """(model or pipeline, request fields) -> what is drawn, small unless told otherwise."""

    def drawn(model: ZImage | Pipeline, prompt: str = "a red fox", preview: Any = None, **fields: Any) -> Drawn:
        pipeline = model if isinstance(model, Pipeline) else Pipeline(model)
        return generate(pipeline, Request(prompt, **{**SMALL, **fields}), preview)

    return drawn


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that regional compilation makes, run as they are traced: counting needs no machine code."""
    import torch._dynamo
    from hotpath.text_to_image import compilation

    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    planned = compilation.plan

    def plan(*asked: Any) -> compilation.CompilationPlan:
        return replace(planned(*asked), backend=backend)

    monkeypatch.setattr(compilation, "plan", plan)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()
