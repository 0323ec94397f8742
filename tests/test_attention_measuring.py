"""The attention dispatcher measures what is exact: once, for good, and without being misled."""

from __future__ import annotations

import json
import os
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch
from attention_calls import ADA, AUTO, BY_NAME, CPU, HOPPER, call, fake, measured, named, qkv
from hotpath.attention import choice, dispatch
from hotpath.attention.capabilities import AttentionCall, DeviceFacts
from hotpath.attention.choice import Choice, MeasuredChoices, class_of, fastest, milliseconds, size_class
from hotpath.attention.dispatch import (
    BACKENDS,
    AttentionDispatcher,
    AttentionPolicy,
    AttentionUnavailable,
)
from hotpath.attention.events import AttentionLog
from hotpath.attention.reference import attention_reference
from hotpath.attention.torch_backends import import_fault, sdpa


def test_auto_measures_once_and_takes_the_fastest():
    dispatcher, clock = measured()
    log = AttentionLog()
    q, k, v = qkv()
    for _ in range(3):
        dispatcher.attend(q, k, v, policy=AUTO, record=log)
    assert clock.timed == ["sdpa_cudnn", "sdpa_flash", "flash2"]
    ((event, count),) = log.events().items()
    assert (event.used, count) == ("sdpa_flash", 3) and "fastest of 3: 1.000 ms" in event.reason
    named = AttentionLog()  # a call that needs full precision takes what is named all the same, if that is exact
    dispatcher.attend(q, k, v, policy=AttentionPolicy("flash2"), record=named, exact=True)
    assert [event.used for event in named.events()] == ["flash2"]


def test_a_prompt_one_token_longer_is_not_measured_anew():
    dispatcher, clock = measured()
    for keys in (96, 95, 89):
        q, k, v = qkv(queries=64, keys=keys)
        dispatcher.attend(q, k, v, policy=AUTO)
    assert len(clock.timed) == 6  # 96 is a multiple of 8; 95 and 89 are one class that is not
    dispatcher.attend(*qkv(queries=64, keys=200), policy=AUTO)
    dispatcher.attend(*qkv(queries=64, keys=96, width=32), policy=AUTO)
    assert len(clock.timed) == 12
    assert [size_class(n) for n in (1, 15, 16, 17, 33, 64, 65, 4096, 4128)] == [1, 15, 16, 18, 36, 64, 72, 4096, 4608]


def test_measurements_outlive_the_process_per_device_and_version(tmp_path):
    tmp_path = tmp_path / "not made yet"
    q, k, v = qkv()
    first, clock = measured(tmp_path)
    first.attend(q, k, v, policy=AUTO)
    again, silent = measured(tmp_path)
    again.attend(q, k, v, policy=AUTO)
    assert clock.timed and not silent.timed
    for changes in ({"versions": {"torch": "2"}}, {"device": ADA}):
        other, clock = measured(tmp_path, **changes)
        other.attend(q, k, v, policy=AUTO)
        assert clock.timed
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and all("nvidia" in path.name and path.suffix == ".json" for path in files)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"choices": {"a": {}}}', '{"choices": {"a": {"backend": "x", "milliseconds": {"y": 1}}}}']
)
def test_a_damaged_file_is_measured_anew(tmp_path, text, caplog):
    dispatcher, _ = measured(tmp_path)
    path = dispatcher.choices.file(HOPPER)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    dispatcher.attend(*qkv(), policy=AUTO)
    assert "measured anew" in caplog.text and json.loads(path.read_text())["choices"]


def test_the_file_is_bounded_and_keeps_what_another_process_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "LARGEST", 20)
    mine, theirs = MeasuredChoices(tmp_path), MeasuredChoices(tmp_path)
    mine.get(call(), HOPPER)
    theirs.put(call(queries=64), HOPPER, Choice("a", {"a": 1.0}))
    mine.put(call(), HOPPER, Choice("b", {"b": 1.0}))
    assert MeasuredChoices(tmp_path).get(call(queries=64), HOPPER) == Choice("a", {"a": 1.0})
    for width in range(25):
        mine.put(call(width=width), HOPPER, Choice("b", {"b": 1.0}))
    stored = json.loads(mine.file(HOPPER).read_text())["choices"]
    assert len(stored) == 20 and class_of(call(width=24)) in stored
    assert not list(tmp_path.glob(".writing-*"))


def test_a_disk_that_refuses_is_no_error(tmp_path, caplog):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    dispatcher, _ = measured(tmp_path / "occupied")
    dispatcher.attend(*qkv(), policy=AUTO)
    dispatcher.attend(*qkv(), policy=AUTO)
    assert "was not written" in caplog.text


def test_noise_does_not_decide():
    assert fastest({"a": 1.0, "b": 0.99}).backend == "a"
    assert fastest({"a": 1.0, "b": 0.9, "c": 0.89}).backend == "b"


