"""The onnxruntime engine: any of its execution providers, believed only after the graph was seen to run there.

`get_available_providers()` lists CUDA on machines without a driver, and sessions fall back to the CPU without an error.
So a session is asked where it put its convolutions and matrix products; a provider that did not get all of them, or an
onnxruntime that cannot say, is not called by that provider's name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from .. import host
from ..host.interruption import interruptibly, read_ahead
from .faces import FaceError
from .onnx_graph import read_model
from .onnx_outline import Outline
from .runner import DETECTOR_BYTES_PER_PIXEL, RECOGNISER_BYTES_PER_PIXEL

log = logging.getLogger("hotpath.face")

HEAVY = ("Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "NhwcFusedConv")
MOST_OFF = 0.05  # of a provider that may compute in half precision, of its outputs' size
SESSIONS_KEPT = 2  # per network, on providers that want fixed sizes
WITH_ARMS_KERNELS_RIGHT = "1.28"


@dataclass(frozen=True)
class Provider:
    """An execution provider: its name, the package that has it, and the memory it reads."""

    name: str
    package: str
    memory: str  # device type of torch tensors it can be bound to
    options: tuple[tuple[str, str], ...] = ()
    systems: tuple[str, ...] = ()  # values of sys.platform for which there are builds; none named: all
    spelling: str = ""  # of the name in onnxruntime, where it has another

    @property
    def long_name(self) -> str:
        """As onnxruntime calls it."""
        return f"{self.spelling or self.name}ExecutionProvider"


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("CPU", "onnxruntime", "cpu"),
        # HEURISTIC: the exhaustive search for an algorithm takes seconds for every new input size.
        Provider(
            "CUDA", "onnxruntime-gpu", "cuda", (("cudnn_conv_algo_search", "HEURISTIC"),), systems=("linux", "win32")
        ),
        Provider("TensorRT", "onnxruntime-gpu", "cuda", systems=("linux", "win32"), spelling="Tensorrt"),
        Provider("MIGraphX", "onnxruntime-migraphx", "cuda", systems=("linux",)),
        Provider("CoreML", "onnxruntime", "cpu", systems=("darwin",)),
        Provider("DirectML", "onnxruntime-directml", "cpu", systems=("win32",), spelling="Dml"),
        Provider("OpenVINO", "onnxruntime-openvino", "cpu", systems=("linux", "win32")),
    )
}


def provider_for(device: torch.device) -> Provider:
    """The provider that computes where torch does on `device`."""
    if device.type == "cuda":
        return PROVIDERS["MIGraphX" if torch.version.hip else "CUDA"]
    if device.type == "mps":
        return PROVIDERS["CoreML"]
    if device.type == "xpu":
        return PROVIDERS["OpenVINO"]
    return PROVIDERS["DirectML"] if device.type == "privateuseone" else PROVIDERS["CPU"]


def session_options() -> Any:
    """What all sessions have in common."""
    import onnxruntime
    from packaging.version import Version

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait are a little quicker alone, and many times slower on a busy machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if Version(onnxruntime.__version__) < Version(WITH_ARMS_KERNELS_RIGHT):
        # On Apple's M4, and other processors with SME, they keep memory of every new picture, and a run again gives other numbers
        # (onnxruntime 28231 and 31569).
        options.add_session_config_entry("mlas.disable_kleidiai", "1")
    return options


def heavy_share(session: Any, provider: Provider) -> float | None:
    """The part of the heavy nodes that runs on `provider`; None when this onnxruntime cannot say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    here = total = 0
    for group in session.get_provider_graph_assignment_info():
        heavy = sum(node.op_type in HEAVY for node in group.get_nodes())
        total += heavy
        here += heavy if group.ep_name == provider.long_name else 0
    return here / total if total else None


class UnverifiedProvider(RuntimeError):
    """The session cannot be made, or does not run where it was asked to; the message says why or where."""


def open_batch(path: Path) -> bytes:
    """The file with its batch, height and width named and open, whatever its header said.

    Published detectors declare a batch of one which nothing in their graph needs.
    """
    graph = (model := read_model(path)).graph
    stored = {t.name for t in graph.initializer}
    given = next(value for value in graph.input if value.name not in stored)
    dims = given.type.tensor_type.shape.dim
    dims[0].ClearField("dim_value")
    dims[0].dim_param = "batch"
    for dim, name in zip(dims[2:], ("height", "width"), strict=False):
        if dim.dim_value <= 0:
            dim.dim_param = name
    for output in graph.output:
        for axis, dim in enumerate(output.type.tensor_type.shape.dim):
            dim.ClearField("dim_value")
            dim.dim_param = f"{output.name}_{axis}"
    # Shapes that were inferred for a batch of one contradict the new header.
    del graph.value_info[:]
    data: bytes = model.SerializeToString()
    return data


