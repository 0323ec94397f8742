"""The convolutional half of a UNet, written by hand for recorded calls: channels last, and GroupNorm in kernels of ours.

Compiled, every width of residual block is a graph of its own, a dozen in SDXL, and most of what they hold are convolutions
that no compiler touches. What is left between them, norms, SiLU, biases and sums, are two kernels here, whatever the width.
Tensor cores read channels that lie side by side: where this machine's convolutions are faster so, pictures stay in that
order from block to block, tokens are a view of them, and kernels of 3x3 are kept once more in it.

Launching these from Python takes longer than one compiled block, so only models whose calls are recorded are given them.
The model that came in is not changed.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.choice import fastest, milliseconds
from .blocks import LiveParts
from .options import NotTraceable

log = logging.getLogger("hotpath.compile")

HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
TRIAL = (2, 640, 64, 64)  # SDXL's middle level at 1024x1024 with CFG
ROOM = 0.1  # of the free memory, at most, for kernels in the other order
allow_interpreter = False  # for tests

Forward = Callable[..., Any]


@functools.cache
def kernels_missing(device: torch.device, dtype: torch.dtype) -> str:
    """Why the model's own layers run; '' where our kernels do. Tried once, against torch. Waits for the device."""
    if device.type != "cuda" or dtype not in HALF:
        return f"there are none for {str(dtype).removeprefix('torch.')} on {device.type}"
    try:
        from .group_norm_kernel import INTERPRETED

        if INTERPRETED and not allow_interpreter:
            return "Triton interprets, which is for tests"
        for found, wanted in trial(device, dtype):
            if not torch.allclose(found.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]):
                return "its numbers were not torch's"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a card that Triton does not know
        log.warning("pictures: the model's own layers, because our kernels failed", exc_info=True)
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return ""


def trial(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int] = (2, 40, 9, 5), groups: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """What our kernels make of some numbers, and torch in float32, in both orders and with all that can be added."""
    from .group_norm_kernel import add, group_norm

    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    samples, channels = shape[:2]
    weight, bias, offset, more = (random(channels) for _ in range(4))
    added = random(samples, channels)
    for order in (torch.contiguous_format, torch.channels_last):
        x, y = ((random(*shape) + 3).contiguous(memory_format=order) for _ in range(2))
        plain = F.group_norm(x.float(), groups, weight.float(), bias.float(), 1e-5)
        yield group_norm(x, groups, weight, bias, 1e-5), plain
        moved = x.float() + (added.float() + offset.float())[..., None, None]
        wanted = F.silu(F.group_norm(moved, groups, weight.float(), bias.float(), 1e-5))
        yield group_norm(x, groups, weight, bias, 1e-5, silu=True, added=added, offset=offset), wanted
        sums = x.float() + y.float()
        yield add(x, y), sums
        yield add(x, y, offset, more), sums + (offset.float() + more.float())[:, None, None]


