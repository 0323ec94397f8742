"""The convolutional half of a UNet, written by hand for recorded calls: channels last, and GroupNorm in kernels of ours.

Compiled, every width of residual block is a graph of its own, a dozen in SDXL, and most of what they hold are convolutions
that no compiler touches. What is left between them, norms, SiLU, biases and sums, are two kernels here, whatever the width.
Tensor cores read channels that lie side by side: where this machine's convolutions are faster so, pictures stay in that
order from block to block, tokens are a view of them, and kernels of 3x3 are kept once more in it.

Launching these from Python takes longer than one compiled block, so they are there while a call is recorded and at no other
time. The model that came in is not changed.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.choice import fastest, milliseconds
from ...host.errors import kind_and_line
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
        return f"there are none for {_name(dtype)} on {device.type}"
    try:
        from .group_norm_kernel import INTERPRETED
    except ImportError:
        return "Triton is not installed"
    try:
        if INTERPRETED and not allow_interpreter:
            return "Triton interprets, which is for tests"
        for found, wanted in trial(device, dtype):
            if not torch.allclose(found.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]):
                return "its numbers were not torch's"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a card that Triton does not know
        log.warning("pictures: the model's own layers, because our kernels failed", exc_info=True)
        return kind_and_line(error)
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
            kept = type(weight).__name__ if quantised else _name(weight.dtype)
            raise NotTraceable(f"weights of a {name} inside are kept as {kept} and computed with as {_name(dtype)}")
    if isinstance(part, nn.Conv2d) and (part.padding_mode, part.groups, part.dilation) != ("zeros", 1, (1, 1)):
        raise NotTraceable(f"a {name} inside is not a plain one")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
        self.refused = "" if taken else f"it was given {_name(x.dtype)} of {x.dim()} dimensions"
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


def _parts(diffusion_model: Any) -> list[tuple[Any, type[Written]]]:
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
    found = Counter(type(module).__name__ for module, _ in _parts(diffusion_model))
    what = ", ".join(f"{count} {title}" for title, count in found.items())
    return f"recorded in half precision, {what} run by our own kernels and need no graph" if found else ""


class Pictures:
    """The written parts of one model instance, and the kernels of its convolutions in the order that they are read in.

    channels_last: the order of pictures. dtype: that the model computes in.
    """

    def __init__(self, diffusion_model: nn.Module) -> None:
        self.channels_last = False
        self.dtype: torch.dtype | None = None
        self.parts = [kind(module, self) for module, kind in _parts(diffusion_model)]
        self._copies: dict[nn.Module, Tensor] = {}
        self.lost = False  # whether copies went that recordings may still hold
        self._used = False  # whether copies are read: not while hooks change weights from call to call
        self._note = ""

    @property
    def serving(self) -> list[Written]:
        return [part for part in self.parts if part.serves]

    def examine(self, device: torch.device, dtype: torch.dtype, free: int, hooked: bool) -> None:
        """Look at the weights as they are now. Waits for the device the first time.

        dtype: that the model computes in. free: bytes. hooked: weights may change from call to call.
        """
        self.dtype, self._note = dtype, ""
        if not self.parts:
            return
        try:
            self.channels_last = not kernels_missing(device, dtype) and channels_last_is_faster(device, dtype)
            for part in self.parts:
                part.examine(device, dtype)
            self._copy(free, hooked)
        except RuntimeError as error:  # memory is short, or a library refuses
            log.warning("pictures: the model's own layers, because %s", error)
            for part in self.parts:
                part.reason = kind_and_line(error)
            self.release()

    def _copy(self, free: int, hooked: bool) -> None:
        """Keep kernels in the other order, in the same memory as before where there is some: recordings read it."""
        self._used = self.channels_last and not hooked
        if not self._used:
            return  # what is held stays for the recordings that read it, and is brought up to date before they run again
        convolutions = [conv for part in self.serving for conv in part.convolutions]
        copied = [c for c in convolutions if not c.weight.is_contiguous(memory_format=torch.channels_last)]
        if sum(c.weight.nbytes for c in copied if c not in self._copies) > ROOM * free:
            self._note = ", whose kernels are reordered at every step for want of memory"
            self.release()
            return
        for gone in self._copies.keys() - set(copied):
            del self._copies[gone]
            self.lost = True
        # Copies outlive the inference mode of the call in which they are made, and are written to in others.
        with torch.inference_mode(False), torch.no_grad():
            for conv in copied:
                held, weight = self._copies.get(conv), conv.weight
                if held is None or (held.shape, held.dtype, held.device) != (weight.shape, weight.dtype, weight.device):
                    self.lost |= held is not None
                    held = self._copies[conv] = torch.empty_like(weight, memory_format=torch.channels_last)
                held.copy_(weight)

    def kernel(self, conv: Any) -> Tensor:
        """The weight of `conv`, in the pictures' order if there is a copy; torch reorders it otherwise."""
        weight: Tensor = conv.weight
        return self._copies.get(conv, weight) if self._used else weight

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The copies, which a recording reads."""
        return tuple(self._copies.values()) if self._used else ()

    @property
    def key(self) -> Hashable:
        """What a recording depends on beside the weights."""
        return self.channels_last, self.dtype, tuple(part.serves for part in self.parts)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Our `forward` on the parts that it serves, in place of whatever stands there."""
        before: list[tuple[dict[str, Any], Any]] = []
        try:
            for part in self.serving:
                own = vars(part.module)
                there = own.get("forward")
                part.otherwise = there or functools.partial(type(part.module).forward, part.module)
                before.append((own, there))
                own["forward"] = part
            yield
        finally:
            for own, there in reversed(before):
                own.pop("forward", None)
                if there is not None:
                    own["forward"] = there

    def release(self) -> None:
        """The weights leave the device, or there is no room: the copies go."""
        self.lost |= bool(self._copies)
        self._copies.clear()
        self._used = False

    def report(self) -> list[str]:
        """What runs by our kernels in recordings, and what does not and why, as lines."""
        ours = Counter(part.title for part in self.serving if not part.refused)
        lines = []
        if ours:
            what = ", ".join(f"{count} {title}" for title, count in ours.items())
            held = sum(copy.nbytes for copy in self.held) / 2**20
            order = ", channels last" if self.channels_last else ""
            order += f" ({held:.0f} MiB of reordered weights)" if held else self._note
            lines.append(f"  {what} by our own kernels{order}")
        reasons = ((part.title, part.reason or part.refused) for part in self.parts)
        others = Counter(f"{title}: {reason}" for title, reason in reasons if reason not in ("", UNSEEN))
        return lines + [f"  {count} not by our own kernels, {reason}" for reason, count in others.items()]
