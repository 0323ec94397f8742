"""A folder's tokenizer and processor: how texts and pictures become what the network reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..host.errors import first_line
from ..host.interruption import is_stop
from .unusable import UnusableModel

# A folder runs no code of its own, which the library would ask for at a terminal, and names no other one to be fetched.
AS_IT_LIES = {"trust_remote_code": False, "local_files_only": True}


def read_words(folder: Path, sees: bool) -> tuple[Any, Any]:
    """(processor, tokenizer) of the model in `folder`; no processor for a text-only model. Asked before the weights,
    which are gigabytes.

    Raises UnusableModel for what the library refuses, with its reason.
    """
    from transformers import AutoProcessor, AutoTokenizer

    try:
        if not sees:
            processor, tokenizer = None, AutoTokenizer.from_pretrained(folder, **AS_IT_LIES)
        else:
            processor = AutoProcessor.from_pretrained(folder, **AS_IT_LIES)
            tokenizer = processor.tokenizer
        _cut_as_the_file_does(tokenizer, folder / "tokenizer.json")
    except Exception as error:  # the library raises anything from KeyError to ImportError
        if is_stop(error):
            raise
        raise UnusableModel(
            f"The processor or tokenizer in {folder} could not be read ({first_line(error, 300)}): fetch its .json files "
            "again."
        ) from error
    if not any(getattr(reader, "chat_template", None) for reader in (processor, tokenizer)):
        raise UnusableModel(
            f"The model folder {folder} has no chat template: copy chat_template.jinja or chat_template.json from the model "
            "that it was made from."
        )
    return processor, tokenizer


def _cut_as_the_file_does(tokenizer: Any, file: Path) -> None:
    """Let `tokenizer` cut texts by the patterns in `file`, with which its model was trained.

    transformers 5 takes the vocabulary alone from the file and the patterns from the class that the settings name
    (transformers #45920). Qwen3.5 is published under the name of Qwen2's class, which parts letters from their marks:
    Thai, Hindi or vowelled Arabic become other tokens.
    """
    made = getattr(tokenizer, "backend_tokenizer", None)
    if made is None or not file.is_file():
        return
    from tokenizers import Tokenizer

    whole = json.loads(file.read_text(encoding="utf-8"))
    cutting = whole.get("pre_tokenizer") or {}
    if not any("Regex" in step.get("pattern", ()) for step in cutting.get("pretokenizers", [cutting])):
        return
    nothing = {"type": "BPE", "vocab": {}, "merges": []}  # the vocabulary takes longest, and stays
    meant = Tokenizer.from_str(json.dumps(whole | {"model": nothing, "added_tokens": [], "post_processor": None}))
    made.normalizer, made.pre_tokenizer, made.decoder = meant.normalizer, meant.pre_tokenizer, meant.decoder
