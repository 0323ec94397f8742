"""Folders in float8 with a scale for each block: read without the library's kernel, in the numbers of the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotpath.vision_language import decoding
from hotpath.vision_language.folders import UnusableModel
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.quantization import Int4Linear, Int4OnCpu, ScaledLinear
from hotpath.vision_language.stored_fp8 import FEW_ROWS, NOTE, BlockScaledLinear, merge, of_library
from safetensors.torch import load_file, save_file

BLOCK = 16


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8 codes, scales [rows / 16, columns / 16]) of a matrix whose sides are whole blocks."""
    blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-6) / 448
    codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    return codes, scale


def unpacked(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


@pytest.fixture
def weights(llm: Path) -> dict[str, torch.Tensor]:
    """What `small-FP8` holds, a folder in float8; `small` holds the same numbers in float32."""
    stored = load_file(llm / "qwen3_vl" / "model.safetensors")
    same = dict(stored)
    for name, weight in list(stored.items()):
        if "language_model" in name and name.endswith("proj.weight"):
            stored[name], scale = in_blocks(weight)
            stored[f"{name}_scale_inv"], same[name] = scale, unpacked(stored[name], scale)
    for folder, tensors in (("small-FP8", stored), ("small", same)):
        shutil.copytree(llm / "qwen3_vl", llm / folder)
        save_file(tensors, llm / folder / "model.safetensors", {"format": "pt"})
    config = json.loads((llm / "small-FP8" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "model.visual"],
    }  # fmt: skip
    (llm / "small-FP8" / "config.json").write_text(json.dumps(config))
    return same


def library_sees(monkeypatch: pytest.MonkeyPatch, card: bool) -> None:
    """Whether there is a card with float8, as far as the library asks before it reads the weights."""
    library = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")
    cuda = SimpleNamespace(is_available=lambda: card, get_device_capability=lambda *_: (9, 0))
    monkeypatch.setattr(library, "torch", SimpleNamespace(**{**vars(torch), "cuda": cuda}))
    monkeypatch.setattr(library, "is_torch_xpu_available", lambda *_, **__: False, raising=False)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    library_sees(monkeypatch, True)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    library_sees(monkeypatch, False)


def layers(model: Any, kind: type | tuple[type, ...]) -> int:
    return sum(isinstance(part, kind) for part in decoding.text_decoder(model.network).layers.modules())


@pytest.fixture
def answers(weights: Any, ask: Any, pictures: Any) -> Callable[..., Any]:
    """The model in float8, after its answer was that of the one with the same numbers."""

    def compare(**options: Any) -> Any:
        stored, same = (MODELS.get(name, LoadOptions(**options)) for name in ("small-FP8", "small"))
        question = Question("Describe.", "", (pictures.a,))
        assert ask(stored, question).raw == ask(same, question).raw
        return stored

    return compare


def test_where_the_library_keeps_float8_ours_multiply(weights: dict[str, torch.Tensor], card: None) -> None:
    model = MODELS.get("small-FP8", LoadOptions())
    decoder = decoding.text_decoder(model.network)
    assert layers(model, BlockScaledLinear) == 4 * len(decoder.layers) and model.quantization == "fp8"
    assert NOTE in model.notes
    name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    assert torch.equal(decoder.layers[1].mlp.down_proj.dense(torch.float32), weights[name])


def test_a_release_that_fails_for_models_without_experts_reads_them(
    weights: Any, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.16 looks up how experts are split between cards, and takes what it does not find for a table (#48346)."""
    library = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")
    overrides: dict[Any, dict[str, str]] = {"deepgemm_megamoe": {"moe_tp_experts": "megamoe_experts"}}
    experts = type("FP8Experts", (torch.nn.Module,), {"_impl_tp_layer_overrides": overrides})
    monkeypatch.setattr("transformers.integrations.finegrained_fp8.FP8Experts", experts, raising=False)
    # Asked in every release, and in that one just before the table.
    monkeypatch.setattr(
        library.FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: overrides.get(None).get("colwise")
    )
    assert layers(MODELS.get("small-FP8", LoadOptions()), BlockScaledLinear)


@pytest.mark.long
@pytest.mark.parametrize("streamed", [0, 1])
def test_what_they_answer(answers: Callable[..., Any], card: None, streamed: int) -> None:
    # A layer that is streamed is no part of the network that the host moves.
    blocks = layers(answers(stream_layers=streamed), BlockScaledLinear)
    assert blocks == 4 * (len(decoding.text_decoder(MODELS.loaded()[0].network).layers) - streamed)


@pytest.mark.long
def test_where_the_library_unpacks_them_all_paths_are_open(answers: Callable[..., Any], no_card: None) -> None:
    model = answers()
    assert model.quantization == "none" and not decoding.unsupported(model.network) and NOTE not in model.notes


@pytest.mark.long
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_they_can_be_packed_anew(answers: Callable[..., Any], card: None, method: str) -> None:
    model = answers(quantization=method)
    assert model.quantization == method and not layers(model, BlockScaledLinear)
    assert layers(model, (ScaledLinear, Int4Linear, Int4OnCpu)) and not any("already" in note for note in model.notes)


@pytest.mark.parametrize(("rows", "columns", "block"), [(40, 24, (16, 16)), (7, 5, None), (32, 64, (32, 8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_any_size_and_what_is_left_of_them(rows: int, columns: int, block: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    down, across = block or (rows, columns)
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // down), -(-columns // across)) + 0.5
    wanted = codes.float() * scale.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
    given = SimpleNamespace(
        weight=codes, weight_scale_inv=scale if block else scale[0, 0], block_size=block, bias=torch.ones(rows)
    )
    layer = of_library(given)
    assert torch.equal(layer.dense(dtype), wanted.to(dtype))
    for shape in ((FEW_ROWS + 1, columns), (1, 3, columns), (columns,)):
        x = torch.randn(shape).to(dtype)
        expected = torch.nn.functional.linear(x, wanted.to(dtype), torch.ones(rows).to(dtype))
        assert layer(x).dtype == dtype and layer(x).shape == expected.shape
        assert torch.allclose(layer(x).float(), expected.float(), atol=torch.finfo(dtype).eps * 4 * columns)


def test_experts_that_need_fetched_code_are_refused(weights: Any, card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.finegrained_fp8.FP8Experts", torch.nn.Embedding, raising=False)
    with pytest.raises(UnusableModel, match=r"its experts are in float8.* int8 or int4, which need no package\.$"):
        MODELS.get("small-FP8", LoadOptions())


@pytest.mark.parametrize(("middle", "joined"), [(32, True), (24, False)])
def test_projections_become_one_where_no_block_lies_in_two(middle: int, joined: bool) -> None:
    def layer(rows: int) -> BlockScaledLinear:
        scale = torch.rand(-(-rows // 16), 3) + 0.5
        return BlockScaledLinear(torch.randn(rows, 40).to(torch.float8_e4m3fn), scale, (16, 16), torch.randn(rows))

    owner = torch.nn.Module()
    owner.q_proj, owner.k_proj, owner.v_proj = layer(64), layer(middle), layer(32)
    names, x = ("q_proj", "k_proj", "v_proj"), torch.randn(3, 40)
    wanted = [getattr(owner, name)(x) for name in names]
    assert merge(owner, names, "qkv_proj") is joined and hasattr(owner, "qkv_proj") is joined
    for name, before in zip(names, wanted, strict=True):
        torch.testing.assert_close(getattr(owner, name)(x), before)
    if joined:
        torch.testing.assert_close(owner.qkv_proj(x[:1]), torch.cat(wanted, dim=1)[:1])
