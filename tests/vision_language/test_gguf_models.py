"""Models of GGUF files: the same as those of the folders that they were made of."""

from __future__ import annotations

import pytest
import torch
from gguf_files import F16, Q8_0, of_folder, use_qwens_words
from hotpath.demo.captioner_model import TEXT_KINDS, VISION_KINDS, write_folder
from hotpath.vision_language import cpu_kernels, folders
from hotpath.vision_language.folders import UnusableModel
from hotpath.vision_language.gguf.types import TYPES, dense
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prompts import Question

ODD = [
    "Hello, wörld! 12345\r\n\n  tabs\t你好 don't DON'T",
    "a" * 60,
    "e\u0301 <|im_end|> <|image_pad|> x",
    "🙂🙂  \u00a0\u2003 ",
    "",
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Tiny folders whose tokenizers cut words as Qwen's do."""
    root = tmp_path_factory.mktemp("of_gguf")
    made = {
        kind: write_folder(root / kind, kind, ODD, 40, num_hidden_layers=2) for kind in (*VISION_KINDS, *TEXT_KINDS)
    }
    for folder in made.values():
        use_qwens_words(folder)
    return made


@pytest.fixture
def gguf(llm, sources):
    """Writes a GGUF of a tiny kind below models/LLM, and loads it; options are those of loading, or facts of the file."""

    def make(kind, stored=0, must_see=None, tower="mmproj-F32.gguf", **options):
        file = llm / "GGUF" / "someone" / f"Tiny-{kind}" / f"Tiny-{kind}-{stored}.gguf"
        of_folder(sources[kind], file, stored, tower)
        sees = kind in VISION_KINDS if must_see is None else must_see
        return MODELS.get(file.name, LoadOptions(**options), sees)

    return make


@pytest.fixture
def of_the_folder(llm, sources):
    def load(kind):
        link = llm / f"source-{kind}"
        link.symlink_to(sources[kind], target_is_directory=True)
        return MODELS.get(link.name, LoadOptions(), must_see=False)

    return load


@pytest.mark.parametrize("kind", [*VISION_KINDS, *TEXT_KINDS])
def test_a_file_loads_as_its_folder_does(gguf, of_the_folder, ask, pictures, kind):
    before = torch.get_rng_state()
    made, meant = gguf(kind), of_the_folder(kind)
    assert torch.equal(torch.get_rng_state(), before)
    assert made.model_type == meant.model_type == kind and made.quantization == "none"
    state = made.network.state_dict()
    for name, tensor in meant.network.state_dict().items():
        assert tensor.layout != torch.strided or torch.equal(state[name], tensor), name
    assert (made.stop_ids, made.pad_id, made.context_length) == (meant.stop_ids, meant.pad_id, meant.context_length)
    for text in ODD:
        assert made.tokenizer(text)["input_ids"] == meant.tokenizer(text)["input_ids"], text
    asked = [Question("Hello", "Be brief.")]
    if made.processor is not None:
        assert made.image_sizes == meant.image_sizes
        assert "pictures by mmproj-F32.gguf" in made.notes
        asked = [Question("Which?", "", (pictures.a, pictures.b), (pictures.clip,))]
    for question in asked:
        assert ask(made, question).raw == ask(meant, question, cache_images=False).raw


def test_configs_say_the_same(gguf, of_the_folder):
    """But for what tells where a model is from, and what a file does not keep."""

    def facts(model):
        found = model.config.get_text_config().to_dict() | model.config.vision_config.to_dict()
        # Up to transformers 4, a dtype is written of the networks only that its library made.
        ours = ("_name_or_path", "architectures", "dtype")
        return {name: value for name, value in found.items() if name not in ours}

    assert facts(gguf("qwen3_vl")) == facts(of_the_folder("qwen3_vl"))


def test_bytes_of_the_file_stay_few(gguf, ask, monkeypatch):
    """Where no kernel of a CPU rounds, the numbers are the file's."""
    monkeypatch.setattr(cpu_kernels, "why_not", lambda method: "asked for")
    model = gguf("qwen3", Q8_0)
    layer = model.network.model.layers[0]
    assert model.quantization == "gguf"
    assert layer.self_attn.qkv_proj.weight.dtype == layer.mlp.down_proj.weight.dtype == torch.int8
    assert any("Q8_0 as stored, 0.00% off" in note and "GB here" in note for note in model.notes), model.notes
    answer = ask(model, Question("Hello"))
    assert "quantization gguf" in answer.report and answer.tokens
    model.discard()
    assert not any(part.numel() for part in model.network.buffers())


def test_packed_files_answer_as_their_numbers_do(gguf, sources, llm, ask, monkeypatch):
    """The Q8_0 file against one with the numbers that it stands for."""
    from gguf_files import facts, stored, weights, words, write
    from hotpath.vision_language.gguf.file import Gguf

    monkeypatch.setattr(cpu_kernels, "why_not", lambda method: "asked for")
    packed = gguf("qwen2", Q8_0)
    read = Gguf([packed.folder.path])
    numbers = {
        name: stored(dense(part.kind, read.blocks(name)).view(part.shape)) for name, part in read.tensors.items()
    }
    source = sources["qwen2"]
    write(llm / "numbers.gguf", facts(source) | words(source), numbers)
    assert set(numbers) == set(weights(source)[0])
    plain = MODELS.get("numbers.gguf", LoadOptions(), must_see=False)
    ids = torch.arange(40).view(1, -1)
    with torch.no_grad():
        mine, theirs = packed.network(input_ids=ids).logits, plain.network(input_ids=ids).logits
    assert (mine - theirs).norm() < 1e-3 * theirs.norm()
    assert ask(packed, Question("Hello")).raw == ask(plain, Question("Hello")).raw


@pytest.mark.parametrize(("tied", "kernels"), [(True, False), (False, False), (True, True)])
def test_an_embedding_stays_packed(llm, sources, ask, monkeypatch, tied, kernels):
    """One matrix for it and the head, where both read the same; rows of it are unpacked when they are asked for."""
    from gguf_files import facts, stored, weights, words, write

    if not kernels:
        monkeypatch.setattr(cpu_kernels, "why_not", lambda method: "asked for")
    source, text = sources["qwen3"], weights(sources["qwen3"], Q8_0)[0]
    shape = text["token_embd.weight"][1]
    if not tied:
        text["output.weight"] = stored(torch.randn(shape), Q8_0)
    write(llm / "ends.gguf", facts(source) | words(source), text)
    device = "cpu" if kernels else "auto"
    model = MODELS.get("ends.gguf", LoadOptions(dtype="float32", device=device), must_see=False)
    embedding = model.network.get_input_embeddings()
    ids = torch.arange(7, device=embedding.device).view(1, 7)
    rows = dense(TYPES[Q8_0], torch.frombuffer(bytearray(text["token_embd.weight"][2]), dtype=torch.uint8).view(-1, 34))
    assert (
        torch.equal(embedding(ids)[0].cpu(), rows.view(shape)[:7]) and model.dtype == embedding.dtype == torch.float32
    )
    large = [name for name, part in model.network.state_dict().items() if part.nbytes >= shape[0] * shape[1]]
    assert len(large) == (1 if tied and not kernels else 2) and large[-1] == "lm_head.weight", large
    assert ask(model, Question("Hi"), decode="static").raw == ask(model, Question("Hi"), decode="plain").raw
    if tied:
        write(
            llm / "plain.gguf",
            facts(source) | words(source),
            weights(source)[0] | {"token_embd.weight": text["token_embd.weight"]},
        )
        plain = MODELS.get("plain.gguf", LoadOptions(dtype="float32"), must_see=False).network
        assert plain.lm_head.weight is plain.get_input_embeddings().weight, "as all the other layers are plain"


@pytest.mark.parametrize("method", ["int8", "int4", "float8", "bitsandbytes 4-bit", "8-bit (Balanced)"])
def test_weights_are_packed_as_asked(gguf, ask, method):
    model = gguf("qwen3", F16, quantization=method)
    assert model.quantization == {"b": "int4", "8": "int8"}.get(method[0], method)
    assert any(note.startswith("weights: F16 anew as") and "in the file" in note for note in model.notes), model.notes
    assert ask(model, Question("Hello")).tokens


def test_a_seeing_model_without_its_tower_writes(gguf, ask):
    """A language model is one also without the file that lets it see: for nodes that rewrite prompts."""
    model = gguf("qwen3_vl", tower="", must_see=False)
    assert (model.model_type, model.processor) == ("qwen3", None)
    assert ask(model, Question("Hello")).tokens
    with pytest.raises(UnusableModel, match=r"needs its vision tower to look at pictures: put the mmproj file"):
        gguf("qwen2_5_vl", tower="")


def test_files_of_the_first_converters(llm, sources):
    """They called the two matrices of a block of the tower each by the other's name."""
    from gguf_files import tower_facts, weights, write

    file = of_folder(sources["qwen2_vl"], llm / "old.gguf", tower="mmproj-a.gguf")
    kept = MODELS.get("old.gguf", LoadOptions()).network.model.visual.state_dict()
    names = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    swapped = {
        ".".join(names.get(part, part) for part in name.split(".")): tensor
        for name, tensor in weights(sources["qwen2_vl"])[1].items()
    }
    write(file.with_name("mmproj-a.gguf"), tower_facts(sources["qwen2_vl"]), swapped)
    made = MODELS.get("old.gguf", LoadOptions()).network.model.visual.state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in kept.items())


