"""The decode step of one row by kernels of our own, where they serve: seven launches a layer, no compiler's graphs.

The sizes of the kernels' blocks depend on the card and on the matrix, so they are measured once for each matrix of a
layer, on the weights of one layer after the other as they will be read, and kept. Numbers that differ from torch's are
refused, and so are kernels that torch's products beat; what compiles layers takes their place then.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import decode_attention
from .decoding import DecodeStep, rms_norm, text_decoder

log = logging.getLogger("hotpath.vision_language")

CONFIGS = ((4, 1024, 4), (8, 512, 4), (4, 512, 2), (2, 2048, 4))  # outputs of a program, inputs at a time, warps
MAX_DIM = 256
AT_LEAST = 0.9  # of the speed of torch's products, all five together
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest number
Config = tuple[int, int, int]

_chosen: dict[tuple[Any, ...], tuple[Config, float]] = {}  # by device and matrix: the config and its milliseconds


class Unfit(RuntimeError):
    """The kernels do not serve here."""


def why_not(network: Any, rows: int, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot run the step of `network`, which `decoding` supports; '' when they can."""
    if rows != 1:
        return f"our kernels take one row, not {rows}"
    if device.type != "cuda":
        return f"our kernels run on NVIDIA cards, not on {device.type}"
    if dtype not in TOLERANCE:
        return f"our kernels take float16, bfloat16 and float32, not {dtype}"
    try:
        from .fused_decode_kernel import INTERPRETED
    except Exception as error:  # not installed, or too old
        return f"Triton does not serve ({type(error).__name__}: {error})"
    if INTERPRETED and not allow_interpreter:
        return "Triton interprets, which is for tests"
    for layer in text_decoder(network).layers:
        parts = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        if not all(map(plain, parts)):
            return "the weights are packed"
        if any(part.bias is not None for part in parts[1:]):
            return "a projection has a bias that our kernels do not add"
    if not plain(network.lm_head) or network.lm_head.bias is not None:
        return "the output head is no plain matrix"
    dim = int(text_decoder(network).layers[0].self_attn.head_dim)
    return f"heads are {dim} wide, our kernels take {MAX_DIM}" if dim > MAX_DIM else ""


def plain(linear: Any) -> bool:
    return type(linear) is nn.Linear and linear.weight.is_contiguous()


allow_interpreter = False


class FusedStep(DecodeStep):
    """`DecodeStep` for one row by `fused_decode_kernel`. Raises Unfit when a kernel is wrong here, or slow."""

    def __init__(self, network: Any, attention_name: str) -> None:
        super().__init__(network, None, attention_name)
        self.configs: dict[str, Config] = {}
        self._try_placing()
        self._tune()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slot: Tensor,
        bias: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        from .fused_decode_kernel import product
        from .prefill_kernels import place_rows

        embed, rotary = self._shared
        x = embed(tokens)[0]
        angles = positions.float() * rotary.inv_freq.float()
        angles = torch.cat((angles, angles))
        cos = (angles.cos() * rotary.attention_scaling).to(x.dtype)
        sin = (angles.sin() * rotary.attention_scaling).to(x.dtype)
        layers: Any = self.layers
        first = layers[0]
        heads, groups, dim, hidden = first.heads, first.groups, first.head_dim, len(x)
        new = functools.partial(torch.empty, dtype=x.dtype, device=x.device)
        qkv = new(1, heads * (groups + 2) * dim)
        for layer, k, v in zip(layers, keys, values, strict=True):
            product(x, layer.qkv.weight, qkv, self.configs["qkv"], layer.qkv.bias, layer.norm_in.weight, layer.eps)
            q_norm = None if layer.q_norm is None else layer.q_norm.weight
            k_norm = None if layer.k_norm is None else layer.k_norm.weight
            queries = place_rows(qkv, cos, sin, q_norm, k_norm, layer.eps, groups, k, v, slot)
            seen = layer.attend(queries.view(1, heads, groups, dim), k, v, bias, slot).reshape(heads * groups * dim)
            middle, after = new(hidden), new(hidden)
            product(seen, layer.out.weight, middle, self.configs["out"], added=x)
            inner = new(layer.down.in_features)
            product(
                middle, layer.gate_up.weight, inner, self.configs["gate_up"],
                norm=layer.norm_mid.weight, eps=layer.eps, gated=True,
            )  # fmt: skip
            product(inner, layer.down.weight, after, self.configs["down"], added=middle)
            x = after
        head: Any = self.head
        logits = new(head.head.out_features)
        product(x, head.head.weight, logits, self.configs["head"], norm=head.norm.weight, eps=head.eps)
        return logits.unsqueeze(0)

    def _try_placing(self) -> None:
        """Rotary embedding and the write into the cache are by a kernel that a prefill shares."""
        from .replayed_prefill import kernels_missing

        first: Any = self.layers[0]
        weight = first.qkv.weight
        if reason := kernels_missing(weight.device, weight.dtype, first.head_dim, first.q_norm is not None):
            raise Unfit(f"the kernels around the products do not serve ({reason})")

    def _tune(self) -> None:
        layers: list[Any] = list(self.layers)
        head: Any = self.head
        kinds: dict[str, tuple[list[Any], list[Any], bool]] = {
            "qkv": ([layer.qkv for layer in layers], [layer.norm_in for layer in layers], False),
            "out": ([layer.out for layer in layers], [], False),
            "gate_up": ([layer.gate_up for layer in layers], [layer.norm_mid for layer in layers], True),
            "down": ([layer.down for layer in layers], [], False),
            "head": ([head.head], [head.norm], False),
        }
        ours = theirs = 0.0
        read = 0
        for name, (linears, norms, gated) in kinds.items():
            config, mine, torchs = tuned(linears, norms, gated, layers[0].eps)
            self.configs[name] = config
            times = 1 if name == "head" else len(layers)
            ours, theirs, read = ours + times * mine, theirs + times * torchs, read + times * linears[0].weight.nbytes
        if ours * AT_LEAST > theirs:
            raise Unfit(f"the products of our kernels take {ours:.2f} ms, torch's {theirs:.2f}")
        self.note = f"products by our kernels, {ours:.2f} ms at {read / ours / 1e6:,.0f} GB/s (torch's {theirs:.2f})"
        log.info("decode step: %s; %s", self.note, self.configs)


