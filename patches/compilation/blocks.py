"""What two blocks must have in common to share a graph, and whether a block can be compiled as it is now.

A graph holds everything but tensors as constants: a block's head count, an epsilon, which class a layer has. All of it
makes up the kind of a block, read once. Where its weights are and in which type they are kept can change with every
load, and is looked at again then.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from .options import OWN, NotTraceable


def of_each_class(ask: Callable[[Any], frozenset[str]]) -> Callable[[Any], frozenset[str]]:
    """`functools.cache` for what is asked of a class, without keeping it: ComfyUI makes classes for a model it loads."""
    known: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()

    @functools.wraps(ask)
    def asked(kind: Any) -> frozenset[str]:
        if (answer := known.get(kind)) is None:
            answer = known[kind] = ask(kind)
        return answer

    return asked


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _kind(value: Any) -> Any:
    """The class, as Any: type checkers take a class for something that cannot be hashed."""
    return type(value)


@of_each_class
def names_used(kind: Any) -> frozenset[str]:
    """Attribute names that the methods of a class use, apart from its constructors."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for name, member in vars(base).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(function, types.FunctionType) and name != "__init__":
                found.update(_names_in(function.__code__))
    return frozenset(found)


def attributes_used(value: Any) -> dict[str, Any] | None:
    """The attributes that the methods of a patch of ours use, or None for any other object."""
    if not (type(value).__module__.startswith(OWN) or getattr(value, "compilable", False)):
        return None
    used = names_used(_kind(value))
    return {name: part for name, part in getattr(value, "__dict__", {}).items() if name in used}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that a block is given in `value`, in containers and patches of ours too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif (attributes := attributes_used(value)) is not None:
        yield from tensors_in(attributes)


def _constant(value: Any) -> Hashable:
    """A stand-in for an attribute that is equal where a graph may be shared."""
    if isinstance(value, torch.Tensor):
        return "tensor", tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_constant(part) for part in value)
    if isinstance(value, dict):
        return dict, tuple((key, _constant(part)) for key, part in value.items())
    try:
        hash(value)
    except TypeError:
        return "object", id(value)
    return type(value), value  # 1, 1.0 and True are equal, and give different graphs


LIVE = frozenset({"training", "comfy_cast_weights", "weight_function", "bias_function"})  # read by `LiveParts`
CASTS = ("comfy_cast_weights", "comfy_force_cast_weights")  # ComfyUI sets them when it loads
# `forward`, and what that of some modules calls; seamless tiling replaces `_conv_forward`.
METHODS = ("forward", "_forward", "_conv_forward", "forward_comfy_cast_weights")
# Where a method of a class may come from, beside the class's own file; ComfyUI's models have layers of einops.
HOMES = ("torch.", "comfy.", "comfy_extras.", "einops.")
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
ORDINARY = (nn.Parameter, torch.Tensor)  # weights that are one tensor; quantised ones hold several
PLAIN = (bool, int, float, str, torch.dtype, type(None))


def parts_of(weight: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """The plain tensors in `weight`, several in a quantised one, and what else says what they mean."""
    if type(weight) in ORDINARY or not hasattr(weight, "__tensor_flatten__"):
        return [weight], None
    names, meaning = weight.__tensor_flatten__()
    inside = [parts_of(getattr(weight, name)) for name in names]
    return [part for parts, _ in inside for part in parts], (meaning, [more for _, more in inside])


def _content(cell: types.CellType) -> Any:
    """What a function has from the one around it; the cell's own class where that was never set, or is deleted."""
    try:
        return cell.cell_contents
    except ValueError:
        return types.CellType


def class_of(kind: Any, by_value: bool = False, within: tuple[Any, ...] = ()) -> Hashable:
    """A class, or what is equal for all classes that one function makes: Stable Cascade has a class of norms for every block.

    by_value: also for those that have more than functions, such as ComfyUI's layers of a quantised checkpoint, whose class is
    another one each time it is loaded. within: the classes and functions that this one is looked at for; they name each other.
    """
    if "<locals>" not in kind.__qualname__:
        return kind
    within = (*within, kind)
    own: list[Hashable] = []
    for name, member in vars(kind).items():
        if isinstance(member, types.FunctionType):
            own.append((name, _function(member, by_value, within)))
        elif not name.startswith("__"):
            if not by_value or not _is_plain(member):
                return kind
            own.append((name, _given(member, by_value, within)))
    bases = tuple(class_of(base, by_value, within) for base in kind.__bases__)
    return kind.__module__, kind.__qualname__, bases, tuple(own)


def _function(function: types.FunctionType, by_value: bool, within: tuple[Any, ...]) -> Hashable:
    given = [_content(cell) for cell in function.__closure__ or ()]
    if by_value:
        given += [function.__defaults__, function.__kwdefaults__]
    within = (*within, function)
    return function.__code__, tuple(_given(value, by_value, within) for value in given)


def _is_plain(value: Any) -> bool:
    """Whether `_given` tells all of it."""
    if isinstance(value, dict):
        return all(_is_plain(part) for entry in value.items() for part in entry)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, (*PLAIN, type, types.FunctionType))


