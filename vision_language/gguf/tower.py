"""The vision tower of a GGUF file (mmproj), of which llama.cpp's converter cuts the first layer by its two frames, and in older
files each block's query, key and value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..unusable import UnusableModel
from .source import deeper_levels
from .taking import Taken

BLOCK = (("norm1", "ln1"), ("norm2", "ln2"), ("attn.proj", "attn_out"))
MLP = {
    "qwen2vl_merger": (("mlp.fc1", "ffn_up"), ("mlp.fc2", "ffn_down")),
    "qwen2.5vl_merger": (("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")),
    "qwen3vl_merger": (("mlp.linear_fc1", "ffn_up"), ("mlp.linear_fc2", "ffn_down")),
}
MERGER = {
    "qwen2vl_merger": (("ln_q", "v.post_ln"), ("mlp.0", "mm.0"), ("mlp.2", "mm.2")),
    "qwen2.5vl_merger": (("ln_q", "v.post_ln"), ("mlp.0", "mm.0"), ("mlp.2", "mm.2")),
    "qwen3vl_merger": (("norm", "v.post_ln"), ("linear_fc1", "mm.0"), ("linear_fc2", "mm.2")),
}
DEEP = (("norm", "norm"), ("linear_fc1", "fc1"), ("linear_fc2", "fc2"))


def fill_tower(visual: Any, tower: Taken, kind: str) -> None:
    """The weights of the vision tower, all in the dtype of the network. kind: what the file calls it."""
    try:
        visual.load_state_dict(weights(visual, tower, kind), strict=True, assign=True)
    except (RuntimeError, IndexError) as error:
        said = str(error)
        reason = (said.partition("\n")[2] or said).strip().partition("\n")[0][:200]
        raise UnusableModel(f"{tower.file.path} does not fit its model: {reason}") from None


def weights(visual: Any, tower: Taken, kind: str) -> dict[str, Tensor]:
    """By the names that the library has for them."""
    state: dict[str, Tensor] = {}

    def both(target: str, name: str) -> None:
        for part in ("weight", "bias"):
            if f"{name}.{part}" in tower.file:
                state[f"{target}.{part}"] = tower.tensor(f"{name}.{part}")

    frames = [tower.tensor("v.patch_embd.weight"), tower.tensor("v.patch_embd.weight.1")]
    state["patch_embed.proj.weight"] = torch.stack(frames, dim=2)
    if "v.patch_embd.bias" in tower.file:
        state["patch_embed.proj.bias"] = tower.tensor("v.patch_embd.bias")
    if "v.position_embd.weight" in tower.file:
        state["pos_embed.weight"] = tower.tensor("v.position_embd.weight")
    for number in range(len(visual.blocks)):
        mine, theirs = f"blocks.{number}.", f"v.blk.{number}."
        names = dict(MLP[kind])
        up, down = (f"{theirs}ffn_{word}.weight" for word in ("up", "down"))
        if kind != "qwen3vl_merger" and (up in tower.file and down in tower.file):
            width = int(visual.blocks[number].attn.proj.in_features)
            if tower.file.stored(down).shape[-1] == width != tower.file.stored(up).shape[-1]:
                # The first converters called each by the other's name.
                swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
                names = {target: swapped.get(name, name) for target, name in names.items()}
        for target, name in (*BLOCK, *names.items()):
            both(mine + target, theirs + name)
        for part in ("weight", "bias"):
            if f"{theirs}attn_qkv.{part}" in tower.file:
                state[f"{mine}attn.qkv.{part}"] = tower.tensor(f"{theirs}attn_qkv.{part}")
            elif f"{theirs}attn_q.{part}" in tower.file:
                cut = [tower.tensor(f"{theirs}attn_{letter}.{part}") for letter in "qkv"]
                state[f"{mine}attn.qkv.{part}"] = torch.cat(cut)
    for target, name in MERGER[kind]:
        both(f"merger.{target}", name)
    for index, level in enumerate(deeper_levels(tower.file)):
        for target, name in DEEP:
            both(f"deepstack_merger_list.{index}.{target}", f"v.deepstack.{level}.{name}")
    return state
