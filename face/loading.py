"""From a model name to an analyser: which files, which engine, which device, and why."""

from __future__ import annotations

import copy
import importlib.util
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
from ..host.errors import kind_and_line
from ..host.interruption import interruptibly, is_stop, read_ahead
from ..products.metal import order_on
from .detection import Detector
from .engine_diagnosis import can_be_tried, why_no_insightface, why_not
from .faces import FaceError
from .foreign import ForeignAnalyser
from .insightface_api import CompatibleAnalyser
from .model_folder import ModelFolder, find_model_folder
from .onnx_graph import OnnxNetwork
from .onnx_outline import Outline
from .onnxruntime_engine import PROVIDERS, OnnxRuntimeRunner, Provider, UnverifiedProvider, provider_for
from .recognition import Recogniser
from .runner import DETECTOR_BYTES_PER_PIXEL, PRECISIONS, RECOGNISER_BYTES_PER_PIXEL, TorchRunner

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
    provider: str = "auto",
) -> CompatibleAnalyser | ForeignAnalyser:
    """The face analyser `name` from the first of the insightface `folders` that has it.

    engine: "torch"; "onnxruntime"; "insightface" (the library itself); "auto" is torch on an accelerator, and on the CPU
    onnxruntime where it is installed, else torch. An engine that cannot run falls back to torch, and `report()` says why
    and what to do. device: default the host's. manage: puts a network under memory management, default the host's.
    precision: fp32, or fp16 and bf16 where the weights stand it (torch only). remember: keep results by content.
    provider: of onnxruntime, one of PROVIDERS; "auto" is the one for the device.
    Raises FaceError, in one sentence with the cure, for what is missing or broken.
    """
    if engine not in ENGINES:
        raise FaceError(f"{engine!r} is no face engine; it is one of: {', '.join(ENGINES)}.")
    if precision not in PRECISIONS:
        raise FaceError(f"{precision!r} is no precision; it is one of: {', '.join(PRECISIONS)}.")
    if provider != "auto" and provider not in PROVIDERS:
        raise FaceError(f"{provider!r} is no onnxruntime provider; it is one of: auto, {', '.join(PROVIDERS)}.")
    folder = find_model_folder(folders, name)
    device = device or host.current().device()
    manage = manage or _manage_for(device)
    chosen = PROVIDERS[provider] if provider != "auto" else provider_for(device)
    why = ""
    if engine == "insightface":
        reason = why_no_insightface()
        if reason is None:
            try:
                return _load_insightface(folder, chosen, device, remember, precision)
            except Exception as error:  # the errors of onnxruntime and of insightface share no base class
                if is_stop(error):
                    raise
                reason = f"it cannot be loaded with {folder.path} ({kind_and_line(error)})"
        why = f"insightface was asked for, but {reason}."
    elif engine == "onnxruntime" or (engine == "auto" and device.type == "cpu" and precision == "fp32"):
        reason = why_not(chosen)
        if reason is None:
            try:
                said = "" if engine == "onnxruntime" else "On the CPU it is preferred where it is installed."
                if precision != "fp32":
                    said = f"{precision} is for the torch engine; onnxruntime computes in fp32."
                return _load_onnxruntime(folder, chosen, device, manage, remember, said)
            except UnverifiedProvider as error:
                reason = f"{error}; `hotpath doctor` says what is installed"
        if engine == "onnxruntime":
            why = f"onnxruntime {chosen.name} was asked for, but {reason}."
        elif importlib.util.find_spec("onnxruntime") is not None:
            why = f"onnxruntime is installed, but {reason}."
    if why:
        log.warning("Faces run on torch: %s", why)
    return _load_torch(folder, device, manage, precision, remember, why)


def _load_onnxruntime(
    folder: ModelFolder, provider: Provider, device: torch.device, manage: Manage, remember: bool, why: str
) -> CompatibleAnalyser:
    detector = Detector(OnnxRuntimeRunner(folder.detector, provider, device), folder.detector)
    recogniser = folder.recogniser
    said = [why] if why else []

    def load_recogniser() -> Recogniser:
        assert recogniser is not None
        try:
            return Recogniser(OnnxRuntimeRunner(recogniser, provider, device), recogniser)
        except UnverifiedProvider as error:
            # It is loaded when a node first asks for an embedding, and torch can do that as well.
            said.append(f"The recogniser runs on torch: onnxruntime {provider.name} was chosen, but {error}.")
            log.warning("%s", said[-1])
            analyser.fingerprint = fingerprint(folder, "onnxruntime", provider.name, "recogniser on torch")
            place = detector.runner.device  # where the crops are
            own = manage if place == device else _manage_for(place)
            return Recogniser(_torch_runner(recogniser, place, own, "fp32", said), recogniser)

    key = fingerprint(folder, "onnxruntime", provider.name)
    analyser = CompatibleAnalyser(folder, detector, load_recogniser, key, said, remember)
    return analyser


