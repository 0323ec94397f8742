"""LoRA files on the transformer: read strictly, added to its weights, and taken away to the last bit.

A file's low-rank products are summed in float32 and added to the weights once for a stack of files, so drawing costs
nothing more; the weights as they were wait in CPU memory. Packed weights (float8, int8) cannot be added to: there the
product runs beside the layer.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import host
from ..cache import content_key, file_fingerprint
from ..host.model_files import structure_problem
from ..host.streamed_layers import inside, named_modules

log = logging.getLogger("hotpath.text_to_image")

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lycoris_", "lora_unet_", "lora_transformer_")
DOWN = re.compile(r"^(?P<module>.+?)\.(?:lora_A|lora_down|lora\.down)(?:\.default)?(?:\.weight)?$")
UP = re.compile(r"^(?P<module>.+?)\.(?:lora_B|lora_up|lora\.up)(?:\.default)?(?:\.weight)?$")
ALPHA = re.compile(r"^(?P<module>.+?)\.alpha$")
# The original repository's and ComfyUI's names of modules, where diffusers has others.
NATIVE = (("attention.qkv", "attention.to_qkv"), ("attention.out", "attention.to_out.0"))
FUSED = ("to_q", "to_k", "to_v")
PLAIN_NAME = re.compile(r"[\w.-]+")  # PEFT takes patterns as well, which are not run here
OTHER_METHODS = {"lokr": "LoKr", "hada": "LoHa", "dora_scale": "DoRA", "oft_": "OFT", "magnitude": "DoRA"}


class UnusableAdapter(ValueError):
    """A LoRA file that cannot be used; the message names the file, what is wrong, and the cure."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA file and its strength; 1.0 is as trained."""

    path: Path
    strength: float = 1.0

    @property
    def identity(self) -> tuple[str, float]:
        return file_fingerprint(self.path), self.strength


