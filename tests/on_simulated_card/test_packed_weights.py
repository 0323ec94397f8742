"""Packed weights on a card: read by the kernels of the decode step, and unpacked by one launch for products of more rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotpath.vision_language import fused_decode, packed_products
from hotpath.vision_language.decoding import text_decoder
from test_fused_decode import ask


def as_files(network: Any, kinds: Any) -> None:
    """Random weights in the layers of a network, as files keep them: by projection a type, or one for each of its parts."""
    from gguf_files import random_blocks
    from hotpath.vision_language.gguf.matrix import Matrix
    from hotpath.vision_language.gguf.packing import Packer
    from hotpath.vision_language.gguf.types import TYPES
    from hotpath.vision_language.projections import replace

    for number, layer in enumerate(text_decoder(network).layers):
        for owner, name in (
            (layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "gate_up_proj"), (layer.mlp, "down_proj"),
        ):  # fmt: skip
            before = getattr(owner, name)
            rows = before.out_features // len(kinds[name])
            matrices = [
                Matrix(TYPES[kind], random_blocks(kind, rows, before.in_features, number), rows, before.in_features)
                for kind in kinds[name]
            ]
            bias = None if before.bias is None else [before.bias.detach().cpu()]
            replace(owner, name, Packer("none", torch.device("cuda"), torch.float32).layer(matrices, bias).to("cuda"))


# Q4_0, Q8_0, Q5_0, Q5_1, MXFP4 and Q2_0, whose blocks no kernel of ours reads.
MIXED = {"qkv_proj": (2, 8), "o_proj": (6,), "gate_up_proj": (7, 39), "down_proj": (42,)}
ALIKE = {"qkv_proj": (39,), "o_proj": (2,), "gate_up_proj": (6,), "down_proj": (8,)}


@pytest.mark.parametrize(
    "how", ["int4", "mixed", *(pytest.param(how, marks=pytest.mark.long) for how in ("int8", "float8", "alike"))]
)
def test_packed_weights_are_read_by_kernels(card: Any, load_fused: Any, how: str) -> None:
    from hotpath.vision_language.decoding import DecodeStep, Workspace

    kind = "qwen3" if how != "int4" else "qwen2"  # with biases
    files = {"alike": ALIKE, "mixed": MIXED}
    model = load_fused(kind, quantization="none" if how in files else how)
    with model.resident(100), torch.no_grad():
        if how in files:
            as_files(model.network, files[how])
        assert not fused_decode.why_not(model.network, 1, model.device, model.dtype)
        steps = [DecodeStep(model.network), fused_decode.FusedStep(model.network, "torch")]
        spaces = [Workspace(step, 1, 512, model.device, model.dtype) for step in steps]
        for token in (5, 77):
            found = []
            for space in spaces:
                card.launches.clear()
                found.append(space.run(torch.tensor([token], device=model.device)).cpu())
            torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(spaces[1].kept.cpu(), spaces[0].kept.cpu(), atol=1e-4, rtol=1e-4)
        layers = len(steps[1].layers)
        launches = {name: count for name, count in card.launches.items() if name.startswith("triton")}
        # Of what is mixed, two launches for the first, and for the third those of its halves and of what joins them.
        packed = 4 * layers if how != "mixed" else 5 * layers
        expected = {"triton::_packed_product": packed, "triton::_product": 1, "triton::_place_rows": layers}
        if how == "mixed":
            expected["triton::_gate_rows"] = layers
            assert f"{layers} of {6 * layers + 1} matrices are unpacked by torch" in steps[1].note
        assert launches == expected


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["int8", "int4", "float8"])
def test_packed_text_is_the_plain_paths(card: Any, load_fused: Any, quantization: str) -> None:
    model = load_fused("qwen3_vl", quantization=quantization)
    wanted = ask(model, "plain")
    made = ask(model, "auto")
    assert made.raw == wanted.raw and len(set(made.raw)) > 1
    assert "static cache, our kernels, one CUDA graph; products by our kernels" in made.report
    assert not card.compiled


def test_weights_that_no_kernel_reads_are_decoded_otherwise(card: Any, load_fused: Any) -> None:
    model = load_fused("qwen3")
    with model.resident(100):
        as_files(model.network, dict.fromkeys(MIXED, (42,)))
        model.network.lm_head = model.network.model.layers[0].mlp.down_proj
        why = fused_decode.why_not(model.network, 1, model.device, model.dtype)
    assert why == "the weights are packed in ways that our kernels do not read"


def test_a_kernel_that_is_wrong_far_behind_is_refused(card: Any, load_fused: Any, monkeypatch: Any) -> None:
    """In outputs that the first result's comparison does not reach: the step compares all of them with torch's."""
    from hotpath.vision_language import packed_decode_kernel as kernel
    from hotpath.vision_language import packed_products

    model = load_fused("qwen3", quantization="int4")
    monkeypatch.setattr(packed_products, "LOOKED_AT", 1)
    product = kernel.packed_product

    def wrong(x: Any, matrix: Any, result: Any, *given: Any, **more: Any) -> None:
        product(x, matrix, result, *given, **more)
        added = given[4] if len(given) > 4 else None  # else it would be told from the same fault without
        made = result.view(-1) if added is None else result.view(-1) - added
        result.view(-1)[-3:] += made[-3:]

    monkeypatch.setattr(kernel, "packed_product", wrong)
    with model.resident(100), torch.no_grad(), pytest.raises(fused_decode.Unfit, match="is off by"):
        fused_decode.FusedStep(model.network, "torch")


@pytest.mark.parametrize("how", ["int4", "alike"])
def test_prompts_unpack_by_one_launch(card: Any, load_fused: Any, how: str) -> None:
    model = load_fused("qwen3", quantization="none" if how == "alike" else how)
    with model.resident(100), torch.no_grad():
        if how == "alike":
            as_files(model.network, ALIKE)
        layer = text_decoder(model.network).layers[0].mlp.down_proj
        x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)).cuda()
        card.launches.clear()
        made = layer(x).cpu()
        assert card.launches["triton::_unpack"] == 1
        torch.testing.assert_close(made, (x @ layer.some(slice(None)).T).cpu(), atol=1e-4, rtol=1e-4)
        few = layer(x[:3]).cpu()  # which are not unpacked for
        assert card.launches["triton::_unpack"] == 1 and card.launches["triton::_packed_product"] == 1
        torch.testing.assert_close(few, made[:3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["broken", "wrong"])
def test_a_kernel_that_does_not_unpack_gives_way(card: Any, load_fused: Any, monkeypatch: Any, how: str) -> None:
    from hotpath.attention import first_results
    from hotpath.vision_language import packed_decode_kernel as kernel

    model = load_fused("qwen3", quantization="int4")
    monkeypatch.setattr(packed_products, "_failed", {})
    monkeypatch.setattr(first_results, "_compared", set())
    unpack = kernel.unpack

    def broken(matrix: Any, dtype: Any) -> Any:
        if how == "broken":
            raise TypeError("no such instruction")
        return unpack(matrix, dtype) * 1.5

    monkeypatch.setattr(kernel, "unpack", broken)
    with model.resident(100), torch.no_grad():
        layer = text_decoder(model.network).layers[0].mlp.down_proj
        x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)).cuda()
        wanted = (x @ layer.some(slice(None)).T).cpu()
        torch.testing.assert_close(layer(x).cpu(), wanted, atol=1e-4, rtol=1e-4)
        assert {"broken": "no such instruction", "wrong": "from plain torch's"}[how] in packed_products.why_not(
            x.device
        )
