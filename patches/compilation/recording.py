"""Whole calls of a diffusion model recorded as CUDA graphs, one per size, and played back.

An SDXL step at batch two launches some thousands of kernels, and Python cannot launch them as fast as the GPU runs them.
A recording launches them all at once. It reads its inputs from buffers of its own, which are filled before each replay,
and its output is copied out, so that no later step overwrites what a sampler still holds.

A recording repeats kernels and not Python, so it is made only where all Python inside the call is known: the model's own
code, our patches, and nothing of another pack. Where that is not so, the call runs unrecorded and the report says why. Other
packs' wrappers run around it.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...host.capturing import GraphMemory, captured, trim
from ...host.errors import kind_and_line
from ...host.interruption import is_stop
from ..model_call import BOUND, BoundPatches
from .blocks import check_replaced
from .call_arguments import Flat, cloned, flatten, fresh, rebuild
from .options import NotTraceable, attention_of_call, is_traceable, options_read_by, origin
from .settings import KEY, CompilationRefused
from .wrapping import others_first

if TYPE_CHECKING:
    from .regional import RegionalCompiler, _Plan

log = logging.getLogger("hotpath.compile")

# Of a kind before it is recorded: the first compiles, the second finds every kernel and workspace in place.
WARM_CALLS = 2
FEW_REPLAYS = 4  # a recording that serves no more than that before it has to go was not worth making
WASTED = 3  # such recordings in a row, and no more are made of that model
MOST_REASONS = 64


class Recording(Protocol):
    """A recorded call. `replay` runs it on what its input buffers hold and returns its output buffers."""

    def replay(self) -> Any: ...


_memories: dict[int, GraphMemory] = {}  # of all recordings on a device


class CudaRecording:
    """`function` recorded as a CUDA graph on the current device, in memory that all recordings there share."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._graph, self._output = captured(function, 0, memory=_memory())

    def replay(self) -> Any:
        self._graph.replay()
        return self._output

    @staticmethod
    def warm(function: Callable[[], Any]) -> Any:
        """Run `function` where it will be recorded; its result."""
        return _memory().run(function)


def _memory() -> GraphMemory:
    return _memories.setdefault(torch.cuda.current_device(), GraphMemory())


def _modes(tensors: list[torch.Tensor]) -> Hashable:
    """The settings of the thread and of the process that decide which kernels a call runs."""
    devices = {tensor.device.type for tensor in tensors}
    casts = tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in sorted(devices))
    matmul: Any = torch.backends.cuda.matmul
    precision = matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    half = getattr(matmul, "allow_fp16_accumulation", None), matmul.allow_fp16_reduced_precision_reduction
    return torch.is_inference_mode_enabled(), casts, precision, half, torch.backends.cudnn.enabled


class _KindOfCall:
    """Calls that differ only in the numbers of their tensors: run as they are at first, on buffers of their own, then recorded.

    reads: tensors beside the arguments that the recording will read. runs: how many there were as they are; of replays, once
    it is recorded.
    """

    def __init__(self, flat: Flat, reads: Sequence[torch.Tensor]) -> None:
        self.buffers = [tensor.clone() for tensor in flat.tensors]
        self.kept = [*flat.kept, *reads]  # as long as the key names them, or the recording reads them
        self.recording: Recording | None = None
        self.runs = 0
        self._held = [weakref.ref(tensor) for tensor in flat.tensors]

    def play(self, flat: Flat) -> Any:
        assert self.recording is not None
        self._fill(flat)
        self.runs += 1
        return cloned(self.recording.replay())

    def warm(self, flat: Flat, run: Callable[[Callable[[], Any]], Any], call: Callable[[], Any]) -> Any:
        self._fill(flat)
        self.runs += 1
        return cloned(run(call), made_elsewhere=True)

    def _fill(self, flat: Flat) -> None:
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


class _Calls:
    """What is known of the calls of one model instance, for as long as its weights stay where they are."""

    def __init__(self) -> None:
        self.weights: Hashable = None
        self.clear()

    def clear(self) -> None:
        self.kept: OrderedDict[Hashable, _KindOfCall] = OrderedDict()
        self.warm: OrderedDict[Hashable, _KindOfCall] = OrderedDict()
        self.failed: OrderedDict[Hashable, str] = OrderedDict()
        self.given_up: str | None = None
        self.short: int | None = None  # the run in which memory was
        self.wasted = 0

    def drop(self) -> None:
        """Let go of all that holds memory."""
        self.kept.clear()
        self.warm.clear()


