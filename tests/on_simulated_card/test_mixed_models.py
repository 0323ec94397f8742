"""Decoders with experts and with linear attention on a card: recorded, they write what the plain path writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from newer_models import newer_folder
from test_fused_decode import ask


@pytest.fixture
def load_mixed(headless_host: Any) -> Iterator[Any]:
    from hotpath.cache import clear_all

    folder = headless_host.model_folders("LLM")[0]
    folder.mkdir(parents=True)
    clear_all()

    def load(kind: str, **options: Any) -> Any:
        newer_folder(folder / kind, kind, num_hidden_layers=2)
        model = MODELS.get(kind, LoadOptions(dtype="float32", **options), must_see=False)
        model.network.set_experts_implementation("eager")  # the library's other one counts whole numbers as no CPU can
        return model

    yield load
    MODELS.clear()
    clear_all()


LONG = [pytest.param(*case, marks=pytest.mark.long) for case in (("qwen2_moe", "none"), ("qwen3_moe", "float8"))]


@pytest.mark.parametrize(
    ("kind", "quantization"), [("qwen3_5", "none"), ("qwen3_5_moe", "int4"), ("qwen3_vl_moe", "none"), *LONG]
)
def test_recorded_they_write_what_the_plain_path_writes(
    card: Any, load_mixed: Any, kind: str, quantization: str
) -> None:
    model = load_mixed(kind, quantization=quantization)
    wanted = ask(model, "plain", 6)
    card.replays = 0
    made = ask(model, "graph", 6)
    assert made.raw == wanted.raw and len(set(made.raw)) > 1
    assert "static cache, one CUDA graph" in made.report and card.replays >= 5
    graphs = card.graphs
    assert ask(model, "graph", 6).raw == wanted.raw and card.graphs == graphs
    waits = []
    for tokens in (3, 6):
        card.waits.clear()
        ask(model, "graph", tokens)
        waits.append(list(card.waits))
    assert waits[0] == waits[1]  # none while text is written


@pytest.mark.parametrize(
    ("kind", "quantization"), [("qwen3_vl_moe", "none"), pytest.param("qwen3_5_moe", "int4", marks=pytest.mark.long)]
)
def test_chosen_experts_are_read_by_a_kernel(
    card: Any, load_mixed: Any, monkeypatch: pytest.MonkeyPatch, kind: str, quantization: str
) -> None:
    import torch
    from hotpath.vision_language import mixed_decoding, packed_products
    from hotpath.vision_language.decoding import text_decoder

    for name in ("CONFIGS", "SHORT_CONFIGS"):
        monkeypatch.setattr(packed_products, name, ((256, 128, 4),))
    model = load_mixed(kind, quantization=quantization)
    mlp = text_decoder(model.network).layers[1].mlp
    with model.resident(100), torch.no_grad():
        x = torch.randn(2, mlp.gate.hidden_dim, generator=torch.Generator().manual_seed(0)).cuda()
        wanted = mixed_decoding.feed_forward(mlp, x).cpu()
        monkeypatch.setattr(packed_products, "allow_interpreter", True)
        card.launches.clear()
        found = mixed_decoding.feed_forward(mlp, x).cpu()
        # Those of the expert beside them are packed, too.
        assert card.launches["triton::_packed_product"] == 2 + 3 * hasattr(mlp, "shared_expert")
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not packed_products._failed


def test_a_question_is_prefilled_by_graphs(card: Any, load_mixed: Any) -> None:
    """The picture first, whose states are kept, then the words; another question about it only reads its own."""
    model = load_mixed("qwen3_5")
    first, second = "What is it?", "And which colours are there?"
    wanted = {text: ask(model, "plain", 6, text, reuse_prefix=False).raw for text in (first, second)}
    made = [ask(model, "graph", 6, text) for text in (first, second, first)]
    assert [answer.raw for answer in made] == [wanted[first], wanted[second], wanted[first]]
    said = [answer.report.split("prefill: ")[1].splitlines()[0] for answer in made]
    assert said[0].startswith("CUDA graphs of") and said[1].startswith("one CUDA graph of")
    assert ["reused" in answer.report for answer in made] == [False, True, True]
    graphs = card.graphs
    assert ask(model, "graph", 6, second).raw == wanted[second] and card.graphs == graphs
    whole = ask(model, "graph", 6, first, reuse_prefix=False)
    assert whole.raw == wanted[first] and "prefill: one CUDA graph of" in whole.report


def test_linear_attention_is_by_kernels(card: Any, load_mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.vision_language import linear_attention, replayed_prefill

    model = load_mixed("qwen3_5")
    by_torch = ask(model, "plain", 3)
    wanted, told = by_torch.raw, "linear attention: torch's operators, because Triton interprets"
    assert told in by_torch.report
    model.drop_device_state()
    linear_attention._missing.clear()
    monkeypatch.setattr(linear_attention, "allow_interpreter", True)
    monkeypatch.setattr(replayed_prefill, "STEP", 8)
    linear_attention.why_not.cache_clear()
    card.launches.clear()
    made = ask(model, "graph", 3)
    assert made.raw == wanted and told not in made.report
    assert {f"triton::_{name}" for name in ("convolve", "prepare", "scan", "gate_heads", "rewrite")} <= set(
        card.launches
    )
    linear_attention.why_not.cache_clear()
