"""The tokenizer and the chat template of a GGUF file, as the files that a model folder has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ..unusable import UnusableModel

# Where words end, by the name that the file has for it: the regular expression of Qwen's tokenizer.json.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Letters with the marks that belong to them.
QWEN_WITH_MARKS = QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
WORDS = {"qwen2": QWEN, "deepseek-r1-qwen": QWEN, "qwen35": QWEN_WITH_MARKS}
CONTROL, OWN, UNUSED = 3, 4, 5  # kinds of tokens that are no pieces of words
STOPS = ("<|im_end|>", "<|endoftext|>")
PICTURE = "<|image_pad|>"

# For files that came without one, or with one that shows no pictures.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def _words(found: Any) -> TypeGuard[list[str]]:
    return isinstance(found, list) and all(isinstance(word, str) for word in found)


class Vocabulary:
    """The tokens of a file. Raises UnusableModel for a tokenizer of another kind."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        kind, words = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "qwen2")
        self.words = WORDS.get(str(words), "")
        tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
        if kind != "gpt2" or not self.words or not _words(tokens) or not _words(merges):
            raise UnusableModel(
                f"{path} has a tokenizer that is not known here ({kind!s:.40}, {words!s:.40}): take a GGUF of one of Qwen's "
                "models."
            )
        self.tokens, self.merges = tokens, merges
        kinds = metadata.get("tokenizer.ggml.token_type")
        self.kinds = kinds if isinstance(kinds, list) and len(kinds) == len(self.tokens) else [1] * len(self.tokens)
        self.ids = {token: number for number, token in enumerate(self.tokens) if self.kinds[number] != UNUSED}
        self.metadata = metadata

    def id_of(self, token: str) -> int | None:
        return self.ids.get(token)

    def special(self, name: str) -> int | None:
        """The id that the file has under `tokenizer.ggml.<name>_token_id`, if it is one."""
        found = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return found if isinstance(found, int) and 0 <= found < len(self.tokens) else None

    def stops(self) -> list[int]:
        """The tokens that end an answer."""
        found = [self.special("eos"), self.special("eot"), *map(self.id_of, STOPS)]
        return list(dict.fromkeys(number for number in found if number is not None))

    def pad(self) -> int | None:
        return next((n for n in (self.special("padding"), self.id_of(STOPS[1]), *self.stops()) if n is not None), None)

    def write(self, folder: Path, seeing: bool) -> None:
        """tokenizer.json, tokenizer_config.json and chat_template.jinja, into `folder`."""
        number_of = {token: number for token, number in self.ids.items() if self.kinds[number] not in (CONTROL, OWN)}
        bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.words}, "behavior": "Isolated", "invert": False}
        added = [
            {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": self.kinds[number] == CONTROL}
            for number, token in enumerate(self.tokens) if self.kinds[number] in (CONTROL, OWN)
        ]  # fmt: skip
        pieces = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": False, "byte_fallback": False, "vocab": number_of, "merges": self.merges,
        }  # fmt: skip
        whole = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]}, "post_processor": None,
            "decoder": bytewise, "model": pieces,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        end, pad = next(iter(self.stops()), None), self.pad()
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": None if end is None else self.tokens[end],
            "pad_token": None if pad is None else self.tokens[pad],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
        }
        template = self.metadata.get("tokenizer.chat_template")
        if not isinstance(template, str) or (seeing and PICTURE not in template):
            template = CHAT_TEMPLATE
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
