"""LoRA and LoKr files: which names they spell their layers by, and what they change, read strictly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..host.model_files import structure_problem
from ..host.streamed_layers import named_modules
from .changes import Change, Kronecker, Product

# VideoX-Fun's trainer, of which the distillations for Z-Image are, puts one more underscore (diffusers #13126).
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lycoris_", "lora_unet__", "lora_unet_",
            "lora_transformer_")  # fmt: skip
DOWN = re.compile(r"^(?P<module>.+?)\.(?:lora_A|lora_down|lora\.down)(?:\.default)?(?:\.weight)?$")
UP = re.compile(r"^(?P<module>.+?)\.(?:lora_B|lora_up|lora\.up)(?:\.default)?(?:\.weight)?$")
KRONECKER = re.compile(r"^(?P<module>.+?)\.lokr_(?P<part>w[12](?:_[ab])?)(?:\.default)?$")
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
OTHER_METHODS = {
    "lokr_t": "LoKr of convolutions",
    "hada": "LoHa",
    "dora_scale": "DoRA",
    "oft_": "OFT",
    "magnitude": "DoRA",
}


class UnusableAdapter(ValueError):
    """A LoRA file that cannot be used; the message names the file, what is wrong, and the cure."""


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


def read(path: Path, transformer: nn.Module) -> dict[str, Change]:
    """The changes of a LoRA or LoKr file by the name of the layer they belong to.

    Understands diffusers' and PEFT's names, kohya's and ComfyUI's. Raises UnusableAdapter when a key has no layer in
    `transformer`, a shape does not fit it, half of a pair is missing, or the file is of another method.
    """
    tensors, trained = _open(path)
    layers = {name: layer for name, layer in named_modules(transformer) if isinstance(layer, nn.Linear)}
    parts = _parts_by_layer(path, tensors, layers)
    changes: dict[str, Change] = {}
    for name, whole in _changes(path, parts, trained).items():
        for target, change in _split(name, whole).items():
            if target not in layers:
                raise UnusableAdapter(
                    f"{path} changes {target}, which this transformer does not have: it was trained for another model."
                )
            wanted = tuple(layers[target].weight.shape)
            if change.shape != wanted:
                raise UnusableAdapter(
                    f"{path} changes {target} as {change.shape[0]} x {change.shape[1]}, and it is {wanted[0]} x {wanted[1]}: "
                    "it was trained for another model."
                )
            # Trainers that write for everybody have each layer in two spellings (diffusers #13203), which is one change.
            if target in changes and not same_change(changes[target], change):
                raise UnusableAdapter(
                    f"{path} changes {target} in two ways, once in a fused layer: choose another file."
                )
            changes[target] = change
    return changes


def same_change(a: Change, b: Change) -> bool:
    """Whether two changes are one but for rounding; products are asked by matrices of their ranks, which are small."""
    if not (isinstance(a, Product) and isinstance(b, Product)):
        first, second = a.delta(torch.device("cpu")), b.delta(torch.device("cpu"))
        return float((first - second).norm()) <= ROUNDING * float(first.norm())
    up = torch.cat((a.scale * a.up.double(), -b.scale * b.up.double()), dim=1)
    down = torch.cat((a.down.double(), b.down.double()))
    squares = (up.T @ up) * (down @ down.T)  # whose sum is the difference's norm, squared
    rank = a.down.shape[0]
    return float(squares.sum()) <= ROUNDING**2 * float(squares[:rank, :rank].sum())


def _parts_by_layer(path: Path, tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """By the name of each layer its parts: down and up, those of a Kronecker product by their own names, and alpha."""
    by_underscores = _by_underscores(layers)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for pattern, part in ((DOWN, "down"), (UP, "up"), (KRONECKER, ""), (ALPHA, "alpha")):
            if (match := pattern.match(key)) is not None:
                name = _layer_name(match["module"], by_underscores)
                parts, part = found.setdefault(name, {}), part or match["part"]
                if part in parts and not torch.equal(parts[part].float(), tensor.float()):
                    raise UnusableAdapter(
                        f"{path} has two entries for {name}, one of them {key!r}: choose another file."
                    )
                parts[part] = tensor
                break
        else:
            raise UnusableAdapter(f"{path} holds {key!r}, which is no part of a LoRA: choose a LoRA file for Z-Image.")
    return found


def _changes(path: Path, parts: Mapping[str, Mapping[str, Tensor]], trained: TrainedWith) -> dict[str, Change]:
    """The change of each layer, fused layers as they are written."""
    changes: dict[str, Change] = {}
    for name, found in parts.items():
        _check(path, name, found)
        kinds = found.keys() - {"alpha"}
        if kinds == {"down", "up"}:
            changes[name] = _product(path, name, found, trained)
        elif any(kind.startswith("w") for kind in kinds) and not kinds & {"down", "up"}:
            changes[name] = _kronecker(path, name, found)
        elif kinds:
            raise UnusableAdapter(f"{path} is not whole: {name} lacks half of its pair.")
    if not changes:
        raise UnusableAdapter(f"{path} is not whole: every layer lacks half of its pair.")
    return changes


def _check(path: Path, name: str, found: Mapping[str, Tensor]) -> None:
    """Refuse what is no matrix of finite numbers, and more than one alpha."""
    alpha = found.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise UnusableAdapter(f"{path} has {alpha.numel()} alphas for {name}, and one belongs there.")
    matrices = {part: tensor for part, tensor in found.items() if part != "alpha"}
    if any(tensor.ndim != 2 or not tensor.numel() for tensor in matrices.values()):
        sizes = " and ".join(str(tuple(tensor.shape)) for tensor in matrices.values())
        raise UnusableAdapter(f"{path} changes {name} by {sizes}, and a LoRA's are two matrices: choose another file.")
    for tensor in matrices.values():
        if not tensor.is_floating_point():
            raise UnusableAdapter(
                f"{path} holds {tensor.dtype} for {name}: a quantised LoRA is not added, choose another file."
            )
    # As float32, because float8 does not know what is finite.
    if not all(tensor.float().isfinite().all() for tensor in found.values()):
        raise UnusableAdapter(f"{path} holds values that are not finite (NaN) for {name}: fetch or train it again.")


def _product(path: Path, name: str, found: Mapping[str, Tensor], trained: TrainedWith) -> Product:
    down, up, alpha = found["down"], found["up"], found.get("alpha")
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise UnusableAdapter(
            f"{path} changes {name} by {tuple(up.shape)} times {tuple(down.shape)}, which do not fit: fetch it again."
        )
    scale = trained.scale(name, rank) if alpha is None else float(alpha) / rank
    if not math.isfinite(scale):
        raise UnusableAdapter(f"{path} multiplies {name} by {scale}: fetch or train it again.")
    return Product(down, up, scale)


def _kronecker(path: Path, name: str, found: Mapping[str, Tensor]) -> Kronecker:
    sides: list[Tensor] = []
    rank = 0
    for side in ("w1", "w2"):
        pair = [found.get(f"{side}_{half}") for half in "ab"]
        if side in found:
            sides.append(found[side])
        elif pair[0] is None or pair[1] is None or pair[0].shape[1] != pair[1].shape[0]:
            raise UnusableAdapter(f"{path} is not whole: {name} lacks a half of {side}, or its halves do not fit.")
        else:
            sides.append(pair[0].float() @ pair[1].float())
            rank = pair[1].shape[0]  # of both that are halved, trainers count the second
    alpha = found.get("alpha")
    # What is stored whole has its scale within: what trainers write for its alpha says nothing.
    return Kronecker(sides[0], sides[1], 1.0 if alpha is None or not rank else float(alpha) / rank)


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


def _split(name: str, change: Change) -> dict[str, Change]:
    """The rows of a fused query-key-value layer for each of the three; everything else as it is."""
    if not name.endswith(".to_qkv"):
        return {name: change}
    stem, outputs = name.removesuffix("to_qkv"), change.shape[0]
    ends = [outputs * third // len(FUSED) for third in range(len(FUSED) + 1)]
    return {stem + part: change.part(slice(*ends[place : place + 2])) for place, part in enumerate(FUSED)}
