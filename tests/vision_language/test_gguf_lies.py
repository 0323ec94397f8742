"""GGUF files that say what cannot be, as damaged ones do: one sentence each, and no menu suffers from them."""

from __future__ import annotations

import pytest
import torch
from gguf_files import F32, facts, stored, tower_facts, weights, words, write
from hotpath.vision_language import cpu_kernels, folders
from hotpath.vision_language.folders import UnusableModel
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS

CANNOT = "which cannot be: fetch it again"
FEW = torch.zeros(4)


@pytest.fixture
def load(llm, tiny_folders):
    """Loads a file of a tiny kind with other facts and tensors; of the tower too, where it has one."""

    def made(kind, told, tensors, of_tower=()):
        (text, seeing), source = weights(tiny_folders[kind]), tiny_folders[kind]
        write(llm / "a" / "a.gguf", facts(source) | words(source) | told, text | tensors)
        if seeing:
            write(llm / "a" / "mmproj.gguf", tower_facts(source) | dict(of_tower), seeing)
        assert isinstance(folders.choices((), None), list)
        return MODELS.get("a/a.gguf", LoadOptions(), must_see=bool(seeing))

    return made


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"qwen3.block_count": "many"}, rf"qwen3\.block_count is 'many', {CANNOT}"),
        ({"qwen3.block_count": 1 << 30}, rf"qwen3\.block_count is 1073741824, {CANNOT}"),
        ({"qwen3.block_count": 5}, r"lacks the tensor blk\.4\."),
        ({"qwen3.embedding_length": 1 << 30}, CANNOT),
        ({"qwen3.attention.head_count": 0}, CANNOT),
        ({"qwen3.attention.head_count": [4, 4]}, rf"is \[4, 4\], {CANNOT}"),
        ({"qwen3.attention.key_length": 1}, r"sizes that .* tells make no network|should have"),
        ({"qwen3.attention.layer_norm_rms_epsilon": float("nan")}, rf"is nan, {CANNOT}"),
        ({"qwen3.rope.freq_base": [1.0]}, CANNOT),
        ({"qwen3.rope.scaling.type": "x" * 500}, r"scales its positions by 'x{39}, which is not known"),
        ({"qwen3.context_length": -1}, CANNOT),
        ({"tokenizer.ggml.tokens": [1, 2]}, "has a tokenizer that is not known here"),
        ({"tokenizer.ggml.merges": 3}, "has a tokenizer that is not known here"),
        ({"tokenizer.ggml.pre": "x" * 500}, r"\(gpt2, x{40}\)"),
        ({"general.architecture": ["qwen3"]}, r"is of the architecture \"\['qwen3'\]\", whose GGUF files are not read"),
        ({"general.alignment": 3}, "header of .* is damaged"),
    ],
    ids=str,
)  # fmt: skip
def test_facts_that_cannot_be(load, told, said):
    with pytest.raises(UnusableModel, match=said) as refused:
        load("qwen3", told, {})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("told", "of_tower", "said"),
    [
        ({"qwen2vl.rope.dimension_sections": [1, 2, 3, 0]}, {}, CANNOT),
        ({"qwen2vl.rope.dimension_sections": 7}, {}, CANNOT),
        ({}, {"clip.vision.image_mean": 0.5}, CANNOT),
        ({}, {"clip.vision.embedding_length": 1 << 30}, CANNOT),
        ({}, {"clip.vision.n_wa_pattern": "x"}, CANNOT),
        ({}, {"clip.vision.block_count": 60}, "does not fit its model: .{,200}$"),
    ],
    ids=str,
)  # fmt: skip
def test_towers_that_cannot_be(load, told, of_tower, said):
    with pytest.raises(UnusableModel, match=said):
        load("qwen2_5_vl", told, {}, of_tower)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blk.0.attn_norm.weight": (F32, (0,), b"")}, "header of .* is damaged"),
        ({"blk.0.attn_q.bias": stored(torch.zeros(64, 1))}, "biases of .* do not fit their matrices"),
        ({"token_embd.weight": stored(FEW)}, "should be a matrix|should have|make no network"),
        ({"output.weight": stored(FEW)}, "should be a matrix"),
        ({"v.deepstack.x.fc1.weight": stored(FEW)}, r"1 tensors that a model of its kind has not"),
    ],
)
def test_tensors_that_cannot_be(load, tensors, said):
    with pytest.raises(UnusableModel, match=said):
        load("qwen2", {}, tensors)


def test_a_name_that_two_tensors_have(llm, load):
    one, other = b"blk.0.attn_q.weight", b"blk.1.attn_q.weight"
    load("qwen2", {}, {})
    MODELS.clear()
    file = llm / "a" / "a.gguf"
    file.write_bytes(file.read_bytes().replace(one, other))
    with pytest.raises(UnusableModel, match=r"has two tensors that are called blk\.1\.attn_q\.weight: fetch it again"):
        MODELS.get("a/a.gguf", LoadOptions(), must_see=False)


def test_kernels_read_rows_that_lie_column_by_column():
    """As the library leaves them of layers with one head."""
    x = torch.randn(64, 3).T
    codes = torch.randint(16, (64, 64))
    for method in ("int4", "int8"):
        if cpu_kernels.why_not(method):
            continue
        args = cpu_kernels.int4_layout(codes, torch.ones(64, 1), torch.zeros(64, 1)) if method == "int4" else ()
        made = [
            cpu_kernels.int4_product(rows, *args, 64) if args else cpu_kernels.int8_product(rows, codes.to(torch.int8))
            for rows in (x, x.contiguous())
        ]
        assert torch.equal(*made)
