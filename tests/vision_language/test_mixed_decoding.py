"""The static decode step of decoders with experts and with linear attention, against the library's own way."""

from __future__ import annotations

import pytest
import torch
from hotpath.vision_language import decoding, experts, mixed_decoding
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.decode_path import DecodePath
from hotpath.vision_language.generation import PlainRunner, workspace
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prefill import prefill
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from newer_models import NAMES, SEEING, newer_folder
from two_questions import prompts

STATIC = DecodePath("static", "")
KINDS = list(NAMES)


@pytest.fixture
def mixed(llm):
    """Loads a tiny folder of a kind, where the library that is installed has it."""

    def load(kind, **options):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if kind not in CONFIG_MAPPING_NAMES:
            pytest.skip(f"this transformers has no {kind}")
        if not (llm / kind).exists():
            newer_folder(llm / kind, kind)
        model = MODELS.get(kind, LoadOptions(**options), must_see=kind in SEEING)
        if reason := mixed_decoding.unsupported(model.network):
            pytest.skip(reason)
        return model

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_plain_paths(mixed, pictures, kind):
    model = mixed(kind)
    asked = prompts(model, pictures)
    filled = prefill(model, asked)
    buffers = workspace(model, STATIC, 2, filled.mask.shape[1] + 20)
    buffers.begin(*filled.layers(), filled.mask, filled.positions)
    plain = PlainRunner(model, filled)
    tokens = torch.tensor([5, 77])
    with torch.no_grad():
        for _ in range(12):
            wanted, found = plain.run(tokens), buffers.run(tokens)
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
            tokens = wanted.argmax(-1)
    assert buffers.nbytes() == model.cache_bytes(filled.mask.shape[1] + 20, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_plain_paths(mixed, ask, pictures, kind):
    model = mixed(kind)
    question = Question("Describe.", "", (pictures.a,) if kind in SEEING else ())
    made, wanted = (ask(model, question, decode=path, max_new_tokens=8) for path in ("auto", "plain"))
    assert made.raw == wanted.raw and made.tokens == wanted.tokens
    assert "static cache" in made.report and "plain" in wanted.report
    assert ask(model, question, decode="auto", max_new_tokens=8).raw == made.raw  # buffers of an earlier answer
    several = answer(model, [question], Sampling(seed=7), AnswerOptions(4, PRESETS["fast"], answers=2))
    singles = [ask(model, question, Sampling(seed=seed), max_new_tokens=4, decode="plain") for seed in (7, 8)]
    assert [part.raw for part in several] == [part.raw for part in singles]


@pytest.mark.parametrize(("kind", "method"), [("qwen3_5", "none"), ("qwen3_5_moe", "float8"), ("qwen3_vl_moe", "none")])
def test_a_kind_of_layer_is_one_graph(mixed, pictures, kind, method, monkeypatch):
    """As a card compiles it: whole layers, the experts that were chosen among them, once for all that are alike."""
    monkeypatch.setattr(mixed_decoding, "LOOKS", ())
    monkeypatch.setattr("hotpath.vision_language.projections.pack_products", lambda network: 0)
    model = mixed(kind, quantization=method)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    filled = prefill(model, prompts(model, pictures)[:1])
    compiled = DecodePath("compiled", "")
    buffers = workspace(model, compiled, 1, 600, backend=backend)
    plain = workspace(model, STATIC, 1, 600)
    for space in (buffers, plain):
        space.begin(*filled.layers(), filled.mask, filled.positions)
    with torch.no_grad():
        for token in (5, 77, 8):
            found, wanted = (space.run(torch.tensor([token])) for space in (buffers, plain))
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert len(graphs) == (3 if "3_5" in kind else 2)  # the head is one


@pytest.mark.parametrize("method", ["none", "int8", "int4", "float8"])
@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen2_moe"])
def test_a_card_reads_the_experts_that_were_chosen(mixed, kind, method):
    """As on a card, in torch's operators; int8's kernel for CPUs, with which it is compared, multiplies in bfloat16."""
    model = mixed(kind)
    layer = decoding.text_decoder(model.network).layers[0]
    x = torch.randn(3, layer.mlp.gate.hidden_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if method != "none":
            experts.pack_experts(layer, method, torch.device("cuda"))
        _, weights, chosen = layer.mlp.gate(x)
        wanted = layer.mlp.experts(x, chosen, weights)
        found = experts.chosen_experts(layer.mlp.experts, x, chosen, weights)
    assert (found - wanted).norm() < (0.02 if method == "int8" else 1e-5) * wanted.norm()


def test_what_is_not_known_stays_on_the_plain_path(mixed):
    model = mixed("qwen3_moe")
    network = model.network
    network.model.layers[1].mlp.experts = torch.nn.Linear(2, 2)
    assert "in another way" in mixed_decoding.unsupported(network)
    network.config.model_type = "qwen9"
    assert "not one of the dense" in mixed_decoding.unsupported(network)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("kind", "quantization", "path"),
    [
        ("qwen3_5", "none", "graph"), ("qwen3_5_moe", "int4", "graph"), ("qwen3_vl_moe", "none", "graph"),
        ("qwen2_moe", "int8", "graph"), ("qwen3_5_moe", "none", "compiled"),
    ],
)  # fmt: skip
def test_a_card_writes_what_the_plain_path_writes(mixed, ask, pictures, kind, quantization, path):
    model = mixed(kind, device="cuda", dtype="float32", quantization=quantization)
    question = Question("Describe.", "", (pictures.a,) if kind in SEEING else ())
    wanted = ask(model, question, decode="plain", max_new_tokens=8)
    made = ask(model, question, decode=path, max_new_tokens=8)
    assert made.raw == wanted.raw and "one CUDA graph" in made.report, made.report
    again = Question("And which colours?", "", question.pictures)
    wanted = ask(model, again, decode="plain", max_new_tokens=8, reuse_prefix=False)
    made = ask(model, again, decode=path, max_new_tokens=8)
    assert made.raw == wanted.raw and ("reused" in made.report) == bool(question.pictures), made.report


@pytest.mark.parametrize("method", ["int8", "int4", "float8"])
def test_what_decides_is_not_rounded(mixed, method):
    """A router's choice, and how fast a state fades: rounding there grows with every token."""
    model = mixed("qwen3_5_moe", quantization=method)
    for layer in decoding.text_decoder(model.network).layers:
        assert isinstance(layer.mlp.gate.weight, torch.nn.Parameter) and layer.mlp.gate.weight.dtype == model.dtype
        if hasattr(layer, "linear_attn"):
            assert type(layer.linear_attn.in_proj_ab) is torch.nn.Linear
            assert type(layer.linear_attn.in_proj_qkvz) is not torch.nn.Linear


def test_projections_are_read_at_once(mixed):
    """As long matrices, of which the library's names are rows."""
    model = mixed("qwen3_5")
    held = {name for name, _ in model.network.model.language_model.layers.named_parameters()}
    assert {"0.linear_attn.in_proj_ab.weight", "1.self_attn.qkv_proj.weight", "0.mlp.gate_up_proj.weight"} <= held
    assert not any(name.split(".")[-2] in ("in_proj_a", "in_proj_qkv", "q_proj", "up_proj") for name in held)
