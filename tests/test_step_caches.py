"""Steps that ComfyUI's EasyCache and LazyCache skip are neither timed nor counted as steps of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotpath.identity.contributions import table as telemetry_table
from hotpath.patches import warmup
from hotpath.patches.profile_drawing import _headline, _time, table
from hotpath.patches.profiling import profile
from hotpath.patches.telemetry import record_blocks
from instantid_bench import sample, shallow_bench
from tiny_native_models import tiny

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


def cached(model: Any, kind: str) -> Any:
    """A clone that skips every step it can: from the third on, as two are needed to know how fast it changes."""
    import comfy_extras.nodes_easycache as nodes

    made: Any = getattr(nodes, f"{kind}Node").execute(model, 1e9, 0.0, 1.0, False).args[0]
    return made


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("profiled_first", [True, False])
def test_a_profile_tells_which_steps_were_skipped(kind: str, profiled_first: bool) -> None:
    bench = tiny("flux")
    model, _, _, session = profile(bench.model if profiled_first else cached(bench.model, kind))
    model = cached(model, kind) if profiled_first else model
    bench.sample(model, steps=5)
    found = session.take()
    assert [step.skipped for step in found.steps] == [False, False, True, True, True]
    assert [step.calls for step in found.steps] == [1] * 5
    text = table(found)
    assert text.count("skipped by a step cache") == 3 and "a step cache skipped 3 of 5 steps" in text
    ran = sum(step.seconds for step in found.steps[:2]) / 2
    assert _headline(found) == f"5 steps (3 skipped), median {_time(ran)}"


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
def test_a_warm_up_times_a_step_of_the_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny("flux")
    network = bench.model.model.diffusion_model
    whole, clock = network._forward, [0.0]

    def three_seconds(*args: Any, **kwargs: Any) -> Any:
        clock[0] += 3.0
        return whole(*args, **kwargs)

    monkeypatch.setattr(network, "_forward", three_seconds)
    monkeypatch.setattr(warmup, "_now", lambda model: clock[0])
    monkeypatch.setattr(warmup, "STEPS", 5)
    [done], _ = warmup.warm_up(cached(bench.model, kind), [(64, 64)], positive=bench.text("a", 8))
    assert done.seconds == 6.0 and done.step_seconds == 3.0


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
def test_telemetry_counts_calls_that_ran_the_model(kind: str) -> None:
    bench = shallow_bench()
    model, positive, negative = bench.apply()
    model, telemetry = record_blocks(model)
    sample(cached(model, kind), positive, negative, steps=5)
    assert "over 2 steps (2 model calls, 1 run)" in telemetry_table(telemetry.contributions())
