"""Tiny folders of the kinds beside the demo's: with experts, and with layers of linear attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hotpath.demo.captioner_model import configuration, new_model, save_weights, write_processors, write_tokenizer

SEEING = ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
WRITING = ("qwen2_moe", "qwen3_moe")
NAMES = {
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration", "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5,
}  # fmt: skip


def newer_config(kind: str, tokens: dict[str, int], **widths: Any) -> dict[str, Any]:
    if kind in WRITING:
        config = configuration("qwen2" if kind == "qwen2_moe" else "qwen3", tokens, **widths)
        config |= {"architectures": [NAMES[kind]], "model_type": kind, "norm_topk_prob": kind != "qwen2_moe", **MOE}
        return config | ({"shared_expert_intermediate_size": 96} if kind == "qwen2_moe" else {})
    config = configuration("qwen3_vl", tokens, **widths)
    text, vision = config["text_config"], config["vision_config"]
    config |= {"architectures": [NAMES[kind]], "model_type": kind}
    text["model_type"], vision["model_type"] = f"{kind}_text", kind
    if "moe" in kind:
        text.update(MOE)
    if "3_5" in kind:
        text.update(HYBRID, layer_types=HYBRID["layer_types"][: text["num_hidden_layers"]])
        del vision["deepstack_visual_indexes"], text["rope_scaling"]
        text["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        }  # fmt: skip
        if "moe" in kind:
            text["shared_expert_intermediate_size"] = 96
    return config


def newer_folder(folder: Path, kind: str, spread: float = 0.3, **widths: Any) -> Path:
    """A whole folder of `kind` with random weights; none of them has the value that a network begins with."""
    tokens = write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(newer_config(kind, tokens, **widths)))
    stops = {"eos_token_id": [tokens["<|im_end|>"], tokens["<|endoftext|>"]], "pad_token_id": tokens["<|endoftext|>"]}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    if kind in SEEING:
        write_processors(folder, "qwen3_vl")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "conv1d" not in name:
                    parameter.normal_(0, spread)
                elif parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    save_weights(model, folder)
    return folder
