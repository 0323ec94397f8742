"""A UNet in half precision whose calls are recorded runs its convolutional half by our kernels, and paints the same picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hotpath.patches.compilation import (
    CompileSettings,
    compile_model,
    compiler_of,
    group_norm_kernel,
    picture_kernels,
    pictures,
    recording,
    unet_parts,
)
from hotpath.patches.compilation.graphs import CompiledKind
from tiny_native_models import LEAST_SDXL, Tiny

pytestmark = pytest.mark.comfy
SMALL = {"size": (8, 8), "steps": 1}


sums = 0


def group_norm(
    x: Any, groups: int, weight: Any, bias: Any, eps: float, silu: Any = False, added: Any = None, offset: Any = None
) -> Any:
    """By torch, in the order of x: interpreted, the kernel takes minutes for a UNet."""
    moved = x if added is None else x + added[..., None, None]
    moved = moved if offset is None else moved + offset[:, None, None]
    made = F.group_norm(moved, groups, weight, bias, eps)
    return torch.empty_like(x).copy_(F.silu(made) if silu else made)


def add(x: Any, y: Any, offset: Any = None, more: Any = None) -> Any:
    global sums
    sums += 1
    for part in (offset, more):
        y = y if part is None else y + part[:, None, None]
    return torch.empty_like(x).copy_(x + y)


def ran() -> bool:
    """Whether blocks did; the trial beforehand adds four times."""
    return sums > 4


@pytest.fixture(autouse=True)
def _ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    global sums
    sums = 0
    if "real_kernels" not in request.fixturenames:
        monkeypatch.setattr(group_norm_kernel, "group_norm", group_norm)
        monkeypatch.setattr(group_norm_kernel, "add", add)
    monkeypatch.setattr(picture_kernels, "allow_interpreter", True)
    monkeypatch.setattr(picture_kernels, "TRIAL", (1, 8, 8, 8))
    monkeypatch.setattr(recording, "WARM_CALLS", 0)
    monkeypatch.setattr(pictures, "channels_last_is_faster", lambda *_: True)
    picture_kernels.kernels_missing.cache_clear()
    with torch.inference_mode():
        yield
    picture_kernels.kernels_missing.cache_clear()


@pytest.fixture
def real_kernels() -> None:
    """The test interprets them."""


def first_block(model: Any) -> Any:
    return next(part for part in model.model.diffusion_model.modules() if type(part).__name__ == "ResBlock")


def bench(dtype: torch.dtype = torch.float16, **changes: Any) -> Tiny:
    from hotpath_demo import tiny_sdxl

    return Tiny("sdxl", tiny_sdxl.make_sdxl(dtype=dtype, **{**LEAST_SDXL, **changes}), tiny_sdxl.encode_text, 4, 4.0)


def recorded(model: Any) -> Any:
    return compile_model(model, CompileSettings(mode="cudagraphs", strict=True))[0]


def same(made: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((made - expected).abs().max() <= 1e-2 * expected.abs().max())


@pytest.mark.parametrize(
    ("dtype", "linear"), [(torch.float16, True), pytest.param(torch.bfloat16, False, marks=pytest.mark.long)]
)
def test_the_picture_stays(card: Any, dtype: torch.dtype, linear: bool) -> None:
    tiny = bench(dtype, use_linear_in_transformer=linear)
    model = recorded(tiny.model)
    expected, made = tiny.sample(**SMALL), tiny.sample(model, **SMALL)
    assert (made - expected).abs().max() <= (1e-2 if dtype == torch.float16 else 8e-2) * expected.abs().max()
    compiler = compiler_of(model)
    assert compiler.recorder.recorded == 1 and compiler.recorder.reason is None
    assert ran()
    report = compiler.report()
    assert "ResBlock" in report and "SpatialTransformer" in report and "by our own kernels, channels last" in report
    assert "not by our own" not in report
    # Not the model that came in: its weights lie as they did, and nothing of ours is on it.
    for part in tiny.model.model.diffusion_model.modules():
        assert "forward" not in vars(part)
        assert all(weight.is_contiguous() for weight in part.parameters(recurse=False))


@pytest.mark.long
@pytest.mark.parametrize("last", [True, False])
def test_a_block_by_the_kernels_themselves(card: Any, real_kernels: None, last: bool) -> None:
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
    from hotpath_demo import tiny_sdxl

    block = ResBlock(32, 16, 0.0, out_channels=64, dtype=torch.float16)
    tiny_sdxl.fill(block, 0)
    block.cuda()
    ours = pictures.Pictures(torch.nn.Module())
    ours.channels_last, ours.dtype = last, torch.float16
    written = unet_parts.ResidualForward(block, ours)
    written.examine(torch.device("cuda", 0), torch.float16)
    assert written.serves, written.reason
    generator = torch.Generator().manual_seed(0)
    x, emb = (torch.randn(size, generator=generator).half().cuda() for size in ((1, 32, 5, 7), (1, 16)))
    before = card.launches["triton::_add"]
    made = written(x, emb)
    assert made.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert same(made, block(x, emb)) and card.launches["triton::_add"] == before + 1


def test_weights_that_change_in_place_are_followed(card: Any) -> None:
    """A LoRA is written into the same memory; the recording reads a copy of it in another order."""
    tiny = bench()
    model = recorded(tiny.model)
    tiny.sample(model, **SMALL)
    kernel = first_block(model).in_layers[2].weight
    kernel.mul_(-1)
    expected = tiny.sample(tiny.model, **SMALL)
    assert same(tiny.sample(model, **SMALL), expected)
    recorder = compiler_of(model).recorder
    assert recorder.recorded == 1 and recorder.replayed == 2


def test_only_transformer_blocks_are_compiled(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for every width of residual block is what a warm-up waited for."""
    asked = []
    plain = CompiledKind.__call__
    monkeypatch.setattr(CompiledKind, "__call__", lambda kind, *args: asked.append(kind) or plain(kind, *args))
    tiny = bench()
    model = compile_model(tiny.model, CompileSettings(mode="reduce-overhead", strict=True), backend="eager")[0]
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert {kind.title for kind in asked} == {"BasicTransformerBlock"} and len(set(asked)) == 2
    assert compiler_of(model).recorder.replayed == 1 and ran()


