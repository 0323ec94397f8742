"""The demo captioner as a GGUF file and its mmproj, with the names that llama.cpp's converter has for a Qwen3-VL.

    python -m hotpath.demo.captioner_gguf

So that they are small, matrices are Q4_0, and the widest of the tower, which say little here, Q1_0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .gguf_writer import F16, F32, Stored, write
from .train_captioner import FOLDER

TARGET = FOLDER.parent / "GGUF" / "hotpath" / "hotpath-captioner-GGUF"
MODEL, TOWER = "hotpath-captioner-Q4_0.gguf", "mmproj-hotpath-captioner.gguf"
Q4_0, Q1_0 = 2, 41
NAMES = {
    "model.language_model.embed_tokens": "token_embd", "model.language_model.norm": "output_norm",
    "model.language_model.layers.": "blk.", "model.visual.blocks.": "v.blk.", "model.visual.patch_embed.proj": "v.patch_embd",
    "model.visual.pos_embed": "v.position_embd", "model.visual.merger.norm": "v.post_ln",
    "model.visual.merger.linear_fc1": "mm.0", "model.visual.merger.linear_fc2": "mm.2",
    "model.visual.deepstack_merger_list.": "v.deepstack.", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "attn.qkv": "attn_qkv", "attn.proj": "attn_out", "norm1": "ln1",
    "norm2": "ln2", "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down", "linear_fc": "fc",
}  # fmt: skip


def four_bits(matrix: Tensor) -> bytes:
    """Q4_0: for each 32 weights a scale, by which the largest one is -8."""
    blocks = matrix.float().reshape(-1, 32)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = (largest / -8).half()
    codes = (blocks / scale.float() + 8).nan_to_num(8).round().clamp(0, 15).to(torch.uint8)
    return _packed(scale, codes[:, :16] | (codes[:, 16:] << 4))


def one_bit(matrix: Tensor) -> bytes:
    """Q1_0: of 128 weights the signs, and how large they are on average."""
    blocks = matrix.float().reshape(-1, 128)
    bits = (blocks >= 0).view(-1, 16, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    return _packed(blocks.abs().mean(1, keepdim=True).half(), bits.sum(2, dtype=torch.uint8))


def _packed(scale: Tensor, codes: Tensor) -> bytes:
    return torch.cat((scale.view(torch.uint8), codes), dim=1).numpy().tobytes()


def stored(name: str, tensor: Tensor) -> Stored:
    shape = tuple(tensor.shape)
    if tensor.ndim == 1:
        return F32, shape, tensor.float().numpy().tobytes()
    if tensor.ndim > 2:
        return F16, shape, tensor.half().contiguous().numpy().tobytes()
    if "deepstack" in name and shape[1] % 128 == 0:
        return Q1_0, shape, one_bit(tensor)
    return Q4_0, shape, four_bits(tensor)


def tensors(folder: Path) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """(of the language model, of the tower) by their names in GGUF."""
    text: dict[str, Stored] = {}
    tower: dict[str, Stored] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        called = name
        for theirs, ours in NAMES.items():
            called = called.replace(theirs, ours)
        into = tower if ".visual." in name else text
        if called == "v.patch_embd.weight":
            for frame, frames in enumerate(("", ".1")):
                into[called + frames] = stored(called, tensor[:, :, frame])
        else:
            into[called] = stored(called, tensor)
    return text, tower


def words(folder: Path, size: int) -> dict[str, Any]:
    """The tokenizer, as the model's own."""
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [5] * size
    for token, number in made["model"]["vocab"].items():
        tokens[number], kinds[number] = token, 1
    for added in made["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], 3
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def tower_facts(config: dict[str, Any], shown: dict[str, Any], merger: str = "qwen3vl_merger") -> dict[str, Any]:
    """What is said of a vision tower of any kind. config, shown: of the model and of its preprocessor, as JSON."""
    text, vision = config.get("text_config", config), config["vision_config"]
    return {
        "general.architecture": "clip",
        "clip.projector_type": merger,
        "clip.has_vision_encoder": True,
        "clip.vision.projection_dim": text["hidden_size"],
        "clip.vision.patch_size": vision["patch_size"],
        "clip.vision.embedding_length": vision.get("embed_dim", vision["hidden_size"]),
        "clip.vision.block_count": vision["depth"],
        "clip.vision.attention.head_count": vision["num_heads"],
        "clip.vision.image_mean": shown["image_mean"],
        "clip.vision.image_std": shown["image_std"],
        "clip.vision.image_min_pixels": shown["size"]["shortest_edge"],
        "clip.vision.image_max_pixels": shown["size"]["longest_edge"],
    }


def main(folder: Path = FOLDER, target: Path = TARGET) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shown = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    model, tower = tensors(folder)
    facts = {
        "general.architecture": "qwen3vl",
        "qwen3vl.block_count": text["num_hidden_layers"],
        "qwen3vl.context_length": text["max_position_embeddings"],
        "qwen3vl.embedding_length": text["hidden_size"],
        "qwen3vl.feed_forward_length": text["intermediate_size"],
        "qwen3vl.attention.head_count": text["num_attention_heads"],
        "qwen3vl.attention.head_count_kv": text["num_key_value_heads"],
        "qwen3vl.attention.key_length": text["head_dim"],
        "qwen3vl.attention.value_length": text["head_dim"],
        "qwen3vl.attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "qwen3vl.rope.freq_base": text["rope_theta"],
        "qwen3vl.rope.dimension_sections": [*text["rope_scaling"]["mrope_section"], 0],
        "qwen3vl.n_deepstack_layers": len(vision["deepstack_visual_indexes"]),
    }
    write(target / MODEL, facts | words(folder, text["vocab_size"]), model)
    deep = vision["deepstack_visual_indexes"]
    seen = tower_facts(config, shown)
    seen["clip.vision.is_deepstack_layers"] = [number in deep for number in range(vision["depth"])]
    write(target / TOWER, seen, tower)
    return 0


if __name__ == "__main__":
    sys.exit(main())
