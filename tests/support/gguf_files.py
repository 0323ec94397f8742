"""GGUF files written for the tests: of a tiny model folder with its true numbers, or of random blocks of any type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gguf_layers import layer_tensors
from hotpath.demo import captioner_gguf
from hotpath.demo.gguf_writer import Stored, write
from safetensors.torch import load_file
from torch import Tensor

F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, BF16, NVFP4 = 0, 1, 2, 8, 12, 14, 30, 40
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
# Bytes of a block, and where in it the float16 numbers lie: kept small, so that every block is finite.
BLOCKS = {
    2: (32, 18, (0,)), 3: (32, 20, (0, 2)), 6: (32, 22, (0,)), 7: (32, 24, (0, 2)), 8: (32, 34, (0,)),
    10: (256, 84, (80, 82)), 11: (256, 110, (108,)), 12: (256, 144, (0, 2)), 13: (256, 176, (0, 2)),
    14: (256, 210, (208,)), 16: (256, 66, (0,)), 17: (256, 74, (0,)), 18: (256, 98, (0,)), 19: (256, 50, (0,)),
    20: (32, 18, (0,)), 21: (256, 110, (0,)), 22: (256, 82, (0,)), 23: (256, 136, (0,)), 29: (256, 56, ()),
    34: (256, 54, (52,)), 35: (256, 66, (64,)), 39: (32, 17, ()), 40: (64, 36, ()), 41: (128, 18, (0,)), 42: (64, 18, (0,)),
}  # fmt: skip
# (byte, bits that stay as they are, bits that are set) where scales are kept in another way: IQ1_M in parts, MXFP4, NVFP4.
SCALES = {29: ((53, 0x3F, 0x80), (55, 0x0F, 0x20)), 39: ((0, 7, 0x78),), 40: tuple((at, 0x3F, 0) for at in range(4))}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOWER = {
    "patch_embed.proj": "v.patch_embd", "pos_embed": "v.position_embd", "merger.ln_q": "v.post_ln",
    "merger.norm": "v.post_ln", "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2", "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
}  # fmt: skip
TOWER_BLOCK = {
    "norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
    "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
MERGERS = {"qwen2_vl": "qwen2vl_merger", "qwen2_5_vl": "qwen2.5vl_merger"}
ARCHITECTURES = {
    "qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen2vl", "qwen3_vl": "qwen3vl", "qwen3_vl_moe": "qwen3vlmoe",
    "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip

QWEN35_WORDS = QWEN_WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")


def random_blocks(kind: int, rows: int, inputs: int, seed: int = 0) -> Tensor:
    """[blocks, bytes] uint8 of a matrix [rows, inputs] of finite numbers."""
    values, length, halves = BLOCKS[kind]
    generator = torch.Generator().manual_seed(seed * 100 + kind)
    made = torch.randint(256, (rows * inputs // values, length), generator=generator, dtype=torch.uint8)
    for at in halves:
        made[:, at + 1] = 0x28 | (made[:, at + 1] & 3)  # between 0.03 and 0.06
    for at, kept, set_bits in SCALES.get(kind, ()):
        made[:, at] = made[:, at] & kept | set_bits
    return made


def stored(tensor: Tensor, kind: int = F32) -> Stored:
    """`tensor` as it is, or rounded to 8 bits as llama.cpp does it (Q8_0)."""
    if kind in PLAIN:
        return kind, tuple(tensor.shape), tensor.to(PLAIN[kind]).contiguous().view(torch.uint8).numpy().tobytes()
    assert kind == Q8_0
    blocks = tensor.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks / scale).nan_to_num().round().to(torch.int8)
    whole = torch.cat((scale.half().view(torch.uint8), codes.view(torch.uint8)), dim=1)
    return kind, tuple(tensor.shape), whole.numpy().tobytes()


def use_qwens_words(folder: Path, pattern: str = QWEN_WORDS) -> None:
    """Let the tokenizer of a tiny folder cut texts where Qwen's cuts them."""
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text())
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    made["normalizer"] = {"type": "NFC"}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytewise]}
    file.write_text(json.dumps(made))


def words(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's tokenizer and template."""
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    size = json.loads((folder / "config.json").read_text())
    size = size.get("text_config", size)["vocab_size"]
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [5] * size
    for token, number in made["model"]["vocab"].items():
        tokens[number], kinds[number] = token, 1
    for added in made["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], 3 if added["special"] else 4
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]]
    ids = {token: number for number, token in enumerate(tokens)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35" if r"\\p{M}" in json.dumps(made["pre_tokenizer"]) else "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(),
    }


