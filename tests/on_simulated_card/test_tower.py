"""The vision tower as a CUDA graph: the library's features, recorded when a size comes again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.attention.capabilities import on_device
from hotpath.vision_language import tower
from hotpath.vision_language.answering import Answer, AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.embeddings import EmbeddingCache, VisualItem, look_up
from hotpath.vision_language.pictures import Clip, Picture
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from hotpath.vision_language.timing import Timing

OPTIONS = AnswerOptions(max_new_tokens=4, budget=PRESETS["fast"], decode="graph", stream=False)
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def noise(seed: int, height: int = 100, width: int = 140) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(seed: int) -> Clip:
    return Clip(np.random.default_rng(seed).integers(0, 256, (4, 84, 84, 3), dtype=np.uint8), 2.0)


def ask(model: Any, *shown: Picture, **options: Any) -> Answer:
    return answer(model, [Question("What?", "", shown)], Sampling(sample=False), replace(OPTIONS, **options))[0]


def looked(model: Any, shown: Picture | Clip, record: bool) -> VisualItem:
    """`shown` after the tower saw it, with its own cache."""
    pictures, clips = ((shown,), ()) if isinstance(shown, Picture) else ((), (shown,))
    timing, cache = Timing(model.device), EmbeddingCache(enabled=False)
    items = look_up(model, pictures, clips, PRESETS["fast"], cache, timing)
    with model.resident(100), on_device(model.device), torch.no_grad():
        tower.encode(model, items, cache, timing, record=record)
    return items[0]


def recordings(model: Any) -> list[Any]:
    return [made for made in model.device_state["towers"].values() if made is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [noise, clip])
def test_features_are_the_librarys(card: Any, load_llm: Any, kind: str, make: Any) -> None:
    model = load_llm(kind)
    inner = model.network.model
    for seed, replayed in ((1, False), (2, True), (3, True)):
        shown = make(seed)
        found = looked(model, shown, record=True)
        method = inner.get_image_features if isinstance(shown, Picture) else inner.get_video_features
        waiting = look_up(
            model, *(((shown,), ()) if isinstance(shown, Picture) else ((), (shown,))), PRESETS["fast"],
            EmbeddingCache(enabled=False), Timing(model.device),
        )[0]  # fmt: skip
        with model.resident(100), on_device(model.device), torch.no_grad():
            made = method(tower.patches_of(model, waiting), torch.tensor([waiting.grid], device=model.device))
            pooled, deep = tower.split(made, [waiting], int(model.config.vision_config.spatial_merge_size))
        assert found.replayed == replayed and found.features is not None
        torch.testing.assert_close(found.features.pooled.cpu(), pooled[0].cpu(), atol=1e-5, rtol=1e-5)
        assert len(found.features.deep) == len(deep) == (kind == "qwen3_vl") * len(deep)
        for mine, theirs in zip(found.features.deep, deep, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs[0].cpu(), atol=1e-5, rtol=1e-5)
    assert len(recordings(model)) == 1


def test_features_outlive_the_next_picture(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    seen = [looked(model, noise(seed), record=True) for seed in range(4)]
    before = [item.features.pooled.cpu().clone() for item in seen if item.features is not None]
    looked(model, noise(9), record=True)
    assert all(torch.equal(item.features.pooled.cpu(), kept) for item, kept in zip(seen, before, strict=True))
    assert len({tuple(kept[0, :3].tolist()) for kept in before}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_for_no_block(card: Any, load_llm: Any, kind: str) -> None:
    model = load_llm(kind)
    looked(model, noise(1), record=False)  # makes the table of pixel values
    timing, cache = Timing(model.device), EmbeddingCache(enabled=False)
    items = look_up(model, (noise(2),), (), PRESETS["fast"], cache, timing)
    with model.resident(100), on_device(model.device), torch.no_grad():
        card.waits.clear()
        tower.encode(model, items, cache, timing, keep_now=False)
        assert not card.waits


def test_answers_use_it_and_say_so(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    reports = [ask(model, noise(seed)).report for seed in range(3)]
    assert ["1 encoded (1 by a CUDA graph)" in report for report in reports] == [False, True, True]
    assert "1 encoded" in reports[0]
    # Nothing is recorded for a model that leaves.
    model.release()
    for seed in range(10, 13):
        assert "by a CUDA graph" not in ask(model, noise(seed), keep_loaded=False).report


def test_few_sizes_are_kept(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen2_vl")
    sizes = [(64, 64 + 56 * i) for i in range(tower.RECORDINGS + 2)]
    for size in sizes:
        for seed in range(2):
            looked(model, noise(seed, *size), record=True)
    assert len(recordings(model)) == tower.RECORDINGS
    assert looked(model, noise(5, *sizes[-1]), record=True).replayed
    graphs = card.graphs
    assert looked(model, noise(5, *sizes[0]), record=True).replayed  # recorded anew
    assert card.graphs == graphs + 1 and len(recordings(model)) == tower.RECORDINGS


def test_weights_that_moved_without_telling(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    for seed in range(2):
        looked(model, noise(seed), record=True)
    for parameter in model.network.model.visual.parameters():
        parameter.data = parameter.data.clone() * 1.5
    wanted = looked(model, noise(7), record=False)
    assert not looked(model, noise(7), record=True).replayed
    made = looked(model, noise(7), record=True)
    assert made.replayed
    torch.testing.assert_close(made.features.pooled.cpu(), wanted.features.pooled.cpu(), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_recorded_runs_as_it_is(card: Any, load_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_llm("qwen3_vl")
    wanted = ask(model, noise(3), decode="plain", keep_loaded=False).raw
    ask(model, noise(1))
    monkeypatch.setattr(tower, "captured", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no capture\nhere")))
    made = ask(model, noise(3), cache_images=False)
    assert made.raw == wanted and "by a CUDA graph" not in made.report
    assert "vision tower: no CUDA graph, because a recording failed here: no capture" in made.report


def test_large_pictures_are_not_recorded(card: Any, load_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "LARGEST", 10)
    model = load_llm("qwen3_vl")
    for seed in range(3):
        assert not looked(model, noise(seed), record=True).replayed
