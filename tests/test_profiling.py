"""Stages and steps are timed without changing a picture, compiled graphs and fallbacks are told, and a chart is drawn."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch
from hotpath.host import fresh_memory
from hotpath.patches import profile_drawing
from hotpath.patches.compilation import compile_model
from hotpath.patches.profile_drawing import COMPILING, draw, table
from hotpath.patches.profile_spans import (
    DECODE,
    ENCODE,
    PREPARE,
    STEP,
    Moment,
    Profile,
    Row,
    Span,
    cost_of_a_moment,
    resolve,
)
from hotpath.patches.profiling import VAE_METHODS, ProfileSession, _Steps, profile, timed_copy
from tiny_native_models import tiny


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    with torch.inference_mode():
        yield


class Patcher:
    load_device = torch.device("cpu")

    def clone(self) -> Patcher:
        return Patcher()


class TextEncoder:
    """As ComfyUI's CLIP: the outer method calls the inner one, and clones are made for every patch."""

    def __init__(self) -> None:
        self.patcher = Patcher()
        self.calls: list[str] = []

    def encode_from_tokens(self, tokens: Any) -> str:
        time.sleep(0.002)
        return f"encoded {tokens}"

    def encode_from_tokens_scheduled(self, tokens: Any) -> list[str]:
        return [self.encode_from_tokens(tokens)]

    def clone(self) -> TextEncoder:
        return TextEncoder()


class Decoder:
    def __init__(self) -> None:
        self.patcher = Patcher()

    def decode(self, latent: Any) -> Any:
        time.sleep(0.003)
        return latent

    def encode(self, pixels: Any) -> Any:
        raise RuntimeError("out of memory")


def stages(found: Any) -> list[str]:
    return [row.stage for row in found.rows]


@pytest.mark.comfy
def test_a_run_is_timed_stage_by_stage_and_stays_the_same() -> None:
    bench = tiny("flux")
    clip, vae = TextEncoder(), Decoder()
    model, timed_clip, timed_vae, session = profile(bench.model, clip, vae)
    expected = bench.sample(steps=3)
    assert timed_clip.clone().encode_from_tokens_scheduled("a") == ["encoded a"]
    assert torch.equal(bench.sample(model, steps=3), expected)
    timed_vae.decode(expected)
    found = session.take()
    assert stages(found) == [ENCODE, PREPARE, STEP, STEP, STEP, "after the last step", DECODE]
    assert all(0 < step.model_seconds <= step.seconds and step.calls == 1 for step in found.steps)
    assert found.rows[0].seconds >= 0.002 and found.rows[-1].seconds >= 0.003
    assert found.total >= sum(row.seconds for row in found.rows) > 0
    assert found.device == "CPU" and found.overhead < 0.01 * found.total
    assert isinstance(timed_clip, TextEncoder) and isinstance(timed_vae, Decoder)
    assert type(clip) is TextEncoder and type(vae) is Decoder and "hotpath_profile" not in vars(vae)
    assert session.take().rows == ()


@pytest.mark.comfy
def test_time_that_the_system_takes_on_a_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, float]] = []
    monkeypatch.setattr(fresh_memory, "advice", lambda *spent: (told.append(spent), "larger pages")[1])
    bench = tiny("flux")
    model, _, _, session = profile(bench.model)
    before = os.times()
    for _ in range(2):
        bench.sample(model, steps=2)
    after = os.times()
    assert "larger pages" in table(session.take())
    user, system = told[0]
    assert 0 < user <= after.user - before.user and 0 <= system <= after.system - before.system
    session.take()
    assert told[1] == (0, 0)


@pytest.mark.comfy
def test_samplers_with_two_evaluations_per_step_are_told() -> None:
    import comfy.sample

    bench = tiny("flux")
    model, _, _, session = profile(bench.model)
    latent = torch.zeros(1, 16, 8, 8)
    comfy.sample.sample(
        model,
        latent,
        3,
        1.0,
        "heun",
        "simple",
        bench.text("a", 8),
        bench.text("b", 8),
        latent,
        disable_pbar=True,
        seed=1,
    )
    found = session.take()
    assert [step.calls for step in found.steps] == [1, 2, 2]  # heun reports a step after its first evaluation
    assert "2 evaluations" in table(found)


