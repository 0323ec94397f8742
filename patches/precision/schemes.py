"""The number formats a model's linear layers can be computed in, what each needs, and which layers are left alone."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...products.int8 import why_not


class PrecisionUnavailable(RuntimeError):
    """This device, this ComfyUI or this model cannot take the scheme; the message says why and what can be done."""


@dataclass(frozen=True)
class Scheme:
    """format: ComfyUI's name of the weight format. weight_only: products in the model's own dtype. rotated: weights and
    activations are turned by a Hadamard matrix first, which spreads outliers (QuaRot, Ashkboos et al. 2024).
    least_capability: of CUDA, for the products.
    """

    name: str
    format: str
    what: str
    weight_only: bool = False
    rotated: bool = False
    least_capability: tuple[int, int] | None = None


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "fp8", "float8_e4m3fn", "weights and activations in 8 bit floating point (e4m3), products on fp8 cores",
            least_capability=(8, 9),
        ),
        Scheme(
            "int8", "int8_tensorwise", "weights per channel and activations per row in 8 bit integers",
            least_capability=(7, 5),
        ),
        Scheme(
            "int8_rotated", "int8_tensorwise", "int8 after a Hadamard rotation, which costs time and saves quality",
            rotated=True, least_capability=(7, 5),
        ),
        Scheme(
            "fp8_weights", "float8_e4m3fn", "weights kept in 8 bit floating point, computed in the model's dtype",
            weight_only=True,
        ),
        Scheme(
            "int8_weights", "int8_tensorwise", "weights kept in 8 bit integers, computed in the model's dtype",
            weight_only=True,
        ),
    )
}  # fmt: skip

# What comes first and last, what time and text enter by, and what scales whole layers: few weights, much of the picture.
DEFAULT_EXCLUDE = (
    "*embed*",
    "label_emb",
    "*.emb_layers",
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "guidance_in",
    "time_r_in",
    "byt5_in",
    "vision_in",
    "cond_in",
    "latent_in",
    "vid_in",
    "emb_in",
    "first",
    "input_proj",
    "*input_layer",
    "*transformer.project_in",
    "*patch*_proj",
    "img_emb*",
    "*caption_projection",
    "*text_proj*",
    "condition_proj",
    "llm_cond_proj",
    "llm_adapter",
    "lyric_proj",
    "t5_yproj",
    "mlp_t5",
    "pooler",
    "txtmlp",
    "clip_*mapper",
    "audio_proj*",
    "casual_audio_encoder",
    "music_projection",
    "face_encoder",
    "lq_proj",
    "pit_lq_gate",
    "cam_refiner",
    "*tokenizer",
    "cond_seq_linear",
    "init_x_linear",
    "time_projection",
    "tmlp",
    "tproj",
    "t_block",
    "distilled_guidance_layer",
    "*adaln_single",
    "*adaln_proj",
    "*adain*",
    "*modulation*",
    "*_mod",
    "*.mod_[xy]",
    "*.mod[CX]",
    "*.modCX",
    "modF",
    "*norm[1-3].linear",
    "*to_gate_logits",
    "*repo_layers",
    "*final_layer*",
    "final_linear",
    "final_norm",
    "norm_out",
    "proj_out",
    "head",
    "head_global",
    "last",
    "out",
    "out_layer",
    "cam_out_layer",
    "img2shape*.out_layer",
    "shape2txt.out_layer",
    "structure_model.out_layer",
    "*transformer.project_out",
    "vid_out",
)
MOST_PATTERNS, LONGEST_PATTERN = 256, 1000
MULTIPLE = 16  # fp8 and int8 products want both sides of a weight in multiples of it
ROTATIONS = (256, 64, 16)


def patterns(exclude: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names with * and ?, from a sequence or from text with commas or lines between them; None: DEFAULT_EXCLUDE.

    Raises ValueError for more than any model has use for: each is compared with every layer.
    """
    if exclude is None:
        return DEFAULT_EXCLUDE
    parts = re.split(r"[,\n]", exclude) if isinstance(exclude, str) else list(exclude)
    found = tuple(part.strip() for part in parts if part.strip())
    if len(found) > MOST_PATTERNS or any(len(pattern) > LONGEST_PATTERN for pattern in found):
        raise ValueError(
            f"Too much is excluded: {MOST_PATTERNS} patterns of {LONGEST_PATTERN} letters are the most; use * in them."
        )
    return found


