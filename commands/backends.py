"""Which optional libraries and attention backends can be used here, in which version, and if not, why."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from packaging.requirements import InvalidRequirement, Requirement

from ..attention.dispatch import dispatcher
from ..distributed.ray_cluster import without_tokens
from ..host.headless import best_device
from ..host.library_parts import BrokenLibrary, for_this_torch, parts


@dataclass(frozen=True)
class Backend:
    """One optional library. `detail` is what it offers, or the reason why it cannot be used, with the cure."""

    name: str
    used_for: str
    available: bool
    version: str
    detail: str


@dataclass(frozen=True)
class _Library:
    module: str
    used_for: str
    cure: str
    distributions: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()  # that show whether it can be used, of one that imports them when they are asked for
    look: Callable[[Any], str] | None = None


def _onnxruntime(module: Any) -> str:
    # A GPU build lists its providers even where it cannot load them, so this is only what the build could use.
    return "providers of this build: " + ", ".join(module.get_available_providers())


def _ray(module: Any) -> str:
    return (
        "no token authentication, so it is not used; pip install 'ray>=2.52'"
        if without_tokens(module.__version__)
        else ""
    )


LIBRARIES = (
    _Library(
        "triton",
        "fused kernels on NVIDIA and AMD",
        "it comes with torch on Linux; on Windows `pip install triton-windows`",
        ("triton", "triton-windows"),
    ),
    _Library("onnx", "reads face models", "pip install onnx"),
    _Library(
        "onnxruntime",
        "optional face engine",
        "pip install onnxruntime-gpu, or onnxruntime where there is no NVIDIA GPU; never both",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-migraphx"),
        look=_onnxruntime,
    ),
    _Library("insightface", "optional face engine", "pip install insightface"),
    _Library("transformers", "Qwen-VL", "pip install transformers accelerate", parts=("AutoProcessor",)),
    _Library(
        "diffusers",
        "Z-Image folders",
        "pip install diffusers transformers accelerate",
        parts=("ZImageTransformer2DModel",),
    ),
    _Library("torchao", "float8 and int8 of Z-Image folders", "pip install torchao"),
    _Library("bitsandbytes", "optional 8-bit and 4-bit weights of Qwen-VL", "pip install bitsandbytes"),
    _Library("ray", "many GPUs and machines", "pip install 'ray>=2.52'", look=_ray),
    _Library("scenedetect", "shots of a film", "pip install scenedetect opencv-python-headless"),
    _Library(
        "cv2",
        "read by scenedetect",
        "pip install opencv-python-headless",
        (
            "opencv-python",
            "opencv-python-headless",
            "opencv-contrib-python",
            "opencv-contrib-python-headless",
        ),
    ),
    _Library("matplotlib", "charts of reports", "pip install matplotlib"),
    _Library("lpips", "optional measure of Compare Pictures", "pip install lpips"),
    _Library("av", "video files", "pip install av"),
    _Library("spatial_correlation_sampler", "optional ColorMNet backend", "pip install spatial-correlation-sampler"),
)


def look_at_backends() -> list[Backend]:
    """Import each library and see. Takes seconds when heavy ones are installed."""
    return [*(_look(library) for library in LIBRARIES), *attention_backends(best_device())]


def attention_backends(device: torch.device) -> list[Backend]:
    """Every way to compute attention that the dispatcher knows, as it stands on `device`."""
    found: list[Backend] = []
    reasons = dispatcher().available(device)
    for name, reason in reasons.items():
        backend = dispatcher().backends[name]
        used_for = f"attention by {backend.what}" + ("" if backend.exact else ", lossy, by name only")
        installed = _installed(backend.distributions)
        found.append(Backend(name, used_for, reason is None, ", ".join(installed.values()), reason or ""))
    return found


def _look(library: _Library) -> Backend:
    installed = _installed(library.distributions or (library.module.replace("_", "-"), library.module))
    version = ", ".join(f"{name} {number}" for name, number in installed.items())
    try:
        module = importlib.import_module(library.module)
        parts(library.module, *library.parts)
    except BrokenLibrary as error:
        return Backend(library.module, library.used_for, False, version, str(error))
    except ModuleNotFoundError as error:
        if error.name == library.module and not installed:
            return Backend(library.module, library.used_for, False, "", f"not installed; {library.cure}")
        return Backend(
            library.module, library.used_for, False, version, f"it needs {error.name}; {_bring(str(error.name))}"
        )
    except Exception as error:  # a library built for another torch or CUDA may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        reasons = filter(None, (f"its import fails: {reason}", for_this_torch(library.module, error)))
        return Backend(library.module, library.used_for, False, version, "; ".join(reasons))
    version = version or str(getattr(module, "__version__", ""))
    detail = library.look(module) if library.look else ""
    if len(installed) > 1:
        names = " and ".join(installed)
        clash = f"{names} share one folder and overwrite each other: uninstall all of them, then install one"
        detail = "; ".join(filter(None, (clash, detail)))
    return Backend(library.module, library.used_for, True, version, detail)


def _bring(module: str) -> str:
    """The command for a module that is missing: of a package that is there, a newer release has it."""
    package = module.partition(".")[0]
    return f"pip install {'--upgrade ' if package in sys.modules else ''}{package}"


def _installed(names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[importlib.metadata.metadata(name)["Name"]] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def unmet_requirements(lines: list[str]) -> list[str]:
    """Requirement lines that this environment does not meet, with what it has instead."""
    unmet = []
    for line in lines:
        try:
            requirement = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:
            continue
        try:
            have = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            unmet.append(f"{requirement} (not installed)")
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            unmet.append(f"{requirement} (installed: {have})")
    return unmet