def test_what_counts_is_the_fastest_run_after_the_first(monkeypatch):
    """The first may compile, or find what it needs in a cache that the others do not."""
    took, now = iter([0.5, 3.0, 1.0, *[2.0] * choice.REPEATS]), [0.0]

    def run():
        now[0] += next(took)

    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
    assert milliseconds(run, CPU) == 1000.0


def test_a_candidate_that_fails_or_lies_is_off_with_a_message(caplog):
    def broken(q, k, v, mask, scale):
        raise RuntimeError("no kernel image")

    def wrong(q, k, v, mask, scale):
        return -sdpa(q, k, v, mask, scale)

    backends = [
        fake("sdpa_cudnn", named("sdpa_cudnn", broken)),
        fake("sdpa_flash", named("sdpa_flash", wrong)),
        fake("flash2", named("flash2")),
    ]
    dispatcher, clock = measured(backends=backends, sdpa_cudnn=1.0, sdpa_flash=1.0, flash2=9.0)
    q, k, v = qkv()
    out = dispatcher.attend(q, k, v, policy=AUTO)
    torch.testing.assert_close(out, attention_reference(q, k, v), atol=2e-5, rtol=0)
    assert clock.timed == ["flash2"]
    assert "sdpa_cudnn is off" in caplog.text and "no kernel image" in caplog.text and "cosine" in caplog.text


def wrong(q, k, v, mask, scale):
    return -sdpa(q, k, v, mask, scale)


def test_when_every_candidate_lies_none_of_them_computes():
    dispatcher, _ = measured(
        backends=[fake(name, named(name, wrong)) for name in ("sdpa_cudnn", "flash2")] + [fake("sdpa", sdpa)]
    )
    q, k, v = qkv()
    log = AttentionLog()
    for _ in range(2):
        out = dispatcher.attend(q, k, v, policy=AUTO, record=log)
        torch.testing.assert_close(out, attention_reference(q, k, v), atol=2e-5, rtol=0)
    assert [event.used for event in log.events()] == ["sdpa"]


RADEON, ARC = DeviceFacts("hip", "AMD Radeon Graphics"), DeviceFacts("xpu", "xpu")


@pytest.mark.parametrize("device", [RADEON, ARC])
@pytest.mark.parametrize("damage", [torch.neg, lambda out: out * float("nan"), torch.zeros_like])
def test_what_torch_picks_is_looked_at_where_nothing_is_measured(monkeypatch, caplog, device, damage):
    ran: list[str] = []

    def picked(q, k, v, mask, scale):
        ran.append("sdpa")
        return damage(sdpa(q, k, v, mask, scale))

    backends = [replace(BY_NAME["sdpa"], run=picked), BY_NAME["sdpa_math"]]
    dispatcher, log = AttentionDispatcher(backends, device=lambda _: device), AttentionLog()
    inputs = qkv()
    for _ in range(3):
        out = dispatcher.attend(*inputs, policy=AUTO, record=log)
        torch.testing.assert_close(out, attention_reference(*inputs), atol=2e-5, rtol=0)
    ((event, count),) = log.events().items()
    assert (event.used, count, len(ran)) == ("sdpa_math", 3, 1) and "sdpa: its result has" in event.reason
    assert len(caplog.records) == 1 and "sdpa is off for" in caplog.text
    asked = AttentionCall(CPU, torch.float32, 1, 1, 1, 16, 16, 64, 64)
    for policy in (AUTO, AttentionPolicy("sdpa")):
        name, reason = dispatcher.traced(asked, policy, False)
        assert name == "sdpa_math" and "sdpa: its result has" in reason
    assert dispatcher.traced(replace(asked, width=32), AUTO, False)[0] == "sdpa"
    with pytest.raises(AttentionUnavailable, match="its result has"):
        dispatcher.attend(*inputs, policy=AttentionPolicy("sdpa", strict=True))
    seen = AttentionDispatcher(backends, device=lambda _: DeviceFacts("mps", "mps"))
    monkeypatch.setattr(dispatch, "fault", None)
    seen.attend(*inputs, policy=AUTO)


@pytest.mark.parametrize("answer", [torch.OutOfMemoryError("no room"), RuntimeError("no such operator"), None])
def test_a_look_that_is_not_possible_costs_torchs_pick_nothing(monkeypatch, answer):
    looked: list[bool] = []

    def fault(*_):
        looked.append(torch.is_grad_enabled())
        if answer is not None:
            raise answer

    monkeypatch.setattr(dispatch, "fault", fault)
    backends = [BY_NAME["sdpa"], BY_NAME["sdpa_math"]]
    dispatcher, log = AttentionDispatcher(backends, device=lambda _: RADEON), AttentionLog()
    for _ in range(3):
        dispatcher.attend(*qkv(), policy=AUTO, record=log)
    assert [event.used for event in log.events()] == ["sdpa"]
    assert looked == [False] * (3 if isinstance(answer, torch.OutOfMemoryError) else 1)


