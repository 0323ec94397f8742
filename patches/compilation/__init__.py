"""torch.compile for any native ComfyUI MODEL, block by block."""

from __future__ import annotations

import atexit
import weakref
from typing import Any

from ..cpu_products import multiply_as_before, multiply_by_onednn
from ..model_call import is_sampled
from .graphs import Backend, named_backend, start_workers
from .options import attention_that_traces
from .recording import record_calls, recording_problem
from .regional import RegionalCompiler, forget_compiled_kinds
from .regions import describe_regions, find_regions
from .settings import KEY, MODES, REGIONS, CompilationRefused, CompileSettings, compiler_problem
from .unet_parts import describe_parts
from .wrapping import CORE_KEY

__all__ = [
    "MODES",
    "REGIONS",
    "CompilationRefused",
    "CompileSettings",
    "RegionalCompiler",
    "compile_model",
    "compiler_of",
    "forget_compiled_kinds",
    "uncompiled",
]

# Patchers of what was loaded without DynamicVRAM, by the model under it.
_static_models: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
atexit.register(_static_models.clear)  # as they go they ask modules that Python takes apart after this


def compiler_of(model: Any) -> RegionalCompiler | None:
    """The compiler of a MODEL that `compile_model` returned, or of a clone of it."""
    return model.get_attachment(KEY)


def compile_model(
    model: Any, settings: CompileSettings | None = None, backend: str | Backend = "inductor"
) -> tuple[Any, str]:
    """A clone of `model` (a ModelPatcher) whose repeated blocks run compiled, and a report of what was found.

    Nothing is compiled yet: that happens in the first call of the model with each kind of block, or in a warm-up.
    backend: a Dynamo backend by name or as a function; everything but "inductor" is for tests and comparisons.
    Raises ValueError for a model without repeated blocks or that no sampler calls, and CompilationRefused in strict mode
    when this machine has no compiler (no CUDA for "cudagraphs"); otherwise the clone's blocks then run as they were, and the
    report says so.
    On a CPU its linear layers are multiplied by oneDNN where that is faster, compiled or not.
    """
    chosen = settings or CompileSettings()
    if not is_sampled(model.get_model_object("diffusion_model")):
        raise ValueError(
            f"{type(model.model).__name__} is not called by a sampler but by nodes of its own, which Compile Model does not "
            "reach; leave it out."
        )
    if (problem := _problem(model, chosen, backend)) is not None:
        if chosen.strict:
            raise CompilationRefused(problem)
        made = model.clone()
        return made, _lines(problem, multiply_by_onednn(made))
    if chosen.compiles and backend == "inductor" and model.load_device.type == "cuda":
        start_workers()
    made, note = _static_clone(model)
    network = made.get_model_object("diffusion_model")
    found = find_regions(network, chosen.regions)
    if not found and chosen.compiles:
        raise ValueError(
            f"{type(made.model).__name__} has no repeated {'blocks' if chosen.regions == 'all blocks' else chosen.regions} "
            "to compile."
        )
    name = backend if isinstance(backend, str) else ""
    compiler = RegionalCompiler(chosen, named_backend(backend, chosen) if isinstance(backend, str) else backend, name)
    replaced = _attach(made, compiler)
    recorded = record_calls(made, compiler)
    sizes = "one graph for all sizes" if chosen.dynamic else "one graph per size"
    what = f"{sizes}: {describe_regions(found)}; compiled at first use" if chosen.compiles else "nothing is compiled"
    return made, _lines(
        f"{chosen.mode}, {what}",
        note,
        replaced,
        attention_that_traces()[1] if chosen.compiles else "",
        recorded,
        describe_parts(network) if compiler.recorder is not None else "",
        multiply_by_onednn(made),
    )


def _lines(*lines: str) -> str:
    return "\n".join(filter(None, lines))


def _problem(model: Any, settings: CompileSettings, backend: str | Backend) -> str | None:
    """Why nothing of `model` can be compiled, or recorded where that is all that was asked for."""
    if not settings.compiles:
        problem = recording_problem(model)
        return f"Not recorded: {problem}" if problem else None
    problem = compiler_problem(model.load_device.type) if backend == "inductor" else None
    return f"Not compiled: {problem}" if problem else None


def _attach(made: Any, compiler: RegionalCompiler) -> str:
    """Put `compiler` on `made`, a ModelPatcher that is already our clone, in the place of any other; a line on another node's."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    others = bool(made.get_wrappers(WrappersMP.APPLY_MODEL, CORE_KEY))
    for key in (CORE_KEY, KEY):
        made.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, key)
    made.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, compiler.apply_model)
    for moment in (
        CallbacksMP.ON_PRE_RUN,
        CallbacksMP.ON_LOAD,
        CallbacksMP.ON_INJECT_MODEL,
        CallbacksMP.ON_EJECT_MODEL,
    ):
        made.remove_callbacks_with_key(moment, KEY)
        made.add_callback_with_key(moment, KEY, compiler.changed)
    made.set_attachments(KEY, compiler)
    return "another node's TorchCompileModel came before: taken off, blocks cannot be compiled twice" if others else ""


def _static_clone(model: Any) -> tuple[Any, str]:
    """A clone whose weights stay where they are while the model runs, and a line where that costs something."""
    if not hasattr(model, "is_dynamic") or not model.is_dynamic():  # an older ComfyUI has no DynamicVRAM
        return model.clone(), ""
    if not hasattr(model, "get_clone_model_override"):  # the first releases that had it, where it was an option
        raise ValueError(
            "This MODEL is under DynamicVRAM, which moves weights while it runs, and this ComfyUI cannot load it without: "
            "start ComfyUI without --fast dynamic_vram, or update it."
        )
    if model.cached_patcher_init is None:
        raise ValueError(
            "This MODEL is under DynamicVRAM, which moves weights while it runs, and its loader gave no way to load it "
            "without; load it with ComfyUI's own loader, or start ComfyUI with --disable-dynamic-vram."
        )
    # What was loaded so serves every other clone of the same model, a changed LoRA too.
    kept = _static_models.get(model.model)
    if kept is None:
        load, given, *place = model.cached_patcher_init
        loaded = load(*given, disable_dynamic=True)
        kept = _static_models[model.model] = loaded[place[0]] if place else loaded
    made = model.clone(disable_dynamic=True, model_override=kept.get_clone_model_override())
    # To whom ComfyUI's books turn when this clone is gone. The one it was made of has other weights, and these would stay on
    # the card for good.
    made.parent = kept
    return (
        made,
        "DynamicVRAM is off for this model, since compiled graphs need weights that stay: it is loaded a second time",
    )


def uncompiled(model: Any) -> Any:
    """A clone of a MODEL that `compile_model` returned that runs as it was."""
    from comfy.patcher_extension import WrappersMP

    made = model.clone()
    made.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    made.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    multiply_as_before(made)
    return made
