"""A warm-up runs what the pictures will run, says what it took, can be stopped, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotpath import host
from hotpath.patches.compilation import compile_model, compiler_of
from hotpath.patches.warmup import (
    POOLED_LAYERS,
    PROMPT_LAYERS,
    STEPS,
    _noise,
    _width_into,
    _with_sound,
    empty_prompt,
    parse_sizes,
    warm_up,
)
from tiny_native_models import tiny


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    with torch.inference_mode():
        yield


def test_sizes_are_read_and_refused() -> None:
    assert parse_sizes("1024x1024, 832 x 1216;64X64\n512×768, 64x64".replace("X", "x")) == [
        (1024, 1024),
        (832, 1216),
        (64, 64),
        (512, 768),
    ]
    assert parse_sizes("16x16384, 16384x16") == [(16, 16384), (16384, 16)]
    for text, said in (
        ("1024", "'1024' is no size"),
        ("", "There is no size"),
        ("8x8", "out of range"),
        ("15x16", "out of range"),
        ("16x15", "out of range"),
        ("16385x16", "out of range"),
        ("16x16385", "out of range"),
        (", ".join(f"{n}x64" for n in range(64, 100)), "36 sizes"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_sizes(text)


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["z_image", "flux", "sdxl"])
def test_an_empty_prompt_fits_the_model(name: str) -> None:
    bench = tiny(name)
    before = bench.sample(steps=1)
    done, report = warm_up(bench.model, [(128, 128), (64, 128)])
    assert [(size.width, size.height) for size in done] == [(128, 128), (64, 128)]
    assert all(0 < size.step_seconds < size.seconds for size in done)
    assert "64x128: " in report and "not compiled" in report
    assert torch.equal(bench.sample(steps=1), before)


@pytest.mark.comfy
def test_the_width_of_a_prompt_is_read_from_the_layer_it_goes_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Wan, Qwen-Image and Stable Diffusion 3 ComfyUI notes no width."""
    model = tiny("flux").model
    config = model.model.model_config
    widths = {key: value for key, value in config.unet_config.items() if key not in ("context_in_dim", "vec_in_dim")}
    monkeypatch.setattr(config, "unet_config", widths)
    [[tokens, extra]] = empty_prompt(model)
    assert tokens.shape == (1, 77, 64) and extra["pooled_output"].shape == (1, 1280)
    monkeypatch.setattr(config, "unet_config", {"llm_features_dim": 52})  # as Ideogram 4 calls it
    assert empty_prompt(model)[0][0].shape == (1, 77, 52)
    wan = torch.nn.ModuleDict({"text_embedding": torch.nn.Sequential(torch.nn.Linear(48, 8))})
    assert _width_into(wan, PROMPT_LAYERS) == 48 and _width_into(wan, POOLED_LAYERS) is None


