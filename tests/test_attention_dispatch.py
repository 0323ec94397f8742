"""The attention dispatcher: what is chosen and why, what is measured and kept, and what lossy libraries may not do."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import types
from dataclasses import replace

import pytest
import sage_modules
import torch
from hotpath.attention import choice, compiled, dispatch
from hotpath.attention.capabilities import (
    BOOL_MASK,
    FLOAT_MASK,
    NO_MASK,
    OTHER_FLOAT_MASK,
    AttentionCall,
    Backend,
    DeviceFacts,
)
from hotpath.attention.choice import Choice, MeasuredChoices, class_of, fastest, milliseconds, size_class
from hotpath.attention.dispatch import (
    BACKENDS,
    AttentionDispatcher,
    AttentionPolicy,
    AttentionUnavailable,
    attend,
)
from hotpath.attention.events import AttentionLog
from hotpath.attention.quantized_backends import QUANTIZED_BACKENDS, within_float16
from hotpath.attention.reference import attention_reference, fault
from hotpath.attention.torch_backends import TORCH_BACKENDS, import_fault, sdpa

CPU = torch.device("cpu")
HOPPER = DeviceFacts("cuda", "NVIDIA H200", (9, 0))
ADA = DeviceFacts("cuda", "NVIDIA GeForce RTX 4090", (8, 9))
TURING = DeviceFacts("cuda", "NVIDIA GeForce RTX 2080", (7, 5))
BLACKWELL = DeviceFacts("cuda", "NVIDIA GeForce RTX 5090", (12, 0))
AUTO = AttentionPolicy()
BY_NAME = {backend.name: backend for backend in BACKENDS}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def qkv(
    batch: int = 2,
    heads: int = 4,
    queries: int = 70,
    keys: int = 90,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    key_heads: int | None = None,
    value_width: int | None = None,
    device: torch.device = CPU,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (
        (batch, heads, queries, width),
        (batch, key_heads or heads, keys, width),
        (batch, key_heads or heads, keys, value_width or width),
    )
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def masks(queries: int = 70, keys: int = 90, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(1, 1, queries, keys, generator=generator) > 0.3
    return {
        "bool": allowed,
        "keys only": allowed[:, :, :1],
        "per sample": torch.rand(2, 1, queries, keys, generator=generator) > 0.3,
        "per head": torch.rand(2, 4, queries, keys, generator=generator) > 0.3,
        "float": torch.randn(1, 1, queries, keys, generator=generator).to(dtype),
    }


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


# --- the same numbers whatever computes them -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["auto", "sdpa", "sdpa_math", "sdpa_flash", "flex", "sage", "flash2"])
@pytest.mark.parametrize("mask", [None, "bool", "keys only", "per sample", "per head", "float"])
def test_every_policy_gives_the_definition(policy, mask):
    q, k, v = qkv()
    m = None if mask is None else masks()[mask]
    before = [x.clone() for x in (q, k, v)]
    out = attend(q, k, v, m, policy=AttentionPolicy(policy))
    torch.testing.assert_close(out, attention_reference(q, k, v, m), atol=2e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("policy", ["auto", "sdpa_math", "flex"])
def test_shared_heads_unequal_widths_scale_and_layout(policy):
    q, k, v = qkv(key_heads=2, value_width=48)
    expected = attention_reference(q, k, v, None, 0.2)
    out = attend(q, k, v, scale=0.2, policy=AttentionPolicy(policy))
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    turned = attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=0.2, layout="NHD", policy=AttentionPolicy(policy)
    )
    torch.testing.assert_close(turned.transpose(1, 2), expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="BHND"):
        attend(q, k, v, layout="BHND", policy=AUTO)
    with pytest.raises(ValueError, match="no attention backend"):
        AttentionPolicy("fastest")


def test_gradients_flow_through_auto():
    q, k, v = (x.requires_grad_() for x in qkv())
    attend(q, k, v, policy=AUTO).square().sum().backward()
    a = q.grad.clone()
    q.grad = None
    attention_reference(q, k, v).square().sum().backward()
    torch.testing.assert_close(a, q.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("policy", ["auto", "sdpa_flash", "sdpa_math"])
def test_what_one_signature_covers_is_computed_whatever_its_layout(policy):
    """A kernel that ran for one layout in memory may refuse another, and a signature does not tell them apart."""
    q, k, v = qkv()
    mask = masks()["per head"]
    expected, masked = attention_reference(q, k, v), attention_reference(q, k, v, mask[0])
    for layout in (lambda x: x, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
        out = attend(*map(layout, (q, k, v)), policy=AttentionPolicy(policy))
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    for shape in (mask[:1], mask[0]):
        out = attend(q, k, v, shape, policy=AttentionPolicy(policy))
        torch.testing.assert_close(out, masked, atol=2e-5, rtol=0)
    half = torch.randn(1, 1, 70, 90).half()
    out = attend(q, k, v, half, policy=AttentionPolicy(policy))
    torch.testing.assert_close(out, attention_reference(q, k, v, half), atol=2e-5, rtol=0)


# --- capability records ---------------------------------------------------------------------------------------------


def call(**changes) -> AttentionCall:
    return replace(AttentionCall(CPU, torch.bfloat16, 2, 24, 24, 4096, 4096, 128, 128), **changes)


@pytest.mark.parametrize(
    ("name", "device", "changes", "words"),
    [
        ("sdpa_cudnn", HOPPER, {"width": 256, "value_width": 256}, None),
        ("sdpa_cudnn", ADA, {"width": 256, "value_width": 256}, "ends at 128"),
        ("sdpa_cudnn", HOPPER, {"width": 60, "value_width": 60}, "multiples of 8"),
        ("sdpa_cudnn", TURING, {}, "compute capability 8.0"),
        ("sdpa_flash", HOPPER, {"mask": BOOL_MASK}, "takes no mask"),
        ("sdpa_flash", HOPPER, {"dtype": torch.float32}, "float32"),
        ("sdpa_flash", DeviceFacts("cpu"), {"dtype": torch.float32, "mask": BOOL_MASK}, None),
        ("sdpa_flash", HOPPER, {"value_width": 64}, "equally wide"),
        ("sdpa_efficient", HOPPER, {"value_width": 64}, None),
        ("sdpa_efficient", TURING, {}, "bfloat16 needs"),
        ("sdpa_efficient", HOPPER, {"mask": OTHER_FLOAT_MASK}, "float mask of another dtype"),
        ("sdpa_math", DeviceFacts("mps"), {"mask": OTHER_FLOAT_MASK}, None),
        ("flash3", ADA, {}, "9.0"),
        ("sage3", HOPPER, {}, "12.0"),
        ("sage1", DeviceFacts("hip", "MI300"), {}, "this is hip"),
        ("xformers", DeviceFacts("cpu"), {}, "this is cpu"),
    ],
)
def test_capability_records(name, device, changes, words):
    refusal = BY_NAME[name].refusal(call(**changes), device)
    assert refusal is None if words is None else words in refusal


def test_a_missing_library_is_named_with_its_cure():
    reasons = AttentionDispatcher(device=lambda _: HOPPER).available(CPU)
    assert reasons["sdpa_cudnn"] is None
    for name, cure in (
        ("flash2", "pip install flash-attn"),
        ("flash3", "hopper"),
        ("xformers", "pip install xformers"),
    ):
        if reasons[name] is not None:
            assert cure in reasons[name]


def test_every_kind_of_call_is_in_the_log_once(caplog):
    log = AttentionLog("auto")
    with caplog.at_level(logging.INFO, "hotpath.attention"):
        for _ in range(2):
            log.begin()
            for queries in (5, 6, 5):
                AttentionDispatcher().attend(*qkv(1, 2, queries, 7, 8), policy=AUTO, record=log)
    said = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert len(said) == 2 and said[0].startswith("attention: auto asked for, 1 x 2 heads x 5 by 7")


def test_what_differs_in_a_signature():
    q, k, v = qkv(key_heads=2)
    kinds = [AttentionCall.of(q, k, v, m).mask for m in (None, masks()["bool"], masks()["float"])]
    assert kinds == [NO_MASK, BOOL_MASK, FLOAT_MASK]
    assert AttentionCall.of(q, k, v, masks()["float"].double()).mask == OTHER_FLOAT_MASK
    assert "4 over 2 heads" in AttentionCall.of(q, k, v, None).describe()


# --- measuring ------------------------------------------------------------------------------------------------------


def fake(name: str, run=sdpa, **fields) -> Backend:
    return Backend(
        name, name, run, devices=("cpu", "cuda"), dtypes=frozenset({torch.float32, torch.bfloat16}), **fields
    )


class Clock:
    """Says how long each backend takes, and what was timed."""

    def __init__(self, **times: float) -> None:
        self.times, self.timed = times, []

    def __call__(self, run, device) -> float:
        run()
        name = run.func.__name__
        self.timed.append(name)
        return self.times[name]


def named(name: str, inner=sdpa):
    def run(q, k, v, mask, scale):
        return inner(q, k, v, mask, scale)

    run.__name__ = name
    return run


def measured(tmp_path=None, versions=None, backends=None, device=HOPPER, **times) -> tuple[AttentionDispatcher, Clock]:
    clock = Clock(**(times or {"sdpa_cudnn": 3.0, "sdpa_flash": 1.0, "flash2": 2.0}))
    backends = backends or [fake(name, named(name)) for name in clock.times]
    choices = MeasuredChoices(tmp_path, versions or {"torch": "1"})
    return AttentionDispatcher([*backends, *TORCH_BACKENDS[:1]], choices, lambda _: device, clock), clock


def test_auto_measures_once_and_takes_the_fastest():
    dispatcher, clock = measured()
    log = AttentionLog()
    q, k, v = qkv()
    for _ in range(3):
        dispatcher.attend(q, k, v, policy=AUTO, record=log)
    assert clock.timed == ["sdpa_cudnn", "sdpa_flash", "flash2"]
    ((event, count),) = log.events().items()
    assert (event.used, count) == ("sdpa_flash", 3) and "fastest of 3: 1.000 ms" in event.reason


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
    assert milliseconds(lambda: None, CPU) < 1


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


# --- lossy backends, with modules that behave as the published ones --------------------------------------------------


@pytest.fixture
def sage(monkeypatch):
    """Install a fake library and get a dispatcher that believes in a device; comfy-kitchen has no kernel."""

    def install(module=None, device=HOPPER) -> AttentionDispatcher:
        for name in ("sageattention", "sageattn3"):
            monkeypatch.setitem(sys.modules, name, None)
        if module is not None:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return AttentionDispatcher([TORCH_BACKENDS[0], *QUANTIZED_BACKENDS], device=lambda _: device)

    return install


def biased(dtype=torch.float16, **sizes):
    """Keys with a direction that all of them share, as real ones have."""
    q, k, v = qkv(dtype=dtype, **sizes)
    return q, k + 16 * torch.sin(torch.arange(k.shape[-1], dtype=torch.float32)).to(dtype), v


def test_sage_1_leaves_the_keys_alone_and_smooths_them(sage):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = biased()
    before = k.clone()
    out = dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1", strict=True), record=log)
    assert torch.equal(k, before)
    expected = attention_reference(q, k, v)
    rough = sys.modules["sageattention"].sageattn(q, k, v, smooth_k=False)
    assert (out - expected).norm() < 0.5 * (rough - expected).norm()
    assert [event.used for event in log.events()] == ["sage1"]
    # The trap itself, as the library has it.
    sys.modules["sageattention"].sageattn(q, k, v)
    assert not torch.equal(k, before)


def test_sage_1_never_gets_a_mask(sage):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = qkv(dtype=torch.float16)
    mask = masks()["bool"]
    out = dispatcher.attend(q, k, v, mask, policy=AttentionPolicy("sage1"), record=log)
    assert cosine(out, attention_reference(q, k, v, mask)) > 0.9999
    ((event, _),) = log.events().items()
    assert event.used == "sdpa" and "takes no mask" in event.reason
    swallowed = sys.modules["sageattention"].sageattn(q, k.clone(), v, attn_mask=mask)
    assert cosine(swallowed, attention_reference(q, k, v, mask)) < 0.99
    with pytest.raises(AttentionUnavailable, match=r"sage1 cannot compute.*bool mask"):
        dispatcher.attend(q, k, v, mask, policy=AttentionPolicy("sage1", strict=True))


@pytest.mark.parametrize(("width", "used"), [(64, "sage1"), (96, "sage1"), (128, "sage1"), (72, "sdpa"), (40, "sdpa")])
def test_sage_1_has_three_head_sizes(sage, width, used):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    dispatcher.attend(*qkv(width=width, dtype=torch.float16), policy=AttentionPolicy("sage1"), record=log)
    assert [event.used for event in log.events()] == [used]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_beyond_float16_survive_sage_1(sage, dtype):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = qkv(dtype=dtype)
    v = v * 1e5
    assert not torch.isfinite(sys.modules["sageattention"].sageattn(q, k.clone(), v)).all()
    out = dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1", strict=True), record=log)
    assert cosine(out, attention_reference(q, k, v)) > 0.999
    small, factor = within_float16(v / 1e5)
    assert torch.equal(small, v / 1e5) and float(factor) == 1


def test_sage_2_uses_the_kernel_that_takes_masks(sage):
    dispatcher, log = sage(sage_modules.sage2()), AttentionLog()
    q, k, v = qkv(dtype=torch.bfloat16)
    for mask in (None, masks()["bool"], masks(dtype=torch.bfloat16)["float"]):
        out = dispatcher.attend(q, k, v, mask, policy=AttentionPolicy("sage", strict=True), record=log)
        assert cosine(out, attention_reference(q, k, v, mask)) > 0.999
    assert {event.used for event in log.events()} == {"sage2"}
    older = sage(sage_modules.sage2(masks=False))
    with pytest.raises(AttentionUnavailable, match="this release of sageattention takes no mask"):
        older.attend(q, k, v, masks()["bool"], policy=AttentionPolicy("sage2", strict=True))
    newest = sage(sage_modules.sage2(), device=BLACKWELL)
    with pytest.raises(AttentionUnavailable, match="compute capability 12"):
        newest.attend(q, k, v, masks()["bool"], policy=AttentionPolicy("sage2", strict=True))


def test_sage_3_gets_its_own_keys_and_the_scale(sage):
    dispatcher = sage(sage_modules.sage3(), device=BLACKWELL)
    q, k, v = biased()
    before = k.clone()
    out = dispatcher.attend(q, k, v, scale=0.05, policy=AttentionPolicy("sage3", strict=True))
    assert torch.equal(k, before) and cosine(out, attention_reference(q, k, v, None, 0.05)) > 0.999


@pytest.mark.parametrize("name", ["sage1", "sage2", "sage3"])
def test_sage_runs_on_the_device_of_its_tensors_and_leaves_the_callers(sage, monkeypatch, name):
    """Triton launches on the current device, and SageAttention 2 sets it."""
    from contextlib import contextmanager

    current = ["the caller's"]

    @contextmanager
    def on_device(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    monkeypatch.setattr("hotpath.attention.quantized_backends.on_device", on_device)
    module = getattr(sage_modules, name)()
    dispatcher = sage(module, device=BLACKWELL if name == "sage3" else HOPPER)
    called = next(key for key in ("sageattn", "sageattn3_blackwell") if hasattr(module, key))
    real, seen = getattr(module, called), []

    def library(q, *args, **kwargs):
        seen.append(current[0])
        current[0] = "left behind"
        return real(q, *args, **kwargs)

    monkeypatch.setattr(module, called, library)
    dispatcher.attend(*qkv(dtype=torch.float16), policy=AttentionPolicy(name, strict=True))
    assert seen == [CPU] and current == ["the caller's"]


def test_the_order_of_sage(sage, monkeypatch):
    q, k, v = qkv(dtype=torch.bfloat16)
    policy = AttentionPolicy("sage")

    def used(dispatcher):
        log = AttentionLog()
        dispatcher.attend(q, k, v, policy=policy, record=log)
        ((event, _),) = log.events().items()
        return event.used, event.reason

    assert used(sage(sage_modules.sage2()))[0] == "sage2"
    name, reason = used(sage(sage_modules.sage1()))
    assert name == "sage1" and "sage2: the installed sageattention is generation 1" in reason
    assert "comfy_kitchen_int8" in reason
    kitchen = sage_modules.sage1()
    kitchen.__name__ = "comfy_kitchen"
    kitchen.int8_attention_is_available = lambda: True
    kitchen.int8_attention = lambda q, k, v, scale, attn_mask: sdpa(q, k, v, attn_mask, scale)
    dispatcher = sage(sage_modules.sage1())
    monkeypatch.setitem(sys.modules, "comfy_kitchen", kitchen)
    assert used(dispatcher)[0] == "comfy_kitchen_int8"
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    name, reason = used(sage(None))
    assert name == "sdpa" and reason.count("is not installed") == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda out: out * float("nan"), "not finite"), (lambda out: out.roll(1, 2), "cosine"), (torch.neg, "cosine")],
)
def test_a_lossy_kernel_that_is_wrong_is_off_with_one_message(sage, monkeypatch, caplog, damage, words):
    module = sage_modules.sage1()
    good = module.sageattn
    module.sageattn = lambda *a, **k: damage(good(*a, **k))
    dispatcher, log = sage(module), AttentionLog()
    q, k, v = qkv(dtype=torch.float16)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1"), record=log)
    assert cosine(out, attention_reference(q, k, v)) > 0.9999
    assert (
        len(caplog.records) == 1 and words in caplog.text and "sage1 is off for 2 x 4 heads x 70 by 90" in caplog.text
    )
    ((event, count),) = log.events().items()
    assert (event.used, count) == ("sdpa", 3) and words in event.reason
    with pytest.raises(AttentionUnavailable, match=words):
        dispatcher.attend(q, k, v, policy=AttentionPolicy("sage1", strict=True))


def test_a_lossy_kernel_is_checked_once_per_signature(sage, monkeypatch):
    checks = []
    monkeypatch.setattr(dispatch, "fault", lambda *a: checks.append(a[0].shape))
    dispatcher = sage(sage_modules.sage1())
    for queries in (70, 70, 71, 70):
        dispatcher.attend(*qkv(queries=queries, dtype=torch.float16), policy=AttentionPolicy("sage1"))
    assert [shape[2] for shape in checks] == [70, 71]


def test_a_call_that_needs_full_precision_gets_it(sage):
    dispatcher, log = sage(sage_modules.sage1()), AttentionLog()
    q, k, v = qkv(dtype=torch.float16)
    dispatcher.attend(q, k, v, policy=AttentionPolicy("sage", strict=True), record=log, exact=True)
    ((event, _),) = log.events().items()
    assert event.used == "sdpa" and "full precision" in event.reason


def test_what_a_fault_is():
    q, k, v = qkv()
    mask = masks()["bool"].clone()
    mask[:, :, 5] = False
    out = attention_reference(q, k, v, mask)
    assert fault(out, q, k, v, mask, None) is None
    blind = out.clone()
    blind[:, :, 5] = 3.0
    assert fault(blind, q, k, v, mask, None) is None, "kernels differ where no key takes part"
    blind[:, :, 5] = float("nan")
    assert "not finite" in fault(blind, q, k, v, mask, None), "but NaN would spread"
    blind[:, :, 5] = 0.0
    blind[:, :, 6] = float("inf")
    assert "not finite" in fault(blind, q, k, v, mask, None)
    q[0, 0, 0, 0] = float("nan")
    assert fault(blind, q, k, v, mask, None) is None, "broken inputs prove nothing about a kernel"


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


def flags() -> tuple:
    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        tuple(torch._C._get_sdp_priority_order()),
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


def test_kernel_flags_are_restored_when_two_threads_overlap(monkeypatch):
    """The first to ask for a kernel is the first to leave: it would undo the other's, which would then undo to its."""
    before, q = flags(), qkv()
    real, waits = torch.nn.functional.scaled_dot_product_attention, iter((0.05, 0.15))

    def slow(*args, **kwargs):
        time.sleep(next(waits))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slow)
    threads = [
        threading.Thread(target=lambda p=policy: attend(*q, policy=AttentionPolicy(p)))
        for policy in ("sdpa_flash", "sdpa_math")
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert flags() == before


def test_a_log_is_bounded_and_readable():
    log = AttentionLog("auto")
    assert "Nothing was sampled yet" in log.report()
    log.begin()
    assert "No call came here" in log.report()
    dispatcher = AttentionDispatcher()
    for queries in range(300):
        dispatcher.attend(*qkv(1, 1, queries + 1, 3, 8), policy=AUTO, record=log)
    assert log.calls == 300 and len(log.events()) == 256 and "44 calls of further sizes" in log.report()
    log.begin()
    assert log.calls == 0


# --- compiled -------------------------------------------------------------------------------------------------------


def compiled_attention(policy: str, log: AttentionLog | None, backend: str = "aot_eager", dynamic: bool | None = None):
    import torch._dynamo

    torch._dynamo.reset()
    compiled.prepare()
    chosen = AttentionPolicy(policy)

    def block(q, k, v, mask=None):
        return 2 * attend(q, k, v, mask, policy=chosen, record=log)

    return torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)


