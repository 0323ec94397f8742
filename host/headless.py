"""The stand-in when there is no ComfyUI: platform folders, torch's devices, a tqdm bar, Ctrl-C."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import cgroup_memory, model_paths, user, whole_paths
from .cards import computes_in
from .device_work import give_back_cached
from .interface import Interrupted
from .interruption import let_layers_ask

log = logging.getLogger("hotpath.nodes")

MODEL_SUFFIXES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".pkl")


class HeadlessManaged:
    """A network that is moved to its device when used and, unless kept, back afterwards."""

    def __init__(self, module: nn.Module, device: torch.device, offload: torch.device) -> None:
        self.module = module.to(offload)
        self.device = device
        self._offload = offload
        self._lock = threading.RLock()
        if device.type == "cpu":
            let_layers_ask(module)

    @contextmanager
    def resident(self, extra_bytes: int = 0, keep: bool = True) -> Iterator[nn.Module]:
        with self._lock:
            try:
                self.module.to(self.device)
                yield self.module
            finally:
                if not keep:
                    self.release()

    def release(self) -> None:
        self.module.to(self._offload)


class TqdmProgress:
    """A bar on the terminal; silent when standard error is not one."""

    def __init__(self, host: HeadlessHost, total: int, label: str) -> None:
        from tqdm import tqdm

        self._host = host
        self._bar = tqdm(total=total, desc=label or None, leave=False, disable=None if host.show_progress else True)

    def update(self, steps: int = 1, preview: Any = None) -> None:
        self._bar.update(steps)
        if preview is not None and self._host.on_preview is not None:
            self._host.on_preview(preview)
        self._host.check_interrupt()

    def close(self) -> None:
        self._bar.close()


class HeadlessHost:
    """Paths, devices and progress for a plain Python process.

    models: the folder that holds `instantid/`, `insightface/` and the others; default HOTPATH_MODELS, else a
    `models` folder in the platform's data folder. `extra_models` are searched after it, then `kind_folders`: folders
    by kind, as a ComfyUI's extra_model_paths.yaml names them. A list of those that holds the folder of `models` too is searched
    first, in its order.
    """

    name = "headless"

    def __init__(
        self,
        models: Path | None = None,
        input_folder: Path | None = None,
        output_folder: Path | None = None,
        device: str | torch.device | None = None,
        extra_models: Sequence[Path] = (),
        show_progress: bool = True,
        kind_folders: Mapping[str, Sequence[Path]] | None = None,
        temp_folder: Path | None = None,
    ) -> None:
        configured = os.environ.get("HOTPATH_MODELS")
        self._models = [models or (Path(configured) if configured else user.data_folder() / "models"), *extra_models]
        self._kind_folders = dict(kind_folders or {})
        self._input = input_folder or Path.cwd()
        self._output = output_folder or Path.cwd() / "output"
        self._temp = temp_folder
        self._cache = user.cache_folder()
        self._device = torch.device(device) if device is not None else best_device()
        self._stop = threading.Event()
        self.show_progress = show_progress
        self.on_preview: Any = None
        self.texts: list[tuple[str | None, str]] = []
        self.node_id: str | None = None

    def model_folders(self, kind: str) -> list[Path]:
        further = self._kind_folders.get(kind, ())
        own = [root / kind for root in self._models]
        return list(dict.fromkeys([*further, *own] if own[0] in further else [*own, *further]))

    def all_model_folders(self) -> tuple[tuple[Path, ...], dict[str, list[Path]]]:
        return tuple(self._models), {kind: list(folders) for kind, folders in self._kind_folders.items()}

    def model_files(self, kind: str, suffixes: Sequence[str] = ()) -> list[str]:
        return model_paths.list_files(self.model_folders(kind), suffixes or MODEL_SUFFIXES)

    def announce_models(self, kind: str) -> None:
        """Nobody else in this process looks for models."""

    def model_path(self, kind: str, name: str) -> Path:
        return model_paths.find_file(kind, self.model_folders(kind), name)

    def input_folder(self) -> Path:
        return self._input

    def output_folder(self) -> Path:
        return self._output

    def temp_folder(self) -> Path:
        return self._temp or self._cache / "temp"

    def cache_folder(self) -> Path:
        return self._cache

    def open_folders(self) -> list[Path] | None:
        return whole_paths.named_folders()

    def keeps_workflows(self) -> bool:
        return True

    def own_comfyui(self) -> None:
        return None

    def device(self) -> torch.device:
        return self._device

    def vae_device(self) -> torch.device:
        return self._device

    def offload_device(self) -> torch.device:
        return torch.device("cpu")

    def picture_device(self) -> torch.device:
        return torch.device("cpu")

    def compute_dtype(
        self,
        parameters: int = 0,
        supported: Sequence[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
        device: torch.device | None = None,
    ) -> torch.dtype:
        device = device or self._device
        if device.type in ("cuda", "xpu", "mps"):
            for dtype in (torch.float16, torch.bfloat16):
                if dtype in supported and computes_in(device, dtype):
                    return dtype
        return torch.float32

    def free_memory(self, device: torch.device) -> int:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if device.type == "xpu":  # many of its drivers do not say what other programs hold
            return torch.xpu.get_device_properties(device).total_memory - torch.xpu.memory_allocated(device)
        return cgroup_memory.at_most(_free_on_this_machine())

    def locked_memory(self) -> int:
        return 0

    def make_room(self, nbytes: int, device: torch.device) -> None:
        if self.free_memory(device) < nbytes:
            gc.collect()
            give_back_cached(device)

    def manage(self, module: nn.Module, device: torch.device | None = None) -> HeadlessManaged:
        return HeadlessManaged(module, device or self._device, self.offload_device())

    def progress(self, total: int, label: str = "") -> TqdmProgress:
        return TqdmProgress(self, total, label)

    def stop(self) -> None:
        """Ask whatever runs to stop at its next check; what a Ctrl-C handler calls."""
        self._stop.set()

    def clear_stop(self) -> None:
        """Forget a request that nothing answered, so that the next run does not stop at its start."""
        self._stop.clear()

    def check_interrupt(self) -> None:
        if self._stop.is_set():
            self._stop.clear()
            raise Interrupted("Stopped on request.")

    def show_text(self, text: str, node_id: str | None = None) -> None:
        self.texts.append((node_id if node_id is not None else self.node_id, text))

    def warn(self, text: str, node_id: str | None = None) -> None:
        log.warning("%s", text)
        self.show_text(f"Warning: {text}", node_id)


def best_device() -> torch.device:
    """The accelerator torch can use, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _free_on_this_machine() -> int:
    try:
        import psutil  # type: ignore[import-untyped,unused-ignore]

        return int(psutil.virtual_memory().available)
    except ImportError:
        if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 4 << 30
