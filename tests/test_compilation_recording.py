"""Recorded model calls: inputs are followed, outputs stay, weights are watched, and failures leave the call as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_models import assert_same_picture, sample
from hotpath.patches.compilation import CompileSettings, compile_model, compiler_of, recording
from hotpath.patches.compilation.recording import CudaRecording
from recorded_models import Replay, recorded
from tiny_native_models import tiny

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first call of a kind; `test_a_kind_of_call_is_recorded_when_it_stays` is about those before it."""
    monkeypatch.setattr(recording, "WARM_CALLS", 0)


@pytest.mark.parametrize("name", ["z_image", pytest.param("flux", marks=pytest.mark.long)])
def test_one_recording_per_size_serves_every_step_and_prompt(name: str) -> None:
    bench = tiny(name)
    model, recorder = recorded(bench.model)
    for count, changes in (
        (1, {}),
        (1, {"prompt": "another", "steps": 3}),
        (2, {"size": (16, 24)}),
        (2, {"prompt": "third"}),
        (3, {"batch": 2}),
    ):
        assert_same_picture(sample(bench, model, **changes), sample(bench, **changes))
        assert recorder.recorded == count
        assert recorder.reason is None
    assert recorder.replayed == 11


def test_what_a_caller_holds_is_not_overwritten() -> None:
    bench = tiny("z_image")
    model, _ = recorded(bench.model)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(executor: Any, *args: Any, **kwargs: Any) -> Any:
        out = executor(*args, **kwargs)
        held.append((out, out.clone()))
        return out

    model.wrappers["diffusion_model"] = {"keep": [keep], **model.wrappers["diffusion_model"]}
    sample(bench, model, steps=3)
    assert len(held) == 3
    assert all(torch.equal(out, at_the_time) for out, at_the_time in held)


def test_only_so_many_sizes_are_kept() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model, captured_sizes=2)
    for width in (8, 12, 16):
        sample(bench, model, size=(8, width), steps=1)
    assert len(recorder) == 2
    sample(bench, model, size=(8, 8), steps=1)
    assert recorder.recorded == 4


def test_other_weights_are_recorded_anew() -> None:
    import comfy.model_management as management

    bench = tiny("z_image")
    model, recorder = recorded(bench.model)
    sample(bench, model)
    changed, expected = model.clone(), bench.model.clone()
    key = "diffusion_model.layers.1.attention.out.weight"
    for patched in (changed, expected):
        patched.add_patches({key: ("diff", (torch.full((256, 256), 0.01),))})
    assert_same_picture(sample(bench, changed), sample(bench, expected))
    assert recorder.recorded == 2
    expected = sample(bench)
    assert_same_picture(sample(bench, model), expected)
    management.unload_all_models()
    assert len(recorder) == 0
    assert_same_picture(sample(bench, model), sample(bench))


def test_a_recording_that_fails_leaves_the_call_as_it_is() -> None:
    bench = tiny("flux")
    tried = []

    def failing(function: Any) -> Any:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    model, recorder = recorded(bench.model, record=failing)
    assert_same_picture(sample(bench, model, steps=3), sample(bench, steps=3))
    assert len(tried) == 1
    assert "not permitted" in recorder.reason
    assert "not permitted" in compiler_of(model).report()


def test_a_stop_while_a_call_is_recorded_is_no_failure() -> None:
    """Blocks compile in that call, and what stops them there is an ordinary exception in older ComfyUIs."""
    stop = type("InterruptProcessingException", (Exception,), {})
    stops = [stop()]

    def record(function: Any) -> Any:
        if stops:
            raise stops.pop()
        return Replay(function)

    bench = tiny("z_image")
    model, recorder = recorded(bench.model, record)
    with pytest.raises(stop):
        sample(bench, model, steps=1)
    sample(bench, model, steps=1)
    assert recorder.reason is None and recorder.recorded == 1


