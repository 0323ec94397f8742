"""Whose rows of a batch are the positive conditioning's, and whose a negative's, whatever guider puts them in which order.

The positive and negative that our nodes give are marked as such; a sampler marks the others, by the names that its guider has
for them. The mark is an entry among the conditioning's own, so that it arrives at the model with the rows it is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..identity.prepared import COND, UNCOND

OURS = "hotpath_"  # begins the names of all that our nodes put on a conditioning
ROLE = f"{OURS}role"
ROLES_BY_INDEX = f"{OURS}roles_by_index"  # set in `transformer_options` where marks mean nothing


def index_roles(cond_or_uncond: Sequence[int]) -> tuple[int, ...]:
    """Roles by position in the guider's list: the first conditioning is the positive one. Used when nobody said more."""
    return tuple(COND if i == 0 else UNCOND for i in cond_or_uncond)


def mark(entry: Mapping[str, Any], role: int) -> dict[str, Any]:
    """A conditioning's options that say whose rows they are, COND's or UNCOND's; nothing else changes."""
    mask = entry.get("mask")
    masks = mask.shape[0] if isinstance(mask, Tensor) and mask.ndim == 3 else 1
    return {**entry, "model_conds": {**entry.get("model_conds", {}), ROLE: role_condition(role, masks)}}


def roles_by_name(conds: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The conditionings of a guider, marked by the names that it gives them: "positive", and those of a negative.

    Marks that stand stay, but for a negative that was made of the marked positive (zeroed out, say). Conditionings of
    other names are as they were.
    """
    positive = {_mark_of(entry) for entry in conds.get("positive") or ()}
    named: dict[str, Any] = {}
    for name, entries in conds.items():
        role = COND if name == "positive" else UNCOND
        if not entries or (role == UNCOND and "negative" not in name):
            named[name] = entries
            continue
        copied = role == UNCOND and positive <= {COND, None}
        named[name] = [
            mark(entry, role) if _mark_of(entry) is None or (copied and _mark_of(entry) == COND) else entry
            for entry in entries
        ]
    return named


def _mark_of(entry: Mapping[str, Any]) -> int | None:
    marked = entry.get("model_conds", {}).get(ROLE)
    return marked.cond if marked is not None else None


def note_names(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """An OUTER_SAMPLE wrapper: the guider has the conditionings under their names, which are lost where they are computed."""
    guider = executor.class_obj
    if isinstance(getattr(guider, "conds", None), dict):
        guider.conds = roles_by_name(guider.conds)
    return executor(*args, **kwargs)


def note_conditionings(
    executor: Any, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """A CALC_COND_BATCH wrapper: two conditionings with one mark are a positive and a negative made of it (zeroed out, say)."""
    marks = [{_mark_of(entry) for entry in cond or ()} - {None} for cond in conds]
    if len(marks) == 2 and marks[0] and marks[0] == marks[1]:
        options = {**model_options.get("transformer_options", {}), ROLES_BY_INDEX: True}
        model_options = {**model_options, "transformer_options": options}
    return executor(model, conds, x, timestep, model_options)


def role_condition(role: int, masks: int = 1) -> Any:
    """A conditioning entry that says whose rows it is about; see `roles_of_rows`.

    masks: pictures in the mask of the same entry. ComfyUI repeats or cuts them, and for other numbers fails with shapes.
    """
    from comfy.conds import CONDRegular

    class CONDRole(CONDRegular):
        """A number for each row, on the CPU, so that there is nothing to copy to a device or to read back."""

        def process_cond(self, batch_size: int, **kwargs: Any) -> Any:
            if masks < batch_size and batch_size % masks:
                raise ValueError(
                    f"The mask has {masks} pictures and the latent batch {batch_size}: use one mask, or one per picture."
                )
            return self._copy_with(2 * torch.arange(batch_size) + role)

        def can_concat(self, other: Any) -> bool:
            return True

        def size(self) -> list[int]:
            return [1]

    return CONDRole(role)


def roles_of_rows(rows: Tensor, batch: int) -> tuple[int, ...] | None:
    """Roles of the chunks of a batch, from the numbers that arrived with its rows; None where they are of another batch.

    A pack that samples a picture in tiles (Tiled Diffusion) puts all rows of a tile behind those of the one before, so that
    there are more chunks than conditionings.
    """
    found: list[int] = rows.tolist()
    if len(found) != batch or not found:
        return None
    chunk = max(found) // 2 + 1
    whole = all(number // 2 == place % chunk for place, number in enumerate(found)) and batch % chunk == 0
    return tuple(number % 2 for number in found[:: chunk if whole else 1])
