"""The vision tower's inputs that depend on the size alone, made on the host; its first layer as a product."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotpath.demo.captioner_model import VISION_KINDS
from hotpath.vision_language import tower
from hotpath.vision_language.projections import PatchProduct, patches_by_product
from torch import nn


def patches_for(network: Any, grids: torch.Tensor) -> torch.Tensor:
    vision = network.config.vision_config
    width = int(getattr(vision, "in_channels", 3)) * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    return torch.randn(int(grids.prod(-1).sum()), width, generator=generator)


@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize("grids", [[[1, 8, 12]], [[2, 4, 6]], [[1, 4, 4], [3, 6, 4]]])
def test_the_library_takes_what_is_made_for_it(load: Any, library: Any, kind: str, grids: list[list[int]]) -> None:
    theirs, mine = library(kind).model.model.visual, load(kind).network.model.visual
    sizes = torch.tensor(grids)
    shown = patches_for(library(kind).model, sizes)
    given = tower.from_size(mine, sizes, torch.device("cpu"))
    if given is None:
        pytest.skip("this transformers takes nothing from outside")
    assert set(tower.LENGTHS) & set(given)
    with torch.no_grad():
        wanted = mine(shown, grid_thw=sizes, return_dict=True)
        # A grid that says nothing: all that depends on it was given.
        made = mine(shown, grid_thw=torch.zeros_like(sizes), return_dict=True, **given)
        plain = theirs(shown, grid_thw=sizes, return_dict=True)
    assert torch.equal(made.pooler_output, wanted.pooler_output)
    torch.testing.assert_close(made.pooler_output, plain.pooler_output, atol=1e-3, rtol=1e-3)
    levels, others = (getattr(output, "deepstack_features", None) or [] for output in (made, wanted))
    assert len(levels) == len(others) and all(map(torch.equal, levels, others))


def test_what_is_not_known_is_left_to_the_library(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    visual = load("qwen3_vl").network.model.visual
    sizes, cpu = torch.tensor([[1, 4, 4]]), torch.device("cpu")
    assert tower.from_size(None, sizes, cpu) is None
    assert tower.from_size(nn.Identity(), sizes, cpu) is None
    monkeypatch.setattr(tower, "_asked", lambda kind: ("get_vision_cu_seqlens", "get_vision_something_new"))
    assert tower.from_size(visual, sizes, cpu) is None
    pytest.importorskip("transformers.vision_utils")
    monkeypatch.setattr(tower, "_asked", lambda kind: ("torch", "get_vision_cu_seqlens"))
    found = tower.from_size(visual, sizes, cpu)
    assert found is not None and found["cu_seqlens"].tolist() == [0, 16]
    monkeypatch.setattr(visual.config, "_attn_implementation", "flash_attention_2")
    assert tower.from_size(visual, sizes, cpu) is None


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_patches_are_multiplied(load: Any, library: Any, kind: str) -> None:
    mine, theirs = load(kind).network.model.visual.patch_embed, library(kind).model.model.visual.patch_embed
    assert isinstance(mine.proj, PatchProduct) and type(theirs.proj) is nn.Conv3d
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    shown = patches_for(library(kind).model, torch.tensor([[1, 4, 6]]))
    with torch.no_grad():
        torch.testing.assert_close(mine(shown), theirs(shown), atol=1e-4, rtol=1e-4)


def test_other_first_layers_stay() -> None:
    for layer in (nn.Linear(3, 4), nn.Conv3d(3, 4, 2, stride=1), nn.Conv3d(3, 4, 2, stride=2, padding=1)):
        owner = SimpleNamespace(patch_embed=SimpleNamespace(proj=layer))
        assert not patches_by_product(owner) and owner.patch_embed.proj is layer
    assert not patches_by_product(None)
