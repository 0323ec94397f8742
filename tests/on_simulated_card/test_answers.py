"""Answers of a vision-language model on the card: graphs write what the plain path writes, and seldom wait."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simulated_card
import torch
from hotpath.cache import clear_all
from hotpath.colorization.transfers import copies_for
from hotpath.host import pinned_memory
from hotpath.identity import prepared
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.pictures import Picture
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling

TOKENS = 16


@pytest.fixture
def model(load_llm: Any) -> Any:
    return load_llm("qwen3_vl")


def asked(model: Any, decode: str, sampling: Sampling, tokens: int = TOKENS) -> list[str]:
    picture = Picture(np.random.default_rng(1).integers(0, 256, (150, 200, 3), dtype=np.uint8))
    questions = [
        Question("Describe.", "Be brief.", (picture,)),
        Question("And now in other words, please.", "", (picture,)),
    ]
    settings = AnswerOptions(max_new_tokens=tokens, budget=PRESETS["fast"], decode=decode)
    return [made.raw for made in answer(model, questions, sampling, settings)]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(sample=False), pytest.param(Sampling(temperature=1.0, seed=3), marks=pytest.mark.long)],
    ids=["greedy", "sampled"],
)
def test_graphs_write_what_the_plain_path_writes(card: Any, model: Any, sampling: Sampling) -> None:
    expected = asked(model, "plain", sampling)
    assert asked(model, "graph", sampling) == expected
    assert all(space.graph is not None for space in model.device_state["workspaces"].values())
    graphs = card.graphs
    waits = []
    for tokens in (4, TOKENS):
        card.waits.clear()
        card.replays = 0
        asked(model, "graph", sampling, tokens)
        assert card.graphs == graphs and card.replays >= tokens - 1
        waits.append(list(card.waits))
    assert waits[0] == waits[1]  # all of them before the first token


def test_answers_where_no_more_memory_can_be_pinned(
    card: Any, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = AnswerOptions(max_new_tokens=4, budget=PRESETS["fast"], decode="graph")
    picture = Picture(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))

    def ask(*texts: str) -> list[str]:
        questions = [Question(text, "", (picture,)) for text in texts]
        return [made.raw for made in answer(model, questions, Sampling(sample=False), settings)]

    wanted = ask("What?") + ask("And where?", "Since when?")
    clear_all()

    def refused(tensor: torch.Tensor) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(simulated_card.operators, "_pinned", refused)
    pinned_memory._tell_of_slow_copies.cache_clear()
    for _ in range(2):
        assert ask("What?") + ask("And where?", "Since when?") == wanted
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == [
        "some copies to the card and back are slow, because no more memory can be pinned"
    ]
    flat = torch.arange(8.0, device="cuda")
    assert torch.equal(prepared._on_cpu(flat), flat.cpu())
    assert copies_for(flat.device).host_memory((2, 3), torch.uint8).shape == (2, 3)


def test_packed_files_go_to_the_card_as_they_are(card: Any, headless_host: Any, tmp_path: Any) -> None:
    """A GGUF of Q8_0, its embedding, which is its head, too: graphs write what the plain path writes."""
    from gguf_files import Q8_0, of_folder
    from hotpath.demo.captioner_model import write_folder
    from hotpath.vision_language.loaded_model import LoadOptions
    from hotpath.vision_language.loading import MODELS

    source = write_folder(tmp_path / "source", "qwen3_vl", num_hidden_layers=2)
    of_folder(source, headless_host.model_folders("LLM")[0] / "Tiny.gguf", Q8_0)
    try:
        model = MODELS.get("Tiny.gguf", LoadOptions(dtype="float32"))
        assert asked(model, "graph", Sampling(sample=False), 6) == asked(model, "plain", Sampling(sample=False), 6)
        packed = model.network.model.language_model.layers[0].mlp.gate_up_proj
        for layer in (packed, model.network.lm_head):
            assert (layer.weight.device.type, str(layer.weight.dtype), layer.group) == ("cuda", "torch.int8", 32)
        assert model.network.get_input_embeddings()(torch.zeros(1, dtype=torch.int64, device="cuda")).is_cuda
        assert any("Q8_0 as stored" in note for note in model.notes)
    finally:
        MODELS.clear()


def test_blocks_are_unpacked_where_they_are(card: Any) -> None:
    """Those of every type, while a graph is recorded: nothing comes from the host, and the graph computes the same again."""
    from gguf_files import BLOCKS, random_blocks
    from hotpath.vision_language.gguf.matrix import Matrix
    from hotpath.vision_language.gguf.packing import Packer
    from hotpath.vision_language.gguf.types import TYPES

    with torch.no_grad():
        packer = Packer("none", torch.device("cuda"), torch.float32)
        stored = [Matrix(TYPES[kind], random_blocks(kind, 8, 256), 8, 256) for kind in BLOCKS if not TYPES[kind].bits]
        layers = [packer.layer([matrix]).to("cuda") for matrix in stored]
        x = torch.linspace(-1, 1, 256).cuda().view(1, -1)
        before = [layer(x).cpu() for layer in layers]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            made = [layer(x) for layer in layers]
        torch.cuda.current_stream().wait_stream(stream)
        x.neg_()
        graph.replay()
        for again, first in zip(made, before, strict=True):
            assert torch.equal(again.cpu(), -first)


def test_what_is_borrowed_leaves_the_card_without_a_copy(card: Any, load_llm: Any) -> None:
    from hotpath.vision_language.loaded_model import LoadOptions
    from hotpath.vision_language.loading import MODELS

    load_llm("qwen3")  # writes the model's folder
    MODELS.clear()
    gc.collect()
    settings = AnswerOptions(max_new_tokens=3, decode="graph", keep_loaded=False)
    before = card.held
    gc.disable()
    try:
        with MODELS.borrowed("qwen3", LoadOptions(dtype="float32"), must_see=False) as model:
            answer(model, [Question("x")], Sampling(sample=False), settings)
            weights = sum(parameter.nbytes for parameter in model.network.parameters())
            assert card.held >= before + weights
            card.waits.clear()
        assert card.held - before < weights // 100 and not card.waits
    finally:
        gc.enable()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_question_that_came_before_is_answered_without_a_wait(card: Any, model: Any, penalty: float) -> None:
    picture = Picture(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    question, sampling = (
        Question("Describe.", "", (picture,)),
        Sampling(temperature=1.0, seed=3, repetition_penalty=penalty),
    )
    settings = AnswerOptions(max_new_tokens=6, budget=PRESETS["fast"], decode="plain", stream=False)
    wanted = answer(model, [question], sampling, settings)[0].raw
    settings = replace(settings, decode="graph")
    for _ in range(2):  # the whole question, and what follows the picture
        assert answer(model, [question], sampling, settings)[0].raw == wanted
    card.waits.clear()
    assert answer(model, [question], sampling, settings)[0].raw == wanted
    assert not card.waits
