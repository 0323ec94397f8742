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