def step_of(network: Any, attention_name: str) -> FusedStep:
    """The step, or Unfit, with the reason, whatever it is that failed."""
    try:
        return FusedStep(network, attention_name)
    except RuntimeError:  # Unfit, or what a driver raises
        raise
    except Exception as error:  # no compiler, a card that Triton does not know
        raise Unfit(f"the kernels failed ({type(error).__name__}: {error})") from error


def tuned(linears: Sequence[Any], norms: Sequence[Any], gated: bool, eps: float) -> tuple[Config, float, float]:
    """(the fastest config, its milliseconds, those of torch's plain product) for matrices of one kind. Waits."""
    from .fused_decode_kernel import product

    weight = linears[0].weight
    outputs, inputs = weight.shape
    made = outputs // 2 if gated else outputs
    device = weight.device
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(inputs, generator=generator, device=device, dtype=weight.dtype)
    added = None if norms else torch.randn(made, generator=generator, device=device, dtype=weight.dtype)
    result = torch.empty(made, device=device, dtype=weight.dtype)

    def run(config: Config, index: int) -> None:
        norm = norms[index].weight if norms else None
        product(x, linears[index].weight, result, config, linears[index].bias, norm, eps, added, gated)

    def in_turns(call: Callable[[int], Any]) -> float:
        turn = itertools.cycle(range(len(linears)))  # or they would lie in the card's cache
        return decode_attention.milliseconds(lambda: call(next(turn)), device)

    key = (torch.cuda.get_device_name(device), weight.dtype, outputs, inputs, gated, bool(norms), len(linears) > 1)
    theirs_key = (*key, "torch")
    wanted = reference(x, linears[0], norms[0].weight if norms else None, eps, added, gated)
    if key not in _chosen:
        best: tuple[Config, float] | None = None
        for config in CONFIGS:
            run(config, 0)
            check(result, wanted)
            spent = in_turns(functools.partial(run, config))
            if best is None or spent < best[1]:
                best = config, spent
        assert best is not None
        _chosen[key] = best
        row = x.unsqueeze(0)
        _chosen[theirs_key] = best[0], in_turns(lambda index: F.linear(row, linears[index].weight))
    else:
        run(_chosen[key][0], 0)
        check(result, wanted)
    return (*_chosen[key], _chosen[theirs_key][1])


def reference(x: Tensor, linear: Any, norm: Tensor | None, eps: float, added: Tensor | None, gated: bool) -> Tensor:
    """What `fused_decode_kernel.product` computes, by torch."""
    made = F.linear(x if norm is None else rms_norm(x, norm, eps), linear.weight, linear.bias)
    if gated:
        gate, up = made.chunk(2, dim=-1)
        made = F.silu(gate) * up
    return made if added is None else added + made


def check(found: Tensor, wanted: Tensor) -> None:
    largest = float(wanted.abs().max())
    worst = float((found.float() - wanted.float()).abs().max())
    if not worst <= TOLERANCE[wanted.dtype] * max(largest, 1e-3):
        raise Unfit(f"a product of our kernels is off by {worst:.2g}, where the largest number is {largest:.2g}")