@dataclass(frozen=True)
class Product:
    """One layer's change: scale * up @ down. down: [rank, in]; up: [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, device: torch.device) -> Tensor:
        """The change as a float32 matrix on `device`."""
        return self.scale * (self.up.to(device, torch.float32) @ self.down.to(device, torch.float32))


@dataclass(frozen=True)
class TrainedWith:
    """PEFT's settings of a file that say how strong its products are.

    alpha: of every layer, None for a layer's rank. alphas: by layer, or by the end of its name. stabilised: alphas are
    divided by the root of the rank (rsLoRA) and not by the rank.
    """

    alpha: float | None
    alphas: Mapping[str, float]
    stabilised: bool

    def scale(self, name: str, rank: int) -> float:
        """What the product of the layer `name` is multiplied by."""
        ours = (alpha for end, alpha in self.alphas.items() if f".{name}".endswith(f".{end}"))
        alpha = next(ours, self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.stabilised else rank)


def read(path: Path, transformer: nn.Module) -> dict[str, Product]:
    """The products of a LoRA file by the name of the layer they belong to.

    Understands diffusers' and PEFT's names, kohya's and ComfyUI's. Raises UnusableAdapter when a key has no layer in
    `transformer`, a shape does not fit it, half of a pair is missing, or the file is of another method.
    """
    tensors, trained = _open(path)
    layers = {name: layer for name, layer in named_modules(transformer) if isinstance(layer, nn.Linear)}
    # kohya writes underscores for dots, which cannot be undone by rule: feed_forward has one of its own.
    by_underscores = {name.replace(".", "_"): name for name in layers}
    by_underscores |= {
        name.removesuffix("to_q").replace(".", "_") + "to_qkv": name.removesuffix("to_q") + "to_qkv"
        for name in layers
        if name.endswith(".to_q")
    }
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        for pattern, found in ((DOWN, downs), (UP, ups), (ALPHA, alphas)):
            if (match := pattern.match(key)) is not None:
                name = _layer_name(match["module"], by_underscores)
                if name in found:
                    raise UnusableAdapter(
                        f"{path} has two entries for {name}, one of them {key!r}: choose another file."
                    )
                found[name] = tensor
                break
        else:
            raise UnusableAdapter(f"{path} holds {key!r}, which is no part of a LoRA: choose a LoRA file for Z-Image.")
    if downs.keys() != ups.keys() or not downs:
        odd = sorted(downs.keys() ^ ups.keys())
        raise UnusableAdapter(f"{path} is not whole: {odd[0] if odd else 'every layer'} lacks half of its pair.")
    products: dict[str, Product] = {}
    for name, down in downs.items():
        if down.ndim != 2 or ups[name].ndim != 2 or not down.shape[0]:
            sizes = " and ".join(str(tuple(part.shape)) for part in (down, ups[name]))
            raise UnusableAdapter(
                f"{path} changes {name} by {sizes}, and a LoRA's are two matrices: choose another file."
            )
        if name in alphas and alphas[name].numel() != 1:
            raise UnusableAdapter(f"{path} has {alphas[name].numel()} alphas for {name}, and one belongs there.")
        rank = down.shape[0]
        scale = float(alphas[name]) / rank if name in alphas else trained.scale(name, rank)
        if not (down.is_floating_point() and ups[name].is_floating_point()):
            raise UnusableAdapter(
                f"{path} holds {down.dtype} for {name}: a quantised LoRA is not added, choose another file."
            )
        # As float32, because float8 does not know what is finite.
        if not (math.isfinite(scale) and all(part.float().isfinite().all() for part in (down, ups[name]))):
            raise UnusableAdapter(f"{path} holds values that are not finite (NaN) for {name}: fetch or train it again.")
        for target, rows in _split(name, ups[name]).items():
            if target in products:
                raise UnusableAdapter(f"{path} changes {target} twice, once in a fused layer: choose another file.")
            if target not in layers:
                raise UnusableAdapter(
                    f"{path} changes {target}, which this transformer does not have: it was trained for another model."
                )
            wanted = tuple(layers[target].weight.shape)
            if (rows.shape[0], down.shape[1]) != wanted or rows.shape[1] != down.shape[0]:
                raise UnusableAdapter(
                    f"{path} changes {target} as {rows.shape[0]} x {down.shape[1]}, and it is {wanted[0]} x {wanted[1]}: "
                    "it was trained for another model."
                )
            products[target] = Product(down, rows, scale)
    return products


def _open(path: Path) -> tuple[dict[str, Tensor], TrainedWith]:
    """Tensors without their prefixes, and PEFT's settings where they stand in the header."""
    from safetensors import safe_open

    if path.suffix.lower() != ".safetensors":
        raise UnusableAdapter(f"{path} is no safetensors file, and nothing else is opened: convert it.")
    if (problem := structure_problem(path)) is not None:
        raise UnusableAdapter(f"{path}: {problem}")
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        header = file.metadata() or {}
    for part, method in OTHER_METHODS.items():
        if any(part in key for key in tensors):
            raise UnusableAdapter(f"{path} is a {method}, and only plain LoRA files are added: merge it into one.")
    if foreign := [key for key in tensors if key.startswith(("text_encoder", "lora_te"))]:
        raise UnusableAdapter(
            f"{path} changes the text encoder ({foreign[0]}), which Z-Image's LoRAs do not: choose another."
        )
    bare: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if _bare(key) in bare:
            raise UnusableAdapter(
                f"{path} has {_bare(key)!r} under two prefixes, one of them in {key!r}: choose another file."
            )
        bare[_bare(key)] = tensor
    try:
        return bare, _trained_with(header)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UnusableAdapter(
            f"{path}: the LoRA settings in its header cannot be read ({error}): fetch or save it again."
        ) from error


def _trained_with(header: Mapping[str, str]) -> TrainedWith:
    told = json.loads(header.get("lora_adapter_metadata", "{}"))
    settings = {key.removeprefix("transformer."): value for key, value in told.items()}
    alpha = settings.get("lora_alpha")
    alphas = {end: float(value) for end, value in dict(settings.get("alpha_pattern") or {}).items()}
    if patterns := [end for end in alphas if not PLAIN_NAME.fullmatch(end)]:
        raise ValueError(f"alpha_pattern {patterns[0]!r} is no layer's name")
    return TrainedWith(None if alpha is None else float(alpha), alphas, bool(settings.get("use_rslora")))


