"""The decode step by our own kernels, interpreted: text and logits are the plain path's, in seven launches a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.vision_language import decode_attention, decode_products, fused_decode, replayed_prefill
from hotpath.vision_language.answering import Answer, AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.decoding import text_decoder
from hotpath.vision_language.pictures import Picture
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling

GREEDY = Sampling(sample=False)


@pytest.fixture
def load(load_llm: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`load_llm`, with our kernels for the products interpreted and torch's in all other places."""
    monkeypatch.setattr(fused_decode, "allow_interpreter", True)
    monkeypatch.setattr(decode_products, "CONFIGS", ((256, 128, 4),))
    monkeypatch.setattr(decode_products, "HALVES_CONFIGS", ((256, 128, 4),))
    monkeypatch.setattr(fused_decode, "AT_LEAST", 0.0)  # nothing is fast in the interpreter
    monkeypatch.setattr(decode_attention, "CALLS", 1)
    monkeypatch.setattr(decode_attention, "REPLAYS", 1)
    monkeypatch.setattr(decode_attention, "why_not", lambda *_: "it is tested elsewhere")
    monkeypatch.setattr(replayed_prefill, "fused_layer", replayed_prefill.prefill_layer)
    for forget in (decode_products._chosen.clear, replayed_prefill.kernels_missing.cache_clear):
        forget()
    yield load_llm
    for forget in (decode_products._chosen.clear, replayed_prefill.kernels_missing.cache_clear):
        forget()


PICTURE = Picture(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def ask(model: Any, decode: str, tokens: int = 4, prompt: str = "What?", **options: Any) -> Answer:
    question = Question(prompt, "", (PICTURE,) if model.processor is not None else ())
    settings = AnswerOptions(tokens, PRESETS["fast"], decode=decode, stream=False, **options)
    return answer(model, [question], GREEDY, settings)[0]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_vl"])
def test_text_is_the_plain_paths(card: Any, load: Any, kind: str) -> None:
    model = load(kind)
    wanted = ask(model, "plain")
    made = ask(model, "auto")
    assert made.raw == wanted.raw and len(set(made.raw)) > 1
    assert "static cache, our kernels, one CUDA graph; products by our kernels" in made.report
    graphs = card.graphs
    assert ask(model, "graph").raw == wanted.raw and card.graphs == graphs  # the same buffers serve
    assert not card.compiled


def test_logits_and_cache_are_the_plain_steps(card: Any, load: Any) -> None:
    from hotpath.vision_language.decoding import DecodeStep, Workspace

    model = load("qwen3_vl")
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


def as_files(network: Any, kinds: Any) -> None:
    """Random weights in the layers of a network, as files keep them: by projection a type, or one for each of its parts."""
    from gguf_files import random_blocks
    from hotpath.vision_language.gguf.matrix import Matrix
    from hotpath.vision_language.gguf.packing import Packer
    from hotpath.vision_language.gguf.types import TYPES
    from hotpath.vision_language.projections import replace

    for number, layer in enumerate(text_decoder(network).layers):
        for owner, name in (
            (layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "gate_up_proj"), (layer.mlp, "down_proj"),
        ):  # fmt: skip
            before = getattr(owner, name)
            rows = before.out_features // len(kinds[name])
            matrices = [
                Matrix(TYPES[kind], random_blocks(kind, rows, before.in_features, number), rows, before.in_features)
                for kind in kinds[name]
            ]
            bias = None if before.bias is None else [before.bias.detach().cpu()]
            replace(owner, name, Packer("none", torch.device("cuda"), torch.float32).layer(matrices, bias).to("cuda"))


# Q4_0, Q8_0, Q5_0, Q5_1, MXFP4 and Q2_0, whose blocks no kernel of ours reads.
MIXED = {"qkv_proj": (2, 8), "o_proj": (6,), "gate_up_proj": (7, 39), "down_proj": (42,)}
ALIKE = {"qkv_proj": (39,), "o_proj": (2,), "gate_up_proj": (6,), "down_proj": (8,)}


@pytest.mark.parametrize("how", ["int8", "int4", "float8", "alike", "mixed"])
def test_packed_weights_are_read_by_kernels(card: Any, load: Any, how: str) -> None:
    from hotpath.vision_language.decoding import DecodeStep, Workspace

    kind = "qwen3" if how != "int4" else "qwen2"  # with biases
    files = {"alike": ALIKE, "mixed": MIXED}
    model = load(kind, quantization="none" if how in files else how)
    with model.resident(100), torch.no_grad():
        if how in files:
            as_files(model.network, files[how])
        assert not fused_decode.why_not(model.network, 1, model.device, model.dtype)
        steps = [DecodeStep(model.network), fused_decode.FusedStep(model.network, "torch")]
        spaces = [Workspace(step, 1, 512, model.device, model.dtype) for step in steps]
        for token in (5, 77):
            found = []
            for space in spaces:
                card.launches.clear()
                found.append(space.run(torch.tensor([token], device=model.device)).cpu())
            torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(spaces[1].kept.cpu(), spaces[0].kept.cpu(), atol=1e-4, rtol=1e-4)
        layers = len(steps[1].layers)
        launches = {name: count for name, count in card.launches.items() if name.startswith("triton")}
        # Of what is mixed, two launches for the first, and for the third those of its halves and of what joins them.
        packed = 4 * layers if how != "mixed" else 5 * layers
        expected = {"triton::_packed_product": packed, "triton::_product": 1, "triton::_place_rows": layers}
        if how == "mixed":
            expected["triton::_gate_rows"] = layers
            assert f"{layers} of {6 * layers + 1} matrices are unpacked by torch" in steps[1].note
        assert launches == expected


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["int8", "int4", "float8"])
def test_packed_text_is_the_plain_paths(card: Any, load: Any, quantization: str) -> None:
    model = load("qwen3_vl", quantization=quantization)
    wanted = ask(model, "plain")
    made = ask(model, "auto")
    assert made.raw == wanted.raw and len(set(made.raw)) > 1
    assert "static cache, our kernels, one CUDA graph; products by our kernels" in made.report
    assert not card.compiled


def test_weights_that_no_kernel_reads_are_decoded_otherwise(card: Any, load: Any) -> None:
    model = load("qwen3")
    with model.resident(100):
        as_files(model.network, dict.fromkeys(MIXED, (42,)))
        model.network.lm_head = model.network.model.layers[0].mlp.down_proj
        why = fused_decode.why_not(model.network, 1, model.device, model.dtype)
    assert why == "the weights are packed in ways that our kernels do not read"


def test_a_batch_is_decoded_otherwise(card: Any, load: Any) -> None:
    model = load("qwen3")
    assert "our kernels" not in ask(model, "graph", answers=2).report


class OutOfResources(Exception):
    """As Triton's: no RuntimeError."""


@pytest.mark.parametrize("how", ["wrong", "slow", "broken", "places wrongly", "cannot place", "fails later"])
def test_kernels_that_do_not_serve_give_way(card: Any, load: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    from hotpath.vision_language import fused_decode_kernel as kernel
    from hotpath.vision_language import prefill_kernels

    model = load("qwen3")
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
def test_configs_are_measured_once(card: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("qwen3")
    del text_decoder(model.network).layers[1:]
    measured = []
    real = decode_attention.milliseconds
    monkeypatch.setattr(decode_attention, "milliseconds", lambda *given: (measured.append(1), real(*given))[1])
    wanted = ask(model, "auto").raw
    first = len(measured)
    model.release()
    assert ask(model, "auto").raw == wanted
    assert first and len(measured) == first
