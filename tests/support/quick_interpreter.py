"""Triton's interpreter looks through its whole language at every launch, and makes a table at every look at a dtype: once is
enough. And what it makes of one comparison for a whole block are integers, which Triton 3.9 takes for no mask.
"""

from __future__ import annotations

import inspect
from typing import Any


def hurry() -> None:
    """Let what does not change from launch to launch be found out once. Releases that do it differently stay as they are."""
    import triton.language as tl
    from triton.runtime import interpreter

    if tuple(inspect.signature(interpreter._patch_builtin).parameters) == ("pkg", "builder", "scope"):
        builtins: dict[int, list[tuple[str, Any]]] = {}

        def patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
            if id(pkg) not in builtins:
                members = inspect.getmembers(pkg)
                builtins[id(pkg)] = [(name, member) for name, member in members if tl.core.is_builtin(member)]
            for name, member in builtins[id(pkg)]:
                interpreter._patch_attr(pkg, name, member, builder, scope)

        interpreter._patch_builtin = patch_builtin

    plain = interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    def get_np_dtype(tt_dtype: Any) -> Any:
        name = tt_dtype.name if type(tt_dtype) is tl.dtype else None
        if name is None:
            return plain(tt_dtype)
        if name not in dtypes:
            dtypes[name] = plain(tt_dtype)
        return dtypes[name]

    interpreter._get_np_dtype = get_np_dtype

    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        made = splat(self, ret_ty, arg)
        made.data = made.data.astype(arg.data.dtype, copy=False)
        return made

    interpreter.InterpreterBuilder.create_splat = create_splat
