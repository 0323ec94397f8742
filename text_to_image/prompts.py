"""Prompts as the transformer reads them: hidden states of the text encoder, kept by content so that none is made twice.

diffusers pads every prompt to 512 tokens and cuts the padding away again. A causal encoder's states do not depend on what
follows, so each prompt is encoded by itself, at its own length, to the same states.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import host
from ..cache import content_key, disk_tier, named_cache
from .folders import UnusableCheckpoint

if TYPE_CHECKING:
    from .loading import ZImage

log = logging.getLogger("hotpath.text_to_image")

CACHES = ("memory", "memory and disk", "off")
MEMORY_LIMIT = 256 << 20
DISK_LIMIT = 1 << 30
MAX_TOKENS = 512  # the length Z-Image was trained with
ENCODER_BYTES_PER_TOKEN = 1 << 20  # activations of the encoder, generously

on_disk = disk_tier(
    "prompt embeddings on disk", lambda: host.current().cache_folder() / "prompt_embeddings", DISK_LIMIT
)


@dataclass(frozen=True)
class Prompt:
    """A prompt's hidden states. states: [tokens, width], on the CPU.

    tokens: how many the whole text has; more than the states have when it was cut.
    """

    states: Tensor
    tokens: int

    @property
    def cut(self) -> bool:
        return self.tokens > self.states.shape[0]


class PromptCache:
    """Hidden states by content: in memory, and on the disk when that was asked for."""

    def __init__(self, tiers: str) -> None:
        if tiers not in CACHES:
            raise ValueError(f"{tiers!r} is no prompt cache: choose one of {', '.join(CACHES)}.")
        self.enabled = tiers != "off"
        self.memory = named_cache("prompt embeddings", MEMORY_LIMIT)
        self.disk = on_disk() if tiers == "memory and disk" else None

    def get(self, key: str, description: str) -> Prompt | None:
        if not self.enabled:
            return None
        kept: Prompt | None = self.memory.get(key)
        if kept is None and self.disk is not None:
            entry = self.disk.get(key, description)
            if entry is not None and "states" in entry.tensors:
                read = Prompt(entry.tensors["states"], int(entry.facts.get("tokens", "0")))
                kept = self.memory.put(key, read)
        return kept

    def put(self, key: str, description: str, prompt: Prompt) -> None:
        if not self.enabled:
            return
        self.memory.put(key, prompt)
        if self.disk is not None:
            self.disk.put(key, {"states": prompt.states}, {"tokens": str(prompt.tokens)}, description)


def encode(
    model: ZImage, texts: Sequence[str], cache: PromptCache, max_tokens: int = MAX_TOKENS
) -> tuple[dict[str, Prompt], int]:
    """Hidden states of each different text of `texts`, and how many of them the text encoder had to make.

    With every text in the cache the encoder is neither run, nor moved to the device, nor read from the disk.
    """
    done: dict[str, Prompt] = {}
    waiting: dict[str, tuple[str, str]] = {}
    for text in dict.fromkeys(texts):
        described = json.dumps({"prompt": text, "max_tokens": max_tokens, "model": model.text_identity}, sort_keys=True)
        key = content_key(described)
        found = cache.get(key, described)
        if found is not None:
            done[text] = found
        else:
            waiting[text] = (key, described)
    if not waiting:
        return done, 0
    ids = {text: tokenize(model, text) for text in waiting}
    longest = min(max_tokens, max(len(tokens) for tokens in ids.values()))
    with model.text_encoder.resident(longest * ENCODER_BYTES_PER_TOKEN) as encoder:
        for text, (key, described) in waiting.items():
            host.current().check_interrupt()
            tokens = torch.tensor([ids[text][:max_tokens]], device=model.device)
            states = encoder(input_ids=tokens, use_cache=False).last_hidden_state[0]
            # A plain tensor: what is cached outlives the inference mode it was made in.
            with torch.inference_mode(False):
                done[text] = Prompt(states.to("cpu", copy=True), len(ids[text]))
            cache.put(key, described, done[text])
    return done, len(waiting)


def tokenize(model: ZImage, text: str) -> list[int]:
    """Token ids of `text` as the user's turn of a chat, with room to think, as Z-Image was trained."""
    try:
        written = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    except (ValueError, TypeError) as error:
        folder = model.checkpoint.path / "tokenizer"
        raise UnusableCheckpoint(f"The chat template in {folder} cannot be used ({error}): fetch it again.") from error
    return list(model.tokenizer(written)["input_ids"])
