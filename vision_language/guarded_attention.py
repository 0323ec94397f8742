"""The library's attention on devices where torch's kernels answer wrongly to what it asks, without a word.

On Metal they misread the masks of padded batches (see `attention.metal`). On data centre Blackwell cards cuDNN, which torch
prefers there, is wrong for a single query (pytorch 193893).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.metal import readable_mask
from ..attention.torch_backends import SINGLE_QUERIES, kernels_allowed, misled_by_cudnn

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
    """The library's attention by torch's kernels, for a single query by others than cuDNN's."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = module, query, key, value, attention_mask
    if query.shape[2] > 1:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(*given, **settings)
        return found
    with kernels_allowed(*SINGLE_QUERIES):
        found = sdpa_attention_forward(*given, **settings)
    return found


def guard(device: torch.device) -> tuple[Attend | None, str]:
    """(what the library should attend with on `device`, or None where it may go on by itself; a line for the report)."""
    if device.type == "mps":
        return on_metal, ""  # the kernels are the same
    return (without_cudnn, WITHOUT_CUDNN) if misled_by_cudnn(device) else (None, "")


def take_over(network: Any, attend: Attend) -> None:
    """Have the language model of `network`, which attends by torch's kernels, do so by `attend`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    name = f"hotpath_{attend.__name__}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    network.config.get_text_config()._attn_implementation = name
