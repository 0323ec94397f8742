"""The parts of ComfyUI's UNet around its attention blocks, written by hand: residual blocks, transformers, convolutions.

They stand in the place of a part's `forward` while a call is recorded. What they share, the order of pictures and the
copies of kernels, is `pictures.Pictures`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.capabilities import dtype_name
from .blocks import LiveParts
from .options import NotTraceable
from .picture_kernels import kernels_missing

if TYPE_CHECKING:
    from .pictures import Pictures

Forward = Callable[..., Any]
UNSEEN = "it has not been looked at"


def _check_layer(part: Any, dtype: torch.dtype) -> None:
    name = type(part).__name__
    if not type(part).forward.__module__.startswith(("torch.nn.", "comfy.ops")):
        raise NotTraceable(f"a {name} inside has a forward of its own")
    if part.weight is None or part.bias is None:
        raise NotTraceable(f"a {name} inside has no weight or no bias")
    for weight in (part.weight, part.bias):
        quantised = hasattr(weight, "__tensor_flatten__")
        if quantised or weight.dtype != dtype:
            kept = type(weight).__name__ if quantised else dtype_name(weight.dtype)
            raise NotTraceable(
                f"weights of a {name} inside are kept as {kept} and computed with as {dtype_name(dtype)}"
            )
    if isinstance(part, nn.Conv2d) and (part.padding_mode, part.groups, part.dilation) != ("zeros", 1, (1, 1)):
        raise NotTraceable(f"a {name} inside is not a plain one")


class Written:
    """The `forward` of one part of a UNet while a call is recorded."""

    without: frozenset[nn.Module] = frozenset()  # modules inside that run as they are

    def __init__(self, module: Any, pictures: Pictures) -> None:
        self.module = module
        self.title = type(module).__name__
        self.otherwise: Forward = functools.partial(type(module).forward, module)
        self.reason = UNSEEN
        self.refused = ""  # what it could not be given in the last recording
        self._pictures = pictures

    @property
    def norms(self) -> list[Any]:
        return []

    @property
    def convolutions(self) -> list[Any]:
        """As they are now: a pack may have put another one in a place."""
        return []

    def examine(self, device: torch.device, dtype: torch.dtype) -> None:
        """Find out whether ours serves, as the weights are now. dtype: that the model computes in."""
        try:
            LiveParts(self.module, self.without).state(device)
            for part in (*self.norms, *self.convolutions):
                _check_layer(part, dtype)
            if missing := kernels_missing(device, dtype):
                raise NotTraceable(missing)
        except NotTraceable as error:
            self.reason = str(error)
        else:
            self.reason = ""

    @property
    def serves(self) -> bool:
        return not self.reason

    def takes(self, x: Tensor) -> bool:
        """Whether ours can be given `x`; the report tells what it could not."""
        taken = x.dtype == self._pictures.dtype and x.dim() == 4 and x.numel() > 0
        self.refused = "" if taken else f"it was given {dtype_name(x.dtype)} of {x.dim()} dimensions"
        return taken

    def ordered(self, x: Tensor) -> Tensor:
        order = torch.channels_last if self._pictures.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=order)

    def convolved(self, part: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`part` without its bias, which what follows adds, or with `bias`."""
        if part.kernel_size == (1, 1) and part.stride == (1, 1) and self._pictures.channels_last:
            return F.linear(x.permute(0, 2, 3, 1), part.weight.flatten(1), bias).permute(0, 3, 1, 2)
        return self.ordered(F.conv2d(x, self._pictures.kernel(part), bias, part.stride, part.padding))


class ResidualForward(Written):
    """ComfyUI's ResBlock: norm, SiLU, convolution, the timestep added, norm, SiLU, convolution, the input added."""

    @property
    def norms(self) -> list[Any]:
        return [self.module.in_layers[0], self.module.out_layers[0]]

    @property
    def convolutions(self) -> list[Any]:
        skip = self.module.skip_connection
        return [
            self.module.in_layers[-1],
            self.module.out_layers[-1],
            *([] if isinstance(skip, nn.Identity) else [skip]),
        ]

    def __call__(self, x: Tensor, emb: Tensor) -> Any:
        if not self.takes(x):
            return self.otherwise(x, emb)
        from .group_norm_kernel import add, group_norm

        (first, second), (conv_in, conv_out, *skips) = self.norms, self.convolutions
        x = self.ordered(x)
        h = group_norm(x, first.num_groups, first.weight, first.bias, first.eps, silu=True)
        h = self.convolved(conv_in, h)
        layers = self.module.emb_layers
        added = None if layers is None else layers(emb).contiguous()
        h = group_norm(
            h, second.num_groups, second.weight, second.bias, second.eps, silu=True, added=added, offset=conv_in.bias
        )
        h = self.convolved(conv_out, h)
        if not skips:
            return add(h, x, conv_out.bias)
        return add(h, self.convolved(skips[0], x), conv_out.bias, skips[0].bias)


