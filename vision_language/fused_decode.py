"""The decode step of one row by kernels of our own, where they serve: seven launches a layer, no compiler's graphs.

Plain weights are read by `fused_decode_kernel`, packed ones by `packed_decode_kernel`. Kernels that torch's products beat
are refused, as are those that are off; what compiles layers takes their place then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .decode_products import TOLERANCE, Part, Product, Unfit, tuned
from .decoding import DENSE_MODELS, DecodeStep, text_decoder

log = logging.getLogger("hotpath.vision_language")

MAX_DIM = 256
AT_LEAST = 0.9  # of the speed of torch's products with plain weights, all together


def why_not(network: Any, rows: int, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot run the step of `network`, which has a static one; '' when they can."""
    if network.config.model_type not in DENSE_MODELS:
        return f"{network.config.model_type} is not one of the dense Qwen decoders"
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
    products = [Product(network.lm_head)]
    for layer in text_decoder(network).layers:
        products += map(
            Product, (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        )
    if reason := next(filter(None, (product.why_not() for product in products)), ""):
        return reason
    if not any(part.served for product in products for part in product.parts):
        return "the weights are packed in ways that our kernels do not read"
    dim = int(text_decoder(network).layers[0].self_attn.head_dim)
    return f"heads are {dim} wide, our kernels take {MAX_DIM}" if dim > MAX_DIM else ""


allow_interpreter = False


class FusedStep(DecodeStep):
    """`DecodeStep` for one row by kernels of ours. Raises Unfit when a kernel is wrong here, or slow."""

    def __init__(self, network: Any, attention_name: str) -> None:
        super().__init__(network, None, attention_name)
        head: Any = self.head
        self.products = [
            (Product(layer.qkv), Product(layer.out), Product(layer.gate_up, gated=True), Product(layer.down))
            for layer in self._layers
        ]
        self.last = Product(head.head)
        self._try_placing()
        self._tune()

    @property
    def _layers(self) -> list[Any]:
        return list(self.layers)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slot: Tensor,
        bias: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        from .prefill_kernels import place_rows

        embed, rotary = self._shared
        x = embed(tokens)[0]
        angles = positions.float() * rotary.inv_freq.float()
        angles = torch.cat((angles, angles))
        cos = (angles.cos() * rotary.attention_scaling).to(x.dtype)
        sin = (angles.sin() * rotary.attention_scaling).to(x.dtype)
        first: Any = self.layers[0]
        heads, groups, dim = first.heads, first.groups, first.head_dim
        for layer, products, k, v in zip(self._layers, self.products, keys, values, strict=True):
            to_qkv, to_out, to_inner, to_next = products
            qkv = to_qkv(x, layer.norm_in, layer.eps).unsqueeze(0)
            q_norm = None if layer.q_norm is None else layer.q_norm.weight
            k_norm = None if layer.k_norm is None else layer.k_norm.weight
            queries = place_rows(qkv, cos, sin, q_norm, k_norm, layer.eps, groups, k, v, slot)
            seen = layer.attend(queries.view(1, heads, groups, dim), k, v, bias, slot).reshape(heads * groups * dim)
            x = to_out(seen, added=x)
            x = to_next(to_inner(x, layer.norm_mid, layer.eps), added=x)
        head: Any = self.head
        return self.last(x, head.norm, head.eps).unsqueeze(0)

    def _try_placing(self) -> None:
        """Rotary embedding and the write into the cache are by a kernel that a prefill shares."""
        from .prefill_layers import kernels_missing

        first: Any = self.layers[0]
        weight = first.norm_in.weight
        if reason := kernels_missing(weight.device, weight.dtype, first.head_dim, first.q_norm is not None):
            raise Unfit(f"the kernels around the products do not serve ({reason})")

    def _alike(self) -> Iterator[tuple[list[Part], list[Any], bool]]:
        """Parts that share a config, their norms if they have any, and whether they gate."""
        head: Any = self.head
        found: dict[tuple[Any, ...], tuple[list[Part], list[Any], bool]] = {}
        for layer, products in zip(self._layers, self.products, strict=True):
            norms = (layer.norm_in, None, layer.norm_mid, None)
            for place, (product, norm) in enumerate(zip(products, norms, strict=True)):
                for part in product.parts:
                    if part.served:
                        parts, their_norms, _ = found.setdefault((place, *part.kind), ([], [], product.gates))
                        parts.append(part)
                        their_norms.extend([norm] if norm is not None else [])
        yield from found.values()
        yield from (([part], [head.norm], False) for part in self.last.parts if part.served)

    def _tune(self) -> None:
        first: Any = self.layers[0]
        spent = plain = theirs = 0.0
        read = 0
        for parts, norms, gated in self._alike():
            ours, torchs = tuned(parts, norms, gated, first.eps, first.norm_in.weight.dtype)
            spent, theirs, read = (
                spent + len(parts) * ours,
                theirs + len(parts) * torchs,
                read + sum(p.nbytes for p in parts),
            )
            plain += len(parts) * ours if parts[0].plain else 0.0
        if plain * AT_LEAST > theirs:
            raise Unfit(f"the products of our kernels take {plain:.2f} ms, torch's {theirs:.2f}")
        compared = f" (torch's {theirs:.2f})" if plain == spent else ""
        self.note = f"products by our kernels, {spent:.2f} ms at {read / spent / 1e6:,.0f} GB/s{compared}"
        everything = [
            part for products in (*self.products, (self.last,)) for product in products for part in product.parts
        ]
        if left := sum(not part.served for part in everything):
            self.note += f"; {left} of {len(everything)} matrices are unpacked by torch"
        log.info("decode step: %s", self.note)


def step_of(network: Any, attention_name: str) -> FusedStep:
    """The step, or Unfit, with the reason, whatever it is that failed."""
    try:
        return FusedStep(network, attention_name)
    except RuntimeError:  # Unfit, or what a driver raises
        raise
    except Exception as error:  # no compiler, a card that Triton does not know
        raise Unfit(f"the kernels failed ({type(error).__name__}: {error})") from error
