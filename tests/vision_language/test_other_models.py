"""Models of the same shape beside the three: hybrid and mixture-of-experts decoders, as the library answers."""

from __future__ import annotations

import sys

import pytest
import torch
from hotpath.demo.captioner_model import write_folder
from hotpath.vision_language import decoding
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.experts import PackedExperts, pack_experts, packable, unpacked_experts
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from newer_models import newer_folder
from torch import nn


def library_experts(count=5, hidden=64, inner=48):
    moe = pytest.importorskip("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe")
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig

    config = Qwen3VLMoeTextConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=count)
    config._experts_implementation = "eager"
    made = moe.Qwen3VLMoeTextExperts(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made


@pytest.mark.parametrize(("kind", "experts"), [("qwen3_vl_moe", True), ("qwen3_5", False)])
def test_experts_that_are_not_packed_are_told(kind, experts):
    """Older releases of the library keep them in another order."""
    part = nn.Module()
    part.gate_up_proj = nn.Parameter(torch.zeros(4, 30, 8))
    layer = nn.ModuleDict({"experts" if experts else "conv1d": part, "o_proj": nn.Linear(8, 8, bias=False)})
    assert not packable(part) and pack_experts(layer, "int8", torch.device("cpu")) == 0
    note = unpacked_experts(nn.ModuleList([layer]))
    assert note == ("quantization: not of its experts, which are 94% of the decoder's bytes" if experts else ""), kind


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("method", "near"), [("int8", 0.02), ("float8", 0.08), ("int4", 0.2)])
@pytest.mark.parametrize("inner", [48, 64])
def test_packed_experts_are_the_librarys(method, near, device, inner):
    torch.manual_seed(0)
    experts = library_experts(inner=inner)
    if not packable(experts):
        pytest.skip("this transformers keeps experts in another order")
    layer = nn.ModuleDict({"experts": experts})
    held = sum(parameter.nbytes for parameter in layer.parameters())
    rows, chosen = torch.randn(23, 64), torch.stack([torch.randperm(5)[:2] for _ in range(23)])
    chosen[4] = torch.tensor([2, 5])  # none: past the last one
    weights = torch.rand(23, 2)
    with torch.no_grad():
        wanted = experts(rows, chosen, weights)
        assert pack_experts(layer, method, torch.device(device)) == 1
        packed = layer["experts"]
        assert type(packed) is PackedExperts and not list(experts.parameters())
        found = packed(rows, chosen, weights)
        one = packed(rows[7:8], chosen[7:8], weights[7:8])
    assert sum(tensor.nbytes for tensor in packed.buffers()) < (0.3 if method != "int4" else 0.19) * held
    assert not list(packed.parameters()) and not unpacked_experts(nn.ModuleList([layer]))
    assert (found - wanted).norm() < near * wanted.norm()
    assert (one - found[7:8]).norm() < 0.02 * found[7:8].norm()


@pytest.mark.parametrize("method", ["int8", "int4", "float8"])
def test_a_mixture_of_experts_answers_packed(llm, ask, pictures, method):
    newer_folder(llm / "mixture", "qwen3_vl_moe")
    model = MODELS.get("mixture", LoadOptions(quantization=method))
    layers = decoding.text_decoder(model.network).layers
    if not any(isinstance(part, PackedExperts) for part in layers.modules()):
        pytest.skip("this transformers keeps experts in another order")
    question = Question("Describe.", "", (pictures.a,))
    first, again = ask(model, question), ask(model, question)
    assert first.raw == again.raw and first.tokens and "not of its experts" not in first.report
    # A router chooses by small differences.
    assert all(layer.mlp.gate.weight.dtype == torch.float32 for layer in layers)


def test_a_release_whose_models_have_a_cache_of_their_own(llm, ask, pictures, monkeypatch):
    """Up to transformers 5.4 linear attention asks its cache what the usual one does not know."""
    from transformers import DynamicCache

    newer_folder(llm / "mixture", "qwen3_vl_moe")
    model, made = MODELS.get("mixture", LoadOptions()), []
    question = Question("Describe.", "", (pictures.a,))
    wanted = ask(model, question).raw

    class MixtureDynamicCache(DynamicCache):
        def __init__(self, config):
            made.append(config.layer_types if hasattr(config, "layer_types") else config.num_hidden_layers)
            super().__init__(config=config)

    module = sys.modules[type(model.network).__module__]
    monkeypatch.setattr(module, "MixtureDynamicCache", MixtureDynamicCache, raising=False)
    assert ask(model, question).raw == wanted and made


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_5"])
def test_they_answer_from_the_cache(llm, ask, counter, pictures, kind):
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    folder = newer_folder(llm / kind, kind)
    model = MODELS.get(kind, LoadOptions())
    question = Question("Describe.", "Be brief.", (pictures.a, pictures.b))
    first = ask(model, question, decode="static")
    assert "static cache" in first.report or "in another way" in first.report
    calls = counter(model)
    again = ask(model, question)
    assert calls.take() == (0, 0, 0) and again.raw == first.raw
    # Against the library on its own.
    from hotpath.vision_language.prompts import render
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    shortest, longest = PRESETS["fast"].edges(model.image_sizes)
    inputs = processor(
        text=[render(model, question)],
        images=[Image.fromarray(picture.pixels) for picture in question.pictures],
        images_kwargs={"size": {"shortest_edge": shortest, "longest_edge": longest}},
        return_tensors="pt",
    )
    made = plain.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert (
        first.raw
        == processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    )
    several = answer(model, [question], Sampling(seed=7), AnswerOptions(4, PRESETS["fast"], answers=2))
    singles = [ask(model, question, Sampling(seed=seed), max_new_tokens=4) for seed in (7, 8)]
    assert [part.raw for part in several] == [part.raw for part in singles]


@pytest.mark.parametrize("first", [0, 1], ids=["all layers", "some layers"])
def test_layers_that_look_through_a_window_keep_no_prefix(llm, ask, pictures, first):
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": first, "num_hidden_layers": 2}
    write_folder(llm / "windows", "qwen2_vl", **window)
    model = MODELS.get("windows", LoadOptions())
    question = Question("x", "", (pictures.a,))
    found = [ask(model, question, max_new_tokens=4, reuse_prefix=reuse).raw for reuse in (False, True, True)]
    assert found[0] == found[1] == found[2]