@pytest.mark.long
def test_gradients_are_never_lost_in_a_recording() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    with torch.no_grad():
        expected = bench.sample(model)
        assert recorder.recorded == 1

    def guided(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return executor(*args, **kwargs)

    steered = model.clone()
    steered.add_wrapper_with_key("apply_model", "guided", guided)
    with torch.no_grad():
        assert_same_picture(bench.sample(steered).detach(), expected)
    assert "gradients" in recorder.reason
    assert_same_picture(sample(bench, model), expected)
    assert recorder.recorded == 2  # in inference mode, whose tensors cannot be written to outside of it
    with torch.no_grad():
        assert_same_picture(bench.sample(model), expected)
    assert recorder.recorded == 2


def test_weights_that_make_room_take_their_recordings_along() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    sample(bench, model)
    assert len(recorder) == 1
    layer = bench.model.model.diffusion_model.double_blocks[0].img_attn.proj
    layer.weight_function = [lambda weight: weight]  # as ComfyUI does with what is not loaded whole
    try:
        assert_same_picture(sample(bench, model), sample(bench))
    finally:
        layer.weight_function = []
    assert "not loaded whole" in recorder.reason
    assert len(recorder) == 0
    sample(bench, model)
    assert len(recorder) == 1


@pytest.mark.long
def test_autocast_is_recorded_apart() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    expected = sample(bench, model, steps=1)
    with torch.autocast("cpu", torch.bfloat16):
        sample(bench, model, steps=1)
    assert recorder.recorded == 2
    assert_same_picture(sample(bench, model, steps=1), expected)
    assert recorder.recorded == 2


@torch.inference_mode()
def test_a_quantised_weight_is_known_by_its_numbers() -> None:
    """What replaces a weight that is gone often has the same identity in Python, and a recording reads the numbers."""
    from hotpath.patches.precision import quantize_model

    bench = tiny("z_image")
    model, recorder = recorded(quantize_model(bench.model, "fp8_weights")[0])
    bench.sample(model, steps=1)
    plan = recorder.compiler.plan(model.model, torch.device("cpu"))
    before = plan.weights()
    assert plan.weights() == before
    weight = model.model.diffusion_model.layers[1].attention.out.weight
    weight._qdata = weight._qdata.clone()
    assert plan.weights() != before


def test_copied_options_keep_the_recorder() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    copied = model.clone()
    copied.wrappers = copy.deepcopy(model.wrappers)
    sample(bench, copied)
    assert recorder.recorded == 1


def test_without_a_gpu_the_report_says_that_nothing_is_recorded() -> None:
    bench = tiny("flux")
    if bench.model.load_device.type == "cuda":
        pytest.skip("there is a GPU")
    model, report = compile_model(bench.model, CompileSettings(mode="reduce-overhead"), backend="eager")
    assert "CUDA graphs need a CUDA device" in report
    assert compiler_of(model).recorder is None


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_picture() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    bench = tiny("z_image")
    model, recorder = recorded(bench.model, record=CudaRecording)
    for changes in ({}, {"prompt": "another"}, {"size": (16, 24)}, {}):
        assert_same_picture(sample(bench, model, **changes), sample(bench, **changes))
    assert recorder.recorded == 2 and recorder.reason is None


def test_a_kind_of_call_is_recorded_when_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps of a picture are not thrown away, and prompts that never come again are not recorded."""
    monkeypatch.setattr(recording, "WARM_CALLS", 2)
    bench = tiny("flux")
    made = []

    def record(function: Any) -> Replay:
        made.append(1)
        return Replay(function)

    model, recorder = recorded(bench.model, record)
    for width in (8, 12, 16):
        assert_same_picture(sample(bench, model, size=(8, width), steps=2), sample(bench, size=(8, width), steps=2))
    assert recorder.recorded == recorder.replayed == 0 and recorder.reason is None and not made
    assert_same_picture(sample(bench, model, size=(8, 16), steps=3), sample(bench, size=(8, 16), steps=3))
    assert recorder.recorded == 1 and recorder.replayed == 3


@pytest.mark.parametrize("older", [False, True])
def test_memory_that_is_short_at_the_first_replay_costs_the_recording_alone(
    monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """The driver gives graphs their memory when they are launched for the first time."""
    import comfy.model_management as management

    if older:  # a ComfyUI that knows one kind of error only
        monkeypatch.delattr(management, "is_oom", raising=False)
    bench = tiny("flux")

    class Full(Replay):
        def replay(self) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model, recorder = recorded(bench.model, record=Full)
    assert_same_picture(sample(bench, model, steps=2), sample(bench, steps=2))
    assert len(recorder) == 0 and recorder.recorded == 1  # once in a run
    assert "memory" in recorder.reason
    recorder.record = Replay
    assert_same_picture(sample(bench, model), sample(bench))
    assert len(recorder) == 1 and recorder.reason is None


def test_nothing_of_a_failed_recording_is_held_while_the_call_runs_as_it_is() -> None:
    import weakref

    bench = tiny("flux")
    held: list[Any] = []

    def failing(function: Any) -> Any:
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        raise RuntimeError("no")

    alive = []

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:
        alive.append(bool(held) and held[0]() is not None)
        return executor(*args, **kwargs)

    model, _ = recorded(bench.model, record=failing)
    model.add_wrapper_with_key("diffusion_model", "hotpath.look", look)
    look.__module__ = "hotpath.look"
    sample(bench, model, steps=1)
    assert alive == [False]


def test_a_model_whose_code_cannot_be_captured_is_tried_once() -> None:
    bench = tiny("flux")
    tried = []

    def failing(function: Any) -> Any:
        tried.append(1)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    model, recorder = recorded(bench.model, record=failing)
    for width in (8, 12, 16):
        sample(bench, model, size=(8, width), steps=2)
    assert len(tried) == 1 and "capturing" in recorder.reason


def test_more_sizes_in_turn_than_are_kept_are_not_recorded_for_ever() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model, captured_sizes=1)
    for _ in range(4):
        for width in (8, 12):
            sample(bench, model, size=(8, width), steps=1)
    assert recorder.recorded == 1 + recording.WASTED
    assert "take turns" in recorder.reason and len(recorder) == 0
    assert_same_picture(sample(bench, model), sample(bench))
