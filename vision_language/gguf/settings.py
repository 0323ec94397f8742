"""What a model folder has beside its weights, made of the metadata of GGUF files: config.json and those of its processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..unusable import UnusableModel
from .source import NEWER, Source, absurd, deeper_levels, is_real
from .tokenizer import Vocabulary

PROCESSORS = {
    "qwen2vl_merger": "Qwen2VLProcessor",
    "qwen2.5vl_merger": "Qwen2_5_VLProcessor",
    NEWER: "Qwen3VLProcessor",
}
# What the published folders say and GGUF files leave out.
PIXELS = {"qwen2vl_merger": (3136, 12845056), "qwen2.5vl_merger": (3136, 12845056), NEWER: (65536, 16777216)}
VIDEO_PIXELS = (4096, 25165824)
WINDOW = 112
FRAMES = 2  # of a temporal patch
LONGEST = 1 << 40
SCALINGS = ("linear", "yarn")
EXPERTS = "blk.0.ffn_down_exps.weight"


def widths(source: Source, vocabulary: Vocabulary) -> dict[str, Any]:
    """The settings of the language model, as config.json has them."""
    heads = source.whole("attention.head_count")
    hidden = source.whole("embedding_length")
    end = next(iter(vocabulary.stops()), None)
    made: dict[str, Any] = {
        "vocab_size": source.text.stored("token_embd.weight").shape[0],
        "hidden_size": hidden,
        # Of a model with experts in every layer no tensor is so long.
        "intermediate_size": source.whole("feed_forward_length", *((0, LONGEST) if EXPERTS in source.text else ())),
        "num_hidden_layers": source.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": source.whole("attention.head_count_kv", heads),
        "hidden_act": "silu",
        "rms_norm_eps": source.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": source.whole("context_length", 32768, LONGEST),
        "rope_theta": source.real("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in source.text,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": vocabulary.special("bos"),
        "eos_token_id": end,
        "pad_token_id": vocabulary.pad(),
    }
    if source.architecture.startswith("qwen3"):
        made["head_dim"] = source.whole("attention.key_length", hidden // heads)
        made["attention_bias"] = "blk.0.attn_q.bias" in source.text
    if EXPERTS in source.text:
        made |= mixture(source)
    if source.hybrid:
        made |= linear_attention(source)
    scaling = str(source.fact("rope.scaling.type", "none"))
    if scaling in SCALINGS:
        made["rope_scaling"] = {"rope_type": scaling, "factor": source.real("rope.scaling.factor")}
        if scaling == "yarn":
            made["rope_scaling"]["original_max_position_embeddings"] = source.whole(
                "rope.scaling.original_context_length", most=LONGEST
            )
    elif scaling != "none":
        raise UnusableModel(f"{source.text.path} scales its positions by {scaling!r:.40}, which is not known here.")
    return made


def mixture(source: Source) -> dict[str, Any]:
    """The settings of experts."""
    beside, count = "blk.0.ffn_down_shexp.weight", source.whole("expert_count")
    made = {
        "num_experts": count,
        "num_experts_per_tok": source.whole("expert_used_count", most=count),
        "moe_intermediate_size": source.text.stored(EXPERTS).shape[-1],
        "norm_topk_prob": source.architecture != "qwen2moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if beside in source.text:
        made["shared_expert_intermediate_size"] = source.text.stored(beside).shape[-1]
    return made


def linear_attention(source: Source) -> dict[str, Any]:
    """The settings of the layers that keep a state instead of keys and values, and which those are."""
    values, width = source.whole("ssm.time_step_rank"), source.whole("attention.key_length")
    rotary = source.whole("rope.dimension_count", width, width)
    if rotary % 2:
        raise absurd(source.text, f"{source.architecture}.rope.dimension_count", rotary)
    kinds = {True: "linear_attention", False: "full_attention"}
    return {
        "layer_types": [kinds[f"blk.{number}.ssm_a" in source.text] for number in range(source.layers)],
        "linear_conv_kernel_dim": source.whole("ssm.conv_kernel"),
        "linear_key_head_dim": source.whole("ssm.state_size"),
        "linear_value_head_dim": source.whole("ssm.inner_size") // values,
        "linear_num_key_heads": source.whole("ssm.group_count"),
        "linear_num_value_heads": values,
        "partial_rotary_factor": rotary / width,
    }


def configuration(source: Source, vocabulary: Vocabulary) -> dict[str, Any]:
    """config.json."""
    text, kind = widths(source, vocabulary), source.model_type
    if source.tower is None:
        return {"model_type": kind, **text}
    sections = source.fact("rope.dimension_sections")
    fit = isinstance(sections, list) and len(sections) in (3, 4) and all(map(is_real, sections))
    # Where they do not alternate they are cut out of half a head.
    fit = fit and (source.projector == NEWER or 2 * sum(sections) == text["hidden_size"] // text["num_attention_heads"])
    if not fit or min(sections) < 0 or max(sections) > source.text.largest:
        raise absurd(source.text, f"{source.architecture}.rope.dimension_sections", sections)
    rope = {"rope_type": "default", **text.get("rope_scaling", {}), "mrope_section": [int(n) for n in sections[:3]]}
    text["rope_scaling"] = rope
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    found = {name: vocabulary.id_of(f"<|{name}|>") for name in names}
    if None in found.values():
        raise UnusableModel(f"{source.text.path} has no tokens for pictures: take a GGUF of a -VL model.")
    ids = {
        "image_token_id": found["image_pad"],
        "video_token_id": found["video_pad"],
        "vision_start_token_id": found["vision_start"],
        "vision_end_token_id": found["vision_end"],
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    vision: dict[str, Any] = {
        "depth": source.seen("block_count"),
        "num_heads": source.seen("attention.head_count"),
        "in_channels": 3,
        "patch_size": source.seen("patch_size"),
        "spatial_merge_size": source.seen("spatial_merge_size", 2),
        "temporal_patch_size": FRAMES,
    }
    tower = source.tower
    width = source.seen("embedding_length")
    # Of the two matrices of a block that one is the first whose rows are as long as the tower is wide.
    inner = max(tower.stored("v.blk.0.ffn_up.weight").shape)
    if source.projector == NEWER:
        text["rope_scaling"]["mrope_interleaved"] = True
        levels = deeper_levels(tower)
        vision |= {
            "hidden_size": width,
            "intermediate_size": inner,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": tower.stored("v.position_embd.weight").shape[0],
            "hidden_act": "gelu_pytorch_tanh",
        } | ({} if source.hybrid else {"deepstack_visual_indexes": levels})
        return {
            "model_type": kind, **ids, "text_config": text | {"model_type": f"{kind}_text"},
            "vision_config": vision | {"model_type": kind},
        }  # fmt: skip
    if kind == "qwen2_5_vl":
        every = source.seen("n_wa_pattern")
        vision |= {
            "hidden_size": width,
            "intermediate_size": inner,
            "out_hidden_size": text["hidden_size"],
            "window_size": source.seen("window_size", WINDOW, LONGEST),
            "fullatt_block_indexes": list(range(every - 1, vision["depth"], every)),
            "tokens_per_second": 2,
            "hidden_act": "silu",
        }
    else:
        vision |= {"embed_dim": width, "hidden_size": text["hidden_size"], "mlp_ratio": inner // width}
    return {"model_type": kind, **ids, **text, "vision_config": vision}


def sampling(source: Source, vocabulary: Vocabulary) -> dict[str, Any]:
    """generation_config.json."""
    names = {
        "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
    }  # fmt: skip
    found = {
        name: source.text.metadata[f"general.sampling.{key}"]
        for key, name in names.items()
        if is_real(source.text.metadata.get(f"general.sampling.{key}"))
    }
    return {
        "do_sample": "temperature" in found, "eos_token_id": vocabulary.stops(), "pad_token_id": vocabulary.pad(), **found,
    }  # fmt: skip


def write(source: Source, folder: Path) -> None:
    """All of it, into `folder`: what the library reads of a model folder before its weights."""
    vocabulary = Vocabulary(source.text.metadata, source.text.path)
    vocabulary.write(folder, seeing=source.tower is not None)
    config = configuration(source, vocabulary)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(sampling(source, vocabulary)))
    if source.tower is None:
        return
    kind, vision = source.projector, config["vision_config"]
    shared: dict[str, Any] = {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": FRAMES,
        "merge_size": vision["spatial_merge_size"],
        "image_mean": source.colours("image_mean"),
        "image_std": source.colours("image_std"),
        "processor_class": PROCESSORS[kind],
    }
    least, most = PIXELS[kind]
    least, most = source.seen("image_min_pixels", least, LONGEST), source.seen("image_max_pixels", most, LONGEST)
    sizes = {"shortest_edge": least, "longest_edge": most}
    pictures = shared | {"image_processor_type": "Qwen2VLImageProcessorFast", "size": sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    worker = "Qwen3VLVideoProcessor" if kind == NEWER else "Qwen2VLVideoProcessor"
    if kind == NEWER:
        sizes = {"shortest_edge": VIDEO_PIXELS[0], "longest_edge": VIDEO_PIXELS[1]}
    clips = shared | {"video_processor_type": worker, "size": sizes}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(clips))