class OnnxRuntimeRunner:
    """A network in onnxruntime, reading and writing torch's memory."""

    engine = "onnxruntime"

    def __init__(self, file: Outline, provider: Provider, device: torch.device) -> None:
        """`device` is torch's. Raises UnverifiedProvider when the provider does not get the heavy nodes, or errs."""
        self.file = file
        self.provider = provider
        self.device = device if provider.memory == device.type else torch.device("cpu")
        self.where = f"{provider.long_name} fp32"
        read_ahead(file.path)
        self._model = open_batch(file.path)
        self._sessions: dict[tuple[int, int], Any] = {}
        self._seen: set[tuple[int, ...]] = set()  # shapes that the open sessions have run
        self._open = None in file.size
        height, width = (n or 640 for n in file.size)
        self._check(self._session(height, width))
        if provider.name != "CPU":
            self._compare(height, width)

    def _session(self, height: int, width: int) -> Any:
        # Fixed sizes let a provider fold the shape arithmetic away instead of sending it to the CPU; the CPU does not care.
        fixed = self.provider.name != "CPU" and self._open
        key = (height, width) if fixed else (0, 0)
        if key in self._sessions:
            return self._sessions[key]
        import onnxruntime

        options = session_options()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if fixed:
            options.add_free_dimension_override_by_name("height", height)
            options.add_free_dimension_override_by_name("width", width)
        settings = dict(self.provider.options)
        if self.provider.memory == "cuda":
            if hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()  # finds the CUDA libraries torch brought
            settings["device_id"] = str(self.device.index or 0)
            # Its arena is outside of the host's memory, which would otherwise keep its own models there.
            card = torch.device("cuda", self.device.index or 0)
            host.current().make_room(len(self._model) + self._activations(height, width), card)
        providers: list[Any] = [(self.provider.long_name, settings)]
        if self.provider.name != "CPU":
            providers.append("CPUExecutionProvider")
        try:
            # Some seconds; minutes where TensorRT builds an engine.
            session = interruptibly(lambda: onnxruntime.InferenceSession(self._model, options, providers=providers))
        except Exception as error:  # onnxruntime's errors share no base class
            raise UnverifiedProvider(f"onnxruntime cannot open {self.file.path.name} there ({error})") from error
        while len(self._sessions) >= SESSIONS_KEPT:
            del self._sessions[next(iter(self._sessions))]
            self._seen.clear()
        self._sessions[key] = session
        return session

    def _activations(self, height: int, width: int) -> int:
        """Bytes, of one picture."""
        recognises = self.file.kind == "recognition"
        return height * width * (RECOGNISER_BYTES_PER_PIXEL if recognises else DETECTOR_BYTES_PER_PIXEL)

    def _check(self, session: Any) -> None:
        first = session.get_inputs()[0]
        if first.type != "tensor(float)":
            raise FaceError(f"{self.file.path} takes {first.type} where float pictures are needed; use the fp32 file.")
        if self.provider.name == "CPU":
            return
        if (actual := session.get_providers()[0]) != self.provider.long_name:
            raise UnverifiedProvider(f"the session was made on {actual} instead of {self.provider.long_name}")
        share = heavy_share(session, self.provider)
        if share is None:
            raise UnverifiedProvider(
                "this onnxruntime cannot say where its nodes run, so the provider cannot be verified (1.24 and later can)"
            )
        if share < 1.0:
            raise UnverifiedProvider(f"{self.provider.long_name} runs only {share:.0%} of the convolutions")

    def _compare(self, height: int, width: int) -> None:
        """Providers have computed other numbers than the network's, and said nothing."""
        import onnxruntime

        noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        plain = interruptibly(
            lambda: onnxruntime.InferenceSession(self._model, session_options(), providers=["CPUExecutionProvider"])
        )
        wanted = [torch.from_numpy(one) for one in plain.run(None, {plain.get_inputs()[0].name: noise.numpy()})]
        found = [one.cpu() for one in self.run(noise.to(self.device))]
        off = max(float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(found, wanted, strict=True))
        if not off <= MOST_OFF:
            raise UnverifiedProvider(f"{self.provider.long_name} computes other numbers than the CPU ({off:.0%} off)")

    def run(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        session = self._session(int(x.shape[2]), int(x.shape[3]))
        place, index = self.device.type, self.device.index or 0
        binding = session.io_binding()
        binding.bind_input(session.get_inputs()[0].name, place, index, np.float32, tuple(x.shape), x.data_ptr())
        for output in session.get_outputs():
            binding.bind_output(output.name, place, index)
        if place == "cuda":
            # onnxruntime works on a stream of its own and takes torch's default stream for "none given".
            torch.cuda.current_stream(self.device).synchronize()
        if self.provider.name == "CPU" or tuple(x.shape) in self._seen:
            session.run_with_iobinding(binding)
        else:  # a provider may compile for a shape when it first meets it
            interruptibly(partial(_run, session, binding, x))
            self._seen.add(tuple(x.shape))
        binding.synchronize_outputs()
        return [_to_torch(value, self.device) for value in binding.get_outputs()]

    def release(self) -> None:
        """Close the sessions; the next run opens them again."""
        self._sessions.clear()
        self._seen.clear()


def _run(session: Any, binding: Any, _read: Tensor) -> None:
    # The binding has only the address of what it reads, which a run that was left goes on reading.
    session.run_with_iobinding(binding)


def _to_torch(value: Any, device: torch.device) -> Tensor:
    if hasattr(value, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(value)
    return torch.from_numpy(value.numpy()).to(device)
