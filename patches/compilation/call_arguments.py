"""The arguments of a model's call taken apart: the tensors that a recording has buffers for, and all else as a key."""

from __future__ import annotations

import copy
import enum
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..attention_override import OVERRIDE
from .blocks import attributes_used
from .options import OWN, NotTraceable


@dataclass
class Flat:
    """The tensors in some arguments, and everything else about them as a key.

    lasting: which of the tensors are in patches of ours, that is, never written to once they are made. kept: objects that
    the key names by identity; held so that no other object gets their identity.
    """

    tensors: list[torch.Tensor]
    lasting: list[bool]
    kept: list[Any]


def flatten(value: Any, flat: Flat, lasting: bool = False) -> Hashable:
    """The key of `value`, whose tensors go into `flat`. Raises NotTraceable for what may change without a trace."""
    if isinstance(value, torch.Tensor):
        flat.tensors.append(value)
        flat.lasting.append(lasting)
        return "tensor", tuple(value.shape), value.dtype, value.device
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, dict):
        parts = tuple((key, flatten(part, flat, lasting)) for key, part in value.items() if key != OVERRIDE)
        return dict, parts, _same(value.get(OVERRIDE), flat)
    if type(value) in (list, tuple):
        return type(value), tuple(flatten(part, flat, lasting) for part in value)
    if isinstance(value, (torch.Size, enum.Enum)):
        return type(value), value
    if (attributes := attributes_used(value)) is not None:
        ours = lasting or type(value).__module__.startswith(OWN)
        return type(value), tuple((name, flatten(part, flat, ours)) for name, part in attributes.items())
    return _same(value, flat)


def _same(value: Any, flat: Flat) -> Hashable:
    """The very object counts, not what is in it: an attention override, a function.

    Raises NotTraceable for others: what is in them may change, and many are made anew for every call.
    """
    if value is None:
        return None
    if not callable(value):
        raise NotTraceable(f"the model is given a {type(value).__module__}.{type(value).__name__}")
    flat.kept.append(value)
    return "object", id(value)


def rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """`value` with its tensors replaced, in the order of `flatten`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: part if key == OVERRIDE else rebuild(part, tensors) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(rebuild(part, tensors) for part in value)
    if (attributes := attributes_used(value)) is not None:
        made = copy.copy(value)
        for name, part in attributes.items():
            object.__setattr__(made, name, rebuild(part, tensors))
        return made
    return value


def cloned(output: Any, made_elsewhere: bool = False) -> Any:
    """`output`, a tensor or containers of them, in memory of its own. made_elsewhere: on another stream than the current one."""
    if isinstance(output, torch.Tensor):
        if made_elsewhere and output.is_cuda:
            output.record_stream(torch.cuda.current_stream(output.device))
        return output.clone()
    if isinstance(output, (list, tuple)):
        return type(output)(cloned(part, made_elsewhere) for part in output)
    return output


def fresh(value: Any) -> Any:
    """Containers copied, what they hold not."""
    if isinstance(value, dict):
        return {key: fresh(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(fresh(part) for part in value)
    return value
