"""Tiny Qwen-VL model folders with the true architectures: the demo captioner's, and the ones the tests load.

A folder holds what a published checkpoint holds (config, processors, tokenizer, chat template, safetensors weights), in
the form that transformers 4.57 and 5 both read, with widths that fit in a few megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# System message, then the turns; pictures and clips stand where the message has them.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

VISION_KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT_KINDS = ("qwen2", "qwen3")
PROCESSOR_CLASSES = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


def write_tokenizer(folder: Path, corpus: Iterable[str] = (), merges: int = 0) -> dict[str, int]:
    """A byte-level BPE tokenizer with Qwen's special tokens; up to `merges` merges learned from `corpus`.

    Returns the special tokens' ids and, under "size", the number of tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if merges:
        tokenizer.train_from_iterator(
            corpus,
            trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False),
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS} | {"size": tokenizer.get_vocab_size()}


def configuration(kind: str, tokens: Mapping[str, int], **widths: Any) -> dict[str, Any]:
    """The config.json of a tiny `kind`; `widths` override the text widths, "vision" the vision ones."""
    vision = dict(widths.pop("vision", {}))
    vocabulary = -(-tokens["size"] // 16) * 16
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "pad_token_id": tokens["<|endoftext|>"],
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    } | widths
    if kind in TEXT_KINDS:
        if kind == "qwen2":
            del text["head_dim"]
        name = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
        return {"architectures": [name], "model_type": kind, **text}
    eighth = text["head_dim"] // 8
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2 * eighth, eighth, eighth]}
    ids = {
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    if kind == "qwen3_vl":
        text["rope_scaling"]["mrope_interleaved"] = True
        seen = {
            "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_channels": 3,
            "out_hidden_size": text["hidden_size"], "num_position_embeddings": 64, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0, 1, 2],
            "hidden_act": "gelu_pytorch_tanh",
        }  # fmt: skip
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": kind, **ids,
            "text_config": text | {"model_type": "qwen3_vl_text", "attention_bias": False},
            "vision_config": seen | vision | {"model_type": "qwen3_vl"},
        }  # fmt: skip
    # Rotary sections of the older families count half of the head dimension in three plain blocks.
    del text["head_dim"]
    if kind == "qwen2_5_vl":
        seen = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_channels": 3,
            "out_hidden_size": text["hidden_size"], "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2, "hidden_act": "silu",
        }  # fmt: skip
        name = "Qwen2_5_VLForConditionalGeneration"
    else:
        seen = {
            "depth": 2, "embed_dim": 32, "hidden_size": text["hidden_size"], "num_heads": 2, "in_channels": 3,
            "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        name = "Qwen2VLForConditionalGeneration"
    # Published folders of these two keep the text widths at the top level.
    text["rope_scaling"]["type"] = "mrope"
    return {
        "architectures": [name], "model_type": kind, **ids, **text, "vision_config": seen | vision,
    }  # fmt: skip


def write_processors(folder: Path, kind: str) -> None:
    """preprocessor_config.json and video_preprocessor_config.json as the published folders have them."""
    old = kind != "qwen3_vl"
    shared: dict[str, Any] = {
        "patch_size": 14 if old else 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if old else [0.5, 0.5, 0.5],
        "image_std": [0.26862954, 0.26130258, 0.27577711] if old else [0.5, 0.5, 0.5],
        "processor_class": PROCESSOR_CLASSES[kind],
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(shared | {"image_processor_type": "Qwen2VLImageProcessorFast"}, indent=1)
    )
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps(shared | {"video_processor_type": "Qwen2VLVideoProcessor" if old else "Qwen3VLVideoProcessor"})
    )


def write_folder(
    folder: Path,
    kind: str = "qwen3_vl",
    corpus: Iterable[str] = (),
    merges: int = 0,
    seed: int = 0,
    shards: int = 1,
    spread: float = 0.3,
    **widths: Any,
) -> Path:
    """A whole model folder with random weights.

    spread: standard deviation of the matrices. Large ones make the answers of an untrained model depend on every
    pixel and every position, which is what a test of equality wants; 0 keeps the architecture's own initialisation.
    """
    tokens = write_tokenizer(folder, corpus, merges)
    (folder / "config.json").write_text(json.dumps(configuration(kind, tokens, **widths), indent=1))
    stops = {"eos_token_id": [tokens["<|im_end|>"], tokens["<|endoftext|>"]], "pad_token_id": tokens["<|endoftext|>"]}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    if kind in VISION_KINDS:
        write_processors(folder, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(folder)
        if spread:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, spread)
    save_weights(model, folder, shards)
    return folder


def new_model(folder: Path) -> Any:
    """A model with fresh weights from the folder's config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto.from_config(config).float().eval()


def save_weights(model: Any, folder: Path, shards: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """model.safetensors, or `shards` files with their index."""
    tied = model.get_input_embeddings().weight
    state = {
        name: tensor.detach().to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and tensor.data_ptr() == tied.data_ptr())
    }
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        part = names[index::shards]
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
