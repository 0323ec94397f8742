"""What is told of a question, and what is asked with extreme settings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hotpath.vision_language import answers, prompts
from hotpath.vision_language.answering import _Run, _tip
from hotpath.vision_language.embeddings import VisualItem
from hotpath.vision_language.prompts import PromptTooLong, Question, build
from hotpath.vision_language.sampling import Sampling
from hotpath.vision_language.timing import Timing


def test_a_budget_is_no_cure_for_words(monkeypatch):
    monkeypatch.setattr(prompts, "render", lambda *_: "")
    monkeypatch.setattr(prompts, "tokenized", lambda *_: torch.zeros(1, 5000, dtype=torch.long))
    model = SimpleNamespace(context_length=4096, folder=SimpleNamespace(name="a model"))
    with pytest.raises(PromptTooLong) as told:
        build(model, Question("words"), [])  # type: ignore[arg-type]
    assert str(told.value).endswith("4,096: shorten the prompt.") and "pictures" not in str(told.value)


@pytest.mark.parametrize("pictures", [0, 1])
def test_fewer_visual_tokens_are_a_tip_for_pictures_alone(pictures):
    run = _Run([], Timing(torch.device("cpu")), [VisualItem("image", (1, 2, 2))] * pictures)
    assert bool(_tip(run, {"prefill": 2.0, "decode": 1.0})) == bool(pictures)


@pytest.mark.parametrize(("temperature", "samples"), [(1e-40, False), (1e-9, False), (0.01, True)])
def test_a_temperature_that_float32_does_not_hold_is_greedy(temperature, samples):
    assert Sampling(True, temperature).resolved(SimpleNamespace()).sample is samples


def test_thoughts_without_an_answer_are_told(load, ask, monkeypatch):
    model, question = load("qwen3"), Question("Hello")
    assert "thoughts alone" not in ask(model, question).report
    monkeypatch.setattr(answers, "split_thoughts", lambda text, opened: (text, ""))
    assert ask(model, question).report.endswith(
        "1 of 1 answers are thoughts alone: raise max_new_tokens, or switch thinking off"
    )
