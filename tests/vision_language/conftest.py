"""Tiny Qwen models of the true architectures in folders, loaded through the pack's own loading code."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.cache import clear_all
from hotpath.demo.captioner_model import TEXT_KINDS, VISION_KINDS, write_folder
from hotpath.vision_language.answering import Answer, AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.loaded_model import LoadedModel, LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.pictures import Clip, Picture
from hotpath.vision_language.prompts import Question, render
from hotpath.vision_language.sampling import Sampling

NEW_TOKENS = 12
GREEDY = Sampling(sample=False)


@pytest.fixture(scope="session", autouse=True)
def quiet_library() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: write_folder(root / kind, kind) for kind in (*VISION_KINDS, *TEXT_KINDS)}


@pytest.fixture
def llm(headless_host: Any, tiny_folders: dict[str, Path]) -> Iterator[Path]:
    """models/LLM of the test's host, with a link to every tiny model folder; no model or entry survives the test."""
    folder = headless_host.model_folders("LLM")[0]
    folder.mkdir(parents=True)
    for kind, path in tiny_folders.items():
        (folder / kind).symlink_to(path, target_is_directory=True)
    clear_all()
    yield folder
    MODELS.clear()
    clear_all()


@pytest.fixture
def load(llm: Path) -> Callable[..., LoadedModel]:
    return lambda kind, **options: MODELS.get(kind, LoadOptions(**options), must_see=False)


def follow_the_largest_position(inner: Any) -> None:
    """Have the words behind a clip begin after its largest position, where the library (from 5.3 on) lets them begin after its
    height and width: the models were trained by the older rule."""
    given = inner.get_rope_index

    def get_rope_index(input_ids: Any, mm_token_type_ids: Any, *others: Any, **settings: Any) -> Any:
        axes, _ = given(input_ids, mm_token_type_ids, *others, **settings)
        for row, types in enumerate(mm_token_type_ids.tolist()):
            shift = 0
            for place in range(1, len(types)):
                axes[:, row, place] += shift
                if types[place] == 0 and types[place - 1] != 0:
                    behind = int(axes[:, row, :place].max()) + 1 - int(axes[0, row, place])
                    axes[:, row, place] += behind
                    shift += behind
        return axes, axes.amax((0, 2)).unsqueeze(1) + 1 - axes.shape[2]

    inner.get_rope_index = get_rope_index


