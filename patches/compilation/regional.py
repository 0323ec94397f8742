"""Regional compilation of a ComfyUI MODEL: every repeated block runs as one of a few graphs.

For the length of a model call, each block's `forward` is ours: it hands the compiled kind what concerns the block and
nothing else (`options`), and falls back to the block as it is, with the reason, where that is not possible. The model
that came in is not changed, and between calls nothing of ours is on it.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ...host.errors import kind_and_line
from ...products.rerouting import aside
from ..model_call import dtype_inside
from .blocks import ORDINARY, LiveParts, constants_of, foreign_class, parts_of
from .graphs import Backend, CompiledKind, compile_errors, usual_order
from .options import NotTraceable, block_options, options_read_by, share_attention_log
from .pictures import Pictures
from .recording import CallRecorder
from .regions import Region, find_regions, is_transformer
from .settings import CompilationRefused, CompileSettings
from .wrapping import WrappedForward, runs_wrappers, without_other_compilers
from .written_out import NAMESPACE

log = logging.getLogger("hotpath.compile")

NOT_CALLED = "no call of the model went through the forward of its blocks"
KEPT_KINDS = 128  # an SDXL UNet has 14

_kinds: OrderedDict[Hashable, CompiledKind] = OrderedDict()
_kinds_lock = threading.Lock()


def shared_kind(key: Hashable, make: Callable[[], CompiledKind]) -> CompiledKind:
    """The compiled kind for `key`, kept for the process: two models of one architecture share their graphs."""
    with _kinds_lock:
        if key not in _kinds:
            _kinds[key] = make()
            while len(_kinds) > KEPT_KINDS:
                _kinds.popitem(last=False)
        _kinds.move_to_end(key)
        return _kinds[key]


def forget(kind: CompiledKind) -> None:
    """Let no other model use `kind`."""
    with _kinds_lock:
        for key in [key for key, held in _kinds.items() if held is kind]:
            del _kinds[key]


def forget_compiled_kinds() -> int:
    """Drop every compiled graph; how many kinds there were."""
    with _kinds_lock:
        count = len(_kinds)
        _kinds.clear()
    return count


class BlockForward:
    """The `forward` of one block during a model call."""

    def __init__(self, region: Region, owner: RegionalCompiler) -> None:
        self.name = region.name
        self.title = region.title
        self.module = region.module
        self.owner = owner
        self.original: Callable[..., Any] = type(region.module).forward
        self._live = LiveParts(region.module)
        self._on_tokens = is_transformer(region.module)
        self._foreign = foreign_class(region.module) is not None
        # Torch raises it where a compiled graph hands weights of a pack's own class to an operator that takes plain ones.
        self._errors: tuple[type[Exception], ...] = (*owner.errors, *((TypeError,) if self._foreign else ()))
        self.kind: CompiledKind | None = None
        self.called = False
        self.reason: str | None = None  # why this block ran as it is, the last time
        self.key: Hashable = None
        names = list(inspect.signature(self.original).parameters)[1:]
        self.place = names.index("transformer_options") if "transformer_options" in names else None
        self._constants: Hashable = None
        self._read: frozenset[str] = frozenset()
        self._unknown: str | None = None
        try:
            self._read = options_read_by(self.module)
            self._constants = constants_of(self.module)
        except NotTraceable as error:
            self._unknown = str(error)

    def examine(self, device: torch.device) -> None:
        """Find the kind this block is of, as its weights are now."""
        self.kind = self.key = None
        try:
            if self._unknown:
                raise NotTraceable(self._unknown)
            self.key = (self._constants, self._live.state(device), self.owner.key)
            if (failed := self.owner.failed.get(self.key)) is not None:
                raise NotTraceable(failed)
        except NotTraceable as error:
            self.reason = str(error)
            return
        self.reason = None
        if not self.owner.settings.compiles:
            return
        self.kind = shared_kind(
            self.key,
            lambda: CompiledKind(self.title, self.original, self.owner.settings, self.owner.backend, self._foreign),
        )
        self.owner.kinds.add(self.kind)
        self.kind.blocks.add(self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind, self.called = self.kind, True
        if kind is None or kind.reason is not None:
            return self._as_it_is(kind.reason if kind is not None else self.reason, args, kwargs)
        try:
            reduced, changed = self._reduce(args, kwargs)
            if self._on_tokens:
                reduced = tuple(usual_order(value) for value in reduced)
                changed = {name: usual_order(value) for name, value in changed.items()}
            with aside():
                out = kind(self.module, reduced, changed)
        except NotTraceable as error:
            return self._as_it_is(str(error), args, kwargs, error)
        except self._errors as error:
            reason = kind.reason = self.owner.failed[self.key] = kind_and_line(error, 200)
            forget(kind)  # who asks for a compiled model next starts anew
            log.warning("%s is not compiled: %s", self.title, reason)
            return self._as_it_is(reason, args, kwargs, error)
        self.reason = None
        return out

    def _as_it_is(
        self, reason: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception | None = None
    ) -> Any:
        self.reason = reason
        if self.owner.settings.strict:
            raise CompilationRefused(f"{self.title} {self.name} cannot run compiled: {reason}.") from error
        return self.original(self.module, *args, **kwargs)

    def _reduce(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "transformer_options" in kwargs:
            options = kwargs["transformer_options"] or {}
            return args, {**kwargs, "transformer_options": block_options(options, self._read)}
        if self.place is not None and self.place < len(args):
            options = block_options(args[self.place] or {}, self._read)
            return (*args[: self.place], options, *args[self.place + 1 :]), kwargs
        return args, kwargs


class _Plan:
    """The blocks of one model instance, and whether they must be looked at again."""

    def __init__(self, model: Any, owner: RegionalCompiler) -> None:
        found = find_regions(model.diffusion_model, owner.settings.regions)
        self.blocks = [BlockForward(region, owner) for region in found]
        self.pictures = Pictures(model.diffusion_model) if owner.recorder is not None else None
        self.whole: WrappedForward | None = None
        if owner.recorder is not None and not runs_wrappers(model.diffusion_model):
            self.whole = WrappedForward(model.diffusion_model, owner.recorder)
        self.stamp: Any = None
        self.ran = False  # at least one call of the model has come to its end
        self.problem: str | None = None  # why the model as a whole cannot be recorded
        self._modules = dict(model.diffusion_model.named_modules())
        inside = frozenset(part for block in self.blocks for part in block.module.modules())
        self._around = LiveParts(model.diffusion_model, without=inside)
        self._foreign = foreign_class(model.diffusion_model)
        self._holders = [held for part in model.diffusion_model.modules() for held in (part._parameters, part._buffers)]

    def examine(self, device: torch.device, model: Any, recorder: CallRecorder | None) -> None:
        """Look at where weights are, and what other packs did, now."""
        self.problem = None
        for block in self.blocks:
            block.examine(device)
            if block.kind is None and block.key not in block.owner.failed:
                self.problem = self.problem or block.reason
        try:
            self._around.state(device)
        except NotTraceable as error:
            self.problem = str(error)
        if self._foreign is not None:
            self.problem = self.problem or self._foreign
        if self.pictures is None or recorder is None:
            return
        if self.problem is not None:
            self.pictures.release()  # nothing is recorded, mostly for want of memory
        else:
            from comfy.model_management import get_free_memory

            hooked = bool(getattr(getattr(model, "current_patcher", None), "hook_patches", None))
            self.pictures.examine(device, dtype_inside(model, torch.float32), get_free_memory(device), hooked)
        if self.pictures.lost:
            recorder.let_go(self)
            self.pictures.lost = False

    def weights(self) -> Hashable:
        """Where every weight of the model lies now; of a quantised one, where its numbers and scales lie.

        Its identity would not do: what replaces a weight that is gone often gets the same.
        """
        found: list[int] = []
        for held in self._holders:
            for weight in held.values():
                if type(weight) in ORDINARY:
                    found.append(weight.data_ptr())
                elif weight is not None:
                    found += [part.data_ptr() for part in parts_of(weight)[0]]
        return tuple(found)

    def pictures_key(self) -> Hashable:
        """Where copies of weights lie that our own kernels read, and which of those kernels there are."""
        if self.pictures is None:
            return None
        return tuple(copy.data_ptr() for copy in self.pictures.held), self.pictures.key

    def passed_by(self) -> dict[str, int]:
        """Blocks that no call so far has gone through, by their title: Wan-Animate 2 calls other methods of its own."""
        return dict(Counter(block.title for block in self.blocks if self.ran and not block.called))

    def fits(self, diffusion_model: nn.Module) -> bool:
        """Whether all is still there that was, and nothing else: nodes put other modules in, blocks or what stands between
        them (another embedding of places, for longer films), and take them out again."""
        return dict(diffusion_model.named_modules()) == self._modules


class RegionalCompiler:
    """What makes a MODEL compiled. Shared by all clones made of it."""

    def __init__(self, settings: CompileSettings, backend: Backend, backend_name: str) -> None:
        self.settings = settings
        self.backend = backend
        # Graphs depend on these; a backend given as a function has no name to share graphs by.
        self.key: Hashable = (settings.graph_key, backend_name or id(backend))
        self.errors = compile_errors() if settings.compiles else (RuntimeError,)
        self.kinds: set[CompiledKind] = set()
        self.failed: dict[Hashable, str] = {}  # kinds that could not be compiled, and why
        self._plans: weakref.WeakKeyDictionary[Any, _Plan] = weakref.WeakKeyDictionary()
        self.loads = 0  # rises with every run, and whenever weights are loaded or moved
        self._thread = threading.local()
        self.recorder: CallRecorder | None = None
        self._alone = True  # in the last call no other compiler came after

    def __deepcopy__(self, _: Any) -> RegionalCompiler:
        return self  # packs that copy a model's options whole must not copy the model along

    def changed(self, *_: Any, **__: Any) -> None:
        """A callback: weights were loaded or moved, or a run begins."""
        self.loads += 1

    def plan(self, model: Any, device: torch.device) -> _Plan:
        """The blocks of `model` (a BaseModel), examined for where their weights are now."""
        plan = self._plans.get(model)
        stamp = (
            self.loads,
            device,
            getattr(model, "model_loaded_weight_memory", None),
            getattr(model, "lowvram_patch_counter", None),
            getattr(model, "current_weight_patches_uuid", None),
        )
        if plan is not None and plan.stamp == stamp:
            return plan
        if plan is None or not plan.fits(model.diffusion_model):
            plan = self._plans[model] = _Plan(model, self)
        plan.examine(device, model, self.recorder)
        plan.stamp = stamp
        return plan

    def apply_model(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """An APPLY_MODEL wrapper: the blocks are compiled inside, and as they were outside."""
        options = kwargs.get("transformer_options", args[4] if len(args) > 4 else None)
        share_attention_log(options or {})
        alone = without_other_compilers(executor, options or {})
        self._alone = alone is None
        before = getattr(self._thread, "plan", None)
        # Triton launches on the current device, and a pack may have put the model on another one.
        with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
            plan = self._thread.plan = self.plan(executor.class_obj, x.device)
            try:
                with installed(self._forwards(plan)):
                    made = (executor if alone is None else alone)(x, *args, **kwargs)
            finally:
                self._thread.plan = before
        plan.ran = True
        if self.settings.compiles and self.settings.strict and not any(block.called for block in plan.blocks):
            raise CompilationRefused(f"Nothing of this model runs compiled: {NOT_CALLED}.")
        return made

    def _forwards(self, plan: _Plan) -> list[BlockForward | WrappedForward]:
        found: list[BlockForward | WrappedForward] = [*plan.blocks] if self.settings.compiles else []
        if plan.whole is not None:
            if self.recorder is not None and "forward" in vars(plan.whole.module):
                self.recorder.leave_out(f"a pack replaced the forward of {type(plan.whole.module).__name__}")
            found.append(plan.whole)
        return found

    def release(self, model: Any) -> _Plan | None:
        """The weights of `model` (a BaseModel) leave the device. Returns its blocks, if they are known."""
        plan = self._plans.get(model)
        if plan is not None and plan.pictures is not None:
            plan.pictures.release()
            plan.stamp = None  # copies are made anew when they are back
        return plan

    def current(self) -> _Plan:
        """The blocks of the model that runs in this thread."""
        plan: _Plan | None = getattr(self._thread, "plan", None)
        assert plan is not None, "outside a model call"
        return plan

    @property
    def graphs(self) -> int:
        """Graphs compiled so far, over all kinds."""
        return sum(kind.graphs for kind in self.kinds)

    @property
    def seconds(self) -> float:
        """Seconds spent compiling so far."""
        return sum(kind.seconds for kind in self.kinds)

    def fallbacks(self) -> dict[str, int]:
        """Why blocks ran as they are in the last call, and how many."""
        plans = list(self._plans.values())
        return dict(Counter(f"{b.title}: {b.reason}" for plan in plans for b in plan.blocks if b.reason))

    def report(self) -> str:
        """What is compiled, and what is not and why, as lines."""
        kinds = sorted((k for k in self.kinds if k.graphs), key=lambda kind: kind.title)
        nothing = "nothing compiled yet" if self.settings.compiles else "nothing is compiled in this mode"
        lines = [f"{self.graphs} graphs compiled in {self.seconds:.1f} s"] if kinds else [nothing]
        per_title = Counter[str]()
        for kind in kinds:
            per_title[kind.title] += kind.graphs
        lines += [f"  {title}: {count}" for title, count in per_title.items()]
        operators = {(name, what) for kind in kinds for name, what in kind.operators.items()}
        lines += [f"  {NAMESPACE}::{name} {what}" for name, what in sorted(operators)]
        lines += [f"  {count} x as it is, {reason}" for reason, count in self.fallbacks().items()]
        for plan in list(self._plans.values()) if self.settings.compiles else ():
            for title, count in plan.passed_by().items():
                lines.append(f"  {count} {title}: no call of the model went through their forward")
        if not self._alone:
            lines.append("  another node's TorchCompileModel came after: left out, blocks cannot be compiled twice")
        for plan in list(self._plans.values()):
            lines += plan.pictures.report() if plan.pictures is not None else []
        if self.recorder is not None:
            lines.append(self.recorder.report())
        return "\n".join(lines)


@contextmanager
def installed(forwards: Sequence[BlockForward | WrappedForward]) -> Iterator[None]:
    """Our `forward` on the modules that have none of another pack."""
    done: list[nn.Module] = []
    try:
        for forward in forwards:
            own = vars(forward.module)
            if "forward" not in own:
                own["forward"] = forward
                done.append(forward.module)
        yield
    finally:
        for module in done:
            vars(module).pop("forward", None)
