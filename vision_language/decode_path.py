"""Which decode path writes an answer, and why: a CUDA graph, compiled layers, a static cache, or the library's own way."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import torch

from . import fused_decode, mixed_decoding, packed_products, projections
from .loaded_model import LoadedModel
from .quantization import AS_STORED, PACKED
from .stored_fp8 import METHOD

DECODE_PATHS = ("auto", "compiled", "graph", "static", "plain")
PACKED_METHODS = (*PACKED, AS_STORED, METHOD)  # of which our layers multiply
GRAPHS = ("fused", "compiled", "graph")  # paths whose step is recorded, or compiled


@dataclass(frozen=True)
class DecodePath:
    """Which path runs and why; `note` is for the report. otherwise: the path to take where it cannot be prepared.

    name: one of DECODE_PATHS but auto, or fused, a graph of our own kernels.
    """

    name: str
    note: str
    otherwise: str = ""


NOTES = {
    "fused": "static cache, our kernels, one CUDA graph",
    "compiled": "static cache, compiled layers, one CUDA graph",
    "graph": "static cache, one CUDA graph",
    "static": "static cache",
    "plain": "plain",
}


def choose_path(model: LoadedModel, asked: str, kept: bool = True, rows: int = 1) -> DecodePath:
    """The decode path for `asked`, one of DECODE_PATHS. kept: the model stays loaded, so what is compiled serves again.

    auto: on CUDA our own kernels for one row where they serve, else compiled with Triton, a CUDA graph without it; static
    on the CPU, the plain path elsewhere. A graph is one of our kernels where they serve.
    """
    if asked not in DECODE_PATHS:
        raise ValueError(f"{asked!r} is no decode path: choose one of {', '.join(DECODE_PATHS)}.")
    path = _path(model, asked, kept, rows)
    if model.device.type != "cpu":  # where the weights may be waiting all the same
        reason = packed_products.why_not(model.device) if model.quantization in PACKED_METHODS else ""
        return (
            replace(path, note=f"{path.note}; packed weights unpacked by torch, because {reason}") if reason else path
        )
    return replace(path, note=path.note + projections.products_note(model.network))


def _path(model: LoadedModel, asked: str, kept: bool, rows: int) -> DecodePath:
    if asked == "plain":
        return DecodePath("plain", "plain, as asked")
    if reason := mixed_decoding.unsupported(model.network):
        return DecodePath("plain", f"plain, because {reason}")
    cuda = model.device.type == "cuda"
    if asked == "auto" and model.device.type == "cpu":
        return DecodePath("static", "static cache")
    if asked == "compiled" and projections.has_packed(model.network):
        return DecodePath("static", "static cache; not compiled, because oneDNN's products cannot be")
    if asked == "auto" and not cuda:
        return DecodePath("plain", f"plain, because there are no CUDA graphs on {model.device.type}")
    triton = importlib.util.find_spec("triton") is not None
    if cuda and asked in ("auto", "graph"):
        fused = not fused_decode.why_not(model.network, rows, model.device, model.dtype) if triton else False
        if fused and "fused" not in model.device_state.get("failed paths", ()):
            return DecodePath("fused", NOTES["fused"], "compiled" if asked == "auto" and kept else "graph")
    if asked == "auto":
        if triton and not kept:
            return DecodePath("graph", f"{NOTES['graph']}; not compiled, because the model does not stay loaded")
        if triton:
            return DecodePath("compiled", NOTES["compiled"])
        return DecodePath("graph", f"{NOTES['graph']}; not compiled, because Triton is missing")
    if asked == "graph" and not cuda:
        return DecodePath("static", f"static cache; no graph, because there are no CUDA graphs on {model.device.type}")
    if asked == "compiled" and cuda and not triton:
        return DecodePath("graph", f"{NOTES['graph']}; not compiled, because Triton is missing")
    return DecodePath(asked, NOTES[asked] if cuda or asked == "static" else "static cache, compiled layers")


def simpler(path: DecodePath, device: torch.device) -> DecodePath:
    """The path to take when `path` cannot be prepared."""
    name = path.otherwise
    if path.name == "compiled":
        name = "graph" if device.type == "cuda" else "static"
    return DecodePath(name or "plain", NOTES[name or "plain"])
