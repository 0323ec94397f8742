"""A question's prefill as a CUDA graph: the numbers of the library's, recorded once for each class of lengths."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.cache import clear_all, named_cache
from hotpath.host import Interrupted
from hotpath.vision_language import decoding, patches, prefill_layers, replayed_prefill
from hotpath.vision_language.answering import Answer, AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.pictures import Clip, Picture
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling

GREEDY = Sampling(sample=False)
OPTIONS = AnswerOptions(max_new_tokens=8, budget=PRESETS["fast"], decode="graph", stream=False)


def noise(seed: int, height: int = 100, width: int = 140) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


A, B = noise(1), noise(2, 160, 90)
CLIP = Clip(np.random.default_rng(4).integers(0, 256, (4, 84, 84, 3), dtype=np.uint8), 2.0)


def ask(model: Any, question: Question, **options: Any) -> Answer:
    return answer(model, [question], GREEDY, replace(OPTIONS, **options))[0]


def recordings(model: Any) -> list[Any]:
    return [made for space in model.device_state["workspaces"].values() for made in space.prefills.values()]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("qwen3", marks=pytest.mark.long),
        pytest.param("qwen2_vl", marks=pytest.mark.long),
        pytest.param("qwen2_5_vl", marks=pytest.mark.long),
        "qwen3_vl",
    ],
)
def test_answers_are_the_plain_paths(card: Any, load_llm: Any, kind: str) -> None:
    model = load_llm(kind)
    media: dict[str, Any] = {} if kind == "qwen3" else {"pictures": (A, B), "clips": (CLIP,)}
    first, second = Question("What?", "Be brief.", **media), Question("And which colours are in them?", **media)
    for question in (first, replace(first, prompt="And which colours are in them, please?"), second, first):
        wanted = ask(model, question, decode="plain", reuse_prefix=False)
        made = ask(model, question)
        assert made.raw == wanted.raw
        assert "prefill: one CUDA graph of" in made.report and "prefill" not in wanted.report.split("time:")[0]
    assert ("reused" in made.report) == (kind != "qwen3")
    assert all(made.graph is not None for made in recordings(model))


@pytest.mark.parametrize("room", [20, pytest.param(1500, marks=pytest.mark.long)])
def test_logits_are_the_librarys(card: Any, load_llm: Any, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Whatever room the cache has for the answer: attention does not read it."""
    from hotpath.attention.capabilities import on_device
    from hotpath.vision_language.decode_path import choose_path
    from hotpath.vision_language.embeddings import EmbeddingCache, look_up
    from hotpath.vision_language.generation import prepared
    from hotpath.vision_language.prefill import prefill
    from hotpath.vision_language.prompts import build
    from hotpath.vision_language.timing import Timing
    from hotpath.vision_language.tower import encode

    model = load_llm("qwen3_vl")
    monkeypatch.setattr(decoding, "BUCKETS", (128, 256, 2048))
    masks: list[Any] = []
    attend = prefill_layers.attend
    monkeypatch.setattr(prefill_layers, "attend", lambda *given: (masks.append(given[3]), attend(*given))[1])
    timing, cache = Timing(model.device), EmbeddingCache()
    prompts = []
    for text in ("What?", "And which colours are in it?", "word " * 20):
        question = Question(text, "", (A,))
        prompts.append(build(model, question, look_up(model, question.pictures, (), PRESETS["fast"], cache, timing)))
    with model.resident(500), on_device(model.device), torch.no_grad():
        for index, prompt in enumerate(prompts):
            encode(model, prompt.items, cache, timing)
            space, _ = prepared(model, choose_path(model, "graph"), 1, prompt.length + room)
            masks.clear()
            for _ in range(2):  # as it is, and replayed
                logits, reused, _ = replayed_prefill.replay(model, space, prompt, True)
                wanted = prefill(model, [prompt], use_prefix=False)
                torch.testing.assert_close(logits.cpu(), wanted.logits.cpu(), atol=2e-4, rtol=1e-4)
                for kept, theirs in zip(
                    (*space.keys, *space.values), (*wanted.layers()[0], *wanted.layers()[1]), strict=True
                ):
                    torch.testing.assert_close(kept[:, :, : prompt.length].cpu(), theirs.cpu(), atol=2e-4, rtol=1e-4)
                assert space.slot.tolist() == [prompt.length]
                assert space.positions.tolist() == wanted.positions.tolist()
                assert torch.isfinite(space.bias.cpu()).sum() == prompt.length
            assert reused == prompts[0].prefix
            if index:
                # One mask for all layers of a run, which is once as it is and once recorded.
                assert len({id(mask) for mask in masks}) == 2
                assert {mask.shape[1] for mask in masks} == {decoding.bucket_length(prompt.length)}
        assert [decoding.bucket_length(prompt.length) for prompt in prompts] == [128, 128, 256]


