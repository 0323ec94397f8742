"""The caches of what the model saw: no work on a hit, the same text, nothing mistaken for something else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hotpath.cache import all_caches, clear_all
from hotpath.vision_language import embeddings
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.embeddings import EmbeddingCache, look_up
from hotpath.vision_language.loaded_model import LoadedModel, LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.pictures import Clip, Picture
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from hotpath.vision_language.timing import Timing

GREEDY = Sampling(sample=False)
VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NOTHING = (0, 0, 0)


@pytest.mark.parametrize("way", ["the version's own", "replaced methods"])
@pytest.mark.parametrize("kind", VISION)
def test_a_hit_looks_at_nothing(load, ask, counter, questions, kind, way, monkeypatch):
    if way == "replaced methods":
        monkeypatch.setattr(LoadedModel, "takes_encoder_outputs", False)
    model = load(kind)
    calls = counter(model)
    for name, question in questions:
        first = ask(model, question, reuse_prefix=False)
        media = len({id(m) for m in question.pictures}), len(question.clips)
        assert calls.take() == (media[0], media[1], media[0] + media[1]), name
        again = ask(model, question, reuse_prefix=False)
        assert calls.take() == NOTHING, name
        assert again.raw == first.raw, name


@pytest.mark.parametrize("kind", VISION)
def test_any_order_and_company_hits(load, ask, reference, counter, pictures, kind):
    model = load(kind)
    ask(model, Question("One.", "", (pictures.a, pictures.b, pictures.c)))
    calls = counter(model)
    for question in (
        Question("Two?", "Other system.", (pictures.c, pictures.a)),
        Question("Three?", "", (pictures.b, pictures.b)),
    ):
        assert ask(model, question).raw == reference(model, question)
    batch = [Question("x", "", (pictures.b,)), Question("Longer.", "", (pictures.c, pictures.a))]
    singles = [reference(model, question) for question in batch]
    made = answer(model, batch, GREEDY, AnswerOptions(12, PRESETS["fast"]))
    assert [part.raw for part in made] == singles
    beams = ask(model, batch[1], Sampling(beams=3)).raw
    assert beams == reference(model, batch[1], num_beams=3)
    assert calls.take()[:2] == (0, 0)
    assert calls.take() == NOTHING


def test_a_restart_finds_the_pictures_on_disk(load, ask, counter, pictures):
    question = Question("Describe.", "", (pictures.a,), (pictures.clip,))
    first = ask(load("qwen3_vl"), question, cache_on_disk=True).raw
    MODELS.clear()
    clear_all()
    model = load("qwen3_vl")
    calls = counter(model)
    made = ask(model, question, cache_on_disk=True)
    assert calls.take() == NOTHING
    assert made.raw == first
    assert "2 from the cache (disk)" in made.report


def test_a_damaged_file_is_dropped_and_made_again(load, ask, counter, headless_host, pictures):
    question = Question("Describe.", "", (pictures.a,))
    first = ask(load("qwen3_vl"), question, cache_on_disk=True).raw
    (file,) = (headless_host.cache_folder() / "image_embeddings").glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"{}"):
        file.write_bytes(damaged)
        MODELS.clear()
        clear_all()
        model = load("qwen3_vl")
        calls = counter(model)
        assert ask(model, question, cache_on_disk=True).raw == first
        assert calls.take() == (1, 0, 1)
        assert len(file.read_bytes()) == len(whole)
        MODELS.clear()
        clear_all()
        assert "1 from the cache (disk)" in ask(load("qwen3_vl"), question, cache_on_disk=True).report


def test_a_cache_that_refuses_costs_no_answer(load, ask, pictures, monkeypatch, caplog):
    question = Question("Describe.", "", (pictures.a,))
    model = load("qwen3_vl")
    first = ask(model, question, cache_images=False).raw

    def full(*_):
        raise MemoryError("no room to keep it")

    monkeypatch.setattr(EmbeddingCache, "put", full)
    assert ask(model, question).raw == first
    assert "is not kept, because of MemoryError: no room to keep it" in caplog.text


def test_switched_off_is_bypassed(load, ask, counter, headless_host, pictures):
    question = Question("Describe.", "", (pictures.a,))
    model = load("qwen3_vl")
    calls = counter(model)
    first = ask(model, question, cache_images=False, cache_on_disk=True)
    again = ask(model, question, cache_images=False, cache_on_disk=True)
    assert calls.take() == (2, 0, 2)
    assert first.raw == again.raw
    assert sum(len(cache) for cache in all_caches()) == 0
    assert "prefix" not in model.device_state
    assert not (headless_host.cache_folder() / "image_embeddings").exists()


def test_the_cache_survives_an_unload(load, ask, counter, pictures):
    question = Question("Describe.", "", (pictures.a,))
    first = ask(load("qwen3_vl"), question, keep_loaded=False).raw
    assert not MODELS._kept
    model = load("qwen3_vl")
    calls = counter(model)
    assert ask(model, question).raw == first
    assert calls.take() == NOTHING


def test_the_key_holds_what_the_features_depend_on(llm, load, pictures, monkeypatch):
    timing = Timing(torch.device("cpu"))

    def key(model, media, budget=PRESETS["fast"]):
        pictures, clips = ([], [media]) if isinstance(media, Clip) else ([media], [])
        return look_up(model, pictures, clips, budget, EmbeddingCache(False), timing)[0].key

    model = load("qwen3_vl")
    base = key(model, pictures.a)
    assert key(model, Picture(pictures.a.pixels.copy())) == base
    changed = pictures.a.pixels.copy()
    changed[0, 0, 0] ^= 1
    assert key(model, Picture(changed)) != base
    turned = Picture(np.ascontiguousarray(pictures.a.pixels.reshape(200, 150, 3)))
    assert key(model, turned) != base
    assert key(model, pictures.a, PRESETS["high"]) != base
    assert key(load("qwen3_vl", dtype="bfloat16"), pictures.a) != base
    assert key(load("qwen3_vl", attention="eager"), pictures.a) != base
    assert key(load("qwen2_5_vl"), pictures.a) != base
    film = key(model, pictures.clip)
    assert key(model, replace(pictures.clip, fps=5.0)) == film
    assert key(model, Clip(pictures.clip.frames[::-1].copy(), 2.0)) != film
    assert key(model, Clip(pictures.clip.frames[:4], 2.0)) != film
    monkeypatch.setattr("transformers.__version__", "99.0")
    assert key(model, pictures.a) != base


def test_a_renamed_folder_is_the_same_model_and_other_weights_are_not(llm, load, tmp_path):
    import shutil

    from hotpath.demo.captioner_model import write_folder

    one = load("qwen3_vl").identity
    shutil.copytree(llm / "qwen3_vl", llm / "renamed")
    write_folder(llm / "tuned", "qwen3_vl", seed=1)
    assert load("renamed").identity == one
    assert load("tuned").identity != one


def test_the_frame_rate_changes_the_text_without_looking_again(load, ask, reference, counter, pictures):
    for kind in ("qwen2_5_vl", "qwen3_vl"):
        model = load(kind)
        slow = Question("What?", "", (), (pictures.clip,))
        fast = Question("What?", "", (), (replace(pictures.clip, fps=0.4),))
        assert ask(model, slow).raw == reference(model, slow)
        calls = counter(model)
        made = ask(model, fast)
        assert calls.take() == NOTHING
        assert made.raw == reference(model, fast)


def test_memory_is_bounded_by_bytes(load, pictures, monkeypatch):
    model = load("qwen3_vl")
    cache = EmbeddingCache()
    one = embeddings.VisualFeatures(torch.zeros(100, 64), (torch.zeros(100, 64),), (1, 20, 20))
    before = cache.memory.limit
    try:
        cache.memory.resize(3 * 2 * 100 * 64 * 4 + 1000)
        for index in range(10):
            cache.put(f"k{index}", "", one)
        assert len(cache.memory) == 3
        # 4 bytes x (1 + levels) x width for every token, and next to nothing else.
        assert cache.memory.statistics().nbytes == pytest.approx(3 * 2 * 100 * 64 * 4, rel=0.02)
        assert cache.get("k9", "")[1] == "memory" and cache.get("k0", "")[0] is None
    finally:
        cache.memory.resize(before)
    assert model is not None


def test_a_feature_of_another_grid_is_not_taken_for_granted(load, ask, headless_host, pictures):
    """The grid comes from the entry, so a picture and its turned twin of as many tokens never share one."""
    model = load("qwen3_vl")
    wide, tall = pictures.noise(5, 192, 96), pictures.noise(5, 96, 192)
    ask(model, Question("x", "", (wide, tall)), cache_on_disk=True)
    files = (headless_host.cache_folder() / "image_embeddings").glob("*.safetensors")
    from safetensors import safe_open

    grids = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            grids.add(json.loads(opened.metadata()["facts"])["grid"])
    assert grids == {"[1, 6, 12]", "[1, 12, 6]"}


class TestPrefix:
    """The keys and values of the pictures, kept for the next question about them."""

    @pytest.mark.parametrize("path", ["plain", "static"])
    @pytest.mark.parametrize("kind", VISION)
    def test_another_question_reads_only_its_own_words(self, load, ask, reference, pictures, kind, path):
        model = load(kind)
        first = Question("What?", "Be brief.", (pictures.a, pictures.b))
        ask(model, first, decode=path)
        seen = []
        model.network.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        second = Question("And which colours does it have?", "Be brief.", (pictures.a, pictures.b))
        made = ask(model, second, decode=path)
        assert made.raw == reference(model, second)
        assert "of them reused" in made.report
        words = model.tokenizer("And which colours does it have?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        assert seen[0] == len(words)

    def test_other_pictures_or_another_system_message_do_not_share_it(self, load, ask, reference, pictures):
        model = load("qwen3_vl")
        ask(model, Question("What?", "Be brief.", (pictures.a,)))
        for other in (
            Question("What?", "Be long.", (pictures.a,)),
            Question("What?", "Be brief.", (pictures.noise(9, 200, 150),)),
        ):
            made = ask(model, other)
            assert "reused" not in made.report
            assert made.raw == reference(model, other)

    def test_it_can_be_switched_off(self, load, ask, pictures):
        model = load("qwen3_vl")
        for _ in range(2):
            assert "reused" not in ask(model, Question("What?", "", (pictures.a,)), reuse_prefix=False).report

    def test_several_answers_start_from_it(self, load, pictures):
        model = load("qwen3_vl")
        question = Question("What?", "", (pictures.a,))
        options = AnswerOptions(8, PRESETS["fast"], answers=2)
        sampling = Sampling(temperature=1.0, seed=1)
        first = [made.raw for made in answer(model, [question], sampling, options)]
        again = answer(model, [question], sampling, options)
        assert [made.raw for made in again] == first
        assert "reused" in again[0].report

    def test_it_goes_when_the_weights_leave(self, load, ask, pictures):
        model = load("qwen3_vl")
        ask(model, Question("What?", "", (pictures.a,)))
        assert len(model.device_state["prefix"]) == 1
        model.release()
        assert not model.device_state

    def test_moving_the_weights_elsewhere_drops_it(self, load, ask, pictures):
        model = load("qwen3_vl")
        ask(model, Question("What?", "", (pictures.a,)))
        MODELS.clear()
        ask(model, Question("What?", "", (pictures.a,)))
        MODELS._models.clear()
        MODELS.let_go()
        model.holder.to("cpu")
        assert model.device_state
        model.holder.to("meta")
        assert not model.device_state


def test_unknown_options_are_not_silently_taken(load):
    with pytest.raises(ValueError, match="no attention"):
        MODELS.get("qwen3", LoadOptions(attention="magic"), False)
    with pytest.raises(ValueError, match="no dtype"):
        MODELS.get("qwen3", LoadOptions(dtype="float7"), False)
    with pytest.raises(ValueError, match="no quantization"):
        MODELS.get("qwen3", LoadOptions(quantization="3bit"), False)


def test_answers_hold_nothing_of_the_device(load, pictures, monkeypatch):
    """Three hundred pictures, one answer each, were gigabytes of features that nobody reads."""
    from hotpath.vision_language import asking

    made = asking.ask(
        load("qwen3_vl"),
        asking.Request("x", pictures=(pictures.a, pictures.b), one_each=True),
        GREEDY,
        AnswerOptions(1, PRESETS["fast"], cache_images=False),
    ).answers
    assert [(item.features, item.patches, item.pixels) for part in made for item in part.items] == [(None,) * 3] * 2
    assert all(part.items[0].grid[1] for part in made)
