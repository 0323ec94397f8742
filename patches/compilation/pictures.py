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
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...host.errors import kind_and_line
from .picture_kernels import channels_last_is_faster, kernels_missing
from .unet_parts import UNSEEN, Written, written_parts

log = logging.getLogger("hotpath.compile")
ROOM = 0.1  # of the free memory, at most, for kernels in the other order


class Pictures:
    """The written parts of one model instance, and the kernels of its convolutions in the order that they are read in.

    channels_last: the order of pictures. dtype: that the model computes in.
    """

    def __init__(self, diffusion_model: nn.Module) -> None:
        self.channels_last = False
        self.dtype: torch.dtype | None = None
        self.parts = [kind(module, self) for module, kind in written_parts(diffusion_model)]
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
