"""Decoder layers that stay in CPU memory and lend their weights to the device for the length of a forward pass.

For a model that is larger than the device. The layers that are streamed are no part of the module that the host manages,
so it neither counts nor moves them; tokens are those of the whole model, at the speed of the bus to the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RESERVE = 1 << 30  # bytes left for activations, keys and values, when the host decides what fits


class StreamedLayer(nn.Module):
    """One decoder layer whose weights are copied to the device of its input when it runs, and dropped after."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that neither `.to` nor the host's memory management sees the weights.
        self._layer = (layer,)
        if torch.cuda.is_available():
            for tensor in [*layer.parameters(), *layer.buffers()]:
                tensor.data = tensor.data.cpu().pin_memory()

    def __getattr__(self, name: str) -> Any:
        # The library asks a layer for its attention type and the like.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer[0]
        weights = {
            name: tensor.to(hidden_states.device, non_blocking=True)
            for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
        }
        return torch.func.functional_call(layer, weights, (hidden_states, *args), kwargs)


def layer_bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])


def whole_bytes(network: nn.Module) -> int:
    """Bytes of the weights of `network`, streamed layers included."""
    streamed = (part._layer[0] for part in network.modules() if isinstance(part, StreamedLayer))
    return layer_bytes(network) + sum(map(layer_bytes, streamed))


def layers_to_stream(network: nn.Module, layers: nn.ModuleList, available: int) -> int:
    """How many decoder layers must be streamed so that the rest of `network` fits into `available` bytes."""
    excess = sum(t.nbytes for t in [*network.parameters(), *network.buffers()]) + RESERVE - available
    count = 0
    for layer in reversed(list(layers)):
        if excess <= 0:
            break
        excess -= layer_bytes(layer)
        count += 1
    return count


def stream(layers: nn.ModuleList, count: int) -> None:
    """Make the last `count` of `layers` streamed ones, in place."""
    for index in range(max(0, len(layers) - count), len(layers)):
        layers[index] = StreamedLayer(layers[index])
