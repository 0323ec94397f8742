"""Checkpoint files of the colorizers: safe reading, finding them in the model folders, and a refusal that says why."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..cache import file_fingerprint
from ..host.interruption import read_ahead
from ..host.model_files import holds_safetensors, impostor
from ..host.torch_files import read_torch_file

log = logging.getLogger("hotpath.colorization")

Network = TypeVar("Network", bound=nn.Module)

SUFFIXES = (".pth", ".pt", ".safetensors", ".sft", ".ckpt", ".bin")
# Trainers wrap the weights in one of these.
WRAPPERS = ("state_dict", "model", "network", "params", "params_ema")


class WrongCheckpoint(ValueError):
    """A file is not the checkpoint it was used as; the message names it and says what was expected."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, on the CPU. Nothing in the file is executed."""
    read_ahead(path)
    if (problem := impostor(path)) is not None:
        raise WrongCheckpoint(f"{path.name} cannot be read as a checkpoint: {problem}")
    try:
        if holds_safetensors(path):
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = read_torch_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise WrongCheckpoint(
            f"{path.name} cannot be read as a checkpoint ({type(error).__name__}); it may be truncated or of another "
            f"kind. Download it again and compare its size ({path.stat().st_size} bytes here)."
        ) from error
    return _tensors_of(state, path)


def _tensors_of(state: Any, path: Path) -> dict[str, Tensor]:
    for name in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict):
        raise WrongCheckpoint(f"{path.name} holds a {type(state).__name__}, not a table of weights.")
    tensors = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise WrongCheckpoint(f"{path.name} holds no weights.")
    return tensors


def key_names(path: Path) -> frozenset[str]:
    """The names of the tensors in a file, without reading them where the format allows it; empty if unreadable. Remembered
    as long as the file stays as it is."""
    try:
        return _key_names(path, file_fingerprint(path))
    except OSError as error:
        log.debug("%s is passed over: %s", path, error)
        return frozenset()


@functools.lru_cache(maxsize=64)
def _key_names(path: Path, fingerprint: str) -> frozenset[str]:
    try:
        if holds_safetensors(path):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return frozenset(file.keys())
        return frozenset(_tensors_of(read_torch_file(path, mapped=True), path))
    except Exception as error:  # safetensors has its own error type in every release
        log.debug("%s is passed over: %s", path, error)
        return frozenset()


def load_network(path: Path, expected: str, build: Callable[[dict[str, Tensor]], Network]) -> Network:
    """`build` over the file's tensors in float32; its refusals are given the file's name and what was expected."""
    tensors = read_tensors(path)
    state = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    try:
        return build(state)
    except WrongCheckpoint as error:
        found = ", ".join(sorted(state)[:3])
        raise WrongCheckpoint(
            f"{path.name} is not {expected}: {error}. It holds {len(state)} tensors ({found}, ...)."
        ) from None


def folded_batch_norms(network: Network) -> Network:
    """Merge every batch norm into the convolution before it, in place: a multiplication and a pass less per layer.

    Only for inference. Pairs are recognised by name, as in `conv1` and `bn1`, or by order inside a Sequential.
    """
    for module in network.modules():
        children = dict(module.named_children())
        pairs: list[tuple[str, str]]
        if isinstance(module, nn.Sequential):
            names = list(children)
            pairs = list(pairwise(names))
        else:
            pairs = [(name.replace("bn", "conv"), name) for name in children if name.startswith("bn")]
        for conv_name, norm_name in pairs:
            conv, norm = children.get(conv_name), children.get(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return network