@pytest.mark.comfy
@pytest.mark.usefixtures("own_graphs")
def test_compiling_and_falling_back_are_part_of_the_report() -> None:
    bench = tiny("flux")

    def foreign(
        q: Any, k: Any, v: Any, pe: Any = None, attn_mask: Any = None, extra_options: Any = None
    ) -> dict[str, Any]:
        return {"q": q * 0.5}

    model, _, _, session = profile(bench.model)
    model, _ = compile_model(model, backend="eager")  # after the profile node: found all the same
    bench.sample(model)
    found = session.take()
    assert [step.graphs for step in found.steps] == [2, 0]
    assert any("graphs compiled" in note for note in found.notes)
    bench.sample(model)
    assert [step.graphs for step in session.take().steps] == [0, 0]
    model.set_model_attn1_patch(foreign)
    bench.sample(model)
    assert any("attn1_patch of" in note for note in session.take().notes)


@pytest.mark.comfy
def test_a_stopped_run_is_reported_too() -> None:
    bench = tiny("flux")
    model, _, _, session = profile(bench.model)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model.model_options["transformer_options"]["patches"] = {"post_input": [stop]}
    with pytest.raises(KeyboardInterrupt):
        bench.sample(model)
    assert PREPARE in stages(session.take())
    del model.model_options["transformer_options"]["patches"]
    bench.sample(model)
    assert stages(session.take()).count(STEP) == 2


def test_a_text_encoder_that_nobody_moves_is_timed_too() -> None:
    class Plain:
        def encode_from_tokens_scheduled(self, tokens: Any) -> str:
            return f"encoded {tokens}"

    _, clip, _, session = profile(tiny("least_sdxl").model, Plain())
    assert clip.encode_from_tokens_scheduled("a") == "encoded a"
    assert [row.stage for row in session.take().rows] == [ENCODE]


def test_what_fails_is_timed_and_still_fails() -> None:
    session = ProfileSession()
    vae = timed_copy(timed_copy(Decoder(), session, VAE_METHODS), session, VAE_METHODS)
    with pytest.raises(RuntimeError, match="out of memory"):
        vae.encode(1)
    vae.decode(1)
    assert stages(session.take()) == ["image encode", DECODE]


