"""What to tell of an error that a library raised: libraries write pages, a report has room for a line."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from .system_errors import FULL, sentence

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
# Metal, DirectML and the CPU say it in a plain RuntimeError.
MEMORY_SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "not enough GPU video memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
RUST = re.compile(r"\(os error (\d+)\)")  # ends what safetensors says, in an exception of its own
WINDOWS_FULL = (39, 112)  # its numbers, which are others than C's
# What a later line says: Dynamo's of what it cannot trace, and a C++ compiler's first error in what Inductor tells of it.
EXPLAINED = re.compile(
    r"^\s*Explanation: (?P<dynamo>.+)$|^Output:$(?s:.*?)\berror(?: C\d+)?: (?P<compiler>.+)$", re.MULTILINE
)
LACKING = re.compile(r"Compiler: (?P<name>.+?) is not found")  # what Inductor says of it on Windows
NAMED_OTHERWISE = {"PIL": "pillow", "yaml": "pyyaml"}  # modules whose distribution has another name


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of what `error` says, at most so many letters; the name of its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def kind_and_line(error: BaseException, most: int = 160) -> str:
    """The kind of `error` and the first line of what it says; of what a compiler's backend raised, inside torch's own. Where
    a compiler says in a later line what is wrong, that one too."""
    inner = getattr(error, "inner_exception", None)
    if inner is not None and (told := sentence(inner, _compilers_folder())):
        return told.removesuffix(".")
    error = inner or error
    if lacking := LACKING.search(str(error)):
        return no_compiler(lacking["name"])
    kind, said = type(error).__name__, first_line(error, most)
    if explained := EXPLAINED.search(str(error)):
        said = f"{said}: {explained['dynamo'] or explained['compiler']}"[:most]
    return kind if said == kind else f"{kind}: {said}"


def no_compiler(name: str) -> str:
    """That there is no C++ compiler called `name`, and the cure."""
    from_prompt = "the Build Tools of Visual Studio, and start ComfyUI from their x64 Native Tools Command Prompt"
    return f"there is no C++ compiler ({name}) on the PATH: install {from_prompt if os.name == 'nt' else 'one, such as g++'}"


def _compilers_folder() -> Path:
    """Where torch's compiler writes, by its own word once it has begun."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, the CPU included, has no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in MEMORY_SIGNS)


def is_full(error: BaseException) -> bool:
    """Whether `error` says that a disk, or what somebody may use of it, is full; SQLite and safetensors do in words only."""
    if isinstance(error, OSError):
        return error.errno in FULL
    if type(error).__name__ == "OperationalError":
        return "disk is full" in str(error)
    told = RUST.search(str(error))
    return told is not None and int(told[1]) in (*FULL, *WINDOWS_FULL)


def missing_library(error: BaseException) -> str:
    """The required library that is not installed, where that is what `error` says; else empty."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    module = error.name.partition(".")[0]
    name = NAMED_OTHERWISE.get(module, module)
    lines = REQUIREMENTS.read_text("utf-8").splitlines() if REQUIREMENTS.exists() else []
    return name if any(re.split(r"[<>=!~;\[ #]", line)[0].lower() == name.lower() for line in lines) else ""


def install(what: str) -> str:
    """The command that installs `what`, as pip is told it, for the Python that runs: people have several."""
    return f'"{sys.executable}" -m pip install {what}'


def install_requirements() -> str:
    """The command that installs what the pack cannot do without."""
    return install(f'-r "{REQUIREMENTS}"')
