"""What an attention call looks like, what a backend can do, and the sentence that says why the two do not fit.

A `Backend` is a capability record with a function. Records are facts of the library's documentation and source;
what a record cannot know (a kernel that this build lacks, say) shows when the backend first runs, and is then
remembered as a reason like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
HALVES = frozenset({FLOAT16, BFLOAT16})
FLOATS = frozenset({FLOAT16, BFLOAT16, FLOAT32})
# For every launch of a Triton kernel: a product and the sum it goes into are rounded once. Triton 3.9 warns where that is
# left to it, and the next release leaves it out.
FUSES = {"enable_fp_fusion": True}
NO_MASK, BOOL_MASK, FLOAT_MASK, OTHER_FLOAT_MASK = "no mask", "bool mask", "float mask", "float mask of another dtype"

Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "float | None"], Tensor]
"""(q [B, H, N, D], k, v [B, H', M, D or D'], mask [B or 1, H or 1, N or 1, M] or None, scale) -> [B, H, N, D']."""


@dataclass(frozen=True)
class DeviceFacts:
    """Of one device: `capability` is CUDA's (9, 0) for an H200; None elsewhere, and on AMD, where it means nothing."""

    type: str
    name: str = ""
    capability: tuple[int, int] | None = None


@functools.lru_cache(maxsize=32)
def device_facts(device: torch.device) -> DeviceFacts:
    """What torch says of `device`."""
    if device.type != "cuda":
        return DeviceFacts(device.type, device.type)
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return DeviceFacts("hip", name)
    return DeviceFacts("cuda", name, torch.cuda.get_device_capability(device))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one inside: Triton launches there, whatever device its tensors are on, and streams, events and
    graphs belong to it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def padded(size: int) -> int:
    """The next power of two, which Triton's blocks must be, and at least what a tensor core multiplies."""
    return max(16, 1 << (size - 1).bit_length())


def one_line(error: BaseException, most: int = 300) -> str:
    """What a library raised, for a reason or a report: compilers write pages."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def float32_products(device: torch.device) -> str:
    """How Triton multiplies float32 on `device` to float32's own accuracy: three TF32 products of the halves of each
    number where tensor cores have them (NVIDIA from compute capability 8.0 on), else "ieee"."""
    capability = device_facts(device).capability
    return "tf32x3" if capability is not None and capability >= (8, 0) else "ieee"


@dataclass(frozen=True)
class AttentionCall:
    """The signature a backend is chosen for. Sizes as in `Run`."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    mask: str = NO_MASK
    gradient: bool = False

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionCall:
        """The signature of tensors laid out as `Run` wants them."""
        batch, heads, queries, width = q.shape
        gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return cls(
            q.device, q.dtype, batch, heads, k.shape[1], queries, k.shape[2], width, v.shape[3],
            mask_kind(mask, q.dtype), gradient,
        )  # fmt: skip

    def describe(self) -> str:
        heads = str(self.heads) if self.heads == self.key_heads else f"{self.heads} over {self.key_heads}"
        width = str(self.width) if self.width == self.value_width else f"{self.width}, values {self.value_width}"
        sizes = f"{self.batch} x {heads} heads x {self.queries} by {self.keys}, width {width}"
        return f"{sizes}, {dtype_name(self.dtype)}, {self.mask}"


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def mask_kind(mask: Tensor | None, dtype: torch.dtype) -> str:
    if mask is None:
        return NO_MASK
    if mask.dtype == torch.bool:
        return BOOL_MASK
    return FLOAT_MASK if mask.dtype == dtype else OTHER_FLOAT_MASK


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    exact: nothing is rounded below the inputs' own dtype. in_graph: torch.compile may trace it; the others are an opaque
    operator there. distributions: packages that it comes in, beside torch. library: returns why the library cannot be
    used, or None. widths: the only head sizes, or None with `largest_width`. architectures: the only compute
    capabilities, or None with `least_capability`.
    further: what the other fields cannot say.
    """

    name: str
    what: str
    run: Run
    exact: bool = True
    in_graph: bool = False
    distributions: tuple[str, ...] = ()
    library: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] = ("cuda",)
    least_capability: tuple[int, int] | None = None
    architectures: tuple[tuple[int, int], ...] | None = None
    dtypes: frozenset[torch.dtype] = HALVES
    widths: tuple[int, ...] | None = None
    largest_width: int | None = None
    width_multiple: int = 1
    unequal_width: bool = False
    masks: tuple[str, ...] = (NO_MASK,)
    gradient: bool = False
    further: Callable[[AttentionCall, DeviceFacts], str | None] = lambda call, device: None

    def unavailable(self, device: DeviceFacts) -> str | None:
        """Why nothing at all runs on `device`, with the cure; None when something does."""
        if device.type not in self.devices:
            return f"it is for {' and '.join(self.devices)}, this is {device.type}"
        if device.capability is not None:
            have = _dotted(device.capability)
            if self.least_capability is not None and device.capability < self.least_capability:
                return f"it needs compute capability {_dotted(self.least_capability)}, {device.name} has {have}"
            if self.architectures is not None and device.capability not in self.architectures:
                known = ", ".join(map(_dotted, self.architectures))
                return f"it has kernels for compute capability {known}, {device.name} has {have}"
        return self.library()

    def refusal(self, call: AttentionCall, device: DeviceFacts) -> str | None:
        """Why this call cannot run here, or None."""
        if (reason := self.unavailable(device)) is not None:
            return reason
        if call.dtype not in self.dtypes:
            known = " and ".join(sorted(map(dtype_name, self.dtypes)))
            return f"it computes {known}, this is {dtype_name(call.dtype)}"
        if self.widths is not None and call.width not in self.widths:
            return f"its head sizes are {', '.join(map(str, self.widths))}, this is {call.width}"
        if self.largest_width is not None and max(call.width, call.value_width) > self.largest_width:
            return f"its head size ends at {self.largest_width}, this is {max(call.width, call.value_width)}"
        if call.width % self.width_multiple or call.value_width % self.width_multiple:
            return f"its head sizes are multiples of {self.width_multiple}, this is {call.width}"
        if call.width != call.value_width and not self.unequal_width:
            return f"keys and values must be equally wide, these are {call.width} and {call.value_width}"
        if call.mask not in self.masks:
            return f"it takes {' or '.join(self.masks)}, this has a {call.mask}"
        if call.gradient and not self.gradient:
            return "it has no backward pass"
        return self.further(call, device)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
