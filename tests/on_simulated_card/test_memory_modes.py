"""Networks of ours under ComfyUI's memory management, in the modes that its flags choose."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hotpath.host.comfyui import ComfyUIHost

pytestmark = pytest.mark.comfy


@pytest.fixture
def management() -> Any:
    import comfy.model_management as management

    management.unload_all_models()
    return management


@pytest.mark.parametrize("mode", ["NORMAL_VRAM", "HIGH_VRAM", "NO_VRAM"])
def test_what_is_sent_away_leaves_the_card(
    card: Any, management: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--highvram and --gpu-only keep ComfyUI's own models there for good; ours were asked to go."""
    monkeypatch.setattr(management, "vram_state", management.VRAMState[mode])
    gc.collect()
    before = card.held
    managed = ComfyUIHost().manage(torch.nn.Linear(64, 64))
    for send_away in (managed.release, management.unload_all_models):
        with managed.resident() as network:
            assert network.weight.is_cuda and card.held > before
        assert network.weight.is_cuda
        send_away()
        assert not network.weight.is_cuda and card.held == before
    with managed.resident(keep=False):
        pass
    assert not network.weight.is_cuda


def test_what_is_reserved_for_others_is_not_free(card: Any, management: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here, place = ComfyUIHost(), torch.device("cuda", 0)
    monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", 3 << 30)
    assert here.free_memory(place) == management.get_free_memory(place) - (3 << 30)
    managed = here.manage(torch.nn.Linear(64, 64))
    with managed.resident() as network:
        pass
    here.make_room(here.free_memory(place), place)
    assert network.weight.is_cuda
    here.make_room(here.free_memory(place) + 1, place)
    assert not network.weight.is_cuda