def facts(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's language model."""
    config = json.loads((folder / "config.json").read_text())
    text, kind = config.get("text_config", config), config["model_type"]
    made = ARCHITECTURES.get(kind, kind)
    found = {
        "general.architecture": made,
        f"{made}.block_count": text["num_hidden_layers"],
        f"{made}.context_length": text["max_position_embeddings"],
        f"{made}.embedding_length": text["hidden_size"],
        f"{made}.feed_forward_length": text["intermediate_size"],
        f"{made}.attention.head_count": text["num_attention_heads"],
        f"{made}.attention.head_count_kv": text["num_key_value_heads"],
        f"{made}.rope.freq_base": text.get("rope_parameters", text)["rope_theta"],
        f"{made}.attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
    }
    if "head_dim" in text:
        found[f"{made}.attention.key_length"] = text["head_dim"]
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if "mrope_section" in rope:
        found[f"{made}.rope.dimension_sections"] = [*rope["mrope_section"], 0]
    if "num_experts" in text:
        found[f"{made}.expert_count"], found[f"{made}.expert_used_count"] = (
            text["num_experts"],
            text["num_experts_per_tok"],
        )
    if kind == "qwen3_5_moe":
        del found[f"{made}.feed_forward_length"]
    if "linear_key_head_dim" in text:
        values = text["linear_num_value_heads"]
        found |= {
            f"{made}.ssm.conv_kernel": text["linear_conv_kernel_dim"],
            f"{made}.ssm.state_size": text["linear_key_head_dim"],
            f"{made}.ssm.group_count": text["linear_num_key_heads"],
            f"{made}.ssm.time_step_rank": values,
            f"{made}.ssm.inner_size": values * text["linear_value_head_dim"],
            f"{made}.rope.dimension_count": int(text["head_dim"] * rope["partial_rotary_factor"]),
        }
    return found


def tower_facts(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's vision tower."""
    config = json.loads((folder / "config.json").read_text())
    vision, kind = config["vision_config"], config["model_type"]
    shown = json.loads((folder / "preprocessor_config.json").read_text())
    found = captioner_gguf.tower_facts(config, shown, MERGERS.get(kind, "qwen3vl_merger"))
    if kind not in MERGERS:
        deep = vision.get("deepstack_visual_indexes", [])
        found["clip.vision.is_deepstack_layers"] = [number in deep for number in range(vision["depth"])]
    if "fullatt_block_indexes" in vision:
        found["clip.vision.n_wa_pattern"] = vision["fullatt_block_indexes"][0] + 1
    return found


def weights(folder: Path, kind: int = F32) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """(tensors of the language model, tensors of the tower) of a folder, by their names in GGUF. Matrices of the language
    model are of the type `kind`, all else is F32."""
    config = json.loads((folder / "config.json").read_text())
    settings = config.get("text_config", config)
    levels = config.get("vision_config", {}).get("deepstack_visual_indexes", [])
    text: dict[str, Stored] = {}
    tower: dict[str, Stored] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, part = name.rpartition(".")
        if ".visual." not in name:
            plain = layer.replace("model.language_model.", "").removeprefix("model.")
            if not plain.startswith("layers."):
                called = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[plain]
                raised = tensor + 1 if plain == "norm" and "linear_key_head_dim" in settings else tensor
                text[f"{called}.{part}"] = stored(raised, kind if tensor.ndim == 2 else F32)
                continue
            _, number, rest = plain.split(".", 2)
            for called, made in layer_tensors(rest, part, tensor, settings):
                packed = made.ndim > 1 and not called.startswith(("ssm_conv1d", "ffn_gate_inp"))
                text[f"blk.{number}.{called}"] = stored(made, kind if packed else F32)
            continue
        plain = layer.partition(".visual.")[2]
        if plain.startswith("blocks."):
            _, number, rest = plain.split(".", 2)
            if rest == "attn.qkv" and config["model_type"] in MERGERS:
                for letter, cut in zip("qkv", tensor.chunk(3), strict=True):
                    tower[f"v.blk.{number}.attn_{letter}.{part}"] = stored(cut)
                continue
            called = f"v.blk.{number}.{ {**TOWER_BLOCK, 'attn.qkv': 'attn_qkv'}[rest] }"
        elif plain.startswith("deepstack_merger_list."):
            _, index, rest = plain.split(".", 2)
            called = f"v.deepstack.{levels[int(index)]}.{rest.replace('linear_', '')}"
        else:
            called = TOWER[plain]
        if called == "v.patch_embd" and part == "weight":
            tower["v.patch_embd.weight"], tower["v.patch_embd.weight.1"] = (
                stored(tensor[:, :, frame]) for frame in (0, 1)
            )
            continue
        tower[f"{called}.{part}"] = stored(tensor)
    return text, tower


def of_folder(folder: Path, target: Path, kind: int = F32, tower: str = "mmproj-F32.gguf", **more: Any) -> Path:
    """A GGUF of a tiny folder at `target`, and beside it, where it sees, its tower. more: further metadata."""
    text, seeing = weights(folder, kind)
    write(target, facts(folder) | words(folder) | more, text)
    if seeing and tower:
        write(target.with_name(tower), tower_facts(folder), seeing)
    return target