def test_copies_go_with_the_model(card: Any) -> None:
    tiny = bench()
    model = recorded(tiny.model)
    tiny.sample(model, **SMALL)
    plan = next(iter(compiler_of(model)._plans.values()))
    copied = [part for part in tiny.model.model.diffusion_model.modules() if getattr(part, "kernel_size", 1) == (3, 3)]
    assert len(plan.pictures.held) == len(copied) - 1  # the last one stands alone
    model.detach()
    assert not plan.pictures.held and len(compiler_of(model).recorder) == 0
    assert same(tiny.sample(model, **SMALL), tiny.sample(tiny.model, **SMALL))
    assert plan.pictures.held


def test_no_copies_where_there_is_no_room(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "ROOM", 0.0)
    tiny = bench()
    model = recorded(tiny.model)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert not next(iter(compiler_of(model)._plans.values())).pictures.held and ran()


def test_what_is_not_recorded_runs_as_before(card: Any) -> None:
    tiny = bench()
    model = compile_model(tiny.model, CompileSettings(mode="cudagraphs"))[0]
    model.set_model_output_block_patch(lambda h, hsp, _: (h, hsp))
    assert torch.equal(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert not ran() and "of another pack" in (compiler_of(model).recorder.reason or "")


CHANGES: dict[str, tuple[Any, str]] = {
    "a hook": (lambda m: m.in_layers[0].register_forward_hook(lambda *_: None), "a pack hooked a GroupNorm inside"),
    "tiling": (
        lambda m: setattr(m.in_layers[2], "_conv_forward", lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), w, b)),
        "a pack replaced the _conv_forward of a Conv2d inside",
    ),
    "its inner part": (
        lambda m: setattr(m, "_forward", lambda x, emb: type(m)._forward(m, x, emb) * 2),
        "a pack replaced the _forward of a ResBlock inside",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_others_changed_runs_as_it_is(card: Any, change: str) -> None:
    """Also where a recording without the change is there already."""
    tiny = bench()
    model = compile_model(tiny.model, CompileSettings(mode="cudagraphs"))[0]
    before = tiny.sample(model, **SMALL)
    act, reason = CHANGES[change]
    act(first_block(model))
    expected = tiny.sample(**SMALL)
    assert change == "a hook" or not same(before, expected)
    assert same(tiny.sample(model, **SMALL), expected)
    assert reason in compiler_of(model).recorder.report()


def test_a_class_that_others_changed_runs_as_it_is(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnimateDiff's packs put another norm into torch's class for the length of a sampling."""
    plain = torch.nn.GroupNorm.forward
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda norm, x: plain(norm, x) * 1.5)
    tiny = bench()
    model = compile_model(tiny.model, CompileSettings(mode="cudagraphs"))[0]
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL)) and not ran()
    assert "replaced the forward of GroupNorm" in compiler_of(model).report()


def test_a_layer_in_anothers_place_is_the_one_that_runs(card: Any) -> None:
    tiny = bench()
    model = recorded(tiny.model)
    tiny.sample(model, **SMALL)
    block = first_block(model)
    other = type(block.in_layers[2])(32, block.out_channels, 3, padding=1, dtype=torch.float16, device="cuda")
    torch.nn.init.normal_(other.weight, std=0.1), torch.nn.init.zeros_(other.bias)
    block.in_layers[2] = other
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))


def test_hooks_use_no_copies_and_lose_no_recording(card: Any) -> None:
    tiny = bench()
    model = recorded(tiny.model)
    first = tiny.sample(model, **SMALL)
    hooked = model.clone()
    hooked.hook_patches = {object(): {}}  # what schedules LoRAs leaves something here
    assert same(tiny.sample(hooked, **SMALL), first)
    recorder = compiler_of(model).recorder
    assert recorder.recorded == 2
    assert torch.equal(tiny.sample(model, **SMALL), first) and recorder.recorded == 2


def test_memory_that_is_short_costs_nothing_but_speed(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pictures, "channels_last_is_faster", full)
    tiny = bench()
    model = recorded(tiny.model)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL)) and not ran()
    assert "OutOfMemoryError" in compiler_of(model).report()


def test_planes_where_those_are_faster(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "channels_last_is_faster", lambda *_: False)
    tiny = bench()
    model = recorded(tiny.model)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL)) and ran()
    report = compiler_of(model).report()
    assert (
        "ResBlock by our own kernels\n" in report and "SpatialTransformer: channels do not lie side by side" in report
    )


def test_float32_is_not_for_them(card: Any) -> None:
    tiny = bench(torch.float32)
    model = recorded(tiny.model)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert not ran() and "ResBlock: there are none for float32 on cuda" in compiler_of(model).report()


def test_kernels_that_fail_give_way(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm_kernel, "add", lambda x, *_: x)
    tiny = bench()
    model = recorded(tiny.model)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert "its numbers were not torch's" in compiler_of(model).report()


def test_the_order_is_measured(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(picture_kernels, "TRIAL", (1, 8, 8, 8))
    times = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(picture_kernels, "milliseconds", lambda run, _: run() is None or next(times))
    for expected in (False, True):
        picture_kernels.channels_last_is_faster.cache_clear()
        assert picture_kernels.channels_last_is_faster(torch.device("cuda", 0), torch.float16) is expected
    picture_kernels.channels_last_is_faster.cache_clear()


def test_numbers_of_another_kind_are_left_to_the_layers_and_that_is_told(
    card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that says it computes in one type and is given another."""
    tiny = bench()
    model = recorded(tiny.model)
    plain = unet_parts.Written.takes
    monkeypatch.setattr(unet_parts.Written, "takes", lambda part, x: plain(part, x.float()))
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL)) and not ran()
    report = compiler_of(model).report()
    assert "ResBlock: it was given float32 of 4 dimensions" in report and "channels last" not in report
