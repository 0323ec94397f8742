"""From a model name to an analyser: which files, which engine, which device, and why."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..cache import file_fingerprint
from ..host import Managed
from .detection import Detector
from .faces import FaceError
from .insightface_api import CompatibleAnalyser
from .model_folder import ModelFolder, find_model_folder
from .onnx_graph import OnnxNetwork
from .onnx_outline import Outline
from .recognition import Recogniser
from .runner import PRECISIONS, TorchRunner

log = logging.getLogger("hotpath.face")

ENGINES = ("auto", "torch", "onnxruntime", "insightface")
Manage = Callable[[nn.Module], Managed]

SAME_DIRECTION = 0.999  # cosine between full and half precision that still counts as the same face


class Stationary:
    """Memory management for a device other than the host's: the network simply stays there."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device

    @contextmanager
    def resident(self, extra_bytes: int = 0, keep: bool = True) -> Iterator[nn.Module]:
        self.module.to(self.device)
        yield self.module
        if not keep:
            self.release()

    def release(self) -> None:
        self.module.to("cpu")


def load_analyser(
    folders: Sequence[Path],
    name: str = "antelopev2",
    engine: str = "auto",
    device: torch.device | None = None,
    manage: Manage | None = None,
    precision: str = "fp32",
    remember: bool = True,
) -> CompatibleAnalyser:
    """The face analyser `name` from the first of the insightface `folders` that has it.

    device: default the host's. manage: puts a network under memory management, default the host's on the host's device.
    precision: fp32, or fp16 and bf16 where the weights stand it. remember: keep results by content.
    Raises FaceError, in one sentence with the cure, for what is missing or broken.
    """
    if engine not in ENGINES:
        raise FaceError(f"{engine!r} is no face engine; it is one of: {', '.join(ENGINES)}.")
    if precision not in PRECISIONS:
        raise FaceError(f"{precision!r} is no precision; it is one of: {', '.join(PRECISIONS)}.")
    folder = find_model_folder(folders, name)
    device = device or host.current().device()
    return _load_torch(folder, device, manage or _manage_for(device), precision, remember, "Asked for.")


def _manage_for(device: torch.device) -> Manage:
    if device == host.current().device():
        return host.current().manage
    return lambda module: Stationary(module, device)


def _load_torch(
    folder: ModelFolder, device: torch.device, manage: Manage, precision: str, remember: bool, why: str
) -> CompatibleAnalyser:
    def runner(file: Outline) -> TorchRunner:
        network = OnnxNetwork(file.path)
        kept = precision
        if precision != "fp32":
            cosine = agreement(network, file, device, PRECISIONS[precision])
            log.info("%s: cosine %.5f between fp32 and %s", file.path.name, cosine, precision)
            kept = precision if cosine >= SAME_DIRECTION else "fp32"
        return TorchRunner(network.to(PRECISIONS[kept]), manage(network), device, kept)

    detector = Detector(runner(folder.detector), folder.detector)
    recogniser = folder.recogniser

    def load_recogniser() -> Recogniser:
        assert recogniser is not None
        return Recogniser(runner(recogniser), recogniser)

    return CompatibleAnalyser(
        folder, detector, load_recogniser, fingerprint(folder, "torch", str(device), precision), why, remember
    )


def fingerprint(folder: ModelFolder, *settings: Any) -> str:
    """What a result depends on besides the picture: the files, the engine and its settings."""
    files = [folder.detector.path] + ([folder.recogniser.path] if folder.recogniser is not None else [])
    return " ".join([*(file_fingerprint(f) for f in files), *map(str, settings)])


def agreement(network: OnnxNetwork, file: Outline, device: torch.device, dtype: torch.dtype) -> float:
    """The least cosine, over outputs, between the network in float32 and in `dtype` on noise pictures, on `device`."""
    height, width = (n or 160 for n in file.inputs[0][1][2:])
    noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        full: list[Tensor] = [o.float() for o in network.to(device)(noise)]
        # A copy: the weights rounded once cannot be made exact again.
        half: list[Tensor] = [o.float() for o in copy.deepcopy(network).to(dtype)(noise.to(dtype))]
    return min(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(full, half, strict=True))