@pytest.fixture(scope="session")
def library(tiny_folders: dict[str, Path]) -> Callable[[str], Any]:
    """Model and processor as any program would load them, untouched by ours, but for what `follow_the_largest_position` tells."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    loaded: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in loaded:
            path = tiny_folders[kind]
            sees = kind in VISION_KINDS
            auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            reader = AutoProcessor if sees else AutoTokenizer
            model = auto.from_pretrained(path, dtype=torch.float32).eval()
            method = getattr(model.model, "get_rope_index", None)
            if kind in ("qwen2_vl", "qwen2_5_vl") and "mm_token_type_ids" in inspect.signature(method).parameters:
                follow_the_largest_position(model.model)
            loaded[kind] = SimpleNamespace(model=model, processor=reader.from_pretrained(path))
        return loaded[kind]

    return get


def noise_picture(seed: int, width: int, height: int) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


A, B, C = noise_picture(1, 200, 150), noise_picture(2, 120, 240), noise_picture(3, 300, 100)
CLIP = Clip(np.random.default_rng(4).integers(0, 256, (5, 112, 84, 3), dtype=np.uint8), 0.2)
QUESTIONS = {
    "one picture": Question("Describe.", "Be brief.", (A,)),
    "three pictures": Question("Compare.", "", (A, B, C)),
    "other order": Question("Compare.", "", (C, A)),
    "the same twice": Question("Same?", "", (A, A)),
    "clip": Question("What happens?", "", (), (CLIP,)),
    "picture and clip": Question("Which?", "", (B,), (CLIP,)),
    "text only": Question("Hello", "Be brief."),
}


@pytest.fixture
def questions() -> Iterator[tuple[str, Question]]:
    """One of every kind with its name, each before empty caches: a model is loaded once for all of them."""

    def one_by_one() -> Iterator[tuple[str, Question]]:
        for name, question in QUESTIONS.items():
            clear_all()
            yield name, question

    return one_by_one()


def library_inputs(processor: Any, model: LoadedModel, question: Question, budget: Any) -> dict[str, Any]:
    """What the library's own processor makes of a question, with the same budget."""
    from hotpath.vision_language.embeddings import clip_size
    from PIL import Image
    from torchvision.transforms.v2 import functional as vision

    text = render(model, question)
    if model.processor is None:
        found = processor(text, return_tensors="pt", add_special_tokens=False)
        return {name: found[name] for name in ("input_ids", "attention_mask")}
    settings: dict[str, Any] = {}
    if question.pictures:
        shortest, longest = budget.edges(model.image_sizes)
        settings["images"] = [Image.fromarray(picture.pixels) for picture in question.pictures]
        settings["images_kwargs"] = {"size": {"shortest_edge": shortest, "longest_edge": longest}}
    if question.clips:
        if model.model_type == "qwen3_vl":
            # Some versions put their dated frames between the marks of the template, others in their place.
            text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
        settings["videos"] = [
            vision.resize(
                torch.from_numpy(clip.frames).permute(0, 3, 1, 2),
                list(clip_size(model, clip, budget)),
                vision.InterpolationMode.BICUBIC,
                antialias=True,
            )
            for clip in question.clips
        ]
        shown = [
            {"total_num_frames": len(c.frames), "fps": c.fps, "frames_indices": list(range(len(c.frames))),
             "duration": len(c.frames) / c.fps}
            for c in question.clips
        ]  # fmt: skip
        settings["videos_kwargs"] = {"do_resize": False, "do_sample_frames": False, "video_metadata": shown}
    found = dict(processor(text=[text], return_tensors="pt", **settings))
    found.pop("video_metadata", None)
    if question.clips and model.model_type == "qwen2_5_vl":
        found["second_per_grid_ts"] = torch.tensor([2 / clip.fps for clip in question.clips])
    return found


@pytest.fixture
def reference(library: Callable[[str], Any]) -> Callable[..., str]:
    """The text of plain transformers.generate, greedy unless told otherwise."""

    def write(model: LoadedModel, question: Question, new_tokens: int = NEW_TOKENS, **settings: Any) -> str:
        plain = library(model.folder.path.name)
        inputs = library_inputs(plain.processor, model, question, PRESETS["fast"])
        made = plain.model.generate(**inputs, max_new_tokens=new_tokens, **({"do_sample": False} | settings))
        tokenizer = getattr(plain.processor, "tokenizer", plain.processor)
        return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return write


@pytest.fixture
def ask() -> Callable[..., Answer]:
    """Our answer to one question, in few tokens."""

    def write(model: LoadedModel, question: Question, sampling: Sampling = GREEDY, **options: Any) -> Answer:
        settings = {"max_new_tokens": NEW_TOKENS, "budget": PRESETS["fast"]} | options
        return answer(model, [question], sampling, AnswerOptions(**settings))[0]

    return write


@pytest.fixture
def pictures() -> SimpleNamespace:
    return SimpleNamespace(a=A, b=B, c=C, clip=CLIP, noise=noise_picture)


class Counter:
    """Calls of the image processor, the video processor and the vision tower of a loaded model."""

    def __init__(self, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = {"image": 0, "video": 0, "tower": 0}
        model.network.model.visual.register_forward_hook(lambda *_: self._count("tower"))
        for name in ("image", "video"):
            worker = getattr(model.processor, f"{name}_processor")
            original = worker._preprocess

            def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                self._count(_name)
                return _original(*args, **kwargs)

            monkeypatch.setattr(worker, "_preprocess", counted)

    def _count(self, name: str) -> None:
        self.calls[name] += 1

    def take(self) -> tuple[int, int, int]:
        found = (self.calls["image"], self.calls["video"], self.calls["tower"])
        self.calls = dict.fromkeys(self.calls, 0)
        return found


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Callable[[LoadedModel], Counter]:
    return lambda model: Counter(model, monkeypatch)
