"""Why an engine or an onnxruntime provider is not used here, and the exact cure. Nothing is installed or started.

A library is asked by importing it: one that is installed and does not load, as without its DLLs, is none.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import torch

from ..host.cards import why_no_gpu
from ..host.errors import kind_and_line
from ..host.headless import best_device
from .onnxruntime_engine import PROVIDERS, Provider

FLAVOURS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
)
# The last onnxruntime-gpu for each CUDA that torch may bring; newer ones want the next.
LAST_FOR_CUDA = {11: "onnxruntime-gpu<1.19", 12: "onnxruntime-gpu<1.27"}
SYSTEMS = {"linux": "Linux", "win32": "Windows", "darwin": "macOS"}  # by sys.platform


def installed_flavours() -> dict[str, str]:
    """The onnxruntime packages of this environment, with versions. All of them share one folder."""
    found = {}
    for name in FLAVOURS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cuda_of_onnxruntime() -> int | None:
    """The CUDA major version this onnxruntime was built for; None when it does not say or was built for none."""
    import onnxruntime

    version = str(getattr(onnxruntime, "cuda_version", "") or "")
    return int(version.split(".")[0]) if version.split(".")[0].isdigit() else None


def _import_fault(library: str) -> str | None:
    """What importing `library`, which is installed, ends with; None when it loads."""
    try:
        importlib.import_module(library)
    except Exception as error:  # whatever its native parts raise
        return kind_and_line(error)
    return None


def _reinstall(package: str) -> str:
    needs = ", and install the current Visual C++ Redistributable" if sys.platform == "win32" else ""
    return f"pip install --force-reinstall {package}{needs}"


def why_not(provider: Provider) -> str | None:
    """What keeps `provider` from being used, as a sentence with the cure; None when nothing is known to."""
    if provider.systems and sys.platform not in provider.systems:
        return f"{provider.name} exists on {' and '.join(SYSTEMS[s] for s in provider.systems)} only"
    flavours = installed_flavours()
    if importlib.util.find_spec("onnxruntime") is None:
        return f"onnxruntime is not installed: pip install {provider.package}"
    fault = _import_fault("onnxruntime")
    if len(flavours) > 1 and (fault is not None or provider.name != "CPU"):
        listed = ", ".join(f"{name} {version}" for name, version in flavours.items())
        return (
            f"two onnxruntime packages overwrite each other in one folder ({listed}): "
            f"pip uninstall -y {' '.join(flavours)} && pip install {provider.package}"
        )
    if fault is not None:
        return f"its import fails ({fault}): {_reinstall(next(iter(flavours), provider.package))}"
    if provider.name == "CPU":
        return None
    import onnxruntime

    no_gpu = why_no_gpu() if provider.memory == "cuda" and not torch.cuda.is_available() else None
    # Another build is no cure where torch has no GPU, so that comes first.
    if reasons := [reason for reason in (no_gpu, _not_in_build(provider)) if reason is not None]:
        return "; and ".join(reasons)
    if provider.memory != "cuda":
        return None
    ours, theirs = torch.version.cuda, cuda_of_onnxruntime()
    if ours is not None and theirs is not None and int(ours.split(".")[0]) != theirs:
        package = LAST_FOR_CUDA.get(int(ours.split(".")[0]), "onnxruntime-gpu")
        return (
            f"onnxruntime {onnxruntime.__version__} needs CUDA {theirs} and this torch has CUDA {ours}: "
            f"pip install '{package}'"
        )
    return None


def can_be_tried(provider: Provider) -> bool:
    """Whether a session on `provider` may come to be, for a library that makes sessions of its own."""
    import onnxruntime

    has_card = provider.memory != "cuda" or torch.cuda.is_available()
    return has_card and provider.long_name in onnxruntime.get_available_providers()


def _not_in_build(provider: Provider) -> str | None:
    import onnxruntime

    if provider.long_name in onnxruntime.get_available_providers():
        return None
    flavours = installed_flavours()
    present = ", ".join(flavours) or "this build"
    return (
        f"{provider.long_name} is not in {present} {onnxruntime.__version__}: "
        f"pip uninstall -y {' '.join(flavours) or 'onnxruntime'} && pip install {provider.package}"
    )


def why_the_cpu() -> str:
    """Why the host computes on the CPU, with the cure."""
    if best_device().type != "cpu":
        return "ComfyUI was started for it (--cpu), so start it without"
    return "torch sees no GPU that Metal serves on this Mac" if sys.platform == "darwin" else why_no_gpu()


def why_no_insightface() -> str | None:
    """What keeps insightface from being used, as a sentence with the cure; None when it can be imported."""
    if importlib.util.find_spec("insightface") is None:
        return "insightface is not installed: pip install insightface"
    if (reason := why_not(PROVIDERS["CPU"])) is not None:
        return f"its onnxruntime cannot be used: {reason}"
    fault = _import_fault("insightface.app")
    return None if fault is None else f"its import fails ({fault}): {_reinstall('insightface')}"


def diagnose() -> list[str]:
    """One line per engine and provider: ready, or why not and what to do. For `hotpath doctor`."""
    lines = ["torch: ready"]
    for provider in PROVIDERS.values():
        reason = why_not(provider)
        # A healthy installation has one of these builds; the others are no fault of it.
        missing = _not_in_build(provider) if why_not(PROVIDERS["CPU"]) is None else None
        if reason is not None and missing is not None and reason.endswith(missing):
            wants_gpu = provider.memory == "cuda" and not torch.cuda.is_available()
            reason = "not for this machine: torch sees no GPU" if wants_gpu else f"not installed, optional; {reason}"
        verified = "ready" if provider.name == "CPU" else "installed; verified when a model is loaded"
        lines.append(f"onnxruntime {provider.name}: {verified if reason is None else reason}")
    lines.append(f"insightface: {why_no_insightface() or 'ready'}")
    return lines
