"""The static decode step against the plain one, its buckets, its compilations, and packed weights."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from hotpath.host.compiling import StopOnItsWay
from hotpath.vision_language import (
    cpu_kernels,
    decode_attention,
    decode_path,
    decoding,
    generation,
    packed_products,
    projections,
    quantization,
)
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.decode_path import DecodePath, choose_path
from hotpath.vision_language.generation import PlainRunner, workspace
from hotpath.vision_language.loading import bitsandbytes_settings
from hotpath.vision_language.prefill import prefill
from hotpath.vision_language.prompts import Question, build
from hotpath.vision_language.quantization import Int4Linear, ScaledLinear, pack, plan
from hotpath.vision_language.sampling import Sampling
from torch import nn
from two_questions import prompts

GREEDY = Sampling(sample=False)
STATIC = DecodePath("static", "")
CPU = torch.device("cpu")
KINDS = ("qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_plain_paths(load, pictures, kind):
    model = load(kind)
    asked = prompts(model, pictures)
    filled = prefill(model, asked)
    buffers = workspace(model, STATIC, 2, filled.mask.shape[1] + 20)
    buffers.begin(*filled.layers(), filled.mask, filled.positions)
    plain = PlainRunner(model, filled)
    tokens = torch.tensor([5, 77])
    with torch.no_grad():
        for _ in range(6):
            wanted = plain.run(tokens)
            torch.testing.assert_close(buffers.run(tokens), wanted, atol=2e-4, rtol=1e-4)
            tokens = wanted.argmax(-1)


def test_the_static_path_reads_only_what_is_filled(load, pictures, monkeypatch):
    """Without a graph to keep its shapes, attention is given the cache up to the new token."""
    model = load("qwen3_vl")
    filled = prefill(model, prompts(model, pictures))
    length = filled.mask.shape[1]
    seen = []
    attend = decode_attention.attend_reference
    monkeypatch.setitem(
        decode_attention.ATTEND,
        "torch",
        lambda q, k, v, bias, slot: (seen.append(k.shape[2]), attend(q, k, v, bias, slot))[1],
    )
    buffers = workspace(model, STATIC, 2, length + 200)
    for _ in range(2):
        buffers.begin(*filled.layers(), filled.mask, filled.positions)
        with torch.no_grad():
            for _ in range(3):
                buffers.run(torch.tensor([5, 77]))
    layers = len(buffers.keys)
    assert seen == 2 * [length + step + 1 for step in range(3) for _ in range(layers)]
    assert buffers.length > length + 3


def test_half_precision_follows_too(load, pictures):
    model = load("qwen3_vl", dtype="bfloat16")
    filled = prefill(model, prompts(model, pictures))
    buffers = workspace(model, STATIC, 2, 600)
    buffers.begin(*filled.layers(), filled.mask, filled.positions)
    with torch.no_grad():
        tokens = torch.tensor([5, 77])
        wanted, found = PlainRunner(model, filled).run(tokens).float(), buffers.run(tokens).float()
    # bfloat16 keeps 8 bits; the logits of these random weights are of the order of ten.
    assert (wanted - found).abs().max() < 0.05 * wanted.abs().max()


def test_buckets():
    assert decoding.bucket_length(1) == 512
    assert decoding.bucket_length(512) == 512
    assert decoding.bucket_length(513) == 768
    assert decoding.bucket_length(300_000) >= 300_000
    assert list(decoding.BUCKETS) == sorted(decoding.BUCKETS)


class CountingBackend:
    """A compiler that changes nothing and counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_compiled_once_for_all_layers_and_calls_of_a_bucket(load, pictures, reference):
    model = load("qwen3_vl")
    backend = CountingBackend()
    path = DecodePath("compiled", "")
    torch._dynamo.reset()

    def run(rows, length, asked):
        filled = prefill(model, asked).repeated(rows)
        buffers = workspace(model, path, rows, length, backend)
        buffers.begin(*filled.layers(), filled.mask, filled.positions)
        with torch.no_grad():
            for token in (3, 4, 5):
                logits = buffers.run(torch.full((rows,), token))
        return buffers, logits

    first, second = prompts(model, pictures)
    buffers, _ = run(1, 400, [first])
    assert backend.graphs == 2  # one for the four layers, one for the head
    again, _ = run(1, 510, [second])
    assert again is buffers
    assert backend.graphs == 2  # another prompt of another length
    run(1, 700, [first])
    assert backend.graphs == 3  # another bucket: the layers, not the head
    run(3, 400, [first])
    assert backend.graphs == 5  # another batch size
    run(1, 400, [second])
    run(1, 700, [second])
    assert backend.graphs == 5  # back again
    for rows in range(4, 11):
        run(rows, 400, [first])
    assert backend.graphs == 5 + 2 * 7  # more versions than the compiler keeps by itself
    model.release()
    buffers, logits = run(1, 400, [first])
    plain = PlainRunner(model, prefill(model, [first]))
    with torch.no_grad():
        for token in (3, 4, 5):
            wanted = plain.run(torch.tensor([token]))
    torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)