def test_a_class_is_recorded_once(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    questions = [Question(text, "", (A,)) for text in ("a", "b?", "something else")]
    for question in questions:
        ask(model, question)
    graphs = {id(made.graph) for made in recordings(model)}
    assert len(graphs) == 2  # a picture with its question, and a question about a known picture
    waits = []
    for question in (*questions, Question("another", "", (noise(8),))):
        card.waits.clear()
        ask(model, question)
        waits.append(len(card.waits))
    assert {id(made.graph) for made in recordings(model)} == graphs
    assert len(set(waits[:-1])) == 1


def test_few_kernels_are_started_for_a_known_picture(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    for text in ("a", "b?"):
        ask(model, Question(text, "", (A,)), max_new_tokens=1)
    card.launches.clear()
    card.replays = 0
    ask(model, Question("c.", "", (A,)), max_new_tokens=1)
    assert card.replays == 1 and sum(card.launches.values()) < 12, card.launches


def test_recordings_go_when_the_weights_leave_and_are_made_again(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    question = Question("What?", "", (A,))
    wanted = ask(model, question).raw
    model.release()
    assert not model.device_state
    assert ask(model, question).raw == wanted
    # Moved without telling: nothing that points at the old places is used.
    for parameter in model.network.model.language_model.parameters():
        parameter.data = parameter.data.clone()
    assert ask(model, question).raw == wanted
    assert ask(model, question, keep_loaded=False).raw == wanted


@contextmanager
def no_search_for_circles() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_buffers_and_graphs_go_at_once(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    with no_search_for_circles():
        ask(model, Question("What?", "", (A,)))
        (space,) = model.device_state["workspaces"].values()
        (made,) = space.prefills.values()
        held = [weakref.ref(it) for it in (space, space.kept, made, made.graph, made.given, made.features)]
        del space, made
        model.drop_device_state()
        assert [it() for it in held] == [None] * len(held)


@pytest.mark.long
def test_recordings_are_bounded(card: Any, load_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed_prefill, "RECORDINGS", 2)
    model = load_llm("qwen3")
    texts = ["a", "word " * 30, "word " * 60]
    wanted = [ask(model, Question(text), decode="plain").raw for text in texts]
    for _ in range(2):
        assert [ask(model, Question(text)).raw for text in texts] == wanted
    assert len(recordings(model)) == 2


class TritonError(Exception):
    """As Triton's: no RuntimeError."""


@pytest.mark.parametrize("kind", [pytest.param(RuntimeError, marks=pytest.mark.long), TritonError])
def test_what_is_too_long_or_cannot_be_recorded_is_the_librarys(
    card: Any, load_llm: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    model = load_llm("qwen3_vl")
    question = Question("What?", "", (A,))
    wanted = ask(model, question).raw
    monkeypatch.setattr(replayed_prefill, "LONGEST", 8)
    made = ask(model, question)
    assert made.raw == wanted and "prefill: the library's, because it has more than 8 tokens" in made.report
    monkeypatch.undo()

    def broken(self: Any, *_: Any) -> None:
        raise kind("the driver refuses\nat length")

    model.drop_device_state()
    monkeypatch.setattr(replayed_prefill.PrefillRecording, "_record", broken)
    for _ in range(2):
        made = ask(model, question)
        assert made.raw == wanted
        assert "prefill: the library's, because a recording failed here: the driver refuses" in made.report


def test_batches_and_several_answers_are_the_librarys(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    question = Question("What?", "", (A,))
    made = answer(model, [question, Question("Else?")], GREEDY, OPTIONS)
    assert [part.raw for part in made] == [ask(model, question).raw, ask(model, Question("Else?")).raw]
    several = answer(model, [question], Sampling(temperature=1.0, seed=2), replace(OPTIONS, answers=2))
    assert several[0].raw == answer(model, [question], Sampling(temperature=1.0, seed=2), OPTIONS)[0].raw


class InterruptProcessingException(Exception):
    """As older versions of ComfyUI have it."""


@pytest.mark.parametrize("kind", [Interrupted, InterruptProcessingException])
def test_a_stop_before_the_prefill_leaves_nothing(
    card: Any, load_llm: Any, headless_host: Any, kind: type[BaseException]
) -> None:
    model = load_llm("qwen3_vl")
    question = Question("What?", "", (A,))
    wanted = ask(model, question).raw

    def stop() -> None:
        raise kind("stop")

    headless_host.check_interrupt = stop
    with pytest.raises(kind):
        ask(model, replace(question, prompt="And?"))
    del headless_host.check_interrupt
    assert ask(model, question).raw == wanted


def test_classes() -> None:
    for after_prefix, sizes in ((True, (1, 16, 17, 500)), (False, (1, 64, 65, 1045, 2048))):
        for tokens in sizes:
            made = replayed_prefill.length_class(tokens, after_prefix)
            assert tokens <= made <= replayed_prefill.LONGEST
    assert replayed_prefill.length_class(33, True) == 64
    assert replayed_prefill.length_class(1045, False) == 1152
    assert replayed_prefill.length_class(2048, False) == 2048


def test_the_tower_sees_what_the_library_makes(card: Any, load_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_llm("qwen3_vl")
    question = Question("Compare.", "", (A, noise(5, 300, 200), B), (CLIP,))
    made = ask(model, question)
    clear_all()
    model.drop_device_state()
    jointly = ask(model, question, encode_jointly=True)
    clear_all()
    model.drop_device_state()
    monkeypatch.setattr(patches, "serves", lambda *_: False)
    assert made.raw == jointly.raw == ask(model, question).raw
    kept = [entry.features for entry in made.items]
    assert all(part.pooled.device.type == "cuda" for part in kept if part is not None)


def test_a_known_picture_is_sent_once(card: Any, load_llm: Any) -> None:
    model = load_llm("qwen3_vl")
    question = Question("What?", "", (A,))
    wanted = ask(model, question, reuse_prefix=False).raw
    assert ask(model, question, reuse_prefix=False).raw == wanted
    assert len(model.device_state["features"]) == 1
    made = ask(model, question, reuse_prefix=False)
    assert made.raw == wanted and "(memory)" in made.report
    assert len(model.device_state["features"]) == len(named_cache("image embeddings", 1 << 30)) == 1
    ask(model, question, reuse_prefix=False, cache_images=False)
    assert len(model.device_state["features"]) == 1


def test_a_stop_after_the_tower_keeps_what_it_saw(card: Any, load_llm: Any, headless_host: Any) -> None:
    model = load_llm("qwen3_vl")
    question = Question("What?", "", (A,))
    wanted = ask(model, question).raw
    clear_all()
    model.drop_device_state()
    check, asked = headless_host.check_interrupt, []

    def stop() -> None:
        asked.append(1)
        if len(model.device_state.get("workspaces", ())):
            raise Interrupted("stop")
        check()

    headless_host.check_interrupt = stop
    with pytest.raises(Interrupted):
        ask(model, question)
    del headless_host.check_interrupt
    made = ask(model, question)
    assert asked and made.raw == wanted and "1 from the cache (memory)" in made.report


def test_kernels_are_tried_as_they_will_run(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with norms of their own and heads without have kernels of their own."""
    from hotpath.vision_language import fused_decode, prefill_kernels

    place_rows = prefill_kernels.place_rows

    def wrong_without_norms(*given: Any) -> Any:
        return place_rows(*given) * (2 if given[3] is None else 1)

    monkeypatch.setattr(fused_decode, "allow_interpreter", True)
    monkeypatch.setattr(prefill_kernels, "place_rows", wrong_without_norms)
    prefill_layers.kernels_missing.cache_clear()
    device = torch.device("cuda", 0)
    assert prefill_layers.kernels_missing(device, torch.float32, 16, True) == ""
    assert "off by" in prefill_layers.kernels_missing(device, torch.float32, 16, False)
    prefill_layers.kernels_missing.cache_clear()


@pytest.mark.long
def test_kernels_between_the_products_change_nothing(card: Any, load_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.vision_language import decode_attention, fused_decode

    model = load_llm("qwen3_vl")
    del model.network.model.language_model.layers[1:]  # every row of every head takes the interpreter some milliseconds
    question = Question("?", "", (noise(3, 32, 32),))
    wanted = ask(model, question, max_new_tokens=2, reuse_prefix=False).raw
    model.drop_device_state()
    monkeypatch.setattr(fused_decode, "allow_interpreter", True)
    monkeypatch.setattr(replayed_prefill, "STEP", 8)
    for module in (fused_decode, decode_attention):
        monkeypatch.setattr(module, "why_not", lambda *_: "it is tested elsewhere")
    prefill_layers.kernels_missing.cache_clear()
    assert ask(model, question, max_new_tokens=2, reuse_prefix=False).raw == wanted
    assert [made.kernels for made in recordings(model)] == [True]
    assert {"triton::_norm_rows", "triton::_place_rows", "triton::_gate_rows"} <= set(card.launches)
    prefill_layers.kernels_missing.cache_clear()
