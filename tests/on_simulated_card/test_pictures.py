"""A UNet in half precision whose calls are recorded runs its convolutional half by our kernels, and paints the same picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hotpath.patches.compilation import CompileSettings, compile_model, compiler_of, group_norm_kernel, pictures
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


@pytest.fixture(autouse=True)
def _ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    global sums
    sums = 0
    if "real_kernels" not in request.fixturenames:
        monkeypatch.setattr(group_norm_kernel, "group_norm", group_norm)
        monkeypatch.setattr(group_norm_kernel, "add", add)
    monkeypatch.setattr(pictures, "allow_interpreter", True)
    monkeypatch.setattr(pictures, "TRIAL", (1, 8, 8, 8))
    monkeypatch.setattr(pictures, "channels_last_is_faster", lambda *_: True)
    pictures.kernels_missing.cache_clear()
    with torch.inference_mode():
        yield
    pictures.kernels_missing.cache_clear()


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


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_picture_stays(card: Any, dtype: torch.dtype, linear: bool) -> None:
    tiny = bench(dtype, use_linear_in_transformer=linear)
    model = recorded(tiny.model)
    expected, made = tiny.sample(**SMALL), tiny.sample(model, **SMALL)
    assert (made - expected).abs().max() <= (1e-2 if dtype == torch.float16 else 8e-2) * expected.abs().max()
    compiler = compiler_of(model)
    assert compiler.recorder.recorded == 1 and compiler.recorder.reason is None
    assert sums > 0
    report = compiler.report()
    assert "ResBlock" in report and "SpatialTransformer" in report and "by our own kernels, channels last" in report
    assert "not by our own" not in report
    # Not the model that came in: its weights lie as they did, and nothing of ours is on it.
    for part in tiny.model.model.diffusion_model.modules():
        assert "forward" not in vars(part)
        assert all(weight.is_contiguous() for weight in part.parameters(recurse=False))


@pytest.mark.parametrize("last", [True, False])
def test_a_block_by_the_kernels_themselves(card: Any, real_kernels: None, last: bool) -> None:
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
    from hotpath_demo import tiny_sdxl

    block = ResBlock(32, 16, 0.0, out_channels=64, dtype=torch.float16)
    tiny_sdxl.fill(block, 0)
    block.cuda()
    written = pictures.ResidualForward(block, pictures.Pictures(torch.nn.Module(), {}), lambda *_: None)
    written._pictures.channels_last = last
    written.examine(torch.device("cuda", 0))
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
    assert compiler_of(model).recorder.replayed == 1 and sums > 0


def test_copies_go_with_the_model(card: Any) -> None:
    tiny = bench()
    model = recorded(tiny.model)
    tiny.sample(model, **SMALL)
    plan = next(iter(compiler_of(model)._plans.values()))
    copied = [part for part in tiny.model.model.diffusion_model.modules() if getattr(part, "kernel_size", 1) == (3, 3)]
    assert len(plan.held) == len(copied) - 2  # the first and the last one stand alone
    model.detach()
    assert not plan.held and len(compiler_of(model).recorder) == 0
    assert same(tiny.sample(model, **SMALL), tiny.sample(tiny.model, **SMALL))
    assert plan.held


def test_no_copies_where_there_is_no_room(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "ROOM", 0.0)
    tiny = bench()
    model = recorded(tiny.model)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert not next(iter(compiler_of(model)._plans.values())).held and sums > 0


def test_other_packs_get_pictures_in_the_order_they_know(card: Any) -> None:
    tiny = bench()
    model = compile_model(tiny.model, CompileSettings(mode="cudagraphs"))[0]
    seen = []

    def patch(h: torch.Tensor, hsp: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(h.is_contiguous() and hsp.is_contiguous())
        return h, hsp

    model.set_model_output_block_patch(patch)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert seen and all(seen) and sums > 0
    assert "of another pack" in (compiler_of(model).recorder.reason or "")


def test_blocks_that_others_changed_run_as_they_are(card: Any) -> None:
    tiny = bench()
    model = compile_model(tiny.model, CompileSettings(mode="cudagraphs"))[0]
    block = first_block(model)
    handle = block.in_layers[0].register_forward_hook(lambda *_: None)
    try:
        assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
        assert "1 not by our own kernels, ResBlock: a pack hooked a GroupNorm inside" in compiler_of(model).report()
    finally:
        handle.remove()


def test_float32_is_not_for_them(card: Any) -> None:
    tiny = bench(torch.float32)
    model = recorded(tiny.model)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert not sums and "ResBlock: there are none for float32 on cuda" in compiler_of(model).report()


def test_kernels_that_fail_give_way(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm_kernel, "add", lambda x, *_: x)
    tiny = bench()
    model = recorded(tiny.model)
    assert same(tiny.sample(model, **SMALL), tiny.sample(**SMALL))
    assert "its numbers were not torch's" in compiler_of(model).report()


def test_the_order_is_measured(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(pictures, "TRIAL", (1, 8, 8, 8))
    times = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(pictures, "milliseconds", lambda run, _: run() is None or next(times))
    for expected in (False, True):
        pictures.channels_last_is_faster.cache_clear()
        assert pictures.channels_last_is_faster(torch.device("cuda", 0), torch.float16) is expected
    pictures.channels_last_is_faster.cache_clear()
