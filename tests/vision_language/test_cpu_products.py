"""Models on the CPU whose matrices are kept as oneDNN orders them: the library's text, one copy of the weights."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hotpath.host.streamed_layers import whole_bytes
from hotpath.products import int8, rerouting
from hotpath.products import linear as products
from hotpath.products.linear import PackedLinear
from hotpath.vision_language import cpu_kernels, decoding, projections, quantization
from hotpath.vision_language.asking import Question
from hotpath.vision_language.loading import MODELS, LoadOptions
from hotpath.vision_language.quantization import pack_head
from hotpath.vision_language.sampling import Sampling
from torch import nn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def every_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "why_not", lambda dtype: "")
    monkeypatch.setattr(projections, "large_linears", lambda network: products.large_linears(network, 0))


def plain_layers(network: nn.Module) -> list[nn.Linear]:
    return [part for part in network.modules() if type(part) is nn.Linear]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_the_text_is_the_librarys(load: Any, ask: Any, reference: Any, pictures: Any, kind: str) -> None:
    model = load(kind)
    assert projections.has_packed(model.network) and not plain_layers(model.network)
    asked = Question("Compare.", "", (pictures.a, pictures.b)) if kind != "qwen3" else Question("Hello")
    wanted = reference(model, asked)
    answers = [ask(model, asked, decode=decode) for decode in ("auto", "plain", "compiled", "auto")]
    assert [made.raw for made in answers] == [wanted] * 4
    assert "products by oneDNN" in answers[0].report and "not compiled, because oneDNN" in answers[2].report
    assert ask(model, asked, Sampling(beams=2)).raw == reference(model, asked, num_beams=2)


def test_weights_exist_once_and_go_at_once(load: Any, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = load("qwen3_vl")
    held = whole_bytes(packed.network)
    attention = decoding.text_decoder(packed.network).layers[0].self_attn
    x = torch.randn(1, 3, attention.qkv_proj.in_features)
    whole = attention.qkv_proj(x)
    torch.testing.assert_close(torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1), whole)
    assert isinstance(attention.qkv_proj, PackedLinear)
    weight = weakref.ref(attention.qkv_proj.weight)
    del attention
    MODELS.clear()
    packed.release()
    gc.collect()
    monkeypatch.setattr(products, "why_not", lambda dtype: "slower")
    with MODELS.borrowed("qwen3_vl", LoadOptions()) as plain:
        assert not projections.has_packed(plain.network) and not projections.products_note(plain.network)
        monkeypatch.setattr(projections, "LARGE", 0)
        monkeypatch.setattr(projections, "why_not", products.why_not)
        assert projections.products_note(plain.network) == "; products by torch itself, because slower"
        tied = plain.network.lm_head.weight is plain.network.get_input_embeddings().weight
        head = plain.network.lm_head.weight.nbytes if tied else 0
        assert held == whole_bytes(plain.network) + head
    packed.discard()
    assert weight() is None and not any(t.nbytes for t in (*packed.network.parameters(), *packed.network.buffers()))


def test_a_shared_head_is_copied_only_where_memory_is_plenty(
    load: Any, headless_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headless_host, "free_memory", lambda device: 1000)
    model = load("qwen3_vl")
    network = model.network
    tied = network.lm_head.weight is network.get_input_embeddings().weight
    assert len(plain_layers(network)) == int(tied)


@pytest.mark.skipif(bool(cpu_kernels.why_not("int8")), reason="torch has no int8 kernel for this CPU")
@torch.inference_mode()
def test_a_head_is_packed_where_its_kernel_is() -> None:
    def owner(inputs: int = 128, tied: bool = False) -> nn.Module:
        network = nn.Module()
        network.embed = nn.Embedding(96, inputs)
        network.lm_head = nn.Linear(inputs, 96, bias=False)
        if tied:
            network.lm_head.weight = network.embed.weight
        return network

    network, cpu = owner(tied=True), torch.device("cpu")
    dense, embedding = network.lm_head, network.embed.weight
    assert pack_head(network, "int4", cpu) and network.embed.weight is embedding
    x = torch.randn(2, 20, 128)
    many = network.lm_head(x)
    near = 0.02 * many.abs().max()
    assert (many - dense(x)).abs().max() < near and (network.lm_head(x[1, 7]) - many[1, 7]).abs().max() < near
    for other, method, device in (
        (owner(96), "int4", cpu),
        (owner(), "float8", cpu),
        (owner(), "int8", torch.device("cuda")),
    ):
        before = other.lm_head
        assert not pack_head(other, method, device) and other.lm_head is before


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_what_is_quantised_stays_so(load: Any, ask: Any, quantization: str) -> None:
    model = load("qwen3_vl", quantization=quantization)
    inside = decoding.text_decoder(model.network).layers[0].self_attn
    assert not isinstance(inside.qkv_proj, PackedLinear) and not plain_layers(model.network.model.visual)
    assert ask(model, Question("x")).tokens


@pytest.mark.parametrize("method", ["int8", "int4", "float8"])
@torch.inference_mode()
def test_unpacked_matrices_are_multiplied_by_onednn_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen: list[torch.Size] = []
    monkeypatch.setattr(quantization, "why_not", lambda *_, **__: "no")
    monkeypatch.setattr(rerouting, "product", lambda *given: (seen.append(given[0].shape), products.product(*given))[1])
    monkeypatch.setattr(int8, "why_not", lambda: "no")
    packed = quantization.pack(nn.Linear(256, 320), method, torch.device("cuda"))
    prompt, token = torch.randn(2, 40, 256), torch.randn(1, 1, 256)
    before = packed(prompt), packed(token), packed.rows(prompt, 64, 320)
    assert not seen
    monkeypatch.setattr(quantization, "why_not", lambda *_, **__: "")
    for made, wanted in zip((packed(prompt), packed(token), packed.rows(prompt, 64, 320)), before, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert seen == [prompt.shape, prompt.shape], "a token alone is read as it is packed"