def _bare(key: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if key.startswith(prefix):
                key, stripped = key.removeprefix(prefix), True
    return key


def _layer_name(module: str, by_underscores: dict[str, str]) -> str:
    if "." not in module:
        for native, ours in NATIVE:
            module = re.sub(f"{native.replace('.', '_')}$", ours.replace(".", "_"), module)
        return by_underscores.get(module, module)
    for native, ours in NATIVE:
        module = re.sub(f"{re.escape(native)}$", ours, module)
    return module


def _split(name: str, up: Tensor) -> dict[str, Tensor]:
    """The rows of a fused query-key-value layer for each of the three; everything else as it is."""
    if not name.endswith(".to_qkv"):
        return {name: up}
    stem = name.removesuffix("to_qkv")
    return {stem + part: rows for part, rows in zip(FUSED, up.tensor_split(3, dim=0), strict=True)}


class AdaptedLinear(nn.Module):
    """A layer with low-rank products beside it: base(x) + sum of up (down x)."""

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Module, products: Sequence[Product], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        # Many files are one product of a larger rank.
        down = torch.cat([product.down.float() for product in products])
        up = torch.cat([product.up.float() * product.scale for product in products], dim=1)
        self.register_buffer("down", down.to(device, dtype), persistent=False)
        self.register_buffer("up", up.to(device, dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Adapters:
    """Which LoRA files one transformer has on it now. Used only while the transformer is resident."""

    def __init__(self) -> None:
        self.applied: (
            tuple[tuple[str, float], ...] | None
        ) = ()  # None: weights are in between, and the next call begins anew
        self._originals: dict[str, Tensor] = {}

    @contextmanager
    def on(self, transformer: nn.Module, stack: Sequence[Adapter], device: torch.device | None = None) -> Iterator[int]:
        """The transformer with exactly the files of `stack` while inside; yields how many layers they change.

        Added weights stay afterwards, for the next picture with the same files; another stack, also an empty one,
        begins with the weights as they were loaded. device: where to compute them, None for where each weight lies; some layers
        may be streamed.
        """
        active = [adapter for adapter in stack if adapter.strength != 0.0]
        wanted = tuple(adapter.identity for adapter in active)
        if wanted == self.applied:
            yield len(self._originals)
            return
        products = combined(active, transformer)  # a file that cannot be used changes nothing
        packed = {name for name in products if not is_dense(transformer.get_submodule(name))}
        added = {name: found for name, found in products.items() if name not in packed}
        # What both stacks change is made of the weight that waits here; a strength is turned up and down many times.
        self.restore(transformer, besides=added)
        self._merge(transformer, added, device)
        if not packed:
            self.applied = wanted
            yield len(products)
            return
        try:
            _stand_beside(transformer, {name: products[name] for name in packed}, device)
            yield len(products)
        finally:
            for name in packed:
                layer = transformer.get_submodule(name)
                if isinstance(layer, AdaptedLinear):
                    _replace(transformer, name, layer.base)
            self.restore(transformer)

    def _merge(self, transformer: nn.Module, products: dict[str, list[Product]], device: torch.device | None) -> None:
        self.applied = None
        for name, found in host.each(list(products.items()), "LoRA"):
            weight = transformer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            if name not in self._originals:
                self._originals[name] = weight.detach().to("cpu", copy=True)
            here = device or weight.device
            changed = self._originals[name].to(here).float()
            for product in found:
                changed = changed + product.delta(here)
            weight.data.copy_(changed)
        self.applied = ()

    def restore(self, transformer: nn.Module, besides: Container[str] = ()) -> None:
        """Give every changed weight, but those of the layers `besides`, the bits it was loaded with."""
        self.applied = None
        for name in [name for name in self._originals if name not in besides]:
            weight = transformer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.data.copy_(self._originals[name])
            del self._originals[name]
        if not self._originals:
            self.applied = ()


def combined(stack: Sequence[Adapter], transformer: nn.Module) -> dict[str, list[Product]]:
    """The products of all files by layer, strengths multiplied in, in the order of the stack."""
    products: dict[str, list[Product]] = {}
    for adapter in stack:
        for name, product in read(adapter.path, transformer).items():
            scaled = Product(product.down, product.up, product.scale * adapter.strength)
            products.setdefault(name, []).append(scaled)
    return products


def is_dense(layer: nn.Module) -> bool:
    """Whether the layer's weight is a plain tensor, which can be added to."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1


def _stand_beside(transformer: nn.Module, products: dict[str, list[Product]], device: torch.device | None) -> None:
    for name, found in products.items():
        layer = transformer.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        dtype = getattr(layer, "computes_in", weight.dtype)
        _replace(transformer, name, AdaptedLinear(layer, found, device or weight.device, dtype))


def _replace(transformer: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(inside(transformer.get_submodule(parent)), last, layer)


def stack_identity(stack: Sequence[Adapter]) -> str:
    """MD5 of the files and strengths that change a picture."""
    return content_key([list(adapter.identity) for adapter in stack if adapter.strength != 0.0])
