"""A batch of questions of different lengths on Metal, where torch misreads the masks that the library gives it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention.metal import readable_mask

NAME = "hotpath_on_metal"


def on_metal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """The library's attention by torch's kernels, with a mask that these read right."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = readable_mask(query, attention_mask)
    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, mask, **settings)
    return found


def take_over(network: Any) -> None:
    """Have the language model of `network`, which attends by torch's kernels, do so by `on_metal`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, on_metal)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.config.get_text_config()._attn_implementation = NAME
