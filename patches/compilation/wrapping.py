"""The wrappers of other nodes around a model's call, put in the order in which they go together with what is ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .blocks import names_used
from .options import OWN

CORE_KEY = "torch.compile"  # of the wrapper of ComfyUI's TorchCompileModel, and of other packs' nodes of that kind


def following(executor: Any) -> list[Callable[..., Any]]:
    """The wrappers that run inside of the one that was handed `executor`, a WrapperExecutor of ComfyUI's."""
    return list(executor.wrappers[executor.idx + 1 :])


def through(executor: Any, wrappers: list[Callable[..., Any]]) -> Callable[..., Any]:
    """What `executor` is around, with `wrappers` in the place of those that follow."""
    made: Callable[..., Any] = type(executor)(executor.original, executor.class_obj, wrappers, 0).execute
    return made


def _is_from(wrapper: Any, homes: str) -> bool:
    home = getattr(wrapper, "__module__", None) or ""
    return home.startswith(homes)


def others_first(executor: Any, own: Callable[..., Any]) -> Callable[..., Any] | None:
    """A call in which `own` is inside of all wrappers of other nodes; None where it is already.

    Step caches and their like decide at every call, whether their node comes before ours or after it.
    """
    inside = following(executor)
    ours = [wrapper for wrapper in inside if _is_from(wrapper, OWN)]
    if len(ours) == len(inside):
        return None
    others = [wrapper for wrapper in inside if not _is_from(wrapper, OWN)]
    return through(executor, [*others, own, *ours])


def without_other_compilers(executor: Any, options: dict[str, Any]) -> Callable[..., Any] | None:
    """A call without ComfyUI's TorchCompileModel, or another pack's, whose node came after ours; None where there is none.

    options: the call's `transformer_options`, which have the wrappers under their names.
    """
    from comfy.patcher_extension import WrappersMP

    compilers = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(CORE_KEY, ())
    inside = following(executor)
    kept = [wrapper for wrapper in inside if wrapper not in compilers]
    return through(executor, kept) if len(kept) < len(inside) else None


def runs_wrappers(network: nn.Module) -> bool:
    """Whether a diffusion model runs the wrappers that ComfyUI has for its calls; Stable Diffusion 3 and others do not."""
    kind: Any = type(network)
    return "DIFFUSION_MODEL" in names_used(kind)


class WrappedForward:
    """The `forward` during a model call of a network that runs no wrappers: `wrapper`, around what the class has.

    While that runs, the network is as it was.
    """

    def __init__(self, module: nn.Module, wrapper: Callable[..., Any]) -> None:
        self.module = module
        self._wrapper = wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from comfy.patcher_extension import WrapperExecutor

        own = vars(self.module)
        del own["forward"]
        try:
            around = WrapperExecutor.new_class_executor(self.module.forward, self.module, [self._wrapper])
            return around.execute(*args, **kwargs)
        finally:
            own["forward"] = self