def test_buffers_are_kept_for_the_last_two_shapes(load, pictures):
    model = load("qwen3_vl")
    for length in (400, 700, 1000):
        workspace(model, STATIC, 1, length)
    assert [key[2] for key in model.device_state["workspaces"]] == [768, 1024]
    one = next(iter(model.device_state["workspaces"].values()))
    assert one.nbytes() == model.cache_bytes(700)


def test_the_path_is_chosen_with_a_reason(load):
    model = load("qwen3_vl")
    assert choose_path(model, "auto").name == "static"
    assert choose_path(model, "static").name == "static"
    assert choose_path(model, "graph").name == "static"
    with pytest.raises(ValueError, match="no decode path"):
        choose_path(model, "magic")
    model.network.config.model_type = "qwen9"
    assert "not one of the dense" in choose_path(model, "static").note


def test_nothing_is_compiled_for_a_model_that_leaves(load, monkeypatch):
    model = load("qwen3_vl")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(decode_path.importlib.util, "find_spec", lambda name: name)
    assert choose_path(model, "auto", rows=2).name == "compiled"
    assert choose_path(model, "auto", kept=False, rows=2).name == "graph"
    assert "does not stay loaded" in choose_path(model, "auto", kept=False, rows=2).note
    assert choose_path(model, "compiled", kept=False).name == "compiled"  # as asked


def test_one_row_is_decoded_by_our_kernels_where_they_serve(load, monkeypatch):
    model, packed = load("qwen3_vl"), load("qwen3_vl", quantization="int8")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(decode_path.importlib.util, "find_spec", lambda name: name)
    for asked, kept, otherwise in (("auto", True, "compiled"), ("auto", False, "graph"), ("graph", True, "graph")):
        path = choose_path(model, asked, kept)
        assert (path.name, path.otherwise) == ("fused", otherwise)
        assert decode_path.simpler(path, model.device).name == otherwise
    assert choose_path(packed, "auto").name == choose_path(packed, "graph").name == "fused"
    assert "unpacked" not in choose_path(packed, "auto").note
    device = torch.device("cuda")
    monkeypatch.setitem(packed_products._failed, device, "the kernel failed (no such instruction)")
    assert choose_path(packed, "plain").note == (
        "plain, as asked; packed weights unpacked by torch, because the kernel failed (no such instruction)"
    )
    assert "unpacked" not in choose_path(model, "plain").note
    assert choose_path(model, "compiled").name == "compiled"  # as asked
    model.device_state["failed paths"] = {"fused": "it was wrong"}
    assert choose_path(model, "auto").name == "compiled"
    monkeypatch.setattr(decode_path.importlib.util, "find_spec", lambda name: None)
    model.device_state.clear()
    assert "Triton is missing" in choose_path(model, "auto").note


