"""The decode step by our own kernels, interpreted: text and logits are the plain path's, in seven launches a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hotpath.vision_language import decode_attention, fused_decode
from hotpath.vision_language.answering import Answer, AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.decoding import text_decoder
from hotpath.vision_language.pictures import Picture
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling

GREEDY = Sampling(sample=False)


PICTURE = Picture(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def ask(model: Any, decode: str, tokens: int = 4, prompt: str = "What?", **options: Any) -> Answer:
    question = Question(prompt, "", (PICTURE,) if model.processor is not None else ())
    settings = AnswerOptions(tokens, PRESETS["fast"], decode=decode, stream=False, **options)
    return answer(model, [question], GREEDY, settings)[0]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_vl"])
def test_text_is_the_plain_paths(card: Any, load_fused: Any, kind: str) -> None:
    model = load_fused(kind)
    wanted = ask(model, "plain")
    made = ask(model, "auto")
    assert made.raw == wanted.raw and len(set(made.raw)) > 1
    assert "static cache, our kernels, one CUDA graph; products by our kernels" in made.report
    graphs = card.graphs
    assert ask(model, "graph").raw == wanted.raw and card.graphs == graphs  # the same buffers serve
    assert not card.compiled


def test_logits_and_cache_are_the_plain_steps(card: Any, load_fused: Any) -> None:
    from hotpath.vision_language.decoding import DecodeStep, Workspace

    model = load_fused("qwen3_vl")
    with model.resident(100), torch.no_grad():
        steps = [DecodeStep(model.network), fused_decode.FusedStep(model.network, "torch")]
        spaces = [Workspace(step, 1, 512, model.device, model.dtype) for step in steps]
        for token in (5, 77, 3):
            found = []
            for space in spaces:
                card.launches.clear()
                found.append(space.run(torch.tensor([token], device=model.device)).cpu())
            torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(spaces[1].kept.cpu(), spaces[0].kept.cpu(), atol=1e-4, rtol=1e-4)
        layers = len(steps[1].layers)
        launches = {name: count for name, count in card.launches.items() if name.startswith("triton")}
        assert launches == {"triton::_product": 4 * layers + 1, "triton::_place_rows": layers}


def test_a_batch_is_decoded_otherwise(card: Any, load_fused: Any) -> None:
    model = load_fused("qwen3")
    assert "our kernels" not in ask(model, "graph", answers=2).report


class OutOfResources(Exception):
    """As Triton's: no RuntimeError."""


@pytest.mark.parametrize("how", ["wrong", "slow", "broken", "places wrongly", "cannot place", "fails later"])
def test_kernels_that_do_not_serve_give_way(
    card: Any, load_fused: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from hotpath.vision_language import fused_decode_kernel as kernel
    from hotpath.vision_language import prefill_kernels

    model = load_fused("qwen3")
    wanted = ask(model, "plain").raw

    def broken(*_: Any, **__: Any) -> None:
        raise OutOfResources("no such instruction")

    def displaced(*given: Any) -> Any:
        place_rows(*given)
        return given[0].new_zeros(1)

    place_rows = prefill_kernels.place_rows

    if how == "wrong":
        monkeypatch.setattr(kernel, "product", lambda x, weight, result, *_, **__: result.zero_())
    elif how == "slow":
        monkeypatch.setattr(fused_decode, "AT_LEAST", 1e9)
    elif how == "broken":
        monkeypatch.setattr(kernel, "product", broken)
    elif how == "fails later":
        monkeypatch.setattr(fused_decode.FusedStep, "forward", broken)
    else:
        monkeypatch.setattr(prefill_kernels, "place_rows", broken if how == "cannot place" else displaced)
    reasons = {"wrong": "is off by", "slow": "torch's", "places wrongly": "around the products do not serve"}
    made = ask(model, "auto")
    assert made.raw == wanted and "compiled layers" in made.report
    assert "not fused, because it failed here" in made.report
    assert reasons.get(how, "no such instruction") in made.report
    assert ask(model, "auto").raw == wanted
    model.release()
    monkeypatch.undo()


@pytest.mark.long
def test_configs_are_measured_once(card: Any, load_fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_fused("qwen3")
    del text_decoder(model.network).layers[1:]
    measured = []
    real = decode_attention.milliseconds
    monkeypatch.setattr(decode_attention, "milliseconds", lambda *given: (measured.append(1), real(*given))[1])
    wanted = ask(model, "auto").raw
    first = len(measured)
    model.release()
    assert ask(model, "auto").raw == wanted
    assert first and len(measured) == first
