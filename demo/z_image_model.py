"""Z-Image checkpoint folders with random weights: tiny ones for tests, one of the published size for benchmarks.

The folder is laid out as `ZImagePipeline.save_pretrained` lays it out: transformer, text encoder, VAE, scheduler,
tokenizer and model_index.json, in safetensors. Random weights draw noise; they are for speed and for equality.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .captioner_model import write_tokenizer


@dataclass(frozen=True)
class Widths:
    """Sizes of the three networks, in the names of their configurations."""

    transformer: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)


TINY = Widths(
    transformer={
        "dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 48,
        "in_channels": 4, "axes_dims": [8, 12, 12], "axes_lens": [640, 64, 64],
    },
    text_encoder={
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12,
    },
    vae={
        "latent_channels": 4, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "sample_size": 64,
    },
)  # fmt: skip
# Z-Image-Turbo: 6.15 billion, 4.02 billion and 84 million weights.
FULL = Widths(
    text_encoder={
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    vae={
        "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
        "norm_num_groups": 32, "sample_size": 1024,
    },
)  # fmt: skip


def write_checkpoint(
    folder: Path,
    widths: Widths = TINY,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding_side: str = "right",
    shard: str = "10GB",
    device: str = "cpu",
    control: int = 0,
) -> Path:
    """Write a random Z-Image checkpoint into `folder` and return it. The global random state is left as it was.

    control: channels of a ControlNet that is written with it; 0 writes none.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokens = write_tokenizer(folder / "tokenizer")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": padding_side}, indent=1))
    text: dict[str, Any] = {
        "vocab_size": -(-tokens["size"] // 16) * 16,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "pad_token_id": tokens["<|endoftext|>"],
    }
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(**widths.transformer)
        encoder = Qwen3Model(Qwen3Config(**text | widths.text_encoder))
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, act_fn="silu", scaling_factor=0.3611, shift_factor=0.1159,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=True, force_upcast=False,
            **widths.vae,
        )  # fmt: skip
        for network in (transformer, encoder):
            _spread(network)
    for name, network in (("transformer", transformer), ("text_encoder", encoder), ("vae", vae)):
        network.to(dtype).save_pretrained(folder / name, max_shard_size=shard)
    # Z-Image-Turbo's schedule.
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if control:
        _write_controlnet(folder / "controlnet", transformer, control, seed)
        index |= {"_class_name": "ZImageControlNetPipeline", "controlnet": ["diffusers", "ZImageControlNetModel"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _write_controlnet(folder: Path, transformer: Any, channels: int, seed: int) -> None:
    """With the layers that it shares with the transformer, as a pipeline saves it."""
    from diffusers import ZImageControlNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        network = ZImageControlNetModel(
            control_layers_places=list(range(transformer.config.n_layers)),
            control_refiner_layers_places=list(range(transformer.config.n_refiner_layers)),
            control_in_dim=channels,
            add_control_noise_refiner="control_noise_refiner",
            **{key: transformer.config[key] for key in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")},
        )
        _spread(network)
    network.to(transformer.dtype)
    ZImageControlNetModel.from_transformer(network, transformer).save_pretrained(folder)


@torch.no_grad()
def _spread(network: torch.nn.Module) -> None:
    """Weights that neither vanish nor overflow over many layers, and pad tokens and biases that are not zero."""
    for parameter in network.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
