"""The library's attention on devices where torch's kernels answer wrongly to what it asks, without a word.

On Metal they misread the masks of padded batches (see `attention.metal`). On data centre Blackwell cards cuDNN, which torch
prefers there, is wrong for a single query (pytorch 193893). On all of NVIDIA's the memory-efficient kernel misreads masks where
all heads read one key head, which the library repeats without a copy (pytorch 191937).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.metal import readable_mask
from ..attention.torch_backends import SINGLE_QUERIES, kernels_allowed, misled_by_cudnn, sdpa

Attend = Callable[..., tuple[Tensor, Tensor | None]]
WITHOUT_CUDNN = "attention: single queries by other kernels of torch's than cuDNN's, which are wrong on this card"


def on_metal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """The library's attention by torch's kernels, with a mask that these read right."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = readable_mask(query, attention_mask)
    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, mask, **settings)
    return found


def without_cudnn(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """`with_one_key_head`, for a single query by other kernels than cuDNN's."""
    given = module, query, key, value, attention_mask
    if query.shape[2] > 1:
        return with_one_key_head(*given, **settings)
    with kernels_allowed(*SINGLE_QUERIES):
        return with_one_key_head(*given, **settings)


def with_one_key_head(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """The library's attention by torch's kernels, with masks that these read right where all heads read one key head."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    further = any(settings.get(name) is not None for name in ("position_bias", "softcap"))
    if attention_mask is None or key.shape[1] > 1 or further:
        given = module, query, key, value, attention_mask
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(*given, **settings)
        return found
    mask, scale = attention_mask[..., : key.shape[2]], settings.get("scaling")
    if query.shape[2] > 1:
        return sdpa(query, key, value, mask, scale).transpose(1, 2).contiguous(), None
    # The heads of a single query are as many queries of one head, and no key is copied.
    return sdpa(query.transpose(1, 2), key, value, mask.transpose(1, 2), scale).contiguous(), None


def one_key_head(network: Any) -> bool:
    """Whether all heads of some layer of `network`'s language model read one key head, and can be given another attention."""
    text = vars(network.config.get_text_config())
    heads = [count for name, count in text.items() if name.endswith("key_value_heads")]
    return 1 in heads and bool(getattr(network, "_supports_attention_backend", False))


def guard(device: torch.device, shared: bool = False) -> tuple[Attend | None, str]:
    """(what the library should attend with on `device`, or None where it may go on by itself; a line for the report).

    shared: whether all heads read one key head.
    """
    if device.type == "mps":
        return on_metal, ""  # the kernels are the same
    if misled_by_cudnn(device):
        return without_cudnn, WITHOUT_CUDNN
    return (with_one_key_head if shared and device.type == "cuda" else None), ""


def take_over(network: Any, attend: Attend) -> None:
    """Have the language model of `network`, which attends by torch's kernels, do so by `attend`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    name = f"hotpath_{attend.__name__}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    network.config.get_text_config()._attn_implementation = name
