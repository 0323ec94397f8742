"""What attention patches need to know of the model call they run in: the sigma, whose rows are in it, the latent's size.

An APPLY_MODEL wrapper notes it once per call, outside whatever is compiled, and binds our attention patches to it. They
reach the UNet as an argument of its own and not in `transformer_options`, because under torch.compile ComfyUI drops the
guards on those: a graph traced without a patch would go on being used with it. Where another pack has put a forward of
fixed arguments in the UNet's place, each block's patch finds the call by itself. What is noted is kept per thread: with
a CFG split over GPUs, one thread runs each part.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..host.device_work import copies_at_once
from .conditioning_roles import OURS, ROLE, ROLES_BY_INDEX, index_roles, note_conditionings, note_names, roles_of_rows

log = logging.getLogger("hotpath.attention")

KEY = "hotpath_model_call"
BOUND = "hotpath_bound_patches"
TELEMETRY = "hotpath_telemetry"

ALWAYS = (999999999.9, 0.0)  # what percent_to_sigma gives for 0 and 1

CPU = torch.device("cpu")
NOISE_LEVELS = frozenset({"timestep", "timesteps", "t", "r"})  # as ComfyUI's networks call what samplers give them

_thread = threading.local()
_closed: weakref.WeakSet[Any] = weakref.WeakSet()  # forwards that take no argument of ours


@dataclass
class ModelCall:
    """One call of the diffusion model.

    roles: COND or UNCOND for each chunk of the batch. height, width: of the latent. batch: samples. dtype: what the
    model computes in. window: indices into the whole batch of the frames in this call (sliding context), or None;
    full_length: length of that whole batch. counts: [70, 2] for telemetry, see `attend_tokens`; a row per block.
    """

    roles: tuple[int, ...]
    height: int
    width: int
    timestep: Tensor | None
    window: tuple[int, ...] | None = None
    full_length: int | None = None
    batch: int = 1
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    counts: Tensor | None = None
    _sigma: float | None = field(default=None, repr=False)
    _made: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.kind = (
            self.roles, self.height, self.width, self.window, self.full_length, self.batch, self.device, self.dtype
        )  # fmt: skip
        """Calls of one kind differ in the sigma only."""

    def of(self, q: Tensor) -> ModelCall:
        """This call with the device and dtype of `q` [B, N, C]."""
        return replace(self, device=q.device, dtype=q.dtype)

    @property
    def sigma_is_near(self) -> bool:
        """Whether the sigma can be read without waiting for a device."""
        return self._sigma is not None or self.timestep is None or self.timestep.device.type == "cpu"

    @property
    def sigma(self) -> float:
        """The noise level. Read from the device at most once per call, and only if someone asks."""
        if self._sigma is None:
            # Without a sigma (a foreign sampler), everything that is limited to a range counts as the very start.
            self._sigma = ALWAYS[0] if self.timestep is None else float(self.timestep.flatten()[0])
        return self._sigma

    def rows(self, identities: int) -> Tensor:
        """[identities, batch] int32: each sample's row in keys and values that hold COND and UNCOND of each identity."""
        return self._once(
            identities,
            lambda: (
                torch.tensor(self.roles, dtype=torch.int32).repeat_interleave(self.batch // len(self.roles))
                + 2 * torch.arange(identities, dtype=torch.int32)[:, None]
            ),
        )

    def weights(self, weights: tuple[float, ...]) -> Tensor:
        """[identities, batch] float32: the same for every sample."""
        return self._once(weights, lambda: torch.tensor(weights)[:, None].repeat(1, self.batch))

    def weights_now(self, settings: tuple[Any, ...]) -> Tensor:
        """`weights` of the settings, 0 where this call's sigma is out of their range; computed on the device."""
        weights = self.weights(tuple(s.weight for s in settings))
        timestep = self.timestep
        if timestep is None:
            return weights

        def gate() -> Tensor:
            # Metal knows no float64, Intel's cards compute none, and others need not.
            exact = torch.float64 if self.device.type in ("cuda", "cpu") else torch.float32
            limits = torch.tensor([(s.sigma_start, s.sigma_end) for s in settings], dtype=exact)
            limits = limits.to(self.device, non_blocking=copies_at_once(self.device))
            sigma = timestep.flatten()[0].to(self.device, exact)
            return weights * ((sigma <= limits[:, 0]) & (sigma >= limits[:, 1]))[:, None]

        return self._once(settings, gate)

    def _once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        made = self._made.get((key, self.device))
        if made is None:
            made = self._made[key, self.device] = make().to(self.device, non_blocking=copies_at_once(self.device))
        return made


class BoundPatches:
    """Our patches in the attention of one call, by block."""

    def __init__(self, attn2: dict[Any, Any]) -> None:
        self.attn2 = attn2


def current_call(extra_options: dict[str, Any]) -> ModelCall:
    """The call around us; made from `extra_options` where a sampler bypasses ComfyUI's wrappers."""
    call = getattr(_thread, "call", None)
    if call is not None:
        return call
    batch, *_, height, width = extra_options["original_shape"]
    roles = index_roles(extra_options.get("cond_or_uncond", [0]))
    return ModelCall(roles, height, width, extra_options.get("sigmas"), *frames_of(extra_options), batch=batch)


def frames_of(options: dict[str, Any]) -> tuple[tuple[int, ...] | None, int | None]:
    """The frames in this call, from AnimateDiff-Evolved's `ad_params` or ComfyUI's own context windows."""
    ad_params = options.get("ad_params")
    if ad_params is not None and ad_params.get("sub_idxs") is not None:
        return tuple(ad_params["sub_idxs"]), ad_params["full_length"]
    window = options.get("context_window")
    # Only windows over the batch: in a video model, frames are a dimension of their own.
    if window is not None and getattr(window, "dim", None) == 0:
        # The last frame of the window before it may stand in front, and is cut off from what the model gives.
        anchor = getattr(window, "causal_anchor_index", None)
        in_front = () if anchor is None or anchor < 0 else (anchor,)
        return (*in_front, *window.index_list), window.total_frames
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
    rows = kwargs.pop(ROLE, None)
    roles = by_index if rows is None else roles_of_rows(rows, x.shape[0]) or by_index
    if options.get(ROLES_BY_INDEX):
        roles = by_index * max(1, len(roles) // len(by_index))
    # What stands on the conditionings for us is read by now, and no model knows it.
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith(OURS)}
    recorder = options.get(TELEMETRY)
    call = ModelCall(
        roles,
        x.shape[-2],
        x.shape[-1],
        t,
        *frames_of(options),
        batch=x.shape[0],
        device=x.device,
        dtype=dtype_inside(executor.class_obj, x.dtype),
        counts=recorder.begin_call(t, x.device) if recorder is not None else None,
    )
    before = getattr(_thread, "call", None)
    _thread.call = call
    try:
        forward = _forward_of(getattr(executor.class_obj, "diffusion_model", None))
        if takes_bound(forward):
            attn2 = options.get("patches_replace", {}).get("attn2", {})
            bound = {block: patch.bind(call, call.counts) for block, patch in attn2.items() if hasattr(patch, "bind")}
            from .others_graphs import kept_apart  # our own compiler, which that knows, asks this module

            run = kept_apart(executor, options, bound)
            try:
                return run(x, t, c_concat, c_crossattn, control, options, **kwargs, **{BOUND: BoundPatches(bound)})
            except TypeError as error:
                if BOUND not in str(error):
                    raise
                _note_closed(forward)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    finally:
        _thread.call = before


def is_sampled(network: Any) -> bool:
    """Whether samplers call a diffusion model. SAM 3, RT-DETR and Depth Anything are MODELs too, for nodes of their own."""
    kind = type(network)
    takes = inspect.signature(kind.forward).parameters
    return not kind.__module__.startswith("comfy.") or not NOISE_LEVELS.isdisjoint(takes)


def dtype_inside(model: Any, otherwise: torch.dtype) -> torch.dtype:
    """What the diffusion model in `model` (a BaseModel) computes in; `otherwise` where it does not say."""
    if hasattr(model, "get_dtype_inference"):
        dtype: torch.dtype = model.get_dtype_inference()
    elif hasattr(model, "get_dtype"):  # an older ComfyUI
        dtype = getattr(model, "manual_cast_dtype", None) or model.get_dtype()
    else:
        dtype = otherwise
    return dtype


def _forward_of(model: Any) -> Any:
    forward = getattr(model, "forward", model)
    return getattr(forward, "__func__", forward)


def takes_bound(forward: Any) -> bool:
    """Whether a diffusion model's forward can be handed `BoundPatches`; other packs replace it by ones that cannot."""
    try:
        if forward in _closed:
            return False
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # nothing that tells: the call will
        return True
    if any(p.kind is p.VAR_KEYWORD or p.name == BOUND for p in parameters):
        return True
    _note_closed(forward)
    return False


def _note_closed(forward: Any) -> None:
    log.info("identity attention finds its call in each block: this model's forward takes fixed arguments")
    with contextlib.suppress(TypeError):  # what cannot be remembered is asked again
        _closed.add(forward)


def _use_bound(
    executor: Any,
    x: Tensor,
    timesteps: Any = None,
    context: Any = None,
    y: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Inside of what is compiled: put the patches of this call in the places of those they were made of."""
    options = transformer_options if transformer_options is not None else {}
    bound = kwargs.pop(BOUND, None)
    if bound is not None:
        replaced = options.get("patches_replace", {})
        replaced = {**replaced, "attn2": {**replaced.get("attn2", {}), **bound.attn2}}
        options = {**options, "patches_replace": replaced}
    return executor(x, timesteps, context, y, control, options, **kwargs)


def note_model_calls(model: Any) -> None:
    """Let patches on `model` (a ModelPatcher that is already our clone) ask for `current_call`."""
    from comfy.patcher_extension import WrappersMP

    for kind, wrapper in (
        (WrappersMP.APPLY_MODEL, _note_call),
        (WrappersMP.DIFFUSION_MODEL, _use_bound),
        (WrappersMP.OUTER_SAMPLE, note_names),
        (WrappersMP.CALC_COND_BATCH, note_conditionings),
    ):
        if not model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)