@functools.cache
def channels_last_is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Of a 3x3 convolution as UNets have them; measured once. Waits for the device."""
    channels = TRIAL[1]
    x = torch.randn(TRIAL, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    times = {}
    for name, order in (("as given", torch.contiguous_format), ("channels last", torch.channels_last)):
        given, kernel = x.contiguous(memory_format=order), weight.contiguous(memory_format=order)
        times[name] = milliseconds(functools.partial(F.conv2d, given, kernel, padding=1), device)
    choice = fastest(times)
    log.info("convolutions %s on %s: %s", choice.backend, device, choice.describe())
    return choice.backend == "channels last"


def _own_forward(part: nn.Module) -> bool:
    """Whether a layer computes what its torch class does: it is torch's or ComfyUI's."""
    return type(part).forward.__module__.startswith(("torch.nn.", "comfy.ops"))


def _check(norms: list[Any], convolutions: list[Any], dtype: torch.dtype) -> None:
    for part in (*norms, *convolutions):
        name = type(part).__name__
        if not _own_forward(part):
            raise NotTraceable(f"a {name} inside has a forward of its own")
        if part.weight is None or part.bias is None:
            raise NotTraceable(f"a {name} inside has no weight or no bias")
        for weight in (part.weight, part.bias):
            quantised = hasattr(weight, "__tensor_flatten__")
            if quantised or weight.dtype != dtype:
                kept = type(weight).__name__ if quantised else str(weight.dtype).removeprefix("torch.")
                raise NotTraceable(f"weights of a {name} inside are kept as {kept}")
    for part in convolutions:
        if part.padding_mode != "zeros" or part.groups != 1 or part.dilation != (1, 1):
            raise NotTraceable("a convolution inside is not a plain one")


class Written:
    """The `forward` of one part of a UNet during a model call. Where ours does not serve, `otherwise` does."""

    norms: list[Any]
    convolutions: list[Any]

    def __init__(self, module: Any, pictures: Pictures, otherwise: Forward, without: frozenset[nn.Module]) -> None:
        self.module = module
        self.title = type(module).__name__
        self.otherwise = otherwise
        self.reason = ""
        self._pictures = pictures
        self._live = LiveParts(module, without)
        self._device = torch.device("cpu")
        self._dtype: torch.dtype | None = None

    def examine(self, device: torch.device) -> None:
        """Find out whether ours serves, as the weights are now."""
        self._device, self._dtype = device, None
        try:
            self._live.state(device)
            dtype = (*self.norms, *self.convolutions)[0].weight.dtype
            _check(self.norms, self.convolutions, dtype)
            if missing := kernels_missing(device, dtype):
                raise NotTraceable(missing)
        except NotTraceable as error:
            self.reason = str(error)
            return
        self.reason, self._dtype = "", dtype

    @property
    def serves(self) -> bool:
        return self._dtype is not None

    def takes(self, x: Tensor) -> bool:
        """Whether ours can be given `x` in this call."""
        return (
            x.dtype == self._dtype and x.dim() == 4 and x.numel() > 0 and x.device == self._device
            and not torch.is_grad_enabled()
        )  # fmt: skip

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

    def __init__(self, module: Any, pictures: Pictures, otherwise: Forward) -> None:
        self.norms = [module.in_layers[0], module.out_layers[0]]
        self.convolutions = [module.in_layers[-1], module.out_layers[-1]]
        self._skip = None if isinstance(module.skip_connection, nn.Identity) else module.skip_connection
        if self._skip is not None:
            self.convolutions.append(self._skip)
        super().__init__(module, pictures, otherwise, frozenset())

    def __call__(self, x: Tensor, emb: Tensor) -> Any:
        if not self.takes(x):
            return self.otherwise(x, emb)
        from .group_norm_kernel import add, group_norm

        (first, second), (conv_in, conv_out) = self.norms, self.convolutions[:2]
        x = self.ordered(x)
        h = group_norm(x, first.num_groups, first.weight, first.bias, first.eps, silu=True)
        h = self.convolved(conv_in, h)
        layers = self.module.emb_layers
        added = None if layers is None else layers(emb).contiguous()
        h = group_norm(
            h, second.num_groups, second.weight, second.bias, second.eps, silu=True, added=added, offset=conv_in.bias
        )
        h = self.convolved(conv_out, h)
        if self._skip is None:
            return add(h, x, conv_out.bias)
        return add(h, self.convolved(self._skip, x), conv_out.bias, self._skip.bias)


class TransformerForward(Written):
    """ComfyUI's SpatialTransformer around its blocks: a norm, two projections, the input added. Channels last only."""

    def __init__(self, module: Any, pictures: Pictures, otherwise: Forward) -> None:
        self.norms = [module.norm]
        self.convolutions = [] if module.use_linear else [module.proj_in, module.proj_out]
        inside = frozenset(part for block in module.transformer_blocks for part in block.modules())
        super().__init__(module, pictures, otherwise, inside)

    def __call__(self, x: Tensor, context: Any = None, transformer_options: Any = None) -> Any:
        options = {} if transformer_options is None else transformer_options
        if not self.takes(x) or not self._pictures.channels_last:
            return self.otherwise(x, context, options)
        from .group_norm_kernel import group_norm

        module, norm = self.module, self.norms[0]
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
    """A convolution between levels, with its kernel in the pictures' order."""

    def __init__(self, module: Any, pictures: Pictures, otherwise: Forward) -> None:
        self.norms, self.convolutions = [], [module]
        super().__init__(module, pictures, otherwise, frozenset())

    def __call__(self, x: Tensor) -> Any:
        if not self.takes(x):
            return self.otherwise(x)
        return self.convolved(self.module, self.ordered(x), self.module.bias)


