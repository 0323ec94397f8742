"""GGUF files of Qwen3.5 and of models with experts: the same models as those of the folders that they were made of."""

from __future__ import annotations

import math

import pytest
import torch
from gguf_files import (
    F32,
    NVFP4,
    Q8_0,
    QWEN35_WORDS,
    QWEN_WORDS,
    facts,
    of_folder,
    random_blocks,
    stored,
    tower_facts,
    use_qwens_words,
    weights,
    words,
    write,
)
from hotpath.vision_language import cpu_kernels, decoding
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.experts import PackedExperts
from hotpath.vision_language.gguf import models
from hotpath.vision_language.gguf.file import Gguf
from hotpath.vision_language.gguf.tokenizer import Vocabulary
from hotpath.vision_language.gguf.types import TYPES, dense
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from newer_models import SEEING, WRITING, newer_folder

PRECISE = LoadOptions(dtype="float32")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen3_5ForConditionalGeneration"):
        pytest.skip(f"transformers {transformers.__version__} has no Qwen3.5")
    root = tmp_path_factory.mktemp("newer")
    made = {kind: newer_folder(root / kind, kind, num_hidden_layers=2) for kind in (*SEEING, *WRITING)}
    for kind, folder in made.items():
        use_qwens_words(folder, QWEN35_WORDS if "3_5" in kind else QWEN_WORDS)
    return made


@pytest.fixture
def both(llm, sources):
    """Loads (the file, the folder that it was made of)."""

    def load(kind, form=F32, tower="mmproj-F32.gguf"):
        file = of_folder(sources[kind], llm / kind / f"Tiny-{kind}-{form}.gguf", form, tower)
        link = llm / f"source-{kind}"
        if not link.exists():
            link.symlink_to(sources[kind], target_is_directory=True)
        return [MODELS.get(name, PRECISE, must_see=False) for name in (file.name, link.name)]

    return load


def logits(model, tokens=40):
    with torch.no_grad():
        return model.network(input_ids=torch.arange(tokens).view(1, -1)).logits


@pytest.mark.parametrize("kind", [*SEEING, *WRITING])
def test_a_file_answers_as_its_folder_does(both, ask, pictures, kind):
    made, meant = both(kind)
    assert (made.model_type, made.quantization) == (kind, "none")
    assert torch.allclose(logits(made), logits(meant), rtol=0, atol=2e-4 * float(logits(meant).abs().max()))
    question = Question("Hello", "Be brief.")
    if kind in SEEING:
        question = Question("Which?", "", (pictures.a, pictures.b), (pictures.clip,))
    assert ask(made, question).raw == ask(meant, question, cache_images=False).raw


def test_letters_keep_their_marks(sources, tmp_path):
    """Where the library does not know better by the name of the model."""
    from tokenizers import Tokenizer

    Vocabulary(words(sources["qwen3_5"]), tmp_path).write(tmp_path, seeing=True)
    made, meant = (Tokenizer.from_file(str(at / "tokenizer.json")) for at in (tmp_path, sources["qwen3_5"]))
    for text in ("e\u0301 a\u0300\u0323b \u0e40\u0e1b\u0e47\u0e19 1234", "don't\r\n\n  \u4f60\u597d\u20dd"):
        assert made.pre_tokenizer.pre_tokenize_str(text) == meant.pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe", "qwen2_moe"])
def test_what_is_packed_stays_so(both, sources, llm, ask, monkeypatch, kind):
    """Against a file with the numbers that the packed one stands for: experts and layers of linear attention as well."""
    monkeypatch.setattr(cpu_kernels, "why_not", lambda method: "asked for")
    packed, _ = both(kind, Q8_0)
    read = Gguf([packed.folder.path])
    numbers = {
        name: stored(dense(part.kind, read.blocks(name)).view(part.shape)) for name, part in read.tensors.items()
    }
    write(llm / "numbers.gguf", facts(sources[kind]) | words(sources[kind]), numbers)
    plain = MODELS.get("numbers.gguf", PRECISE, must_see=False)
    mine, theirs = logits(packed), logits(plain)
    assert packed.quantization == "gguf" and (mine - theirs).norm() < 1e-3 * theirs.norm()
    layer = decoding.text_decoder(packed.network).layers[0]
    if "moe" in kind:
        assert isinstance(layer.mlp.experts, PackedExperts)
        assert all(part.weight.dtype == torch.int8 for part in (*layer.mlp.experts.gate_up, layer.mlp.experts.down))
        assert layer.mlp.gate.weight.dtype == torch.float32, "a router chooses by small differences"
    if "3_5" in kind:
        assert layer.linear_attn.in_proj_qkv.weight.dtype == layer.linear_attn.out_proj.weight.dtype == torch.int8
    assert ask(packed, Question("Hello"), max_new_tokens=3).tokens


