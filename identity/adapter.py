"""The InstantID adapter network: a resampler and one key and one value projection per cross-attention block."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..cache import content_key, file_fingerprint
from .checkpoint import KV_KEY, State, UnsupportedCheckpoint, read_adapter, split_adapter
from .resampler import Resampler

# Two threads must not make two handles: one's user would send the weights away under the other's.
_managing = threading.Lock()


class BlockProjections(nn.Module):
    """`to_kvs["1_to_k_ip"]`, `to_kvs["1_to_v_ip"]`, `to_kvs["3_to_k_ip"]`, ...: the names other packs look up."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.to_kvs = nn.ModuleDict()
        for key, weight in state.items():
            with torch.device("meta"):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.to_kvs[key.removesuffix(".weight").replace(".", "_")] = linear


class InstantIDAdapter(nn.Module):
    """The network in `ip-adapter.bin`: face embedding -> tokens -> keys and values of every block.

    `fingerprint` is the content key of the weights. Other packs may call `get_image_embeds` and read
    `ip_layers.to_kvs`, as on the object of the pack this one replaces.
    """

    def __init__(self, image_proj: State, ip_adapter: State, name: str, fingerprint: str) -> None:
        super().__init__()
        self.name = name
        self.fingerprint = fingerprint
        try:
            self.image_proj_model = Resampler.from_state(image_proj)
        except KeyError as error:
            raise UnsupportedCheckpoint(
                f"{name}: the resampler has no {error.args[0]}; the file is incomplete."
            ) from error
        except (RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedCheckpoint(f"{name}: the resampler's weights do not fit together: {reason}") from error
        self.numbers = _block_numbers(ip_adapter, self.image_proj_model.output_dim, name)
        self.ip_layers = BlockProjections(ip_adapter)
        self._managed: host.Managed | None = None
        self.requires_grad_(False)
        self.eval()

    @property
    def managed(self) -> host.Managed:
        """Itself in the host's memory management: on the device while something is computed, off it otherwise."""
        with _managing:
            if self._managed is None:
                self._managed = host.current().manage(self)
            return self._managed

    @property
    def embedding_dim(self) -> int:
        """Width of the face embedding it takes (512 for ArcFace)."""
        return self.image_proj_model.embedding_dim

    @property
    def context_dim(self) -> int:
        """Width of its tokens, which is the width of the model's text conditioning (2048 for SDXL)."""
        return self.image_proj_model.output_dim

    def block_width(self, index: int) -> int:
        """Width of the keys of block `index` in 0..len(numbers)-1, the block's number of channels."""
        return self._projection(index, "k").out_features

    def _projection(self, index: int, kind: str) -> nn.Linear:
        linear = self.ip_layers.to_kvs[f"{2 * index + 1}_to_{kind}_ip"]
        assert isinstance(linear, nn.Linear)
        return linear

    def project(self, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, width] of block `index` for tokens [B, T, context_dim]."""
        return self._projection(index, "k")(tokens), self._projection(index, "v")(tokens)

    @torch.inference_mode()
    def get_image_embeds(self, embedding: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of a face embedding and of its unconditional counterpart, both [N, 1, embedding_dim]."""
        return self.image_proj_model(embedding), self.image_proj_model(unconditional)


def _block_numbers(state: State, context_dim: int, name: str) -> tuple[int, ...]:
    """The blocks the file has keys and values for, counted from 0, checked for gaps and widths."""
    found: dict[int, dict[str, int]] = {}
    for key, weight in state.items():
        match = KV_KEY.fullmatch(key)
        assert match is not None  # split_adapter refused others
        if weight.ndim != 2 or weight.shape[1] != context_dim:
            raise UnsupportedCheckpoint(
                f"{name}: ip_adapter.{key} has the shape {tuple(weight.shape)}; expected [width, {context_dim}], because "
                f"the resampler gives tokens {context_dim} wide."
            )
        found.setdefault(int(match[1]), {})[match[2]] = weight.shape[0]
    numbers = sorted(found)
    expected = [2 * i + 1 for i in range(len(numbers))]
    incomplete = [n for n in numbers if found[n].keys() != {"k", "v"}]
    if not numbers or numbers != expected or incomplete:
        what = f"block {incomplete[0]} lacks one of them" if incomplete else f"found blocks {numbers[:4]}..."
        raise UnsupportedCheckpoint(
            f"{name}: keys and values must be numbered 1, 3, 5, ... without gaps, one pair per block; {what}."
        )
    uneven = [n for n in numbers if found[n]["k"] != found[n]["v"]]
    if uneven:
        widths = found[uneven[0]]
        raise UnsupportedCheckpoint(
            f"{name}: block {uneven[0]} has keys {widths['k']} wide and values {widths['v']} wide; they must be the same."
        )
    return tuple(range(len(numbers)))


def load_adapter(path: Path, dtype: torch.dtype | None = None) -> InstantIDAdapter:
    """Load an adapter file strictly; with `dtype`, convert the weights to it.

    Raises UnsupportedCheckpoint with what was found when the file is another one.
    """
    image_proj, ip_adapter = read_adapter(path)
    adapter = InstantIDAdapter(image_proj, ip_adapter, path.name, file_fingerprint(path))
    return adapter.to(dtype) if dtype is not None else adapter


_adopted: weakref.WeakKeyDictionary[Any, InstantIDAdapter] = weakref.WeakKeyDictionary()


def adopt_adapter(foreign: Any) -> InstantIDAdapter:
    """Our adapter from an INSTANTID object that another pack loaded; one of ours is returned as it is.

    Weights are shared, not copied. Raises UnsupportedCheckpoint for an object of another shape.
    """
    if isinstance(foreign, InstantIDAdapter):
        return foreign
    if isinstance(foreign, nn.Module) and foreign in _adopted:
        return _adopted[foreign]
    resampler = getattr(foreign, "image_proj_model", None)
    layers = getattr(getattr(foreign, "ip_layers", None), "to_kvs", None)
    if not isinstance(resampler, nn.Module) or not isinstance(layers, nn.Module):
        raise UnsupportedCheckpoint(
            f"The instantid input got a {type(foreign).__name__}; connect the output of Load InstantID Model."
        )
    state: dict[str, Any] = {f"image_proj.{k}": v for k, v in resampler.state_dict().items()}
    for key, weight in layers.state_dict().items():
        state[f"ip_adapter.{key.replace('_', '.', 1)}"] = weight
    parts = split_adapter(state, "the adapter")
    sample = {key: _sample(value) for key, value in state.items()}
    adapter = InstantIDAdapter(*parts, "the adapter", content_key("adopted", sample))
    if isinstance(foreign, nn.Module):
        _adopted[foreign] = adapter
    return adapter


def _sample(weight: Tensor) -> tuple[str, list[int], Tensor]:
    """Enough of a tensor to tell two adapters apart without hashing gigabytes."""
    flat = weight.reshape(-1)
    return str(weight.dtype), list(weight.shape), flat[:: max(1, flat.numel() // 512)].contiguous()