@pytest.mark.parametrize("policy", ["auto", "sdpa_flash", "sdpa_math"])
def test_kernels_of_torch_stay_in_the_graph(policy):
    log = AttentionLog(policy)
    compiled.number_of(log)
    block = compiled_attention(policy, log)
    for mask in (None, masks()["bool"]):
        q, k, v = qkv()
        torch.testing.assert_close(block(q, k, v, mask), 2 * attention_reference(q, k, v, mask), atol=4e-5, rtol=0)
    assert log.calls == 0 and "compiled into a graph" in log.report()


def test_everything_else_is_one_operator_that_decides_when_it_runs(sage, monkeypatch):
    dispatcher = sage(sage_modules.sage1())
    monkeypatch.setattr(dispatch, "dispatcher", lambda: dispatcher)
    log = AttentionLog("sage1")
    compiled.number_of(log)
    block = compiled_attention("sage1", log, dynamic=True)
    for queries in (70, 80, 96):
        q, k, v = biased(queries=queries)
        before = k.clone()
        out = block(q, k, v)
        assert torch.equal(k, before) and cosine(out, attention_reference(q, k, v)) > 0.999
    assert [event.used for event in log.events()] == ["sage1"] * 3, "counted when it runs, with the real sizes"


def test_strict_in_a_graph_says_the_same_as_outside():
    block = compiled_attention("flash2", None)
    log = AttentionLog("flash2")

    def strict(q, k, v):
        return attend(q, k, v, policy=AttentionPolicy("flash2", strict=True), record=log)

    block = torch.compile(strict, backend="aot_eager", fullgraph=True)
    with pytest.raises(AttentionUnavailable, match="flash2 cannot compute"):
        block(*qkv())


