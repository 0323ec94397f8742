"""What attention patches need to know of the model call they run in: the sigma, whose rows are in it, the latent's size.

An APPLY_MODEL wrapper notes it once per call, outside whatever is compiled. Patches read it from here and not from
`transformer_options`, because under torch.compile ComfyUI drops the guards on those and values read while tracing
would stay in the graph for good. It is kept per thread: with a CFG split over GPUs, one thread runs each part.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEY = "hotpath_model_call"
ROLE = "hotpath_role"
ROLES_BY_INDEX = "hotpath_roles_by_index"

COND, UNCOND = 0, 1

_thread = threading.local()


@dataclass
class ModelCall:
    """One call of the diffusion model.

    roles: COND or UNCOND for each chunk of the batch. height, width: of the latent. window: indices into the whole
    batch of the frames in this call (sliding context), or None; full_length: length of that whole batch.
    """

    roles: tuple[int, ...]
    height: int
    width: int
    timestep: Tensor | None
    window: tuple[int, ...] | None = None
    full_length: int | None = None
    _sigma: float | None = field(default=None, repr=False)
    _rows: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @property
    def sigma(self) -> float:
        """The noise level. Read from the device at most once per call, and only if someone asks."""
        if self._sigma is None:
            # Without a sigma (a foreign sampler), everything that is limited to a range counts as the very start.
            self._sigma = 999999999.9 if self.timestep is None else float(self.timestep.flatten()[0])
        return self._sigma

    def rows(self, batch: int, device: torch.device) -> Tensor:
        """The role of each of `batch` samples, [batch] int64 on `device`."""
        key = (batch, device)
        if key not in self._rows:
            self._rows[key] = torch.tensor(self.roles).repeat_interleave(batch // len(self.roles)).to(device)
        return self._rows[key]


def current_call(extra_options: dict[str, Any]) -> ModelCall:
    """The call around us; made from `extra_options` where a sampler bypasses ComfyUI's wrappers."""
    call = getattr(_thread, "call", None)
    if call is not None:
        return call
    height, width = extra_options["original_shape"][-2:]
    roles = index_roles(extra_options.get("cond_or_uncond", [0]))
    return ModelCall(roles, height, width, extra_options.get("sigmas"), *_window(extra_options))


def index_roles(cond_or_uncond: Sequence[int]) -> tuple[int, ...]:
    """Roles by position in the guider's list: the first conditioning is the positive one. Used when nobody said more."""
    return tuple(COND if i == 0 else UNCOND for i in cond_or_uncond)


def _window(options: dict[str, Any]) -> tuple[tuple[int, ...] | None, int | None]:
    """The frames in this call, from AnimateDiff-Evolved's `ad_params` or ComfyUI's own context windows."""
    ad_params = options.get("ad_params")
    if ad_params is not None and ad_params.get("sub_idxs") is not None:
        return tuple(ad_params["sub_idxs"]), ad_params["full_length"]
    window = options.get("context_window")
    # Only windows over the batch: in a video model, frames are a dimension of their own.
    if window is not None and getattr(window, "dim", None) == 0:
        return tuple(window.index_list), window.total_frames
    return None, None


def _note_call(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    options = transformer_options if transformer_options is not None else {}
    by_index = index_roles(options.get("cond_or_uncond", [0]))
    roles = kwargs.pop(ROLE, None)
    if roles is None or len(roles) != len(by_index) or options.get(ROLES_BY_INDEX):
        roles = by_index
    before = getattr(_thread, "call", None)
    _thread.call = ModelCall(tuple(roles), x.shape[-2], x.shape[-1], t, *_window(options))
    try:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    finally:
        _thread.call = before


def _note_conditionings(
    executor: Any, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """A pair of conditionings with the same mark is a positive and a negative that was made of it (zeroed out, say)."""
    marks = [{c["model_conds"][ROLE].cond for c in cond or () if ROLE in c.get("model_conds", {})} for cond in conds]
    if len(marks) == 2 and marks[0] and marks[0] == marks[1]:
        options = {**model_options.get("transformer_options", {}), ROLES_BY_INDEX: True}
        model_options = {**model_options, "transformer_options": options}
    return executor(model, conds, x, timestep, model_options)


def note_model_calls(model: Any) -> None:
    """Let patches on `model` (a ModelPatcher that is already our clone) ask for `current_call`."""
    from comfy.patcher_extension import WrappersMP

    for kind, wrapper in ((WrappersMP.APPLY_MODEL, _note_call), (WrappersMP.CALC_COND_BATCH, _note_conditionings)):
        if not model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)


def role_condition(role: int, masks: int = 1) -> Any:
    """A conditioning entry that tells `ModelCall.roles` whose rows it is, whatever guider orders them how.

    masks: pictures in the mask of the same entry. ComfyUI repeats or cuts them, and for other numbers fails with shapes.
    """
    from comfy.conds import CONDRegular

    class CONDRole(CONDRegular):
        """One role per chunk, joined as a tuple: no tensor, so nothing to copy to a device or to read back."""

        def process_cond(self, batch_size: int, **kwargs: Any) -> Any:
            if masks < batch_size and batch_size % masks:
                raise ValueError(
                    f"The mask has {masks} pictures and the latent batch {batch_size}: use one mask, or one per picture."
                )
            return self

        def can_concat(self, other: Any) -> bool:
            return True

        def concat(self, others: Sequence[Any]) -> tuple[int, ...]:
            return (self.cond, *(other.cond for other in others))

        def size(self) -> list[int]:
            return [1]

    return CONDRole(role)
