"""Texts are cut into tokens where the folder's tokenizer.json cuts them, whatever class its settings name."""

from __future__ import annotations

import json

import pytest
from gguf_files import QWEN35_WORDS, use_qwens_words
from hotpath.demo.captioner_model import write_processors, write_tokenizer
from hotpath.vision_language.words import read_words
from newer_models import newer_config
from tokenizers import Tokenizer

TEXTS = ("x\u0301 a\u0300\u0323x\u0301b \u0e40\u0e1b\u0e47\u0e19 1234", "don't\r\n\n  \u4f60\u597d\u20dd<|im_end|>\n")
MERGES = [["\u00cc", "\u0123"], ["x", "\u00cc\u0123"]]  # the two bytes of an accent, and x with it


def folder_of(folder, kind, **settings):
    """A model's folder without weights, with the words of Qwen3.5."""
    tokens = write_tokenizer(folder)
    config = newer_config("qwen3_5", tokens)
    (folder / "config.json").write_text(json.dumps(config if kind == "qwen3_5" else config["text_config"]))
    write_processors(folder, "qwen3_vl")
    use_qwens_words(folder, QWEN35_WORDS)
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    vocabulary = whole["model"]["vocab"]
    free = iter(sorted(set(range(config["text_config"]["vocab_size"])) - {*vocabulary.values(), *tokens.values()}))
    vocabulary.update({"".join(merge): next(free) for merge in MERGES})
    whole["model"]["merges"] += MERGES
    file.write_text(json.dumps(whole))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("named", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_text"])
def test_texts_are_cut_where_the_file_cuts_them(tmp_path, kind, named):
    """Qwen3.5 is published under the name of Qwen2's class, which has words of its own in transformers 5."""
    folder = folder_of(tmp_path, kind, tokenizer_class=named)
    meant = Tokenizer.from_file(str(folder / "tokenizer.json"))
    _, made = read_words(folder, sees=kind == "qwen3_5")
    for text in TEXTS:
        wanted = meant.encode(text, add_special_tokens=False).ids
        assert made(text, add_special_tokens=False)["input_ids"] == wanted
        assert made.decode(wanted) == meant.decode(wanted, skip_special_tokens=False)