def test_a_graph_takes_what_was_measured_before(monkeypatch):
    dispatcher, _ = measured(backends=list(TORCH_BACKENDS[1:]), device=HOPPER)
    dispatcher.choices.put(call(width=64, value_width=64), HOPPER, Choice("sdpa_cudnn", {"sdpa_cudnn": 1.0}))
    dispatcher.choices.put(
        call(width=64, value_width=64, queries=77, keys=77), HOPPER, Choice("sdpa_efficient", {"sdpa_efficient": 1.0})
    )
    asked = call(width=64, value_width=64, queries=16, keys=16)
    assert dispatcher.traced(asked, AUTO, False)[0] == "sdpa_cudnn"
    assert dispatcher.traced(replace(asked, mask=BOOL_MASK), AUTO, False) == (
        "sdpa",
        "nothing was measured before compiling, torch picks",
    )
    assert dispatcher.traced(asked, AttentionPolicy("sdpa_math"), False) == ("sdpa_math", "")


def test_a_graph_takes_the_fastest_that_it_can_hold():
    dispatcher, _ = measured(backends=[*TORCH_BACKENDS[1:]], device=HOPPER)
    times = {"sdpa_cudnn": 2.0, "sdpa_flash": 1.5, "flash3": 1.0}
    dispatcher.choices.put(call(), HOPPER, Choice("flash3", times))
    name, reason = dispatcher.traced(call(queries=16, keys=16), AUTO, False)
    assert name == "sdpa_flash" and "fastest of 2 that a graph can hold" in reason


