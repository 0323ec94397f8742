"""3x3 convolutions, in float32 on a CPU with 2.25 times fewer multiplications: Winograd's F(2x2, 3x3) (Lavin and Gray, CVPR
2016, section 4.1).

Four outputs in a square are made from sixteen products instead of thirty-six. The products are sixteen matrix products
over channels, so this pays where layers are wide. With AVX-512 oneDNN's direct convolution is faster than the sixteen
products with what is added around them; its weights are kept in its own order there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..products.convolution import PackedConvolution, available, can_pack
from ..products.metal import readable

# Input channels times output channels from which the products outweigh what is added around them.
WIDE = 128 * 128
# Bytes of transformed inputs and products at a time: what a core's share of the cache holds.
TILES_BYTES = 4 << 20


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1. padding: zeros around the picture, as many as `dilation` where it is not given.

    As torch computes it, until `prepare` was called.
    """

    transformed: Tensor | None
    packs = False  # for the size in use

    def __init__(
        self, inputs: int, outputs: int, dilation: int = 1, padding: int | None = None, bias: bool = True
    ) -> None:
        padding = dilation if padding is None else padding
        super().__init__(inputs, outputs, 3, padding=padding, dilation=dilation, bias=bias)
        self.register_buffer("transformed", None, persistent=False)
        self._packed: dict[int, PackedConvolution] = {}  # by the first of its channels
        self._sizes: dict[int, torch.Size] = {}  # of the call before

    def prepare(self) -> None:
        """Keep a second copy of the weights of a wide layer: transformed, 16/9 of their size, or as oneDNN orders them."""
        if self.in_channels * self.out_channels >= WIDE:
            self.packs = direct_is_faster()
            self.transformed = None if self.packs else transform_weights(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, slice(None), self.bias)

    def partial(self, x: Tensor, first: int, bias: bool) -> Tensor:
        """What the channels from `first` on, which are `x`, add to the output; the bias belongs to one such part."""
        return self._convolve(x, slice(first, first + x.shape[1]), self.bias if bias else None)

    def _convolve(self, x: Tensor, channels: slice, bias: Tensor | None) -> Tensor:
        padding, dilation = int(self.padding[0]), self.dilation[0]
        if self.packs and can_pack(x):
            return self._packed_for(x, channels)(x, bias)
        if self.transformed is None or x.dtype != torch.float32 or torch.compiler.is_compiling():
            return F.conv2d(x, readable(self.weight[:, channels]), bias, 1, padding, dilation)
        return winograd(x, self.transformed[:, channels], bias, padding, dilation)

    def _packed_for(self, x: Tensor, channels: slice) -> PackedConvolution:
        """Kept from the second call of a size in a row on. What is computed does not depend on the calls before."""
        first = channels.start or 0
        again, self._sizes[first] = self._sizes.get(first) == x.shape, x.shape
        packed = self._packed.get(first)
        if packed is None or packed.size != x.shape:
            padding = [int(side) for side in self.padding]
            packed = PackedConvolution(self.weight[:, channels], x.shape, padding, self.stride, self.dilation)
            if again:
                self._packed[first] = packed
        return packed

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = self.weight.data_ptr()
        made = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.weight.data_ptr() != before:
            self._packed.clear()
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}  # what oneDNN ordered cannot be copied


def direct_is_faster() -> bool:
    """Whether oneDNN's direct convolution beats Winograd's products on this CPU."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and available()


def prepare_convolutions(network: nn.Module) -> None:
    """For a network that computes in float32 on a CPU."""
    for module in network.modules():
        if isinstance(module, Conv3x3):
            module.prepare()


def convolutions_status(network: nn.Module) -> str:
    """Which way the wide convolutions of `network` go, for a report."""
    wide = [
        module for module in network.modules() if isinstance(module, Conv3x3) and module.weight.dtype == torch.float32
    ]
    if any(module.packs for module in wide):
        return "oneDNN's direct ones, faster than Winograd's with AVX-512"
    if any(module.transformed is not None for module in wide):
        return "Winograd's products"
    return "torch's own"


def transform_weights(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] to [16, C, O]."""
    rows = _transformed(weight.unbind(2))
    both = [cell for row in rows for cell in _transformed(row.unbind(2))]
    return torch.stack([cell.T.contiguous() for cell in both])


def _transformed(taps: tuple[Tensor, ...]) -> list[Tensor]:
    first, second, third = taps
    outer = first + third
    return [first, (outer + second) / 2, (outer - second) / 2, third]


def winograd(x: Tensor, weights: Tensor, bias: Tensor | None, padding: int = 1, dilation: int = 1) -> Tensor:
    """x: [B, C, H, W]; weights: of `transform_weights`. Returns [B, O, H', W'] in channels-last order.

    With a dilation, every `dilation`-th row and column are a picture of their own.
    """
    batch, channels, height, width = x.shape
    outputs = weights.shape[2]
    high, wide = (size + 2 * padding - 2 * dilation for size in (height, width))
    down, across = (-(-size // (2 * dilation)) for size in (high, wide))  # tiles of 2x2 outputs
    needed = [(2 * tiles + 2) * dilation - size - padding for tiles, size in ((down, height), (across, width))]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, needed[1], padding, needed[0]))
    pictures = padded.view(batch, 2 * down + 2, dilation, 2 * across + 2, dilation, channels)
    y = x.new_empty(batch, 2 * down, dilation, 2 * across, dilation, outputs)
    # At least as many tiles as it takes to make good for reading the weights.
    tiles = max(TILES_BYTES // (64 * (channels + outputs)), channels * outputs // (channels + outputs))
    step = max(1, tiles // (batch * dilation * across * dilation))
    for first in range(0, down, step):
        stop = min(first + step, down)
        _tiles(pictures[:, 2 * first : 2 * stop + 2], weights, bias, y[:, 2 * first : 2 * stop])
    return y.view(batch, 2 * down * dilation, 2 * across * dilation, outputs)[:, :high, :wide].permute(0, 3, 1, 2)


def _tiles(pictures: Tensor, weights: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """pictures: [B, 2 * down + 2, d, 2 * across + 2, d, C]; y: [B, 2 * down, d, 2 * across, d, O], written to."""
    down, across = y.shape[1] // 2, y.shape[3] // 2
    rows = [pictures[:, index : index + 2 * down : 2] for index in range(4)]
    inputs = pictures.new_empty(4, 4, *y[:, ::2, :, ::2].shape[:-1], pictures.shape[-1])
    for row, mixed in zip(
        inputs, (rows[0] - rows[2], rows[1] + rows[2], rows[2] - rows[1], rows[1] - rows[3]), strict=True
    ):
        columns = [mixed[:, :, :, index : index + 2 * across : 2] for index in range(4)]
        torch.sub(columns[0], columns[2], out=row[0])
        torch.add(columns[1], columns[2], out=row[1])
        torch.sub(columns[2], columns[1], out=row[2])
        torch.sub(columns[1], columns[3], out=row[3])
    products = torch.bmm(inputs.view(16, -1, inputs.shape[-1]), weights).view(4, 4, *inputs.shape[2:-1], -1)
    for index, half in enumerate((products[0] + products[1] + products[2], products[1] - products[2] - products[3])):
        middle = half[1] if bias is None else half[1] + bias
        y[:, index::2, :, ::2] = (half[0].add_(half[2])).add_(middle)
        y[:, index::2, :, 1::2] = (middle - half[2]).sub_(half[3])