class TransformerForward(Written):
    """ComfyUI's SpatialTransformer around its blocks: a norm, two projections, the input added. Channels last only."""

    def __init__(self, module: Any, pictures: Pictures) -> None:
        super().__init__(module, pictures)
        self.without = frozenset(part for block in module.transformer_blocks for part in block.modules())

    @property
    def norms(self) -> list[Any]:
        return [self.module.norm]

    @property
    def convolutions(self) -> list[Any]:
        return [] if self.module.use_linear else [self.module.proj_in, self.module.proj_out]

    def examine(self, device: torch.device, dtype: torch.dtype) -> None:
        super().examine(device, dtype)
        if self.serves and not self._pictures.channels_last:
            self.reason = "channels do not lie side by side, which pays here alone"

    def __call__(self, x: Tensor, context: Any = None, transformer_options: Any = None) -> Any:
        options = {} if transformer_options is None else transformer_options
        if not self.takes(x):
            return self.otherwise(x, context, options)
        from .group_norm_kernel import group_norm

        module, norm = self.module, self.module.norm
        blocks = module.transformer_blocks
        contexts = context if isinstance(context, list) else [context] * len(blocks)
        options["activations_shape"] = list(x.shape)
        x = self.ordered(x)
        tokens = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps).permute(0, 2, 3, 1)
        places = tokens.shape[1:3]
        tokens = self._projected(module.proj_in, tokens.flatten(1, 2))
        for index, block in enumerate(blocks):
            options["block_index"] = index
            tokens = block(tokens, context=contexts[index], transformer_options=options)
        tokens = self._projected(module.proj_out, tokens)
        return tokens.unflatten(1, places).permute(0, 3, 1, 2) + x

    def _projected(self, part: Any, tokens: Tensor) -> Tensor:
        made: Tensor = part(tokens) if self.module.use_linear else F.linear(tokens, part.weight.flatten(1), part.bias)
        return made


class ConvolutionForward(Written):
    """A convolution between blocks, with its kernel in the pictures' order."""

    @property
    def convolutions(self) -> list[Any]:
        return [self.module]

    def __call__(self, x: Tensor) -> Any:
        if not self.takes(x):
            return self.otherwise(x)
        return self.convolved(self.module, self.ordered(x), self.module.bias)


def written_parts(diffusion_model: Any) -> list[tuple[Any, type[Written]]]:
    """The parts that are written here, each with its class. Classes that inherit from ComfyUI's compute something else."""
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample

    found: list[tuple[Any, type[Written]]] = []
    if not isinstance(diffusion_model, UNetModel):
        return found
    for module in diffusion_model.modules():
        part: Any = module
        kind = type(module)
        if kind is ResBlock and not (part.updown or part.use_scale_shift_norm or part.exchange_temb_dims):
            if isinstance(part.in_layers[-1], nn.Conv2d) and isinstance(part.skip_connection, nn.Conv2d | nn.Identity):
                found.append((part, ResidualForward))
        elif kind is SpatialTransformer:
            found.append((part, TransformerForward))
        elif kind in (Downsample, Upsample) and part.use_conv and part.dims == 2:
            found.append((part.op if kind is Downsample else part.conv, ConvolutionForward))
    if not any(kind is ResidualForward for _, kind in found):
        return []  # a model of films, whose own blocks turn what comes from these
    # What it gives is put beside the last block's input, and would turn all of it.
    first = diffusion_model.input_blocks[0][0]
    return [(first, ConvolutionForward), *found] if isinstance(first, nn.Conv2d) else found


def describe_parts(diffusion_model: nn.Module) -> str:
    """A line about the parts of a model that are written here, or ""."""
    found = Counter(type(module).__name__ for module, _ in written_parts(diffusion_model))
    what = ", ".join(f"{count} {title}" for title, count in found.items())
    return f"recorded in half precision, {what} run by our own kernels and need no graph" if found else ""