def test_what_failed_at_one_size_is_in_no_graph_for_all_sizes():
    dispatcher, _ = measured(backends=[*TORCH_BACKENDS[1:]], device=HOPPER)
    dispatcher.choices.put(call(), HOPPER, Choice("sdpa_cudnn", {"sdpa_cudnn": 1.0, "sdpa_flash": 2.0}))
    asked = call(queries=16, keys=16)
    assert dispatcher.traced(asked, AUTO, False)[0] == "sdpa_cudnn"
    dispatcher._switch_off(BY_NAME["sdpa_cudnn"], call(keys=77), "it fails: no execution plan")
    assert dispatcher.traced(asked, AUTO, False)[0] == "sdpa_flash"
    name, reason = dispatcher.traced(asked, AttentionPolicy("sdpa_cudnn"), False)
    assert name == "sdpa_flash" and "no execution plan" in reason
    assert (
        dispatcher.traced(replace(asked, dtype=torch.float16), AttentionPolicy("sdpa_cudnn"), False)[0] == "sdpa_cudnn"
    )


# --- a real GPU -----------------------------------------------------------------------------------------------------

SHAPES = {
    "z_image": {"batch": 1, "heads": 30, "queries": 4128, "keys": 4128, "width": 128},
    "sdxl_self": {"batch": 2, "heads": 10, "queries": 4096, "keys": 4096, "width": 64},
    "sdxl_cross": {"batch": 2, "heads": 20, "queries": 1024, "keys": 77, "width": 64},
    "shared": {"batch": 1, "heads": 16, "key_heads": 8, "queries": 1024, "keys": 1000, "width": 128},
    "unequal": {"batch": 1, "heads": 8, "queries": 512, "keys": 512, "width": 64, "value_width": 128},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(BY_NAME))
