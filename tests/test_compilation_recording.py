"""Recorded model calls: inputs are followed, outputs stay, weights are watched, and what is not known is not recorded.

Where there is no GPU, a recording is played by running the recorded function on the recording's own buffers.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hotpath.patches.compilation import CompileSettings, compile_model, compiler_of
from hotpath.patches.compilation.recording import WARM_CALLS, CallRecorder, CudaRecording, record_calls
from tiny_native_models import Tiny, tiny

pytestmark = pytest.mark.comfy
CLOSE = 2e-5


class Replay:
    def __init__(self, function: Any) -> None:
        self.function = function
        for _ in range(WARM_CALLS):
            function()
        self.output = function()

    def replay(self) -> Any:
        self.output.copy_(self.function())
        return self.output


def recorded(model: Any, record: Any = Replay, **changes: Any) -> tuple[Any, CallRecorder]:
    made, _ = compile_model(model, CompileSettings(mode="reduce-overhead", **changes), backend="eager")
    compiler = compiler_of(made)
    record_calls(made, compiler, record=record)
    assert compiler.recorder is not None
    return made, compiler.recorder


def sample(bench: Tiny, model: Any = None, **changes: Any) -> torch.Tensor:
    with torch.inference_mode():
        return bench.sample(model, **changes)


def assert_same_picture(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert (made - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize("name", ["z_image", "flux"])
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


def test_python_of_other_packs_is_not_frozen() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    calls = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return executor(*args, **kwargs)

    wrapped = model.clone()
    wrapped.add_wrapper_with_key("diffusion_model", "foreign", wrapper)
    assert_same_picture(sample(bench, wrapped, steps=3), sample(bench, steps=3))
    assert len(calls) == 3
    assert "wraps the model's forward" in recorder.reason
    patched = model.clone()
    patched.model_options["transformer_options"]["patches"] = {"post_input": [lambda arguments: arguments]}
    sample(bench, patched)
    assert "post_input of another pack runs inside the model" in recorder.reason
    replaced = model.clone()
    replaced.model_options["transformer_options"]["patches_replace"] = {
        "dit": {("double_block", 0): lambda arguments, extra: extra["original_block"](arguments)}
    }
    sample(bench, replaced)
    assert "dit is replaced by" in recorder.reason
    hooked = bench.model.model.diffusion_model.final_layer.linear
    handle = hooked.register_forward_hook(lambda module, inputs, output: output)
    try:
        sample(bench, model)
        assert "hooked a Linear" in recorder.reason
    finally:
        handle.remove()
    assert recorder.recorded == 0
    sample(bench, model)
    assert recorder.recorded == 1 and recorder.reason is None


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


def test_tuples_of_a_kind_of_their_own_are_not_taken_apart() -> None:
    from collections import namedtuple

    from hotpath.patches.compilation.recording import _Flat, _flatten, _rebuild

    Pair = namedtuple("Pair", "first second")
    given = (Pair(torch.ones(1), torch.ones(2)), [torch.ones(3)], torch.ones(4))
    flat = _Flat([], [], [])
    _flatten(given, flat)
    made = _rebuild(given, iter([tensor.clone() for tensor in flat.tensors]))
    assert [tensor.numel() for tensor in flat.tensors] == [3, 4]
    assert made[0] is given[0] and made[1][0].numel() == 3 and made[2].numel() == 4


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