def _load_insightface(
    folder: ModelFolder, provider: Provider, device: torch.device, remember: bool, precision: str
) -> ForeignAnalyser:
    from insightface.app import FaceAnalysis

    said = []
    if not can_be_tried(provider):
        # The library stops at some of these, and goes on without a word at others.
        said.append(f"{provider.name} was asked for, but it runs on the CPU: {why_not(provider)}.")
        log.warning("Faces by insightface: %s", said[-1])
        provider = PROVIDERS["CPU"]
    if precision != "fp32":
        said.append(f"{precision} is for the torch engine; insightface computes in fp32.")
    names = [provider.long_name] + (["CPUExecutionProvider"] if provider.name != "CPU" else [])
    modules = ["detection"] + (["recognition"] if folder.recogniser is not None else [])
    if provider.memory == "cuda":
        # As for our own sessions: it takes memory that the host does not know of.
        files = [file for file in (folder.detector, folder.recogniser) if file is not None]
        needed = sum(file.path.stat().st_size for file in files) + 640 * 640 * DETECTOR_BYTES_PER_PIXEL
        host.current().make_room(needed, torch.device("cuda", device.index or 0))
    # By its path: a name would make the library look elsewhere, and download.
    analysis = interruptibly(lambda: FaceAnalysis(name=str(folder.path), allowed_modules=modules, providers=names))
    analysis.prepare(ctx_id=0, det_size=(640, 640))
    if provider.name != "CPU":
        actual = analysis.det_model.session.get_providers()[0]
        if actual != provider.long_name:
            reason = why_not(provider)
            said.append(f"{provider.name} was asked for, but runs on {actual}" + (f": {reason}." if reason else "."))
            log.warning("Faces by insightface: %s", said[-1])
        else:
            said.append(f"{provider.name} is what the session lists; insightface does not let it be verified.")
    key = fingerprint(folder, "insightface", provider.name) if remember else ""
    return ForeignAnalyser(analysis, " ".join([*said, *folder.notes]), key)


def _manage_for(device: torch.device) -> Manage:
    if device == host.current().device():
        return host.current().manage
    return lambda module: Stationary(module, device)


def _load_torch(
    folder: ModelFolder, device: torch.device, manage: Manage, precision: str, remember: bool, why: str
) -> CompatibleAnalyser:
    said = [why] if why else []
    detector = Detector(_torch_runner(folder.detector, device, manage, precision, said), folder.detector)
    recogniser = folder.recogniser

    def load_recogniser() -> Recogniser:
        assert recogniser is not None
        return Recogniser(_torch_runner(recogniser, device, manage, precision, said), recogniser)

    key = fingerprint(folder, "torch", str(device), precision)
    return CompatibleAnalyser(folder, detector, load_recogniser, key, said, remember)


def _torch_runner(file: Outline, device: torch.device, manage: Manage, precision: str, said: list[str]) -> TorchRunner:
    """The network of `file` in torch; where it does not stand `precision`, in fp32, and `said` gets a sentence."""
    read_ahead(file.path)
    network = interruptibly(lambda: OnnxNetwork(file.path, order_on(device)))
    kept = precision
    if precision != "fp32":
        cosine = agreement(network, file, device, PRECISIONS[precision])
        log.info("%s: cosine %.5f between fp32 and %s", file.path.name, cosine, precision)
        if not cosine >= SAME_DIRECTION:
            kept = "fp32"
            said.append(f"{file.path.name} stays in fp32: in {precision} its outputs turn (cosine {cosine:.4f}).")
    each = RECOGNISER_BYTES_PER_PIXEL if file.kind == "recognition" else DETECTOR_BYTES_PER_PIXEL
    return TorchRunner(network.to(PRECISIONS[kept]), manage(network), device, kept, each)


def fingerprint(folder: ModelFolder, *settings: Any) -> str:
    """What a result depends on besides the picture: the files, the engine and its settings."""
    files = [folder.detector.path] + ([folder.recogniser.path] if folder.recogniser is not None else [])
    return " ".join([*(file_fingerprint(f) for f in files), *map(str, settings)])


def agreement(network: OnnxNetwork, file: Outline, device: torch.device, dtype: torch.dtype) -> float:
    """The least cosine, over outputs, between the network in float32 and in `dtype` on noise pictures, on `device`."""
    height, width = (n or 160 for n in file.size)
    noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        full: list[Tensor] = [o.float() for o in network.to(device)(noise)]
        # A copy: the weights rounded once cannot be made exact again.
        half: list[Tensor] = [o.float() for o in copy.deepcopy(network).to(dtype)(noise.to(dtype))]
    return min(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(full, half, strict=True))
