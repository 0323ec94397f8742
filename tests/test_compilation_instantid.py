"""InstantID in a compiled model: one graph for every weight, mask, person and range, and nothing falls back."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from compiled_models import assert_same_picture
from hotpath.patches.compilation import (
    CompileSettings,
    compile_model,
    compiler_of,
    forget_compiled_kinds,
    recording,
)
from hotpath.patches.compilation.recording import record_calls
from hotpath.patches.model_call import ModelCall
from instantid_bench import sample as sample_in_steps
from instantid_bench import shallow_bench as bench
from instantid_scenarios import mask, photo
from recorded_models import Replay

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """There a sigma is not read back: out of its range an identity has weight 0, and the block keeps its form."""
    monkeypatch.setattr(ModelCall, "sigma_is_near", False)
    with torch.inference_mode():
        yield


def sample(*given: Any, **changes: Any) -> torch.Tensor:
    """In three steps: some of them out of a range."""
    return sample_in_steps(*given, steps=3, **changes)


@cache
def bases() -> tuple[Any, Any]:
    forget_compiled_kinds()
    made, _ = compile_model(bench().model, CompileSettings(regions="transformer blocks"), backend="eager")
    return made, compiler_of(made)


CHANGES = {
    "weight": {"ip_weight": 0.3},
    "person": {"image": photo(2)},
    "two pictures": {"image": photo(9, count=2), "combine_embeds": "average"},
    "range": {"start_at": 0.3, "end_at": 0.7},
    "noise": {"noise": 0.9},
    "other range": {"start_at": 0.5, "end_at": 1.0, "ip_weight": 1.4},
}


def test_what_changes_from_picture_to_picture_needs_no_graph() -> None:
    base, compiler = bases()
    first = sample(*bench().advanced(model=base))
    graphs = compiler.graphs
    assert graphs == 3  # two widths of block, and the middle ones, which this node leaves alone
    assert compiler.fallbacks() == {}
    assert_same_picture(first, sample(*bench().advanced()))
    for name, changes in CHANGES.items():
        made = sample(*bench().advanced(model=base, **changes))
        assert_same_picture(made, sample(*bench().advanced(**changes)))
        assert (made - first).abs().max() > 1e-3 * first.abs().max(), name
        assert compiler.graphs == graphs, name
        assert compiler.fallbacks() == {}, name


@pytest.mark.long
def test_masks_and_sizes_share_one_more_graph() -> None:
    base, compiler = bases()
    made = sample(*bench().advanced(model=base, mask=mask(4)))
    graphs = compiler.graphs
    assert_same_picture(made, sample(*bench().advanced(mask=mask(4))))
    for changes, size in ((mask(6), (8, 12)), (mask(7), (16, 12))):
        made = sample(*bench().advanced(model=base, mask=changes), size=size)
        assert_same_picture(made, sample(*bench().advanced(mask=changes), size=size))
        assert compiler.graphs == graphs
        assert compiler.fallbacks() == {}


@pytest.mark.long
def test_two_people_and_compiling_after_them() -> None:
    def both(model: Any) -> Any:
        model, positive, negative = bench().apply(model=model, mask=mask(3))
        return bench().apply(image=photo(2), model=model, positive=positive, negative=negative, mask=1 - mask(3))

    model, positive, negative = both(bench().model)
    after, _ = compile_model(model, CompileSettings(regions="transformer blocks"), backend="eager")
    expected = sample(model, positive, negative)
    assert_same_picture(sample(after, positive, negative), expected)
    assert compiler_of(after).fallbacks() == {}
    assert_same_picture(sample(*both(bases()[0])), expected)


@pytest.mark.long
def test_another_packs_callback_runs_as_it_is() -> None:
    base, compiler = bases()

    def callback(out: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return 0.1 * out

    def added(model: Any) -> Any:
        model, positive, negative = bench().advanced(model=model)
        attn2 = model.model_options["transformer_options"]["patches_replace"]["attn2"]
        attn2[("output", 0, 0)].add(callback)
        return model, positive, negative

    assert_same_picture(sample(*added(base)), sample(*added(bench().model)))
    assert list(compiler.fallbacks().values()) == [1]


@pytest.fixture(autouse=True)
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first call of a kind; `test_a_kind_of_call_is_recorded_when_it_stays` is about those before it."""
    monkeypatch.setattr(recording, "WARM_CALLS", 0)


@pytest.mark.long
@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_recording_follows_every_change_of_an_identity(compiled_first: bool) -> None:
    settings = CompileSettings(mode="reduce-overhead", regions="transformer blocks")

    # Without IdentityNet, which has a range of its own: a call without it is another call.
    def made(**changes: Any) -> Any:
        if not compiled_first:
            return attach(bench().patch(**changes)[0])
        return bench().patch(model=attached, **changes)[0]

    def attach(model: Any) -> Any:
        model, _ = compile_model(model, settings, backend="eager")
        record_calls(model, compiler_of(model), record=Replay)
        return model

    attached = attach(bench().model)
    first = None
    for name, changes in {"plain": {}, **CHANGES}.items():
        changes = {k.removeprefix("ip_"): v for k, v in changes.items() if k != "combine_embeds"}
        model = made(**changes)
        recorder = compiler_of(model).recorder
        expected = sample(bench().patch(**changes)[0], bench().positive, bench().negative)
        assert_same_picture(sample(model, bench().positive, bench().negative), expected)
        assert recorder.reason is None, name
        assert recorder.recorded == 1, name
        first = first or recorder
    assert not compiled_first or recorder is first


def test_an_identity_is_copied_once_and_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CompileSettings(mode="reduce-overhead", regions="transformer blocks")
    model, _ = compile_model(bench().patch(weight=0.7, end_at=0.6)[0], settings, backend="eager")
    record_calls(model, compiler_of(model), record=Replay)
    copied: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(
        torch,
        "_foreach_copy_",
        lambda to, of: (copied.append(len(of)), len({t.dtype for t in of}) == 1 or 1 / 0, copy(to, of)),
    )
    expected = sample(bench().patch(weight=0.7, end_at=0.6)[0], bench().positive, bench().negative)
    assert_same_picture(sample(model, bench().positive, bench().negative), expected)
    compiler = compiler_of(model)
    assert compiler.recorder.recorded == 1 and compiler.recorder.reason is None
    steps, blocks = compiler.recorder.replayed, 11
    assert sum(copied) < steps * (blocks + 8)  # the weights of a range, which change, and the model's own inputs
