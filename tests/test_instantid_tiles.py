"""InstantID beside packs that sample a picture in tiles: whose rows are whose, and which part of a drawing a tile gets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from instantid_bench import apply, sample, shallow_bench
from instantid_scenarios import Bench

pytestmark = pytest.mark.comfy


@pytest.fixture
def bench() -> Bench:
    return shallow_bench()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-4 * b.abs().max())


def in_tiles(model: Any, together: bool) -> Any:
    """A clone that computes the left and the right half apart, or both in one call as Tiled Diffusion does: all rows of a
    tile, the prompt's and the negative's, stand behind those of the one before."""
    from comfy.utils import repeat_to_batch_size

    def run(apply_model: Any, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        c = {
            name: repeat_to_batch_size(value, x.shape[0]) if isinstance(value, torch.Tensor) else value
            for name, value in arguments["c"].items()
        }
        made: torch.Tensor = apply_model(x, repeat_to_batch_size(arguments["timestep"], x.shape[0]), **c)
        return made

    def tiled(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        halves = arguments["input"].chunk(2, dim=-1)
        if together:
            return torch.cat(run(apply_model, torch.cat(halves), arguments).chunk(2), dim=-1)
        return torch.cat([run(apply_model, half, arguments) for half in halves], dim=-1)

    tiled_model = model.clone()
    tiled_model.set_model_unet_function_wrapper(tiled)
    return tiled_model


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("negative", ["its own", "made of the positive"])
def test_tiles_that_are_computed_together(bench: Bench, negative: str, batch: int) -> None:
    model, positive, own, _ = apply(bench, control_net=None, weight=1.2)
    zeroed = [[torch.zeros_like(c), options] for c, options in positive]
    conditionings = positive, own if negative == "its own" else zeroed
    apart = sample(in_tiles(model, together=False), *conditionings, batch=batch, size=(8, 16))
    together = sample(in_tiles(model, together=True), *conditionings, batch=batch, size=(8, 16))
    assert alike(together, apart)


def test_rows_in_any_order_have_their_own_role() -> None:
    from hotpath.patches.conditioning_roles import roles_of_rows

    def roles(rows: list[int], batch: int | None = None) -> Any:
        return roles_of_rows(torch.tensor(rows), len(rows) if batch is None else batch)

    assert roles([0, 2, 4, 1, 3, 5]) == (0, 1)
    assert roles([0, 2, 1, 3, 0, 2, 1, 3]) == (0, 1, 0, 1)
    assert roles([1, 0, 3, 2]) == (1, 0, 1, 0)
    assert roles([2, 3]) == (0, 1), "a part of a batch"
    assert roles([0, 1], 4) is roles([], 0) is None


@pytest.mark.parametrize("seen_by", ["IdentityNet only", "every ControlNet"])
def test_a_tile_gets_its_part_of_the_drawing(bench: Bench, seen_by: str) -> None:
    """Ultimate SD Upscale copies the ControlNets of a conditioning and cuts their drawings."""
    model, *conditionings, _ = apply(bench, face_tokens_for=seen_by, cn_strength=1.0)
    whole = sample(model, *conditionings)
    drawing = conditionings[0][0][1]["control"].cond_hint_original
    top = drawing[..., : drawing.shape[-2] // 2, :]

    def cut(control: Any) -> Any:
        made = control.copy()
        assert torch.equal(made.cond_hint_original, drawing)
        made.cond_hint_original = top
        return made.copy()

    tile = [[[c, {**options, "control": cut(options["control"])}] for c, options in one] for one in conditionings]
    found = sample(model, *tile)
    expected = sample(*apply(bench, face_tokens_for=seen_by, cn_strength=1.0, image_kps=top.movedim(1, -1))[:3])
    assert (found - expected).abs().max() < 0.1 * (found - whole).abs().max()
    assert torch.equal(sample(model, *conditionings), whole), "the whole picture's are as they were"


def test_a_tile_is_put_in_the_place_of_the_drawing_on_the_device() -> None:
    """As Tiled Diffusion does; the net of the link reads it."""
    from comfy.controlnet import ControlNet
    from hotpath.patches.face_token_link import face_token_link

    net = ControlNet(torch.nn.Linear(1, 1), compression_ratio=4, manual_cast_dtype=torch.bfloat16)
    net.cond_hint_original, net.upscale_algorithm = torch.ones(1, 3, 8, 8), "bilinear"
    link = face_token_link(net, "tokens", None)
    assert link.cond_hint_original is net.cond_hint_original and link.control_model is net.control_model
    assert (link.compression_ratio, link.upscale_algorithm, link.manual_cast_dtype) == (4, "bilinear", torch.bfloat16)
    link.cond_hint = torch.zeros(1)
    del link.cond_hint
    link.cond_hint = tile = torch.ones(1, 3, 4, 4)
    assert net.cond_hint is tile
    link.cleanup()
    assert net.cond_hint is None and net.cond_hint_original is not None