def test_what_a_file_lacks_or_has_too_much(llm, sources):
    from gguf_files import facts, weights, words, write

    source = sources["qwen3"]
    head, (tensors, _) = facts(source) | words(source), weights(source)

    def load(name, metadata, given):
        write(llm / name, metadata, given)
        return MODELS.get(name, LoadOptions(), must_see=False)

    with pytest.raises(UnusableModel, match=r"lacks the tensor blk\.1\.attn_k\.weight"):
        load("a.gguf", head, {name: part for name, part in tensors.items() if name != "blk.1.attn_k.weight"})
    with pytest.raises(UnusableModel, match=r"1 tensors that a model of its kind has not, such as cls\.output"):
        load("b.gguf", head, tensors | {"cls.output.weight": tensors["output_norm.weight"]})
    with pytest.raises(UnusableModel, match=r"blk\.0\.ffn_down has the shape \(64, 64\) and should have \(64, 128\)"):
        kind, _, raw = tensors["blk.0.attn_output.weight"]
        load("c.gguf", head, tensors | {"blk.0.ffn_down.weight": (kind, (64, 64), raw)})
    with pytest.raises(UnusableModel, match=r"does not tell qwen3\.attention\.head_count"):
        load("d.gguf", {k: v for k, v in head.items() if k != "qwen3.attention.head_count"}, tensors)
    with pytest.raises(UnusableModel, match="tokenizer that is not known here"):
        load("e.gguf", head | {"tokenizer.ggml.pre": "llama-bpe"}, tensors)
    with pytest.raises(UnusableModel, match="scales its positions by 'longrope'"):
        load("f.gguf", head | {"qwen3.rope.scaling.type": "longrope"}, tensors)
    with pytest.raises(UnusableModel, match=r"is quantised as Q8_K .* such as Q4_K_M, Q5_K_M or Q8_0"):
        shape = (64, 256)
        load("g.gguf", head, tensors | {"blk.0.attn_q.weight": (15, shape, bytes(64 * 292))})


def test_a_file_that_changes_is_another_model(llm, sources):
    file = of_folder(sources["qwen3"], llm / "own.gguf")
    first = MODELS.get("own.gguf", LoadOptions(), must_see=False)
    assert MODELS.get("own.gguf", LoadOptions(), must_see=False) is first
    of_folder(sources["qwen3"], file, F16)
    assert MODELS.get("own.gguf", LoadOptions(), must_see=False) is not first
    assert folders.find("own").path == file, "without its ending, too"
