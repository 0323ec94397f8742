"""Tests of a process with a simulated card; `tests/test_on_simulated_card.py` starts one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

if not os.environ.get("HOTPATH_SIMULATED_CARD"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def card(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The card, with nothing counted yet. Memory that was freed too early fails the test, and so does an allocator that
    waits for the end of a capture that broke off."""
    import simulated_card

    card = simulated_card.card()
    card.host_waits_for_all()
    for counted in (card.waits, card.hazards, card.compiled, card.launches):
        counted.clear()
    card.graphs = card.replays = 0
    yield card
    card.debug = 0
    left, card.captures_into = card.captures_into, None
    assert not card.hazards
    assert left is None or request.path.name == "test_simulation.py"


@pytest.fixture(autouse=True)
def no_interpreted_decode_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is timed over caches of true length, which takes minutes in the interpreter; its numbers are tested elsewhere."""
    from hotpath.vision_language import decode_attention

    monkeypatch.setattr(decode_attention, "why_not", lambda *_: "it is tested elsewhere")


@pytest.fixture
def load_llm(headless_host: Any) -> Iterator[Any]:
    """Writes a tiny model of a kind into a folder and loads it from there, in float32, with nothing remembered."""
    from hotpath.cache import clear_all
    from hotpath.demo.captioner_model import write_folder
    from hotpath.vision_language.loaded_model import LoadOptions
    from hotpath.vision_language.loading import MODELS

    folder = headless_host.model_folders("LLM")[0]
    folder.mkdir(parents=True)
    clear_all()

    def load(kind: str, **options: Any) -> Any:
        write_folder(folder / kind, kind)
        return MODELS.get(kind, LoadOptions(dtype="float32", **options), must_see=False)

    yield load
    MODELS.clear()
    clear_all()


@pytest.fixture
def load_fused(load_llm: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`load_llm`, with our kernels for the products interpreted and torch's in all other places."""
    from hotpath.vision_language import (
        decode_attention,
        decode_products,
        fused_decode,
        packed_decode_kernel,
        packed_products,
        prefill_layers,
        replayed_prefill,
    )

    monkeypatch.setattr(fused_decode, "allow_interpreter", True)
    monkeypatch.setattr(packed_products, "allow_interpreter", True)
    monkeypatch.setattr(packed_decode_kernel, "UNPACKED", (256, 512))
    monkeypatch.setattr(decode_products, "CONFIGS", ((256, 128, 4),))
    monkeypatch.setattr(packed_products, "CONFIGS", ((256, 128, 4),))
    monkeypatch.setattr(packed_products, "SHORT_CONFIGS", ((256, 128, 4),))
    monkeypatch.setattr(fused_decode, "AT_LEAST", 0.0)  # nothing is fast in the interpreter
    monkeypatch.setattr(decode_attention, "CALLS", 1)
    monkeypatch.setattr(decode_attention, "REPLAYS", 1)
    monkeypatch.setattr(replayed_prefill, "fused_layer", prefill_layers.prefill_layer)
    for forget in (decode_products._chosen.clear, prefill_layers.kernels_missing.cache_clear):
        forget()
    yield load_llm
    for forget in (decode_products._chosen.clear, prefill_layers.kernels_missing.cache_clear):
        forget()