def test_what_does_not_fit_into_memory_is_measured_once():
    def greedy(run, device):
        timed.append(run)
        raise torch.OutOfMemoryError("CUDA out of memory")

    timed: list[object] = []
    dispatcher, _ = measured()
    dispatcher.clock = greedy
    log = AttentionLog()
    for _ in range(3):
        dispatcher.attend(*qkv(), policy=AUTO, record=log)
    assert len(timed) == 3  # each candidate, at the first call
    assert [event.reason for event in log.events()] == ["there was no memory to measure with"]


def test_a_kernel_that_ran_before_and_fails_now_gives_way(caplog):
    calls = []

    def moody(q, k, v, mask, scale):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no such layout")
        return sdpa(q, k, v, mask, scale)

    dispatcher = AttentionDispatcher([fake("flash2", moody), fake("sdpa")], device=lambda _: HOPPER)
    log, inputs = AttentionLog(), qkv()
    for _ in range(4):
        out = dispatcher.attend(*inputs, policy=AUTO, record=log)
        torch.testing.assert_close(out, attention_reference(*inputs), atol=2e-5, rtol=0)
    assert [event.used for event in log.events()] == ["flash2", "sdpa"] and len(calls) == 3
    assert "flash2 is off" in caplog.text and "no such layout" in caplog.text


def test_a_remembered_choice_that_fails_now_is_measured_anew(tmp_path):
    def broken(q, k, v, mask, scale):
        raise RuntimeError("no kernel image")

    first, _ = measured(tmp_path)
    first.attend(*qkv(), policy=AUTO)
    names = ("sdpa_cudnn", "sdpa_flash", "flash2")
    again, clock = measured(
        tmp_path, backends=[fake(n, named(n, broken) if n == "sdpa_flash" else named(n)) for n in names]
    )
    log = AttentionLog()
    for _ in range(3):
        again.attend(*qkv(), policy=AUTO, record=log)
    ((event, count),) = log.events().items()
    assert event.used in ("sdpa_cudnn", "flash2") and "fastest of 2" in event.reason and count == 3
    assert sorted(clock.timed) == ["flash2", "sdpa_cudnn"]


def test_a_library_that_fails_is_not_imported_for_every_size(tmp_path, monkeypatch):
    """Such an import can take seconds, and every new size asks."""
    (tmp_path / "broken_attention.py").write_text(
        "import pathlib; pathlib.Path(__file__ + '.log').open('a').write('x'); raise OSError('undefined symbol')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(3):
        assert "undefined symbol" in import_fault("broken_attention", "")
    assert (tmp_path / "broken_attention.py.log").read_text() == "x"
    monkeypatch.setitem(sys.modules, "broken_attention", types.ModuleType("broken_attention"))
    assert import_fault("broken_attention", "") is None


def test_running_out_of_memory_while_measuring_only_skips_the_candidate():
    def greedy(q, k, v, mask, scale):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backends = [fake("sdpa_cudnn", named("sdpa_cudnn", greedy)), fake("flash2", named("flash2"))]
    dispatcher, _ = measured(backends=backends, sdpa_cudnn=1.0, flash2=1.0)
    q, k, v = qkv()
    plan_log = AttentionLog()
    dispatcher.attend(q, k, v, policy=AUTO, record=plan_log)
    assert [e.used for e in plan_log.events()] == ["flash2"]
    only = AttentionDispatcher([fake("sdpa", greedy)], device=lambda _: HOPPER)
    with pytest.raises(torch.OutOfMemoryError):
        only.attend(q, k, v, policy=AUTO)


def test_nothing_is_measured_while_a_graph_records(monkeypatch):
    dispatcher, clock = measured()
    monkeypatch.setattr(dispatch, "_recording", lambda device: True)
    log = AttentionLog()
    dispatcher.attend(*qkv(), policy=AUTO, record=log)
    assert not clock.timed and [e.reason for e in log.events()] == ["not measured yet"]
    monkeypatch.undo()
    dispatcher.attend(*qkv(), policy=AUTO)
    assert clock.timed


def test_auto_takes_no_lossy_backend():
    assert all(BY_NAME[name].exact for name in (*dispatch.AUTO, *dispatch.LAST))
    assert {b.name for b in BACKENDS if not b.exact} == {"sage1", "sage2", "sage3", "comfy_kitchen_int8"}


def test_many_threads_measure_once_and_count_every_call():
    dispatcher, clock = measured()
    log = AttentionLog()
    q, k, v = qkv()

    def work():
        for _ in range(20):
            dispatcher.attend(q, k, v, policy=AUTO, record=log)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clock.timed) == 3 and log.calls == 80


def test_what_a_killed_process_had_begun_to_write_goes(tmp_path):
    left = [tmp_path / f"{choice.WRITING}{name}" for name in ("old", "young")]
    for path in left:
        path.write_text("half")
    os.utime(left[0], (1, 1))
    dispatcher, _ = measured(tmp_path)
    dispatcher.attend(*qkv(), policy=AUTO)
    assert [path.exists() for path in left] == [False, True]
