"""Model calls that are not recorded: Python of other packs runs in them, or something whose content is not known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_models import assert_same_picture, sample
from hotpath.patches.compilation import call_arguments, recording
from hotpath.patches.compilation.blocks import foreign_class
from hotpath.patches.compilation.settings import KEY
from recorded_models import recorded
from tiny_native_models import tiny

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "WARM_CALLS", 0)


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


def test_a_module_that_a_node_puts_in_later_is_seen() -> None:
    """RIFLEx of KJNodes puts another embedding of places into Wan and HunyuanVideo."""
    bench = tiny("flux")
    model, recorder = recorded(bench.model)
    plain = bench.model.model.diffusion_model.pe_embedder

    class Stretched(type(plain)):  # type: ignore[misc]
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids * 0.5)

    expected = sample(bench, steps=3)
    assert_same_picture(sample(bench, model, steps=3), expected)
    replayed = recorder.replayed
    assert recorder.recorded == 1 and replayed and recorder.reason is None
    longer = model.clone()
    longer.add_object_patch("diffusion_model.pe_embedder", Stretched(plain.dim, plain.theta, plain.axes_dim))
    other = sample(bench, longer, steps=3)
    assert (other - expected).abs().max() > 1e-3 * expected.abs().max()
    assert recorder.replayed == replayed and f"its Stretched is made by {__name__}" in str(recorder.reason)
    assert_same_picture(sample(bench, model, steps=3), expected)
    assert recorder.reason is None


def test_layers_of_einops_are_known() -> None:
    """Anima and other models of Cosmos' kind have them."""
    from einops.layers.torch import Rearrange

    assert foreign_class(torch.nn.Sequential(Rearrange("b c -> c b"))) is None


def test_objects_whose_content_is_not_known_are_not_recorded() -> None:
    """They may change between calls, and many, such as windows of a film, are made anew for each."""
    from collections import namedtuple

    Pair = namedtuple("Pair", "first second")
    for given in (object(), Pair(torch.ones(1), torch.ones(2))):
        with pytest.raises(recording.NotTraceable, match=f"is given a .*{type(given).__name__}"):
            call_arguments.flatten({"window": [given]}, call_arguments.Flat([], [], []))
    sizes = [call_arguments.flatten(torch.Size([1, n]), call_arguments.Flat([], [], [])) for n in (2, 2, 3)]
    assert sizes[0] == sizes[1] != sizes[2]


def test_models_that_run_no_wrappers_are_recorded_around_their_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's Stable Diffusion 3, PixArt, OmniGen2 and Stable Cascade are such."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from hotpath.patches.compilation import regional, wrapping

    bench = tiny("flux")
    network: Any = bench.model.model.diffusion_model
    assert wrapping.runs_wrappers(network) and not wrapping.runs_wrappers(object.__new__(OpenAISignatureMMDITWrapper))
    monkeypatch.setattr(regional, "runs_wrappers", lambda _: False)
    model, recorder = recorded(bench.model)
    model.remove_wrappers_with_key("diffusion_model", KEY)  # a network like those would not run it
    assert_same_picture(sample(bench, model, steps=3), sample(bench, steps=3))
    assert recorder.recorded == 1 and recorder.replayed == 3 and recorder.reason is None
    assert "forward" not in vars(network)
    network.forward = type(network).forward.__get__(network)
    try:
        assert_same_picture(sample(bench, model), sample(bench))
        assert recorder.reason == "a pack replaced the forward of Flux" and recorder.recorded == 1
    finally:
        del network.forward