def test_a_path_that_fails_gives_way_and_says_so(load, pictures, monkeypatch):
    model = load("qwen3_vl")
    question = Question("Describe.", "", (pictures.a,))
    options = AnswerOptions(12, PRESETS["fast"], decode="compiled")
    plain = answer(model, [question], GREEDY, AnswerOptions(12, PRESETS["fast"]))[0].raw
    tries = []
    stop = type("InterruptProcessingException", (Exception,), {})  # an ordinary exception in older ComfyUIs

    def stopped(self, *arguments):
        raise StopOnItsWay(stop())

    def broken(self, *arguments):
        tries.append(self)
        raise RuntimeError("no C compiler\nand a long story")

    monkeypatch.setattr(decoding.Workspace, "warm_up", stopped)
    with pytest.raises(stop):
        answer(model, [question], GREEDY, options)
    monkeypatch.setattr(decoding.Workspace, "warm_up", broken)
    for _ in range(2):
        made = answer(model, [question], GREEDY, options)[0]
        assert made.raw == plain
        assert "decode: static cache; not compiled, because it failed here: no C compiler;" in made.report
    assert len(tries) == 1
    monkeypatch.setattr(decoding.Workspace, "begin", broken)
    made = answer(model, [question], GREEDY, options)[0]
    assert made.raw == plain and "decode: plain; not compiled" in made.report and "not static" in made.report
    model.release()
    monkeypatch.undo()
    assert (
        "failed" not in answer(model, [question], GREEDY, AnswerOptions(12, PRESETS["fast"], decode="static"))[0].report
    )