class CallRecorder:
    """A DIFFUSION_MODEL wrapper that records calls and plays them back.

    The first calls of a kind (sizes, prompt lengths, settings) run as they are, in the place where they will be recorded; the
    next one is recorded. recorded: how many recordings were made; replayed: how many calls they served. reason: why the last
    call was not recorded, or None.
    """

    def __init__(self, compiler: RegionalCompiler, record: Callable[[Callable[[], Any]], Recording]) -> None:
        self.compiler = compiler
        self.record = record
        self._run: Callable[[Callable[[], Any]], Any] = getattr(record, "warm", None) or (lambda function: function())
        self.recorded = 0
        self.replayed = 0
        self.reason: str | None = None
        # Of each model instance: those of ComfyUI's multi-GPU split run in threads of their own.
        self._calls: weakref.WeakKeyDictionary[_Plan, _Calls] = weakref.WeakKeyDictionary()
        self._read: dict[type, frozenset[str]] = {}
        self._places: dict[type, int | None] = {}

    def __deepcopy__(self, _: Any) -> CallRecorder:
        return self

    def __len__(self) -> int:
        return sum(len(calls.kept) for calls in list(self._calls.values()))

    @property
    def on_the_way(self) -> dict[Hashable, int]:
        """How many calls there were of each kind that is not recorded yet."""
        return {key: held.runs for calls in list(self._calls.values()) for key, held in calls.warm.items()}

    def let_go(self, plan: _Plan) -> None:
        """Drop all recordings of a model instance."""
        if plan in self._calls:
            self._calls[plan].drop()

    def forget(self, patcher: Any, unpatch_all: bool = True, *_: Any) -> None:
        """A callback: the weights leave the device, so what was recorded points at nothing."""
        if unpatch_all and patcher is not None:
            plan = self.compiler.release(patcher.model)
            if plan is not None and plan in self._calls:
                self._calls[plan].clear()
            trim(patcher.load_device)

    def rest(self, patcher: Any, *_: Any) -> None:
        """A callback: sampling is done, and others want memory."""
        trim(patcher.load_device)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if (outside := others_first(executor, self)) is not None:
            return outside(*args, **kwargs)
        plan = self.compiler.current()
        calls = self._calls.setdefault(plan, _Calls())
        flat = Flat([], [], [])
        try:
            arguments = self._reduced(plan, calls, executor, args, kwargs)
            key = (flatten(arguments, flat), _modes(flat.tensors), plan.pictures_key())
        except NotTraceable as error:
            reason: str | None = str(error)
        else:
            weights = plan.weights()
            if weights != calls.weights:
                calls.clear()
                calls.weights = weights
            reason = calls.given_up or calls.failed.get(key)
            if calls.short == self.compiler.loads:
                reason = "memory is short"
        if reason is None:
            try:
                return self._prepare_or_play(plan, calls, key, executor, arguments, flat)
            except CompilationRefused:
                raise
            except Exception as error:  # of compilers, drivers, code that cannot do with less: as it is it may run
                if is_stop(error):
                    raise
                reason = self._failed(calls, key, error)
            # Outside of the handler, whose traceback holds what the failed call had in memory.
            if calls.short is not None:
                calls.drop()
                trim(flat.tensors[0].device)
        return self._unrecorded(reason, executor, args, kwargs)

    def _prepare_or_play(
        self, plan: _Plan, calls: _Calls, key: Hashable, executor: Any, arguments: tuple[Any, Any], flat: Flat
    ) -> Any:
        held = calls.kept.get(key)
        if held is not None:
            calls.kept.move_to_end(key)
            return self._play(held, flat)
        pictures = plan.pictures
        held = calls.warm.pop(key, None) or _KindOfCall(flat, pictures.held if pictures is not None else ())
        call = _prepared(executor, arguments, held.buffers)
        devices = [buffer.device for buffer in held.buffers if buffer.device.type == "cuda"]
        with (
            torch.cuda.device(devices[0]) if devices else contextlib.nullcontext(),
            pictures.installed() if pictures is not None else contextlib.nullcontext(),
        ):
            if held.runs < WARM_CALLS:
                made = held.warm(flat, self._run, call)
                calls.warm[key] = held
                while len(calls.warm) > self.compiler.settings.captured_sizes:
                    calls.warm.popitem(last=False)
                self.reason = None
                return made
            held.recording = self.record(call)
        held.runs = 0
        self.recorded += 1
        made = self._play(held, flat)  # before it is kept: the driver may find only now that there is no memory
        calls.kept[key] = held
        self._make_room(calls)
        return made

    def _play(self, held: _KindOfCall, flat: Flat) -> Any:
        made = held.play(flat)
        self.reason = None
        self.replayed += 1
        return made

    def _make_room(self, calls: _Calls) -> None:
        while len(calls.kept) > self.compiler.settings.captured_sizes:
            _, gone = calls.kept.popitem(last=False)
            calls.wasted = calls.wasted + 1 if gone.runs <= FEW_REPLAYS else 0
        if calls.wasted >= WASTED:
            calls.drop()
            kept = self.compiler.settings.captured_sizes
            calls.given_up = f"more sizes or prompt lengths take turns than the {kept} that are kept"
            log.warning("Model calls are not recorded any more: %s", calls.given_up)

    def _failed(self, calls: _Calls, key: Hashable, error: Exception) -> str:
        from comfy import model_management as management

        reason = f"while recording, {kind_and_line(error)}"
        # An older ComfyUI knows torch's own error only.
        known = getattr(management, "is_oom", lambda error: isinstance(error, management.OOM_EXCEPTION))
        if known(error):
            calls.short = self.compiler.loads  # in another run there may be more
        elif isinstance(error, RuntimeError) and "captur" in str(error):
            calls.given_up = reason  # what its code does, it does at every size
        else:
            calls.failed[key] = reason
            while len(calls.failed) > MOST_REASONS:
                calls.failed.popitem(last=False)
        log.warning("The model call is not recorded: %s", reason)
        return reason

    def _unrecorded(self, reason: str, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.leave_out(reason)
        return executor(*args, **kwargs)

    def leave_out(self, reason: str) -> None:
        """A call runs as it is. Raises CompilationRefused where that is not wanted."""
        self.reason = reason
        settings = self.compiler.settings
        if settings.strict and not settings.compiles:
            raise CompilationRefused(f"The model's call cannot be recorded: {reason}.")

    def _reduced(
        self, plan: _Plan, calls: _Calls, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `transformer_options` cut down to what the model's code reads."""
        if torch.is_grad_enabled():
            raise NotTraceable("gradients are wanted, and a recording has none")
        check_replaced(executor.class_obj)  # for the length of a step, as caches of steps do
        if plan.problem is not None:
            calls.drop()  # mostly weights that had to make room, for which recordings hold room as well
            raise NotTraceable(plan.problem)
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
                    raise NotTraceable(f"{name} is replaced by {origin(patch)}")
        if replaced:
            made["patches_replace"] = replaced
        return made | attention_of_call(options)

    def report(self) -> str:
        kept = f"{self.recorded} recordings ({len(self)} kept), {self.replayed} calls replayed"
        return f"{kept}; the last call was not recorded: {self.reason}" if self.reason else kept


def _prepared(
    executor: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]], buffers: list[torch.Tensor]
) -> Callable[[], Any]:
    """The model's call over `buffers`."""
    args, kwargs = rebuild(arguments, iter(buffers))
    # The model writes into its options while it runs.
    return lambda: executor(*fresh(args), **fresh(kwargs))


def recording_problem(model: Any) -> str | None:
    """Why calls of `model` (a ModelPatcher) cannot be recorded at all, or None."""
    if model.load_device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and this model runs on {model.load_device.type}."
    return None


def record_calls(made: Any, compiler: RegionalCompiler, record: Any = None) -> str:
    """Let `made` (a ModelPatcher that is already our clone) record its calls, if its settings say so; a line for the report."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    made.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    for moment in (CallbacksMP.ON_DETACH, CallbacksMP.ON_CLEANUP):
        made.remove_callbacks_with_key(moment, KEY)
    compiler.recorder = None
    if not compiler.settings.records:
        return ""
    if record is None:
        if (problem := recording_problem(made)) is not None:
            return f"Calls are not recorded: {problem}"
        record = CudaRecording
    compiler.recorder = CallRecorder(compiler, record)
    made.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, compiler.recorder)
    made.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, compiler.recorder.forget)
    made.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, compiler.recorder.rest)
    return f"model calls are recorded as CUDA graphs, {compiler.settings.captured_sizes} sizes kept"
