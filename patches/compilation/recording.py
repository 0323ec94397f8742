"""Whole calls of a diffusion model recorded as CUDA graphs, one per size, and played back.

An SDXL step at batch two launches some thousands of kernels, and Python cannot launch them as fast as the GPU runs them.
A recording launches them all at once. It reads its inputs from buffers of its own, which are filled before each replay,
and its output is copied out, so that no later step overwrites what a sampler still holds.

A recording repeats kernels and not Python, so it is made only where all Python inside the call is known: the model's own
code, our patches, and nothing of another pack. Where that is not so, the call runs unrecorded and the report says why.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...host.capturing import GraphMemory, captured
from ...host.errors import kind_and_line
from ..model_call import BOUND, BoundPatches
from .blocks import attributes_used
from .options import (
    CALL,
    OVERRIDE,
    OWN,
    NotTraceable,
    attention_that_traces,
    check_override,
    is_traceable,
    options_read_by,
)
from .settings import CompilationRefused

if TYPE_CHECKING:
    from .regional import RegionalCompiler

log = logging.getLogger("hotpath.compile")

KEY = "hotpath_compile"
WARM_CALLS = 2  # before recording: the first compiles, the second finds every workspace and kernel in place


class Recording(Protocol):
    """A recorded call. `replay` runs it on what its input buffers hold and returns its output buffers."""

    def replay(self) -> Any: ...


_memories: dict[int, GraphMemory] = {}  # of all recordings on a device


class CudaRecording:
    """`function` recorded as a CUDA graph on the current device, in memory that all recordings there share."""

    def __init__(self, function: Callable[[], Any]) -> None:
        memory = _memories.setdefault(torch.cuda.current_device(), GraphMemory())
        self._graph, self._output = captured(function, WARM_CALLS, memory=memory)

    def replay(self) -> Any:
        self._graph.replay()
        return self._output


@dataclass
class _Flat:
    """The tensors in some arguments, and everything else about them as a key.

    lasting: which of the tensors are in patches of ours, that is, never written to once they are made. kept: objects that
    the key names by identity; held so that no other object gets their identity.
    """

    tensors: list[torch.Tensor]
    lasting: list[bool]
    kept: list[Any]


def _flatten(value: Any, flat: _Flat, lasting: bool = False) -> Hashable:
    if isinstance(value, torch.Tensor):
        flat.tensors.append(value)
        flat.lasting.append(lasting)
        return "tensor", tuple(value.shape), value.dtype, value.device
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, dict):
        parts = tuple((key, _flatten(part, flat, lasting)) for key, part in value.items() if key != OVERRIDE)
        return dict, parts, _same(value.get(OVERRIDE), flat)
    if type(value) in (list, tuple):
        return type(value), tuple(_flatten(part, flat, lasting) for part in value)
    if (attributes := attributes_used(value)) is not None:
        ours = lasting or type(value).__module__.startswith(OWN)
        return type(value), tuple((name, _flatten(part, flat, ours)) for name, part in attributes.items())
    return _same(value, flat)


def _same(value: Any, flat: _Flat) -> Hashable:
    """The very object counts, not what is in it: an attention override, a function."""
    if value is None:
        return None
    flat.kept.append(value)
    return "object", id(value)


def _rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """`value` with its tensors replaced, in the order of `_flatten`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: part if key == OVERRIDE else _rebuild(part, tensors) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rebuild(part, tensors) for part in value)
    if (attributes := attributes_used(value)) is not None:
        made = copy.copy(value)
        for name, part in attributes.items():
            object.__setattr__(made, name, _rebuild(part, tensors))
        return made
    return value


def _modes(tensors: list[torch.Tensor]) -> Hashable:
    """What of the thread's settings decides which kernels a call runs."""
    devices = {tensor.device.type for tensor in tensors}
    casts = tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in sorted(devices))
    return torch.is_inference_mode_enabled(), casts


def _copies(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, (list, tuple)):
        return type(output)(_copies(part) for part in output)
    return output