def test_merged_projections_are_the_same_weights():
    owner = nn.Module()
    for name, width in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        setattr(owner, name, nn.Linear(16, width))
    x = torch.randn(3, 16)
    wanted = [getattr(owner, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    count = sum(p.numel() for p in owner.parameters())
    assert projections.merge(owner, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    assert sum(p.numel() for p in owner.parameters()) == count
    for name, want in zip(("q_proj", "k_proj", "v_proj"), wanted, strict=True):
        torch.testing.assert_close(getattr(owner, name)(x), want)
    torch.testing.assert_close(owner.qkv_proj(x), torch.cat(wanted, -1))
    owner.to(torch.float64)
    assert owner.k_proj(x.double()).dtype == torch.float64
    assert not projections.merge(owner, ("q_proj", "k_proj"), "again")
    assert set(owner.state_dict()) == {"qkv_proj.weight", "qkv_proj.bias"}
    apart = copy.deepcopy(owner)
    assert apart.k_proj.merged is apart.qkv_proj is not owner.qkv_proj
    assert quantization.quantize(owner, "int8", CPU) == 1
    assert type(owner.qkv_proj) is ScaledLinear and owner.v_proj.merged is owner.qkv_proj


@pytest.mark.parametrize(("method", "limit"), [("int8", 0.01), ("float8", 0.04), ("int4", 0.12)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_are_close_and_small(method, limit, bias):
    torch.manual_seed(0)
    linear = nn.Linear(200, 48, bias=bias)
    packed = pack(linear, method, CPU)
    x = torch.randn(5, 200)
    wanted = linear(x)
    error = (packed(x) - wanted).norm() / wanted.norm()
    assert error < limit
    torch.testing.assert_close(packed.rows(x, 16, 40), packed(x)[:, 16:40])
    stored = sum(t.nbytes for t in packed.buffers())
    full = linear.weight.nbytes
    assert stored < full * (0.36 if method != "int4" else 0.26)
    assert isinstance(packed, Int4Linear if method == "int4" else ScaledLinear)


def test_packing_holds_no_layer_twice(monkeypatch):
    decoder = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3))
    whole = [weakref.ref(layer) for layers in decoder for layer in layers]
    alive = []

    def counted(linear, method, device):
        alive.append(sum(layer() is not None for layer in whole))
        return pack(linear, method, device)

    monkeypatch.setattr(quantization, "pack", counted)
    assert quantization.quantize(decoder, "int8", CPU) == 6
    assert alive == [6, 5, 4, 3, 2, 1] and all(type(layer) is ScaledLinear for layers in decoder for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", ["int8", "int4", "float8"])
def test_degenerate_rows_and_large_inputs(method, dtype):
    """Also where a sum of codes, which the scale comes after, is more than a number of 16 bits can be."""
    linear = nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        linear.weight[0] = 0
        linear.weight[1] = 3.0
    rows = cpu_kernels.FEW_ROWS + 1
    found = pack(linear.to(dtype), method, CPU)(torch.full((rows, 64), 10.0, dtype=dtype))
    wanted = torch.tensor([[0.0, 1920.0]], dtype=dtype).expand(rows, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["int8", "int4", "float8"])
def test_quantised_models_answer_the_same_on_both_paths(load, pictures, method):
    model = load("qwen3_vl", quantization=method)
    assert f"quantization {method}" in answer(model, [Question("x")], GREEDY, AnswerOptions(2))[0].report
    kept = [name for name, m in model.network.named_modules() if type(m) is nn.Linear]
    assert all("visual" in name or name == "lm_head" for name in kept)
    question = Question("Describe.", "", (pictures.a,))
    texts = {
        path: answer(model, [question], GREEDY, AnswerOptions(12, PRESETS["fast"], decode=path))[0].raw
        for path in ("plain", "static")
    }
    assert texts["plain"] == texts["static"]
    torch._dynamo.reset()
    backend = CountingBackend()
    workspace(model, DecodePath("compiled", ""), 1, 100, backend)
    assert backend.graphs == 2


def test_quantization_words(monkeypatch):
    cpu = torch.device("cpu")
    assert plan("none", cpu).method == "none"
    assert plan("None (FP16)", cpu).method == "none"
    assert plan("8bit", cpu).method == "int8"
    assert plan("8-bit (Balanced)", cpu).method == "int8"
    found = plan("4bit", cpu)
    assert found.method == "int4" and "bitsandbytes is not usable" in found.note
    with pytest.raises(ValueError, match="choose int4 or int8"):
        plan("bitsandbytes 4-bit", cpu)
    with pytest.raises(ValueError, match="no quantization"):
        plan("3bit", cpu)
    card, there = torch.device("cuda"), [object()]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there[0])
    assert plan("4bit", card).method == plan("bitsandbytes 4-bit", card).method == "bitsandbytes 4-bit"
    assert plan("4bit", cpu).method == "int4"
    with pytest.raises(ValueError, match="choose int4 or int8"):
        plan("bitsandbytes 4-bit", cpu)
    there[0] = None
    assert plan("4bit", card).method == "int4"
    with pytest.raises(ValueError, match="choose int4 or int8"):
        plan("bitsandbytes 4-bit", card)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", dict)
    assert bitsandbytes_settings("bitsandbytes 8-bit", torch.float16) == {"load_in_8bit": True}
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16}
    assert bitsandbytes_settings("bitsandbytes 4-bit", torch.float16) == four
    on_a_mac = plan("float8", torch.device("mps"))
    assert on_a_mac.method == "int8" and "Metal has no 8 bit floats" in on_a_mac.note


def test_a_report_says_how_packed_weights_are_multiplied_on_a_cpu(monkeypatch):
    cpu, card = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(
        cpu_kernels, "why_not", lambda method: "" if method == "int8" else "torch has no int4 kernel here"
    )
    assert "CPU kernel" in plan("int8", cpu).note and "CPU kernel" in plan("8bit", cpu).note
    for word in ("int4", "4bit"):
        assert plan(word, cpu).note.endswith("unpacked for every product: torch has no int4 kernel here")
    assert "unpacked" in plan("float8", cpu).note
    assert plan("int8", card).note == "int8 weights, one scale a row"


def test_a_batch_over_two_buckets_of_text(load, reference):
    """A prompt that fills its bucket to the last token, and one token more."""
    model = load("qwen3")
    for length in (500, 501):
        question = Question("y" * (length - build(model, Question(""), []).length))
        assert build(model, question, []).length == length
        made = answer(model, [question], GREEDY, AnswerOptions(12, decode="static"))[0]
        assert made.raw == reference(model, question)
        assert generation.workspace(model, STATIC, 1, length + 12).length == (512 if length == 500 else 768)
