"""ComfyUI's own models on the card: recorded calls, InstantID's kernel, and samplers that wait no more than before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hotpath.patches.compilation import CompileSettings, compile_model, compiler_of
from tiny_native_models import tiny

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_recorded_calls(card: Any) -> None:
    bench = tiny("z_image")
    model, _ = compile_model(bench.model, CompileSettings(mode="reduce-overhead"), backend="eager")
    recorder = compiler_of(model).recorder
    assert recorder is not None
    for count, changes in ((1, {}), (1, {"prompt": "another"}), (2, {"size": (16, 24)}), (2, {"steps": 3})):
        waits = []
        for patched in (bench.model, model):
            before = len(card.waits)
            waits.append((bench.sample(patched, **changes), len(card.waits) - before))
        (expected, its), (made, ours) = waits
        assert (made - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert recorder.recorded == count and recorder.reason is None
    assert ours == its  # the last one found its recording
    assert recorder.replayed == card.replays == 9 and card.graphs == 2


def test_identities_in_a_recorded_model(card: Any) -> None:
    from instantid_bench import apply, sample, shallow_bench

    small: dict[str, Any] = {"size": (8, 8), "steps": 1}
    bench = shallow_bench()
    *plain, report = apply(bench, weight=0.8)
    assert "11 of 11 blocks" in report
    expected = sample(*plain, **small)
    assert card.launches["triton::_attend_tokens"] >= 11
    model, _ = compile_model(plain[0], CompileSettings(mode="reduce-overhead"), backend="eager")
    recorder = compiler_of(model).recorder
    assert recorder is not None
    assert (sample(model, *plain[1:], **small) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert recorder.recorded == recorder.replayed == 1