def excluded_by(name: str, exclude: Iterable[str]) -> str | None:
    """The pattern that matches the layer `name` ("layers.0.attention.qkv") or something it lies in; None when none does."""
    parts = name.split(".")
    places = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((p for p in exclude if any(fnmatch.fnmatchcase(place, p) for place in places)), None)


def rotation(scheme: Scheme, inputs: int) -> int:
    """Size of the Hadamard blocks for a weight with `inputs` columns; 0: none."""
    return next((size for size in ROTATIONS if scheme.rotated and inputs % size == 0), 0)


def slow_on_a_cpu(scheme: Scheme) -> str:
    """Why `scheme` computes slower than the model itself on this CPU; '' when it does not, or is there to save memory."""
    if scheme.weight_only:
        return ""
    if scheme.format.startswith("float8"):
        return "a CPU has no products of 8 bit floats"
    return why_not()


def unavailable(scheme: Scheme, device: torch.device) -> str | None:
    """Why `scheme` cannot run on `device`, with what can; None when it can. A CPU may compute a slow reference."""
    try:
        import comfy.ops
        import comfy.quant_ops
        import comfy_kitchen.tensor.base
    except ImportError as error:
        return f"it needs ComfyUI with quantised layers, and {error.name} is missing: update ComfyUI to 0.33 or later"
    # An earlier form of them takes neither emulated formats nor layouts of ours. Float8 layers are made beside int8's.
    present = hasattr(comfy.quant_ops, "TensorWiseINT8Layout") and hasattr(comfy_kitchen.tensor.base, "dequantize_args")
    made = inspect.signature(getattr(comfy.ops, "mixed_precision_ops", object)).parameters
    if not present or "disabled" not in made or scheme.format not in comfy.quant_ops.QUANT_ALGOS:
        return f"this ComfyUI knows no {scheme.format} layers: update ComfyUI to 0.33 or later"
    if device.type == "mps" and scheme.format.startswith("float8"):
        return f"torch has no 8 bit floats on {device.type}: choose int8_weights"
    if device.type == "cpu" or scheme.weight_only:
        return None
    if device.type != "cuda":
        return (
            f"products of {scheme.name} have no kernel on {device.type}: choose {scheme.name[:4].rstrip('_')}_weights"
        )
    if torch.version.hip is not None:
        return _unavailable_on_amd(scheme, comfy.model_management, device)
    capability = torch.cuda.get_device_capability(device)
    if scheme.least_capability is not None and capability < scheme.least_capability:
        need, have = (".".join(map(str, c)) for c in (scheme.least_capability, capability))
        instead = "int8" if scheme.name == "fp8" and capability >= (7, 5) else f"{scheme.name[:4].rstrip('_')}_weights"
        return (
            f"products of {scheme.name} need compute capability {need}, "
            f"{torch.cuda.get_device_name(device)} has {have}: choose {instead}"
        )
    return None


def _unavailable_on_amd(scheme: Scheme, management: Any, device: torch.device) -> str | None:
    # torch's own int8 products end the process or hang the card on some of them (comfy-kitchen #61), and crawl on the others.
    if scheme.format.startswith("int8") and not _has_int8_kernels():
        return "ComfyUI has no int8 products for this AMD GPU: choose int8_weights"
    if scheme.format.startswith("float8") and not management.supports_fp8_compute(device):
        return "ComfyUI has no fp8 products for this AMD GPU: choose fp8_weights"
    return None


def _has_int8_kernels() -> bool:
    """Whether comfy-kitchen multiplies int8 by kernels of its own, and not by torch's."""
    import comfy_kitchen

    try:
        return str(comfy_kitchen.registry.get_capable_backend("int8_linear")) != "eager"
    except Exception:  # of releases without such products
        return False