@pytest.mark.comfy
def test_a_model_that_reads_more_than_a_prompt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny("flux")

    def needs_more(*_: Any, **__: Any) -> None:
        raise TypeError("missing 'attention_mask'")

    monkeypatch.setitem(vars(bench.model.model.diffusion_model), "forward", needs_more)
    with pytest.raises(ValueError, match=r"Flux needs more than an empty prompt \(TypeError: missing 'attention_mask'"):
        warm_up(bench.model, [(64, 64)])
    with pytest.raises(TypeError):
        warm_up(bench.model, [(64, 64)], positive=bench.text("a fox", 8))


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["StableAudio3", "ACEAudio", "Hunyuan3Dv2", "TripoSplat", "Trellis2ShapeSLAT"])
def test_models_that_make_no_pictures_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.latent_formats

    if not hasattr(comfy.latent_formats, name):
        pytest.skip(f"this ComfyUI has no {name}")
    bench = tiny("flux")
    monkeypatch.setattr(bench.model.model, "latent_format", getattr(comfy.latent_formats, name)())
    with pytest.raises(ValueError, match="Flux makes no pictures, so no size in pixels warms it up"):
        warm_up(bench.model, [(64, 64)], positive=bench.text("a fox", 8))


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("home", "name"),
    [("sam3.detector", "SAM3Model"), ("rt_detr.rtdetr_v4", "RTv4"), ("depth_anything_3.model", "DepthAnything3Net")],
)
def test_models_that_no_sampler_calls_are_refused(home: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(pytest.importorskip(f"comfy.ldm.{home}"), name)
    network = kind.__new__(kind)
    torch.nn.Module.__init__(network)
    bench = tiny("flux")
    monkeypatch.setattr(bench.model.model, "diffusion_model", network)
    with pytest.raises(ValueError, match="Flux makes no pictures"):
        warm_up(bench.model, [(64, 64)])
    with pytest.raises(ValueError, match="Flux is not called by a sampler but by nodes of its own"):
        compile_model(bench.model, backend="eager")


@pytest.mark.comfy
def test_a_film_and_its_sound_are_sampled_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    nested_tensor = pytest.importorskip("comfy.nested_tensor")
    film, sound = torch.zeros(1, 4, 2, 3, 3), torch.zeros(1, 8, 2, 5)
    noise = _noise(nested_tensor.NestedTensor((film, sound)))
    assert [part.shape for part in noise.unbind()] == [film.shape, sound.shape]
    assert torch.equal(noise.unbind()[0], _noise(film)) and noise.unbind()[1].abs().min() > 0
    bench = tiny("flux")
    assert _with_sound(bench.model, film) is film
    network = bench.model.model.diffusion_model  # as LTX-2's
    for name, size in (("num_audio_channels", 8), ("audio_frequency_bins", 16)):
        monkeypatch.setattr(network, name, size, raising=False)
    assert [part.shape for part in _with_sound(bench.model, film).unbind()] == [film.shape, (1, 8, 8, 16)]


@pytest.mark.comfy
@pytest.mark.usefixtures("own_graphs")
def test_pictures_after_a_warm_up_compile_nothing() -> None:
    bench = tiny("flux")
    model, _ = compile_model(bench.model, backend="eager")
    compiler = compiler_of(model)
    done, report = warm_up(model, [(128, 128), (128, 192)])
    assert [size.graphs for size in done] == [2, 0]
    assert "2 graphs" in report
    for changes in ({}, {"tokens": 50}, {"size": (24, 16)}, {"size": (32, 32)}):
        bench.sample(model, **changes)
    assert compiler.graphs == 2


@pytest.mark.long
@pytest.mark.comfy
@pytest.mark.usefixtures("own_graphs")
def test_attention_is_measured_before_graphs_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph keeps the attention chosen while it is traced, so the first call of the dispatcher must not be traced."""
    from hotpath.attention import dispatch
    from hotpath.patches.attention_override import set_attention

    bench = tiny("flux")
    traced: list[bool] = []
    for name in ("attend", "traced"):
        whole = getattr(dispatch.AttentionDispatcher, name)

        def noted(*args: Any, whole: Any = whole, name: str = name, **kwargs: Any) -> Any:
            traced.append(name == "traced")
            return whole(*args, **kwargs)

        monkeypatch.setattr(dispatch.AttentionDispatcher, name, noted)
    model, _ = compile_model(set_attention(bench.model, "auto")[0], backend="eager")
    done, _ = warm_up(model, [(128, 128)])
    assert done[0].graphs == 2
    assert not traced[0]
    assert any(traced)


@pytest.mark.comfy
def test_a_warm_up_shows_progress_and_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management

    bench = tiny("flux")
    model, _ = compile_model(bench.model, backend="eager")
    updates = []

    class Bar:
        def update(self, steps: int = 1, preview: Any = None) -> None:
            updates.append(steps)
            if len(updates) == 3:
                raise management.InterruptProcessingException()

        def close(self) -> None:
            updates.append("closed")

    totals = []
    monkeypatch.setattr(type(host.current()), "progress", lambda self, total, label="": totals.append(total) or Bar())
    with pytest.raises(management.InterruptProcessingException):
        warm_up(model, [(128, 128), (64, 64)])
    assert totals == [2 * STEPS]
    assert updates == [1, 1, 1, "closed"]
    monkeypatch.undo()
    expected = bench.sample()
    assert (bench.sample(model) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.comfy
def test_the_nodes_compile_and_warm_up() -> None:
    from hotpath.nodes import NODE_CLASS_MAPPINGS as nodes

    bench = tiny("flux")
    assert "no size" in nodes["HotpathWarmup"].VALIDATE_INPUTS(sizes="big")
    assert nodes["HotpathWarmup"].VALIDATE_INPUTS(sizes="64x64") is True
    defaults = {
        name: options["default"]
        for name, (_, options) in nodes["HotpathCompile"].INPUT_TYPES()["required"].items()
        if "default" in options
    }
    _model, report = nodes["HotpathCompile"]().compile(bench.model, **defaults)
    assert "2 DoubleStreamBlock" in report or "Not compiled" in report
    prompt = bench.text("warm", 20)
    same, report = nodes["HotpathWarmup"]().warm_up(bench.model, "64x64", 2, prompt, prompt, cfg=1.0)
    assert same is bench.model and "64x64: " in report


@pytest.mark.comfy
def test_calls_that_a_cache_leaves_out_are_recorded_by_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of steps spares most of a short sampling, and the first picture would find nothing recorded."""
    from hotpath.patches.compilation import CompileSettings, recording

    class Replay:
        def __init__(self, function: Any) -> None:
            self.replay = function

    bench = tiny("flux")
    steps: list[Any] = []

    def every_other(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append(None)
        return executor(x, *args, **kwargs) if len(steps) % 2 else x

    cached = bench.model.clone()
    cached.add_wrapper_with_key("predict_noise", "cache", every_other)
    model, _ = compile_model(cached, CompileSettings(mode="reduce-overhead"), backend="eager")
    compiler = compiler_of(model)
    recording.record_calls(model, compiler, record=Replay)
    done, _ = warm_up(model, [(64, 64)], positive=bench.text("a", 8))
    assert done[0].recordings == 1 and not compiler.recorder.on_the_way