class _Recorded:
    def __init__(self, recording: Recording, buffers: list[torch.Tensor], flat: _Flat) -> None:
        self.recording = recording
        self.buffers = buffers
        self.kept = flat.kept
        self._held = [weakref.ref(tensor) for tensor in flat.tensors]

    def play(self, flat: _Flat) -> Any:
        self._fill(flat)
        return _copies(self.recording.replay())

    def _fill(self, flat: _Flat) -> None:
        """The buffers get what changed: an identity has some 300 tensors, and they stay from step to step."""
        changed: dict[Hashable, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for place, (tensor, lasts) in enumerate(zip(flat.tensors, flat.lasting, strict=True)):
            if lasts and tensor is self._held[place]():
                continue
            self._held[place] = weakref.ref(tensor)
            # Copies of one type are one launch; mixed, each would be one of its own.
            buffers, tensors = changed.setdefault((tensor.device, tensor.dtype), ([], []))
            buffers.append(self.buffers[place])
            tensors.append(tensor)
        for buffers, tensors in changed.values():
            torch._foreach_copy_(buffers, tensors)


def _triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where it cannot compile or launch a kernel of ours."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


class CallRecorder:
    """A DIFFUSION_MODEL wrapper that records calls and plays them back.

    recorded: how many recordings were made; replayed: how many calls they served. reason: why the last call was not
    recorded, or None.
    """

    def __init__(self, compiler: RegionalCompiler, record: Callable[[Callable[[], Any]], Recording]) -> None:
        self.compiler = compiler
        self.record = record
        self.recorded = 0
        self.replayed = 0
        self.reason: str | None = None
        self._errors: tuple[type[Exception], ...] = (RuntimeError, *compiler.errors, *_triton_errors())
        self._kept: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._failed: dict[Hashable, str] = {}
        self._read: dict[type, frozenset[str]] = {}
        self._places: dict[type, int | None] = {}

    def __deepcopy__(self, _: Any) -> CallRecorder:
        return self

    def __len__(self) -> int:
        return len(self._kept)

    def let_go(self) -> None:
        """Drop all recordings."""
        self._kept.clear()

    def forget(self, patcher: Any = None, unpatch_all: bool = True, *_: Any) -> None:
        """A callback: the weights leave the device, so what was recorded points at nothing."""
        if unpatch_all:
            self._kept.clear()
            self._failed.clear()
            if patcher is not None:
                self.compiler.release(patcher.model)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            arguments = self._reduced(executor, args, kwargs)
        except NotTraceable as error:
            return self._unrecorded(str(error), executor, args, kwargs)
        flat = _Flat([], [], [])
        key = (_flatten(arguments, flat), self.compiler.current().weights(), _modes(flat.tensors))
        if key in self._failed:
            return self._unrecorded(self._failed[key], executor, args, kwargs)
        held = self._kept.get(key)
        if held is None:
            try:
                held = self._make(executor, arguments, flat)
            except self._errors as error:
                self._failed[key] = f"while recording, {kind_and_line(error)}"
                if isinstance(error, torch.OutOfMemoryError):
                    self._kept.clear()
                log.warning("The model call is not recorded: %s", self._failed[key])
                return self._unrecorded(self._failed[key], executor, args, kwargs)
            self._kept[key] = held
            while len(self._kept) > self.compiler.settings.captured_sizes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        self.reason = None
        self.replayed += 1
        return held.play(flat)

    def _unrecorded(self, reason: str, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.reason = reason
        settings = self.compiler.settings
        if settings.strict and not settings.compiles:
            raise CompilationRefused(f"The model's call cannot be recorded: {reason}.")
        return executor(*args, **kwargs)

    def _make(self, executor: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]], flat: _Flat) -> _Recorded:
        buffers = [tensor.clone() for tensor in flat.tensors]
        args, kwargs = _rebuild(arguments, iter(buffers))

        def call() -> Any:
            # The model writes into its options while it runs.
            return executor(*_fresh(args), **_fresh(kwargs))

        devices = [buffer.device for buffer in buffers if buffer.device.type == "cuda"]
        pictures = self.compiler.current().pictures
        held = pictures.held if pictures is not None else ()
        with (
            torch.cuda.device(devices[0]) if devices else contextlib.nullcontext(),
            pictures.installed() if pictures is not None else contextlib.nullcontext(),
        ):
            made = _Recorded(self.record(call), buffers, flat)
        made.kept += held  # the graph reads them, whoever else lets go of them
        self.recorded += 1
        return made

    def _reduced(
        self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `transformer_options` cut down to what the model's code reads."""
        for wrapper in executor.wrappers[executor.idx + 1 :]:
            home = getattr(wrapper, "__module__", "?")
            if not home.startswith(OWN):
                raise NotTraceable(f"{home} wraps the model's forward")
        if torch.is_grad_enabled():
            raise NotTraceable("gradients are wanted, and a recording has none")
        problem = self.compiler.current().problem
        if problem is not None:
            self._kept.clear()  # mostly weights that had to make room, for which recordings hold room as well
            raise NotTraceable(problem)
        model = type(executor.class_obj)
        if model not in self._places:
            self._read[model] = options_read_by(executor.class_obj)
            names = list(inspect.signature(executor.original).parameters)
            self._places[model] = names.index("transformer_options") if "transformer_options" in names else None
        place = self._places[model]
        kwargs = dict(kwargs)
        bound = kwargs.pop(BOUND, None)
        if place is not None and place < len(args):
            return (*args[:place], self._options(model, args[place] or {}, bound), *args[place + 1 :]), kwargs
        return args, {
            **kwargs,
            "transformer_options": self._options(model, kwargs.get("transformer_options") or {}, bound),
        }

    def _options(self, model: type, options: dict[str, Any], bound: BoundPatches | None) -> dict[str, Any]:
        made = {key: options[key] for key in self._read[model] if key in options}
        made.pop("wrappers", None)
        patches = {name for name, held in (options.get("patches") or {}).items() if held}
        if patches:
            raise NotTraceable(f"{', '.join(sorted(patches))} of another pack runs inside the model")
        replaced: dict[str, dict[Any, Any]] = {
            name: dict(held) for name, held in (options.get("patches_replace") or {}).items() if held
        }
        if bound is not None and bound.attn2:
            replaced["attn2"] = {**replaced.get("attn2", {}), **bound.attn2}
        for name, held in replaced.items():
            for patch in held.values():
                if any(getattr(step, "stats", None) is not None for step in getattr(patch, "steps", ())):
                    raise NotTraceable("telemetry measures every block")
                if not is_traceable(patch):
                    raise NotTraceable(f"{name} is replaced by {type(patch).__module__}")
        if replaced:
            made["patches_replace"] = replaced
        if OVERRIDE in options:
            check_override(options[OVERRIDE])
            made[OVERRIDE] = options[OVERRIDE]
        elif (instead := attention_that_traces()[0]) is not None:
            made[OVERRIDE] = instead
        if CALL in options:
            made[CALL] = options[CALL]
        return made

    def report(self) -> str:
        kept = f"{self.recorded} recordings ({len(self)} kept), {self.replayed} calls replayed"
        return f"{kept}; the last call was not recorded: {self.reason}" if self.reason else kept


def _fresh(value: Any) -> Any:
    """Containers copied, what they hold not."""
    if isinstance(value, dict):
        return {key: _fresh(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fresh(part) for part in value)
    return value


def record_calls(made: Any, compiler: RegionalCompiler, record: Any = None) -> list[str]:
    """Let `made` (a ModelPatcher that is already our clone) record its calls, if its settings say so; lines for the report."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    made.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    made.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    compiler.recorder = None
    if not compiler.settings.records:
        return []
    if record is None:
        if made.load_device.type != "cuda":
            return ["CUDA graphs need a CUDA device: calls are not recorded"]
        record = CudaRecording
    compiler.recorder = CallRecorder(compiler, record)
    made.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, compiler.recorder)
    made.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, compiler.recorder.forget)
    return [f"model calls are recorded as CUDA graphs, {compiler.settings.captured_sizes} sizes kept"]