class TestOnCUDA:
    pytestmark = gpu

    def test_backend(self, name, shape, dtype):
        """Every backend that says it can, can; those that cannot say why, and nobody touches the caller's tensors."""
        device = torch.device("cuda")
        q, k, v = qkv(**SHAPES[shape], dtype=dtype, device=device)
        dispatcher = dispatch.AttentionDispatcher()
        for mask in (None, torch.rand(1, 1, q.shape[2], k.shape[2], device=device) > 0.3):
            before = [x.clone() for x in (q, k, v)]
            refusal = BY_NAME[name].refusal(AttentionCall.of(q, k, v, mask), dispatch.device_facts(device))
            if refusal is not None:
                with pytest.raises(AttentionUnavailable):
                    dispatcher.attend(q, k, v, mask, policy=AttentionPolicy(name, strict=True))
                continue
            out = dispatcher.attend(q, k, v, mask, policy=AttentionPolicy(name, strict=True))
            assert fault(out, q, k, v, mask, None, 0.9999 if BY_NAME[name].exact else 0.999) is None
            assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


class TestAutoOnCUDA:
    pytestmark = gpu

    @pytest.mark.parametrize("shape", SHAPES)
    def test_auto_measures_and_agrees(self, shape, tmp_path):
        q, k, v = qkv(**SHAPES[shape], dtype=torch.bfloat16, device=torch.device("cuda"))
        dispatcher, log = AttentionDispatcher(choices=MeasuredChoices(tmp_path)), AttentionLog()
        before = flags()
        out = dispatcher.attend(q, k, v, policy=AUTO, record=log)
        assert fault(out, q, k, v, None, None, 0.9999) is None and flags() == before
        facts = dispatch.device_facts(q.device)
        able = [n for n in dispatch.AUTO if BY_NAME[n].refusal(AttentionCall.of(q, k, v, None), facts) is None]
        assert len(able) < 2 or dispatcher.choices.get(AttentionCall.of(q, k, v, None), facts) is not None

    def test_in_a_cuda_graph(self):
        q, k, v = qkv(**SHAPES["sdxl_self"], dtype=torch.bfloat16, device=torch.device("cuda"))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            attend(q, k, v, policy=AUTO)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(q, k, v, policy=AUTO)
        graph.replay()
        torch.cuda.synchronize()
        assert fault(out, q, k, v, None, None, 0.9999) is None

    @pytest.mark.parametrize("policy", ["auto", "sage", "sdpa_cudnn"])
    def test_compiled_by_inductor(self, policy):
        block = compiled_attention(policy, None, "inductor", dynamic=None)
        for queries in (1024, 1100, 1200):
            q, k, v = qkv(1, 8, queries, queries, 128, torch.bfloat16, device=torch.device("cuda"))
            assert fault(block(q, k, v) / 2, q, k, v, None, None) is None


class TestRealSage:
    def test_the_traps_are_still_there(self):
        """What the adapters guard against, in the installed release; no GPU needed to look."""
        import inspect

        sageattention = pytest.importorskip("sageattention")
        parameters = inspect.signature(sageattention.sageattn).parameters
        assert "attn_mask" not in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not hasattr(sageattention, "sageattn_qk_int8_pv_fp16_cuda"):
            assert parameters["smooth_k"].default is True
            source = inspect.getsource(sageattention.sageattn)
            assert "k -= km" in source and "[64, 96, 128]" in source and "torch.float16" in source
            assert BY_NAME["sage1"].library() is None and "generation 1" in BY_NAME["sage2"].library()