def test_experts_whose_gates_are_stored_in_another_type_or_with_the_ups(llm, sources):
    source = sources["qwen3_moe"]
    text = weights(source)[0]
    packed, fused = weights(source, Q8_0)[0], dict(text)
    for number in range(2):
        names = [f"blk.{number}.ffn_{name}_exps.weight" for name in ("gate", "up", "gate_up")]
        packed[names[1]] = text[names[1]]
        gate, up = (torch.frombuffer(bytearray(fused.pop(name)[2]), dtype=torch.float32) for name in names[:2])
        fused[names[2]] = stored(torch.cat((gate.view(4, 32, 64), up.view(4, 32, 64)), dim=1))
    made = []
    for name, tensors in (("whole", text), ("fused", fused), ("mixed", packed)):
        write(llm / f"{name}.gguf", facts(source) | words(source), tensors)
        made.append(logits(MODELS.get(f"{name}.gguf", PRECISE, must_see=False)))
    assert torch.equal(made[0], made[1])
    assert 0 < (made[2] - made[0]).norm() < 0.3 * made[0].norm()


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_moe"])
def test_files_of_four_bits_with_a_number_for_each_matrix_or_expert(llm, sources, monkeypatch, kind):
    """NVFP4 has a scale beside a matrix, and one of its inputs, which nothing here needs."""
    monkeypatch.setattr(cpu_kernels, "why_not", lambda method: "asked for")
    head, (text, _) = facts(sources[kind]) | words(sources[kind]), weights(sources[kind])
    packed, numbers = dict(text), dict(text)
    for seed, (name, (_, shape, _)) in enumerate(text.items()):
        if len(shape) < 2 or shape[-1] % 64 or name.startswith(("token_embd", "output")):
            continue
        blocks = random_blocks(NVFP4, math.prod(shape[:-1]), shape[-1], seed)
        scale = torch.linspace(0.01, 0.02, shape[0] if len(shape) == 3 else 1)
        base = name.removesuffix("weight")
        packed |= {name: (NVFP4, shape, blocks.numpy().tobytes()), f"{base}scale": stored(scale)}
        packed[f"{base}input_scale"] = stored(torch.ones(1))
        numbers[name] = stored(dense(TYPES[NVFP4], blocks).view(shape) * scale.view(-1, *[1] * (len(shape) - 1)))
    made = []
    for name, tensors in (("packed", packed), ("numbers", numbers)):
        write(llm / f"{name}.gguf", head, tensors)
        made.append(MODELS.get(f"{name}.gguf", PRECISE, must_see=False))
    assert any("NVFP4 as stored" in note for note in made[0].notes), made[0].notes
    assert torch.allclose(logits(made[0]), logits(made[1]), rtol=0, atol=1e-4 * float(logits(made[1]).abs().max()))


def test_layers_that_guess_later_tokens_are_passed_over(llm, sources, both):
    source = sources["qwen3_5"]
    text = weights(source)[0]
    guessing = {name.replace("blk.1.", "blk.2."): part for name, part in text.items() if name.startswith("blk.1.")}
    guessing["blk.2.nextn.eh_proj.weight"] = stored(torch.zeros(64, 128))
    more = {"qwen35.block_count": 3, "qwen35.nextn_predict_layers": 1}
    write(llm / "guessing.gguf", facts(source) | more | words(source), text | guessing)
    made, (plain, _) = MODELS.get("guessing.gguf", PRECISE, must_see=False), both("qwen3_5", tower="")
    assert made.model_type == plain.model_type == "qwen3_5_text" and made.processor is None
    assert made.folder.config["num_hidden_layers"] == 2 and torch.equal(logits(made), logits(plain))


def test_a_tower_with_deeper_levels_is_none_of_a_model_without_them(llm, sources):
    """Qwen3-VL 4B and Qwen3.5 4B are as wide, and their towers are called the same."""
    for kind in ("qwen3_5", "qwen3_vl_moe"):
        of_folder(sources[kind], llm / "one" / f"{kind}.gguf", tower=f"mmproj-{kind}.gguf")
        head = tower_facts(sources[kind])
        assert any(head["clip.vision.is_deepstack_layers"]) == (kind == "qwen3_vl_moe")
    for kind in ("qwen3_5", "qwen3_vl_moe"):
        assert models.of(llm / "one" / f"{kind}.gguf").tower.name == f"mmproj-{kind}.gguf"
        (llm / "one" / f"mmproj-{kind}.gguf").unlink()
        assert models.of(llm / "one" / f"{kind}.gguf").tower is None
        of_folder(sources[kind], llm / "one" / f"{kind}.gguf", tower=f"mmproj-{kind}.gguf")


def test_questions_of_several_lengths_leave_no_trace_in_each_other(both, pictures):
    """Left padding must not reach the state of a layer of linear attention, of the file nor of the folder."""
    asked = [Question("Hi"), Question("Describe it at some length.", "Be brief.", (pictures.a,))]
    options = AnswerOptions(max_new_tokens=6, budget=PRESETS["fast"])
    for model in both("qwen3_5"):
        alone = [answer(model, [question], Sampling(sample=False), options)[0].raw for question in asked]
        assert [made.raw for made in answer(model, asked, Sampling(sample=False), options)] == alone
