"""How ColorMNet's network runs: compiled or not, recorded or not, and with which attention.

What is compiled is kept with the network, or every film would compile anew. Recorded graphs read the weights where they
lie, and the host may move those when a film is done: an engine is for one film, whatever its shots.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...attention.compiled import number_of, prepare
from ...attention.dispatch import AttentionPolicy, attend
from ...attention.events import AttentionLog
from ...attention.local_window import AUTOMATIC, select_local_window
from ...host.capturing import GraphMemory
from ..compilation import MaybeCompiled
from ..cuda_graph import GraphedStep
from .decoder import DecoderContext
from .network import ColorMNet, FrameKeys

MOST_LINES = 3  # kinds of attention calls in a report


class ColorMNetFunctions:
    """attention: of `attention.dispatch.POLICIES`, for DINOv2's blocks; auto takes the fastest exact one that was
    measured here."""

    def __init__(self, network: ColorMNet, compile: bool = False, attention: str = "auto") -> None:
        self.network = network
        policy = self.attention = AttentionPolicy(attention)
        calls = self.calls = AttentionLog(attention)

        # Without `self`, whose network would else stay on the device until Python looks for what holds itself.
        def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, policy=policy, record=calls)

        def encode(luminance: Tensor, position: Tensor) -> FrameKeys:
            return network.encode_keys(luminance, position, attended)

        self.encode_keys = MaybeCompiled(encode, compile, "key encoder")
        self.decode = MaybeCompiled(network.decode, compile, "decoder")
        if compile:
            # A graph holds no objects: it finds what it reports to by number.
            number_of(self.calls)
            prepare()


class ColorMNetEngine:
    """local_attention: of `attention.local_window.BACKENDS`."""

    def __init__(self, functions: ColorMNetFunctions, local_attention: str = AUTOMATIC) -> None:
        network = functions.network
        self.functions = functions
        self.encode_keys, self.decode = functions.encode_keys, functions.decode
        self.short_term_attn = network.short_term_attn
        self.local_attention = local_attention
        # One for frames that update the sensory memory, one for those that do not.
        device = network.compute_device
        memory = GraphMemory(device)
        self.steps = {
            update: GraphedStep(_step(self.decode, update), device, memory=memory) for update in (True, False)
        }
        functions.calls.begin()

    def near(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention to the surroundings in the last remembered frame; see `network.LocalAttention`."""
        out: Tensor = self.short_term_attn(query, key, value, self.local_attention)
        return out

    def report(self) -> dict[str, str]:
        """Which implementation of each kernel runs here, and why."""
        # Asked anew: a kernel that cannot be built shows when it first runs.
        _, local_reason = select_local_window(self.functions.network.compute_device, backend=self.local_attention)
        return {
            "DINOv2 attention": f"{self.functions.attention.backend} was asked for; " + "; ".join(self._attended()),
            "local attention": local_reason,
            "torch.compile": f"key encoder {self.encode_keys.status}; decoder {self.decode.status}",
            "CUDA graph of the decoder": self.steps[True].status,
        }

    def _attended(self) -> list[str]:
        lines = self.functions.calls.report().splitlines()[1:]
        return lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES} more kinds"]


def _step(decode: MaybeCompiled, update: bool) -> Callable[..., tuple[Tensor, ...]]:
    """The decoder as a function of tensors alone."""

    def step(entry: Tensor, skip: Tensor, skip8: Tensor, skip4: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        colours, after = decode(DecoderContext(entry, skip, skip8, skip4), hidden, update)
        return colours, after

    return step
