"""What stands before every node's function: of a call that goes well it changes nothing but where pictures lie.

A prompt may come from any program. ComfyUI checks links by their types, and lets nearly anything else pass: a number where a
picture belongs, an object as the name of a file, NaN, which is neither below the least value nor above the largest. What a
node then fails with speaks of its inside, so it is said which input is wrong. And a half letter in an error's text ends the
thread in which ComfyUI runs prompts, for good: its log cannot write it. What the operating system refuses is a number and a
name, so it is told with its cure.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from .. import host
from ..host.letters import readable
from ..host.system_errors import SystemRefused, sentence

PICTURES = ("IMAGE", "MASK", "LATENT")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")  # ComfyUI converts these
# What an operation raises; a sentence of the pack's own about the value is of another kind, and better.
RAW = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
SHOWN = 60  # letters of a wrong value


class WrongInput(ValueError):
    """An input of a prompt is of a kind that no node gives there; the message names it."""


def guard(node_class: type[Any]) -> None:
    """Put the door before the function of `node_class`; of one that it was inherited from, it is there already."""
    function = getattr(node_class, node_class.FUNCTION)
    if getattr(function, "guarded", False):
        return

    @functools.wraps(function)
    def through(self: Any, *args: Any, **inputs: Any) -> Any:
        if any(map(_endless, inputs.values())) and (wrong := wrong_input(type(self), inputs)) is not None:
            raise WrongInput(wrong)
        try:
            return delivered(type(self), function(self, *args, **inputs), inputs)
        except Exception as error:
            make_readable(error)
            if type(error) in RAW and (wrong := wrong_input(type(self), inputs)) is not None:
                raise WrongInput(wrong) from error
            if isinstance(error, OSError) and not isinstance(error, SystemRefused) and (told := sentence(error)):
                raise SystemRefused(error.errno, told) from error
            raise

    through.guarded = True  # type: ignore[attr-defined]
    setattr(node_class, node_class.FUNCTION, through)


def delivered(node_class: type[Any], outcome: Any, inputs: Mapping[str, Any]) -> Any:
    """`outcome` with its pictures where ComfyUI has its own, which with --gpu-only is the card: its nodes join the two.

    What was made of pictures that lie elsewhere, such as the frames of a film, stays with them.
    """
    place = host.current().picture_device()
    if place.type == "cpu":
        return outcome
    given = [value.device for value in inputs.values() if hasattr(value, "untyped_storage")]
    if given and place not in given:
        return outcome
    if isinstance(outcome, dict):
        return {**outcome, "result": _moved(node_class, outcome.get("result", ()), place)}
    return _moved(node_class, outcome, place)


def _moved(node_class: type[Any], results: Any, place: Any) -> Any:
    kinds = node_class.RETURN_TYPES
    if not isinstance(results, tuple) or len(results) != len(kinds):
        return results
    return tuple(_to(value, place) if kind in PICTURES else value for kind, value in zip(kinds, results, strict=True))


def _to(value: Any, place: Any) -> Any:
    if isinstance(value, list):
        return [_to(part, place) for part in value]
    if isinstance(value, dict):  # a LATENT
        return {name: _to(part, place) for name, part in value.items()}
    return value.to(place) if hasattr(value, "untyped_storage") else value


def wrong_input(node_class: type[Any], inputs: Mapping[str, Any]) -> str | None:
    """A sentence about the first of `inputs` that holds a plain value where a connection belongs, no word where a word is
    chosen, or no number; None when there is none."""
    declared: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # a list of files may be what failed
        declared = node_class.INPUT_TYPES()
    listed = getattr(node_class, "INPUT_IS_LIST", False)
    for part in ("required", "optional"):
        for name, (kind, *_) in declared.get(part, {}).items():
            given = inputs.get(name)
            value = given[0] if listed and isinstance(given, list) and given else given
            if name not in inputs or (value is None and part == "optional" and not isinstance(kind, list)):
                continue
            if wanted := _wanted_instead(kind, value):
                return f"{name} is {readable(repr(value))[:SHOWN]}, and {wanted}."
    return None


def _wanted_instead(kind: Any, value: Any) -> str | None:
    if isinstance(kind, list):
        return None if isinstance(value, str) else "must be one of the words that the node offers"
    if kind == "FLOAT":
        return "must be a number" if _endless(value) else None
    if kind not in WIDGETS and kind != "*" and _is_plain(value):
        return f"takes what another node gives ({kind}): connect one"
    return None


def _endless(value: Any) -> bool:
    """Whether it is NaN or infinite, also as the list of one that some nodes get."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return isinstance(value, float) and not math.isfinite(value)


def _is_plain(value: Any) -> bool:
    """Whether it is what JSON can hold; an empty list may also be a batch of nothing."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return bool(value) and all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def make_readable(error: BaseException) -> None:
    """Replace half letters in the texts of `error` and of what led to it."""
    for one in _chain(error):
        if any(isinstance(part, str) and readable(part) != part for part in one.args):
            one.args = tuple(readable(part) if isinstance(part, str) else part for part in one.args)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            seen.append(one)
            waiting += [one.__cause__, one.__context__]
            yield one
