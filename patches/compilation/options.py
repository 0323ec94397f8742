"""What a block gets to see of `transformer_options` while it is compiled.

ComfyUI hands every block one big dict: sigmas and ids that change with each step, the block's own place in the model,
everybody's patches. Traced as it is, each of these costs a graph. So a block is given only what concerns it: the
attention override, what its code reads by name, and its own attention replacement, filed under a place that is the same
for all blocks. What another pack does inside a block cannot be told from here, so such a block runs as it is, and the
report says whose patch it was.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ...attention.compiled import number_of
from ..attention_override import OVERRIDE, AttentionOverride
from ..bound_attention import BoundAttention, TokenStep

BLOCK = ("hotpath", 0)
PLACE = ("hotpath", 0, 0)

# Patches that ComfyUI's blocks run inside themselves, beside those that a block's code names.
INSIDE = frozenset({"attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch"})
# ComfyUI's own blocks look at these only to find or to inform patches.
FOR_PATCHES = frozenset(
    {
        "patches", "patches_replace", "block", "block_index", "block_type", "total_blocks", "transformer_index",
        "img_slice", "n_heads", "dim_head", "attn_precision", "activations_shape", "original_shape", OVERRIDE,
        "forward_timestep_embed_patch",
    }
)  # fmt: skip

OWN = __name__[: -len("patches.compilation.options")]  # what the modules of this pack start with

_WORD = re.compile(r"""["']([A-Za-z_]\w*)["']""")


class NotTraceable(Exception):
    """Why a block cannot be compiled in this call."""


@functools.cache
def _words(kind: type) -> frozenset[str]:
    """Every word that stands in quotes in the source of a class and of its module's functions."""
    module = sys.modules.get(kind.__module__)
    texts = [inspect.getsource(kind)]
    for value in vars(module).values() if module is not None else ():
        if inspect.isfunction(value) and value.__module__ == kind.__module__:
            texts.append(inspect.getsource(value))
    return frozenset(word for text in texts for word in _WORD.findall(text))


@functools.cache
def _read_by_class(kind: type) -> frozenset[str]:
    try:
        words = _words(kind)
    except (OSError, TypeError) as error:
        raise NotTraceable(f"the source of {kind.__name__} cannot be read") from error
    return words - FOR_PATCHES if kind.__module__.startswith("comfy.") else words


def options_read_by(module: nn.Module) -> frozenset[str]:
    """Keys of `transformer_options` that the code of a block may read. Raises NotTraceable without its source."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    found: frozenset[str] = frozenset()
    for kind in kinds:
        home = kind.__module__
        if home.partition(".")[0] not in sys.stdlib_module_names and not home.startswith(("torch.", "comfy.ops")):
            found |= _read_by_class(kind)
    return found


def origin(patch: Any) -> str:
    """Where a patch comes from, for a report."""
    made_of = patch if inspect.isfunction(patch) or inspect.isclass(patch) else type(patch)
    return f"{getattr(made_of, '__module__', '?')}.{getattr(made_of, '__qualname__', type(patch).__name__)}"


def is_traceable(patch: Any) -> bool:
    """Whether an attention replacement is known to be tensors and arithmetic: identities bound to this call, or one that
    says so of itself (`compilable`).
    """
    if isinstance(patch, BoundAttention):
        return patch.base is None and all(isinstance(step, TokenStep) for step in patch.steps)
    return bool(getattr(patch, "compilable", False))


def check_override(override: Callable[..., Any]) -> None:
    """Raises NotTraceable for an attention override that is neither ComfyUI's nor ours, or that has another pack's inside."""
    home = getattr(override, "__module__", None) or type(override).__module__
    if not home.startswith(("comfy.", "comfy_extras.", OWN)):
        raise NotTraceable(f"attention is overridden by {origin(override)}")
    # Ours calls what was there before it; ComfyUI's is made around any function that a node has given it.
    inside = [getattr(override, "below", None)]
    if home == "comfy.model_patcher":
        inside += [cell.cell_contents for cell in getattr(override, "__closure__", None) or ()]
    for other in inside:
        if callable(other):
            check_override(other)


@functools.cache
def attention_that_traces() -> tuple[Callable[..., Any] | None, str]:
    """An override for ComfyUI's attention where that cannot be traced, and a line about it.

    Its sub-quadratic and split attention, which it chooses on CPUs and some cards, ask for the free memory at every call.
    """
    from comfy.ldm.modules import attention

    name = attention.optimized_attention.__name__
    if name not in ("attention_sub_quad", "attention_split"):
        return None, ""
    torch_attention = attention.attention_pytorch

    def instead(_: Any, *args: Any, **kwargs: Any) -> Any:
        return torch_attention(*args, **kwargs)

    return instead, (
        f"{name} cannot be compiled; compiled blocks use torch's scaled_dot_product_attention. In models that let no node "
        "choose their attention that takes starting ComfyUI with --use-pytorch-cross-attention"
    )


def attention_of_call(options: dict[str, Any]) -> dict[str, Any]:
    """The override among `options`, or ours where ComfyUI's attention cannot be traced, as an entry for code that is traced
    or recorded. Raises NotTraceable for another pack's."""
    if OVERRIDE in options:
        check_override(options[OVERRIDE])
        return {OVERRIDE: options[OVERRIDE]}
    instead, _ = attention_that_traces()
    return {} if instead is None else {OVERRIDE: instead}


_logs: dict[Any, Any] = {}  # the first log of each attention policy


def share_attention_log(options: dict[str, Any]) -> None:
    """Let the attention override of this call write into its own log from graphs that another one was traced with.

    A graph knows a log by a number. All overrides of one policy share theirs, so that none of them needs its own graph;
    the number leads to the one whose model runs.
    """
    override = options.get(OVERRIDE)
    if isinstance(override, AttentionOverride):
        first = _logs.setdefault(override.policy, override.log)
        if override.log is not first:
            override.log.number = first.number
            override.log._traced = first._traced  # graphs are shared, so is what is known of them
        number_of(override.log)


def block_options(options: dict[str, Any], read: frozenset[str]) -> dict[str, Any]:
    """`options` reduced to what concerns the block they were set for.

    read: from `options_read_by`. Raises NotTraceable when a patch inside the block is not known to be traceable.
    """
    made = {key: options[key] for key in read if key in options}
    for name, patches in (options.get("patches") or {}).items():
        if patches and (name in INSIDE or name in read):
            raise NotTraceable(f"{name} of {origin(patches[0])} acts inside the block")
    made |= attention_of_call(options)
    replaced = options.get("patches_replace") or {}
    block = options.get("block")
    place = (*block[:2], options.get("block_index", 0)) if block is not None else None
    mine: dict[str, Any] = {}
    for name in ("attn1", "attn2"):
        held = replaced.get(name)
        if not held:
            continue
        patch = held.get(place, held.get(block))
        if patch is None:
            continue
        if not is_traceable(patch):
            raise NotTraceable(f"{name} is replaced by {origin(patch)}")
        mine[name] = {PLACE: patch}
    if mine:
        made |= {"block": BLOCK, "block_index": 0, "patches_replace": mine}
    return made
