"""Parts of libraries that import a part when it is asked for, and then hide what broke it."""

from __future__ import annotations

import importlib
import re
import traceback
from typing import Any

import torch

from .errors import kind_and_line

ASKED = {"importlib", "numpy", "torch"}  # raise because of what somebody asks of them
OF_TORCH = re.compile(r"(module|from) 'torch[.']")  # what torch lacks, as Python tells of it


class BrokenLibrary(RuntimeError):
    """A library cannot be imported because of another one; the message names it and the cure."""


def parts(library: str, *names: str) -> list[Any]:
    """The named parts of an installed library. Raises ImportError where it has none of that name or is not there, and
    BrokenLibrary where another library that it imports breaks it, such as a torchao made for another torch."""
    try:
        module = importlib.import_module(library)
        return [getattr(module, name) for name in names]
    except Exception as error:
        root: BaseException = error
        while (cause := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
            root = cause
        if isinstance(root, ModuleNotFoundError) and root.name:
            raise root from None
        culprit = _culprit(root, library)
        if culprit is None:
            raise ImportError(f"{library}: {kind_and_line(root)}", name=library) from error
        raise BrokenLibrary(
            f"{library} cannot be used here, because {culprit}, which it imports, breaks off ({kind_and_line(root)}): "
            f"{for_this_torch(culprit, root) or f'update {culprit}'}, or uninstall it where nothing else needs it."
        ) from error


def for_this_torch(library: str, error: BaseException) -> str | None:
    """The cure where `library` broke off with `error` because it is made for another torch, an older or a newer one."""
    if library.startswith("torch") or OF_TORCH.search(str(error)):
        return f"install the {library} that is made for torch {torch.__version__}"
    return None


def _culprit(error: BaseException, library: str) -> str | None:
    """The package whose code was at work when `error` arose; None where that is `library` itself."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ASKED:
            return None if package == library or frame.f_globals is globals() else package
    return None