def _parts(diffusion_model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The parts that are written here, each with its class. Classes that inherit from ComfyUI's compute something else."""
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample

    for module in diffusion_model.modules():
        part: Any = module
        kind = type(module)
        if kind is ResBlock and not (part.updown or part.use_scale_shift_norm or part.exchange_temb_dims):
            if isinstance(part.in_layers[-1], nn.Conv2d) and isinstance(part.skip_connection, nn.Conv2d | nn.Identity):
                yield part, ResidualForward
        elif kind is SpatialTransformer:
            yield part, TransformerForward
        elif kind in (Downsample, Upsample) and part.use_conv and part.dims == 2:
            yield part.op if kind is Downsample else part.conv, ConvolutionForward


def describe_parts(diffusion_model: nn.Module) -> str:
    """A line about the parts of a model that are written here, or ""."""
    found = Counter(type(module).__name__ for module, _ in _parts(diffusion_model))
    what = ", ".join(f"{count} {title}" for title, count in found.items())
    return f"in half precision our own kernels run {what}, which then need no graph" if found else ""


class Pictures:
    """The written parts of one model instance, and the kernels of its convolutions in the order that they are read in.

    channels_last: the order of pictures in this call.
    """

    def __init__(self, diffusion_model: nn.Module, otherwise: Mapping[nn.Module, Forward]) -> None:
        """otherwise: the `forward` of parts where ours does not serve; by default that of their class."""
        self.channels_last = False
        self._prefers_last = False
        self._copies: dict[nn.Module, Tensor] = {}
        self.parts: list[Written] = []
        for module, kind in _parts(diffusion_model):
            plain = functools.partial(type(module).forward, module)
            self.parts.append(kind(module, self, otherwise.get(module, plain)))

    @property
    def serving(self) -> list[Written]:
        return [part for part in self.parts if part.serves]

    def examine(self, device: torch.device, free: int, hooked: bool) -> None:
        """Look at the weights as they are now. Waits for the device the first time.

        free: bytes. hooked: weights may change from call to call, so that no copies are kept.
        """
        for part in self.parts:
            part.examine(device)
        serving = self.serving
        self._prefers_last = bool(serving) and channels_last_is_faster(
            device, (*serving[0].norms, *serving[0].convolutions)[0].weight.dtype
        )
        if not self._prefers_last or hooked:
            self._copies.clear()
            return
        self._copy([conv for part in serving for conv in part.convolutions], free)

    def _copy(self, convolutions: list[Any], free: int) -> None:
        """Keep kernels in the other order, in the same memory as before where there is some: recordings read it."""
        copied = [c for c in convolutions if not c.weight.is_contiguous(memory_format=torch.channels_last)]
        new = sum(c.weight.nbytes for c in copied if c not in self._copies)
        if new > ROOM * free:
            self._copies.clear()
            return
        for gone in self._copies.keys() - set(copied):
            del self._copies[gone]
        # Copies outlive the inference mode of the call in which they are made, and are written to in others.
        with torch.inference_mode(False), torch.no_grad():
            for conv in copied:
                held, weight = self._copies.get(conv), conv.weight
                if held is None or (held.shape, held.dtype, held.device) != (weight.shape, weight.dtype, weight.device):
                    held = self._copies[conv] = torch.empty_like(weight, memory_format=torch.channels_last)
                held.copy_(weight)

    def kernel(self, conv: Any) -> Tensor:
        """The weight of `conv`, in the order of this call's pictures if there is a copy; torch reorders it otherwise."""
        weight: Tensor = conv.weight
        return self._copies.get(conv, weight) if self.channels_last else weight

    def begin(self, patched: bool) -> None:
        """A call begins. patched: other packs' code is given pictures in between, and may take their order for granted."""
        self.channels_last = self._prefers_last and not patched

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The copies, which a recording reads."""
        return tuple(self._copies.values())

    def release(self) -> None:
        """The weights leave the device: so do the copies."""
        self._copies.clear()

    def report(self) -> list[str]:
        """What ran by our kernels, and what did not and why, as lines."""
        ours = Counter(part.title for part in self.serving)
        lines = []
        if ours:
            what = ", ".join(f"{count} {title}" for title, count in ours.items())
            held = sum(copy.nbytes for copy in self._copies.values()) / 2**20
            order = f", channels last ({held:.0f} MiB of reordered weights)" if self._prefers_last else ""
            lines.append(f"  {what} by our own kernels{order}")
        others = Counter(f"{part.title}: {part.reason}" for part in self.parts if part.reason)
        return lines + [f"  {count} not by our own kernels, {reason}" for reason, count in others.items()]
