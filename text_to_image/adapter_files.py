"""LoRA files: which names they spell their layers by, and what they change, read strictly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..host.model_files import structure_problem
from ..host.streamed_layers import named_modules

# VideoX-Fun's trainer, of which the distillations for Z-Image are, puts one more underscore (diffusers #13126).
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lycoris_", "lora_unet__", "lora_unet_",
            "lora_transformer_")  # fmt: skip
DOWN = re.compile(r"^(?P<module>.+?)\.(?:lora_A|lora_down|lora\.down)(?:\.default)?(?:\.weight)?$")
UP = re.compile(r"^(?P<module>.+?)\.(?:lora_B|lora_up|lora\.up)(?:\.default)?(?:\.weight)?$")
ALPHA = re.compile(r"^(?P<module>.+?)\.alpha$")
# The original repository's and ComfyUI's names of modules, where diffusers has others.
NATIVE = (
    ("attention.qkv", "attention.to_qkv"),
    ("attention.out", "attention.to_out.0"),
    ("x_embedder", "all_x_embedder.2-1"),
    ("final_layer.linear", "all_final_layer.2-1.linear"),
    ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
)
FUSED = ("to_q", "to_k", "to_v")
ROUNDING = 0.01  # of a change, between two spellings of it in bfloat16
PLAIN_NAME = re.compile(r"[\w.-]+")  # PEFT takes patterns as well, which are not run here
OTHER_METHODS = {"lokr": "LoKr", "hada": "LoHa", "dora_scale": "DoRA", "oft_": "OFT", "magnitude": "DoRA"}


class UnusableAdapter(ValueError):
    """A LoRA file that cannot be used; the message names the file, what is wrong, and the cure."""


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
    downs, ups, alphas = _parts_by_layer(path, tensors, layers)
    products: dict[str, Product] = {}
    for name, down in downs.items():
        whole = _product(path, name, down, ups[name], alphas.get(name), trained)
        for target, rows in _split(name, whole.up).items():
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
            product = replace(whole, up=rows)
            # Trainers that write for everybody have each layer in two spellings (diffusers #13203), which is one change.
            if target in products and not same_change(products[target], product):
                raise UnusableAdapter(
                    f"{path} changes {target} in two ways, once in a fused layer: choose another file."
                )
            products[target] = product
    return products


def same_change(a: Product, b: Product) -> bool:
    """Whether two products are one but for rounding; asked of matrices of their ranks, as the change is as large as the layer."""
    up = torch.cat((a.scale * a.up.double(), -b.scale * b.up.double()), dim=1)
    down = torch.cat((a.down.double(), b.down.double()))
    squares = (up.T @ up) * (down @ down.T)  # whose sum is the difference's norm, squared
    rank = a.down.shape[0]
    return float(squares.sum()) <= ROUNDING**2 * float(squares[:rank, :rank].sum())


def _parts_by_layer(
    path: Path, tensors: Mapping[str, Tensor], layers: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The down and up matrices and the alphas among `tensors`, each by the name of its layer."""
    by_underscores = _by_underscores(layers)
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        for pattern, found in ((DOWN, downs), (UP, ups), (ALPHA, alphas)):
            if (match := pattern.match(key)) is not None:
                name = _layer_name(match["module"], by_underscores)
                if name in found and not torch.equal(found[name].float(), tensor.float()):
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
    return downs, ups, alphas


def _product(path: Path, name: str, down: Tensor, up: Tensor, alpha: Tensor | None, trained: TrainedWith) -> Product:
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0]:
        sizes = " and ".join(str(tuple(part.shape)) for part in (down, up))
        raise UnusableAdapter(f"{path} changes {name} by {sizes}, and a LoRA's are two matrices: choose another file.")
    if alpha is not None and alpha.numel() != 1:
        raise UnusableAdapter(f"{path} has {alpha.numel()} alphas for {name}, and one belongs there.")
    rank = down.shape[0]
    scale = trained.scale(name, rank) if alpha is None else float(alpha) / rank
    if not (down.is_floating_point() and up.is_floating_point()):
        raise UnusableAdapter(
            f"{path} holds {down.dtype} for {name}: a quantised LoRA is not added, choose another file."
        )
    # As float32, because float8 does not know what is finite.
    if not (math.isfinite(scale) and all(part.float().isfinite().all() for part in (down, up))):
        raise UnusableAdapter(f"{path} holds values that are not finite (NaN) for {name}: fetch or train it again.")
    return Product(down, up, scale)


def _by_underscores(layers: Iterable[str]) -> dict[str, str]:
    """Names by kohya's spelling of them: underscores for dots, which no rule undoes, as feed_forward has one of its own."""
    found: dict[str, str] = {}
    for name in layers:
        found[name.replace(".", "_")] = name
        if name.endswith(".to_q"):
            fused = name.removesuffix("to_q") + "to_qkv"
            found[fused.replace(".", "_")] = fused
    return found


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