def _given(value: Any, by_value: bool, within: tuple[Any, ...]) -> Hashable:
    """What a class that a function makes, or one of its functions, has from it."""
    for place, known in enumerate(within):
        if value is known:  # `super` keeps the class itself
            return place
    if not by_value or not _is_plain(value):
        return id(value)
    if isinstance(value, type):
        return class_of(value, by_value, within)
    if isinstance(value, types.FunctionType):
        return _function(value, by_value, within)
    if isinstance(value, dict):
        return dict, tuple((key, _given(part, by_value, within)) for key, part in value.items())
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_given(part, by_value, within) for part in value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_given(part, by_value, within) for part in value)
    return type(value), value


def constants_of(block: nn.Module) -> Hashable:
    """The part of a block's kind that stays: classes, names, and attributes that its code uses."""
    found: list[Hashable] = []
    # With another pack's code inside, graphs are guarded by the classes themselves, and torch makes only a few of a kind.
    by_value = foreign_class(block) is None
    for path, part in block.named_modules():
        used = names_used(_kind(part))
        attributes = tuple(
            (name, _constant(value))
            for name, value in sorted(vars(part).items())
            if name in used
            and name not in LIVE
            and name not in OF_EVERY_MODULE
            # What a layer keeps for itself may be an object that only it has.
            and (not name.startswith("_") or isinstance(value, PLAIN))
        )
        found.append((path, class_of(type(part), by_value), attributes))
    return tuple(found)


def check_kind(kind: type) -> None:
    """Raises NotTraceable where another pack has put its own method into a class, as AnimateDiff's do with torch's norms.

    A graph made before would not notice.
    """
    for base in kind.__mro__:
        for name in METHODS:
            method = vars(base).get(name)
            home = getattr(method, "__module__", None)
            if method is not None and home != base.__module__ and not (home or "").startswith(HOMES):
                raise NotTraceable(f"{home or 'a pack'} replaced the {name} of {base.__name__}")


@of_each_class
def _methods(kind: Any) -> frozenset[str]:
    """Names of the functions of a module's class and of those it is made from, apart from torch's Module."""
    bases = (base for base in kind.__mro__ if base not in (nn.Module, object))
    return frozenset(
        name for base in bases for name, value in vars(base).items() if isinstance(value, types.FunctionType)
    )


def check_replaced(part: nn.Module) -> None:
    """Raises NotTraceable where a pack has put a function of its own in the place of one of the module's."""
    own, kind = vars(part), _kind(part)
    for name in own.keys() & _methods(kind):
        # ComfyUI's bypass LoRA leaves the class's own method behind as an attribute.
        if getattr(own[name], "__func__", None) is not getattr(kind, name):
            raise NotTraceable(f"a pack replaced the {name} of a {kind.__name__} inside")


def foreign_class(model: nn.Module) -> str | None:
    """Why the Python inside `model` is not known: a class that is neither torch's nor ComfyUI's nor ours. None if it is."""
    for kind in {type(part) for part in model.modules()}:
        if not kind.__module__.startswith((*HOMES, OWN)):
            return f"its {kind.__name__} is made by {kind.__module__}"
    return None


class LiveParts:
    """The modules of a block, listed once, because they are looked at again with every run."""

    def __init__(self, block: nn.Module, without: frozenset[nn.Module] = frozenset()) -> None:
        self._parts = [
            (part, vars(part), part._parameters, part._buffers) for part in block.modules() if part not in without
        ]
        self._kinds = {type(part) for part, *_ in self._parts}

    def state(self, device: torch.device) -> Hashable:
        """The part of a block's kind that changes with loading. Raises NotTraceable when it cannot be compiled so."""
        for kind in self._kinds:
            check_kind(kind)
        found: list[Hashable] = []
        for part, own, parameters, buffers in self._parts:
            check_replaced(part)
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                raise NotTraceable(f"a pack hooked a {type(part).__name__} inside")
            if own.get("weight_function") or own.get("bias_function"):
                raise NotTraceable("weights are patched at every call, because the model is not loaded whole")
            if "_v" in own:
                raise NotTraceable("weights come through DynamicVRAM")
            if parameters:
                found.append((part.training, *(getattr(part, name, None) for name in CASTS)))
            else:
                found.append(part.training)
            for held in (parameters, buffers):
                for name, weight in held.items():
                    if weight is None:
                        continue
                    if weight.device != device:
                        raise NotTraceable(f"weights lie on {weight.device}, because the model is not loaded whole")
                    parts, meaning = parts_of(weight)
                    looks = tuple((part.dtype, part.shape, part.stride()) for part in parts)
                    found.append((name, type(weight), weight.dtype, looks, _constant(meaning)))
        return device, tuple(found)
