"""ComfyUI's own models on the card: recorded calls, InstantID's kernel, and samplers that wait no more than before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotpath.patches.compilation import CompilationRefused, CompileSettings, compile_model, compiler_of, recording
from tiny_native_models import tiny

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recording, "WARM_CALLS", 0)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("mode", [pytest.param("reduce-overhead", marks=pytest.mark.long), "cudagraphs"])
def test_recorded_calls(card: Any, mode: str) -> None:
    bench = tiny("z_image")
    model, _ = compile_model(bench.model, CompileSettings(mode=mode, strict=True), backend="eager")
    recorder = compiler_of(model).recorder
    assert recorder is not None
    for count, changes in ((1, {}), (1, {"prompt": "another"}), (2, {"size": (16, 24)}), (2, {"steps": 3})):
        waits = []
        for patched in (bench.model, model):
            before = len(card.waits)
            waits.append((bench.sample(patched, **changes), len(card.waits) - before))
        (expected, its), (made, ours) = waits
        assert (made - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert recorder.recorded == count and recorder.reason is None
    assert ours == its  # the last one found its recording
    assert recorder.replayed == card.replays == 9 and card.graphs == 2
    assert bool(compiler_of(model).kinds) == (mode == "reduce-overhead")


@pytest.mark.long
def test_a_model_that_runs_no_wrappers(card: Any) -> None:
    import comfy.sample
    import comfy.supported_models
    from tiny_native_models import _patcher, encode

    config = comfy.supported_models.SD3(
        {
            "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "num_patches": 4096,
            "pos_embed_max_size": 64, "pos_embed_scaling_factor": None, "adm_in_channels": 64, "dtype": torch.float32,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    plain = _patcher(config, 0)
    model, _ = compile_model(plain, CompileSettings(mode="cudagraphs", strict=True))
    recorder = compiler_of(model).recorder
    latent = torch.zeros(1, 16, 16, 16)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    for count, prompt in enumerate(("one", "another"), 1):
        text = encode(prompt, 20, 64, 64)
        expected, made = (
            comfy.sample.sample(
                m, noise, 2, 4.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=1
            )
            for m in (plain, model)
        )  # fmt: skip
        assert (made - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert recorder.recorded == 1 and recorder.replayed == 2 * count and recorder.reason is None


def test_the_first_calls_run_where_the_next_is_recorded(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "WARM_CALLS", 2)
    bench = tiny("z_image")
    model, _ = compile_model(bench.model, CompileSettings(mode="cudagraphs", strict=True), backend="eager")
    made, expected = bench.sample(model, steps=5), bench.sample(steps=5)
    assert (made - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert card.graphs == 1 and card.replays == 3


@pytest.mark.long
@pytest.mark.parametrize("mode", ["reduce-overhead", "cudagraphs"])
def test_identities_in_a_recorded_model(card: Any, mode: str) -> None:
    from instantid_bench import apply, sample, shallow_bench

    small: dict[str, Any] = {"size": (8, 8), "steps": 1}
    bench = shallow_bench()
    *plain, report = apply(bench, weight=0.8)
    assert "11 of 11 blocks" in report
    expected = sample(*plain, **small)
    assert card.launches["triton::_attend_tokens"] >= 11
    model, _ = compile_model(plain[0], CompileSettings(mode=mode), backend="eager")
    recorder = compiler_of(model).recorder
    assert recorder is not None
    assert (sample(model, *plain[1:], **small) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert recorder.recorded == recorder.replayed == 1


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.long), True])
def test_text_and_identity_take_one_launch(card: Any, masked: bool) -> None:
    from hotpath.patches.attention_override import OVERRIDE
    from hotpath.patches.bound_attention import BoundAttention, TokenStep

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").half()

    rows = torch.tensor([[0, 1]], dtype=torch.int32, device="cuda")
    mask = torch.rand(1, 2, 40, device="cuda") if masked else None
    step = TokenStep(
        normal(2, 16, 128), normal(2, 16, 128), rows, torch.full((1, 2), 0.8, device="cuda"),
        None if mask is None else lambda length: mask, 40,
    )  # fmt: skip
    bound, (q, k, v) = BoundAttention(None, (step, step)), (normal(2, n, 128) for n in (40, 77, 77))

    def attentions(options: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
        before = dict(card.launches)
        out = bound(q, k, v, {"n_heads": 2, **options})
        new = {name: count - before.get(name, 0) for name, count in card.launches.items()}
        return out, new.get("triton::_attend_tokens", 0), sum(n for name, n in new.items() if "dot_product" in name)

    attentions({})  # the kernel is tried
    fused, ours, theirs = attentions({})
    assert (ours, theirs) == (2, 0)  # the second step adds to the first one's result
    # A node's choice of attention is the text's.
    chosen = {OVERRIDE: lambda function, *args, **kwargs: function(*args, **kwargs)}
    attentions(chosen)
    expected, ours, theirs = attentions(chosen)
    assert ours == 2 and theirs > 0
    assert (fused - expected).abs().max() <= 4e-3 * expected.abs().max()
    bound.steps = (step.variant(step.weights, torch.zeros(2, device="cuda"), True),)
    assert attentions({})[2] == 0 and (bound.steps[0].stats > 0).all()


def test_what_cannot_be_recorded_is_refused_where_that_is_asked_for(card: Any) -> None:
    bench = tiny("z_image")
    other = bench.model.clone()
    other.set_model_patch(lambda args: args, "double_block")
    for strict in (False, True):
        model, report = compile_model(other, CompileSettings(mode="cudagraphs", strict=strict))
        assert "nothing is compiled" in report
        if strict:
            with pytest.raises(CompilationRefused, match="cannot be recorded: double_block of another pack"):
                bench.sample(model)
        else:
            assert torch.equal(bench.sample(model), bench.sample(other))
            assert "was not recorded" in compiler_of(model).report()


@pytest.mark.long
def test_the_adapter_stays_where_there_is_room(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.identity import prepared
    from instantid_bench import shallow_bench

    adapter = shallow_bench().instantid
    faces = torch.randn(4, 1, 1, adapter.embedding_dim)
    on_cpu = prepared.prepare(
        adapter, SimpleNamespace(device=torch.device("cpu"), resident=lambda keep: nullcontext(adapter)), faces[0]
    )
    moved = card.launches.copy()
    kept = prepared.prepare(adapter, adapter.managed, faces[1])
    assert next(adapter.parameters()).is_cuda and card.launches != moved
    again = prepared.prepare(adapter, adapter.managed, faces[1], noise=0.1)
    assert torch.equal(again.cond, kept.cond) and not torch.equal(again.uncond, kept.uncond)
    monkeypatch.setattr(prepared, "ROOM", 1 << 50)
    prepared.prepare(adapter, adapter.managed, faces[2])
    assert not next(adapter.parameters()).is_cuda
    prepared.named_cache("InstantID identities", prepared.CACHE_BYTES).clear()
    both_ways = prepared.prepare(adapter, adapter.managed, faces[0])
    assert (both_ways._master - on_cpu._master).abs().max() <= 1e-5 * on_cpu._master.abs().max()
    assert both_ways.cond.device.type == both_ways._master.device.type == "cpu"