def made_up(on_gpu: bool) -> Any:
    """A run with known times: two seconds, of which one is compiling in the first step."""

    waited = [-1.0, -1.0]

    class Event:
        def __init__(self, at: float, device: int) -> None:
            self.at, self.device = at, device

        def elapsed_time(self, end: Event) -> float:
            assert end.at <= waited[end.device], "as torch says of an event that has not happened yet"
            return 1000 * (end.at - self.at)

        def synchronize(self) -> None:
            waited[self.device] = max(self.at, waited[self.device])

    def moment(at: float, device: int = 0) -> Moment:
        return Moment(at, Event(at, device) if on_gpu else None)

    spans = [Span(ENCODE, moment(0.0), moment(0.2)), Span(PREPARE, moment(0.3), moment(0.4))]
    at = 0.4
    for seconds, graphs, spared in [(0.5, 14, 0)] + [(0.06, 0, 0)] * 7 + [(0.06, 0, 1)]:
        inside = [(moment(at), moment(at + 0.9 * seconds))]
        spans.append(Span(STEP, moment(at), moment(at + seconds), graphs, inside, spared))
        at += seconds
    spans.append(Span(DECODE, moment(at + 0.1, 1), moment(at + 0.25, 1)))
    return resolve(spans, ("compiled model: 14 graphs compiled in 0.4 s",))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_times_of_the_gpu_stand_beside_those_of_python(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotpath.patches.profile_spans.cost_of_a_moment", lambda cuda: 1e-6)
    found = made_up(on_gpu)
    assert found.device == ("CUDA" if on_gpu else "CPU")
    assert found.total == pytest.approx(1.63)
    assert found.gap == pytest.approx(0.2)
    assert [step.waits_for_python for step in found.steps] == [*[on_gpu] * 8, False], "one a step cache skipped"
    assert found.steps[1].model_seconds == pytest.approx(0.054)
    text = table(found)
    assert "14 graphs compiled" in text
    assert ("the GPU waits for Python" in text) is on_gpu
    again = json.loads(json.dumps(found.as_dict()))
    assert len(again["stages"]) == 12 and again["total_seconds"] == pytest.approx(1.63)
    picture = draw(found)
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.shape[1] > 500
    assert picture.min() >= 0 and picture.max() <= 1
    red = torch.tensor([int(COMPILING[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    assert ((picture - red).abs().amax(-1) < 0.02).any()  # the step that compiled stands out


def run_of(*samplings: list[float]) -> Profile:
    """A run of samplings whose steps took so many seconds, and that compiled nothing."""
    rows = [
        Row(stage, 0.0, seconds, None, 0.0, 1, 0)
        for steps in samplings
        for stage, seconds in [(PREPARE, 0.001), *((STEP, seconds) for seconds in steps)]
    ]
    return Profile(tuple(rows), sum(row.seconds for row in rows), "CPU", (), 0.0)


def test_samplings_are_told_apart() -> None:
    found = run_of([0.02] * 3, [0.1])
    assert [len(steps) for steps in found.samplings] == [3, 1]
    assert "sampling 2 of 2\n  step 4      100.0 ms" in table(found)
    assert profile_drawing._headline(found) == "3 steps, median 20 ms, then 1 step, median 100 ms"
    assert "sampling" not in table(run_of([0.02]))


@pytest.mark.parametrize(
    ("samplings", "highest"),
    [
        ([[3.5, 0.007]], 0.007),  # a compilation that failed
        ([[3.5, 2.0, *[0.007] * 6]], 0.007),
        ([[0.1, 0.01] * 3], 0.1),  # a step cache
        ([[0.01] * 4, [0.1] * 2], 0.1),  # two sizes
        ([[0.2]], 0.2),
    ],
)
def test_a_step_like_no_other_does_not_flatten_the_chart(samplings: list[list[float]], highest: float) -> None:
    assert profile_drawing._highest(run_of(*samplings)) == highest


def test_a_run_without_steps_has_no_chart_of_steps() -> None:
    row = Row(ENCODE, 0.0, 0.04, None, 0.0, 1, 0)
    assert draw(Profile((row,), 0.04, "CPU", (), 0.0)).shape[1] < draw(run_of([0.02])).shape[1] / 2


@pytest.mark.parametrize(
    ("python", "gpu", "reads", "waits"),
    [
        (0.05, 0.5, "at the end of a step", False),  # a sampler that asks whether the next sigma is 0
        (0.05, 0.5, "in the model", False),  # a ControlNet that acts in a part of the schedule
        (0.05, 0.5, "", False),
        (0.05, 0.01, "at the end of a step", True),
        (0.05, 0.01, "in the model", True),
        (0.05, 0.01, "", True),
    ],
)
def test_who_waits_for_whom(
    python: float, gpu: float, reads: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of known times, in Python and on the GPU, and a Python that stops where it reads a number from the GPU."""
    clock = {"python": 0.0, "gpu": 0.0}  # the second: when the queue is empty

    class Event:
        def __init__(self) -> None:
            self.at = max(clock.values())

        def query(self) -> bool:
            return self.at <= clock["python"]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    def read() -> None:
        clock["python"] = max(clock.values())

    monkeypatch.setattr(Moment, "now", lambda device: Moment(clock["python"], Event()))
    monkeypatch.setattr("hotpath.patches.profile_spans.cost_of_a_moment", lambda cuda: 0.0)
    session = ProfileSession()
    steps = _Steps(session, torch.device("cuda"), None)
    for _ in range(6):
        start = steps.model_starts()
        if reads == "in the model":
            read()
        for _ in range(10):  # kernels
            clock["python"] += python / 10
            clock["gpu"] = max(clock.values()) + gpu / 10
        steps.model_ends(start)
        clock["python"] += 0.001  # the sampler
        if reads == "at the end of a step":
            read()
        steps.step_done()
    found = session.take()
    assert [step.waits_for_python for step in found.steps] == [waits] * 6
    assert ("CUDA graphs would help" in table(found)) is waits


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_devices_without_cuda_events_are_waited_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from hotpath.patches.warmup import _now

    waited: list[str] = []
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *_: waited.append(kind))
    device = torch.device(kind)
    session = ProfileSession()
    with session.stage(DECODE, device):
        assert waited == [kind]
    assert waited == [kind] * 2 and session.take().device == kind.upper()
    _now(SimpleNamespace(load_device=device))
    assert waited == [kind] * 3


def test_without_a_run_or_matplotlib_a_sentence_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    assert "Nothing ran" in table(ProfileSession().take())
    assert draw(ProfileSession().take()).shape[1] < 100
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    said: list[str] = []
    monkeypatch.setattr(profile_drawing, "_sentence", lambda text: said.append(text) or torch.zeros(1, 1, 1, 3))
    draw(made_up(False))
    assert "pip install matplotlib" in said[0]


def test_noting_a_moment_costs_little() -> None:
    assert cost_of_a_moment(False) < 1e-4


@pytest.mark.comfy
def test_the_nodes_hand_a_run_to_a_report() -> None:
    from hotpath.nodes import NODE_CLASS_MAPPINGS as nodes

    bench = tiny("flux")
    model, clip, vae, session = nodes["HotpathProfile"]().measure(bench.model)
    assert clip is None and vae is None
    bench.sample(model)
    chart, text, numbers = nodes["HotpathProfileReport"]().report(session)
    assert chart.shape[3] == 3 and "2 x step" in text
    assert len([row for row in json.loads(numbers)["stages"] if row["stage"] == STEP]) == 2
    assert "text encode did not run" in text
