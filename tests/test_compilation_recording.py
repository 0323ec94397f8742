"""Recorded model calls: inputs are followed, outputs stay, weights are watched, and what is not known is not recorded.

Where there is no GPU, a recording is played by running the recorded function on the recording's own buffers.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hotpath.patches.compilation import CompileSettings, call_arguments, compile_model, compiler_of, recording
from hotpath.patches.compilation.blocks import foreign_class
from hotpath.patches.compilation.recording import CallRecorder, CudaRecording, record_calls, recording_problem
from tiny_native_models import Tiny, tiny

pytestmark = pytest.mark.comfy
CLOSE = 2e-5


@pytest.fixture(autouse=True)
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first call of a kind; `test_a_kind_of_call_is_recorded_when_it_stays` is about those before it."""
    monkeypatch.setattr(recording, "WARM_CALLS", 0)


class Replay:
    def __init__(self, function: Any) -> None:
        self.function = function
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


def test_python_of_other_packs_is_not_frozen() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    calls = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return executor(*args, **kwargs)

    # A step cache, say, whose node comes after ours: around the recording all the same.
    wrapped = model.clone()
    wrapped.add_wrapper_with_key("diffusion_model", "foreign", wrapper)
    assert_same_picture(sample(bench, wrapped, steps=3), sample(bench, steps=3))
    assert len(calls) == 3
    assert recorder.recorded == 1 and recorder.replayed == 3 and recorder.reason is None
    patched = model.clone()
    patched.model_options["transformer_options"]["patches"] = {"post_input": [lambda arguments: arguments]}
    sample(bench, patched)
    assert "post_input of another pack runs inside the model" in recorder.reason
    replaced = model.clone()
    replaced.model_options["transformer_options"]["patches_replace"] = {
        "dit": {("double_block", 0): lambda arguments, extra: extra["original_block"](arguments)}
    }
    sample(bench, replaced)
    assert f"dit is replaced by {__name__}." in recorder.reason
    hooked = bench.model.model.diffusion_model.final_layer.linear
    handle = hooked.register_forward_hook(lambda module, inputs, output: output)
    try:
        sample(bench, model)
        assert "hooked a Linear" in recorder.reason
    finally:
        handle.remove()
    assert recorder.recorded == 1
    sample(bench, model)
    assert recorder.recorded == 2 and recorder.reason is None


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


def test_layers_of_einops_are_known() -> None:
    """Anima and other models of Cosmos' kind have them."""
    from einops.layers.torch import Rearrange

    assert foreign_class(torch.nn.Sequential(Rearrange("b c -> c b"))) is None


def test_models_whose_calls_have_no_wrapper_are_told() -> None:
    """ComfyUI's Stable Diffusion 3, PixArt, HunyuanDiT and OmniGen2 among them."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    model = tiny("flux").model.clone()
    model.load_device = torch.device("cuda")
    assert recording_problem(model) is None
    model.add_object_patch("diffusion_model", object.__new__(OpenAISignatureMMDITWrapper))
    _, report = compile_model(model, CompileSettings(mode="cudagraphs"))
    assert report.startswith("Not recorded") and "OpenAISignatureMMDITWrapper runs none" in report


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
    calls = []

    def count(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return executor(*args, **kwargs)

    model, recorder = recorded(bench.model)
    forward = bench.model.model.diffusion_model.img_in.forward
    seen = []
    monkeypatch.setattr(Replay, "__init__", _counting(Replay.__init__, seen))
    for width in (8, 12, 16):
        assert_same_picture(sample(bench, model, size=(8, width), steps=2), sample(bench, size=(8, width), steps=2))
    assert recorder.recorded == recorder.replayed == 0 and recorder.reason is None and not seen
    assert_same_picture(sample(bench, model, size=(8, 16), steps=3), sample(bench, size=(8, 16), steps=3))
    assert recorder.recorded == 1 and recorder.replayed == 3
    assert forward.__func__ is type(bench.model.model.diffusion_model.img_in).forward and not calls


def _counting(plain: Any, seen: list[int]) -> Any:
    def made(self: Any, function: Any) -> None:
        seen.append(1)
        plain(self, function)

    return made


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


def test_another_packs_attention_under_ours_is_seen() -> None:
    from comfy.ldm.modules.attention import attention_pytorch
    from hotpath.attention.dispatch import AttentionPolicy
    from hotpath.patches.attention_override import AttentionOverride

    bench = tiny("flux")
    calls = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        attention = args[0] if callable(args[0]) else attention_pytorch
        return attention(*(args[1:] if callable(args[0]) else args), **kwargs)

    theirs.__module__ = "custom_nodes.other_pack"
    model, recorder = recorded(bench.model)
    for override in (AttentionOverride(AttentionPolicy(), theirs), _wrapped_by_comfyui(theirs)):
        calls.clear()
        patched = model.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = override
        sample(bench, patched, steps=2)
        assert "attention is overridden by custom_nodes.other_pack" in recorder.reason
        assert calls and recorder.recorded == 0


def _wrapped_by_comfyui(function: Any) -> Any:
    import comfy.model_patcher

    holder: Any = type("Holder", (), {"model_options": {"transformer_options": {}}})()
    comfy.model_patcher.ModelPatcher.set_model_optimized_attention(holder, function)
    return holder.model_options["transformer_options"]["optimized_attention_override"]


def test_a_method_that_is_replaced_for_some_steps_is_seen() -> None:
    """As caches of steps do: the function is theirs while a step runs."""
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    network = bench.model.model.diffusion_model
    plain, calls = network.forward_orig, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        network.forward_orig = theirs
        try:
            return executor(*args, **kwargs)
        finally:
            del network.forward_orig

    patched = model.clone()
    patched.add_wrapper_with_key("apply_model", "theirs", around)
    assert_same_picture(sample(bench, patched, steps=3), sample(bench, steps=3))
    assert len(calls) == 3 and recorder.recorded == 0
    assert "replaced the forward_orig of a Flux" in recorder.reason


def test_objects_whose_content_is_not_known_are_not_recorded() -> None:
    """They may change between calls, and many, such as windows of a film, are made anew for each."""
    from collections import namedtuple

    Pair = namedtuple("Pair", "first second")
    for given in (object(), Pair(torch.ones(1), torch.ones(2))):
        with pytest.raises(recording.NotTraceable, match=f"is given a .*{type(given).__name__}"):
            call_arguments.flatten({"window": [given]}, call_arguments.Flat([], [], []))
    sizes = [call_arguments.flatten(torch.Size([1, n]), call_arguments.Flat([], [], [])) for n in (2, 2, 3)]
    assert sizes[0] == sizes[1] != sizes[2]


def test_layers_of_another_pack_are_not_known() -> None:
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    plain = bench.model.model.diffusion_model.final_layer.linear
    kind = type("Linear4Bit", (type(plain),), {"__module__": "custom_nodes.other_pack"})
    before = type(plain)
    plain.__class__ = kind
    try:
        assert_same_picture(sample(bench, model), sample(bench))
        assert "its Linear4Bit is made by custom_nodes.other_pack" in recorder.reason and recorder.recorded == 0
    finally:
        plain.__class__ = before
