"""InstantID beside IPAdapter_plus and PuLID on one model, in either order, with those packs' own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from instantid_bench import attention_patches, shared_bench
from instantid_scenarios import Bench, mask, photo, sample
from peer_packs import Pack, PackMissing, pack_named

pytestmark = pytest.mark.comfy


@pytest.fixture
def bench() -> Bench:
    return shared_bench()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["IPAdapter_plus", "PuLID neutral", "PuLID fidelity", "PuLID style"])
def pack(request: pytest.FixtureRequest) -> Pack:
    try:
        return pack_named(request.param)
    except PackMissing as missing:
        pytest.skip(str(missing))


def in_place(first: Any, second: Any) -> Any:
    """What the original packs do: callbacks of both in one object, in the order of the nodes."""
    model = first.clone()
    attn2 = model.model_options["transformer_options"]["patches_replace"]["attn2"]
    for block, patch in attention_patches(second).items():
        held = attn2[block]
        merged = Joined(held.callback + patch.callback, held.kwargs + patch.kwargs)
        attn2[block] = merged
    return model


class Joined:
    def __init__(self, callbacks: list[Any], kwargs: list[dict[str, Any]]) -> None:
        self.callback, self.kwargs = callbacks, kwargs

    def __call__(self, q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        out = optimized_attention(q, k, v, extra_options["n_heads"])
        sigma = float(extra_options["sigmas"][0])
        for callback, kwargs in zip(self.callback, self.kwargs, strict=True):
            if kwargs["sigma_end"] <= sigma <= kwargs["sigma_start"]:
                out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out.to(q.dtype)


def close(made: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((made - expected).abs().max() < 1e-5 * expected.abs().max())


def test_theirs_first(bench: Bench, pack: Pack) -> None:
    theirs = pack.apply(bench.model, end_at=0.6)
    alone = sample(theirs, bench.positive, bench.negative)
    expected = sample(in_place(theirs, bench.patch(weight=0.9, mask=mask(1))[0]), bench.positive, bench.negative)
    both = bench.patch(model=theirs, weight=0.9, mask=mask(1))[0]
    made = sample(both, bench.positive, bench.negative)
    assert close(made, expected)
    assert not close(made, alone)
    assert torch.equal(sample(theirs, bench.positive, bench.negative), alone), "theirs is as it was"


def test_ours_first(bench: Bench, pack: Pack) -> None:
    ours = bench.patch(weight=0.9, start_at=0.3)[0]
    alone = sample(ours, bench.positive, bench.negative)
    theirs_alone = pack.apply(bench.model, mask=mask(1))
    expected = sample(in_place(ours, theirs_alone), bench.positive, bench.negative)
    both = pack.apply(ours, mask=mask(1))
    made = sample(both, bench.positive, bench.negative)
    assert close(made, expected)
    assert not close(made, alone)
    assert torch.equal(sample(ours, bench.positive, bench.negative), alone), "ours is as it was"


def test_theirs_between_two_people_of_ours(bench: Bench, pack: Pack) -> None:
    first = bench.patch(mask=mask(1))[0]
    between = pack.apply(first, weight=0.4)
    both = bench.patch(model=between, image=photo(2), mask=1 - mask(1))[0]
    theirs, second = pack.apply(bench.model, weight=0.4), bench.patch(image=photo(2), mask=1 - mask(1))[0]
    expected = sample(in_place(in_place(first, theirs), second), bench.positive, bench.negative)
    assert close(sample(both, bench.positive, bench.negative), expected)
