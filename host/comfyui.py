"""The host inside ComfyUI: folder_paths, model_management, ProgressBar and PromptServer.

ComfyUI is imported inside the methods only, so that this module can be imported, and type-checked, without it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import cgroup_memory, model_paths, node_warnings, whole_paths
from .downloads import is_loopback
from .interruption import let_layers_ask
from .letters import readable
from .own_comfyui import OwnComfyUI, for_another
from .unloading import before_unloading_all

log = logging.getLogger("hotpath.nodes")

WARNING_EVENT = "hotpath.warning"  # web/node_state.js listens to it
# Also where ComfyUI keeps its models on the card for good (--highvram, --gpu-only): what is sent away has to leave it.
OFFLOAD = torch.device("cpu")
PREVIEW_SIZE = 512  # longest side, in pixels, of the pictures a progress bar shows

_loading = threading.RLock()  # ComfyUI's list of loaded models is made for one thread
_in_use: list[Any] = []  # patchers of networks that are inside `resident`, once for each use


class ComfyUIManaged:
    """A network of ours in a ModelPatcher, so that ComfyUI can evict it and make room for it.

    A module with a method `before_leaving` is told before ComfyUI takes some of its weights off the device; `to` tells it when
    all of them go.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None) -> None:
        import comfy.model_management as management

        self.module = module
        self._lock = threading.RLock()  # one thread must not send away what another computes with
        self.device: torch.device = device or management.get_torch_device()
        if device is not None and not hasattr(management, "get_all_torch_devices"):
            before_unloading_all(_unload_other_devices)
        module.to(OFFLOAD)
        if self.device.type == "cpu":
            let_layers_ask(module)
        # Not CoreModelPatcher: with dynamic VRAM that one is for ComfyUI's own layers, and would upload every weight of
        # ours again each time it is asked for. ComfyUI keeps the present device on the module, as `model.device`.
        self.patcher = _patcher()(module, load_device=self.device, offload_device=OFFLOAD)

    @contextmanager
    def resident(self, extra_bytes: int = 0, keep: bool = True) -> Iterator[nn.Module]:
        import comfy.model_management as management

        with self._lock:
            with _loading:
                management.load_models_gpu([self.patcher], memory_required=extra_bytes, force_full_load=True)
                # ComfyUI's low-memory modes leave behind what is not one of its own layers, and count on those to cast.
                self.module.to(self.device)
                _in_use.append(self.patcher)
            try:
                yield self.module
            finally:
                with _loading:
                    _in_use.remove(self.patcher)
                if not keep:
                    self.release()

    def release(self) -> None:
        import comfy.model_management as management

        with _loading:
            others = [entry for entry in management.current_loaded_models if entry.model is not self.patcher]
            management.free_memory(1e30, self.device, keep_loaded=others)
            # Of what `resident` moved by itself ComfyUI knows nothing.
            self.module.to(OFFLOAD)


def _unload_other_devices() -> None:
    """ComfyUI before it knew of several cards unloads all models of the one it computes on."""
    import comfy.model_management as management

    here = management.get_torch_device()
    with _loading:
        for device in {entry.device for entry in management.current_loaded_models} - {here, OFFLOAD}:
            management.free_memory(1e30, device)


@cache
def _patcher() -> Any:
    """ComfyUI's plain ModelPatcher, which tells a module before some of its weights leave."""
    import comfy.model_management as management
    import comfy.model_patcher

    class TellingPatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc,unused-ignore]
        def partially_unload(self, device_to: Any, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> Any:
            gained = 0
            if hasattr(self.model, "before_leaving"):
                before = management.get_free_memory(self.load_device)
                self.model.before_leaving()
                if self.load_device.type != "cpu":  # whose free memory is every program's
                    gained = max(0, management.get_free_memory(self.load_device) - before)
            if 0 < memory_to_free <= gained:
                return gained
            return gained + super().partially_unload(device_to, memory_to_free - gained, *args, **kwargs)

        def model_mmap_residency(self, free: bool = False) -> tuple[int, int]:
            # ComfyUI 0.18 to 0.22 would ask each weight for its storage, and one in oneDNN's own order has none. What it
            # looks for there, files mapped by ComfyUI itself, no network of ours has.
            return 0, self.model_size()

    return TellingPatcher


class ComfyUIProgress:
    """ComfyUI's bar on the node that runs. Its hook raises when the user interrupts."""

    def __init__(self, total: int) -> None:
        import comfy.utils

        self._bar = comfy.utils.ProgressBar(total)
        self._done = 0

    def update(self, steps: int = 1, preview: Any = None) -> None:
        import comfy.model_management as management

        management.throw_exception_if_processing_interrupted()
        self._done += steps
        shown = ("JPEG", preview, PREVIEW_SIZE) if preview is not None else None
        self._bar.update_absolute(self._done, preview=shown)

    def close(self) -> None:
        """ComfyUI ends the bar with the node."""


class ComfyUIHost:
    """Answers from the ComfyUI that runs in this process."""

    def __init__(self) -> None:
        import comfyui_version

        self.name = f"ComfyUI {comfyui_version.__version__}"

    def model_folders(self, kind: str) -> list[Path]:
        import folder_paths

        default = Path(folder_paths.models_dir) / kind
        known: list[str] = []
        if kind in folder_paths.folder_names_and_paths:
            # What extra_model_paths.yaml marks as default comes first there; keep ComfyUI's order.
            known = folder_paths.get_folder_paths(kind)
        return list(dict.fromkeys([*map(Path, known), default]))

    def all_model_folders(self) -> tuple[tuple[Path, ...], dict[str, list[Path]]]:
        import folder_paths

        # custom_nodes is listed there as well, and holds no models.
        kinds = {kind: list(map(Path, known[0])) for kind, known in folder_paths.folder_names_and_paths.items()}
        kinds.pop("custom_nodes", None)
        return (Path(folder_paths.models_dir),), kinds

    def model_files(self, kind: str, suffixes: Sequence[str] = ()) -> list[str]:
        import folder_paths

        return model_paths.list_files(
            self.model_folders(kind), suffixes or sorted(folder_paths.supported_pt_extensions)
        )

    def announce_models(self, kind: str) -> None:
        import folder_paths

        folders = [str(folder) for folder in self.model_folders(kind)]
        known = folder_paths.folder_names_and_paths.get(kind)
        if known is None or not known[1]:
            folder_paths.folder_names_and_paths[kind] = (folders, set(folder_paths.supported_pt_extensions))

    def model_path(self, kind: str, name: str) -> Path:
        return model_paths.find_file(kind, self.model_folders(kind), name)

    def input_folder(self) -> Path:
        import folder_paths

        return Path(folder_paths.get_input_directory())

    def output_folder(self) -> Path:
        import folder_paths

        return Path(folder_paths.get_output_directory())

    def temp_folder(self) -> Path:
        import folder_paths

        return Path(folder_paths.get_temp_directory())

    def cache_folder(self) -> Path:
        import folder_paths

        # A "__" user folder is ComfyUI's place for what belongs to the system and not to one user.
        return Path(folder_paths.get_user_directory()) / "__hotpath"

    def open_folders(self) -> list[Path] | None:
        from comfy.cli_args import args

        named = whole_paths.named_folders()
        if named is None and not all(is_loopback(address.strip()) for address in args.listen.split(",")):
            return []
        return named

    def keeps_workflows(self) -> bool:
        from comfy.cli_args import args

        return not args.disable_metadata

    def own_comfyui(self) -> OwnComfyUI | None:
        import folder_paths

        folder = Path(folder_paths.__file__).resolve().parent
        return OwnComfyUI(folder, tuple(for_another(sys.argv[1:])))

    def device(self) -> torch.device:
        import comfy.model_management as management

        return management.get_torch_device()

    def vae_device(self) -> torch.device:
        import comfy.model_management as management

        place: torch.device = management.vae_device()  # the CPU with --cpu-vae
        return place

    def offload_device(self) -> torch.device:
        return OFFLOAD

    def picture_device(self) -> torch.device:
        import comfy.model_management as management

        return management.intermediate_device()

    def compute_dtype(
        self,
        parameters: int = 0,
        supported: Sequence[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
        device: torch.device | None = None,
    ) -> torch.dtype:
        import comfy.model_management as management

        device = device or management.get_torch_device()
        if torch.float16 in supported and management.should_use_fp16(device, model_params=parameters):
            return torch.float16
        if torch.bfloat16 in supported and management.should_use_bf16(device, model_params=parameters):
            return torch.bfloat16
        return torch.float32

    def free_memory(self, device: torch.device) -> int:
        import comfy.model_management as management

        free = int(management.get_free_memory(device))
        if device.type == "cpu":
            return cgroup_memory.at_most(free)
        # By --reserve-vram some of it is for other programs.
        return max(0, free - int(management.extra_reserved_memory()))

    def locked_memory(self) -> int | None:
        import comfy.model_management as management
        from comfy.cli_args import args

        # An older ComfyUI has no such flag, and locks nothing.
        return None if getattr(args, "disable_pinned_memory", False) else getattr(management, "TOTAL_PINNED_MEMORY", 0)

    def make_room(self, nbytes: int, device: torch.device) -> None:
        import comfy.model_management as management

        if device.type != "cpu":
            nbytes += int(management.extra_reserved_memory())
        with _loading:
            # ComfyUI takes the smallest first, and would send away what is about to compute.
            kept = [entry for entry in management.current_loaded_models if any(entry.model is p for p in _in_use)]
            management.free_memory(nbytes, device, keep_loaded=kept)

    def manage(self, module: nn.Module, device: torch.device | None = None) -> ComfyUIManaged:
        return ComfyUIManaged(module, device)

    def progress(self, total: int, label: str = "") -> ComfyUIProgress:
        return ComfyUIProgress(total)

    def check_interrupt(self) -> None:
        import comfy.model_management as management

        management.throw_exception_if_processing_interrupted()

    def show_text(self, text: str, node_id: str | None = None) -> None:
        server, node_id = prompt_server(), node_id or running_node()
        # As in `send_warning`: without a client it would go to everybody.
        if server is not None and server.client_id is not None and node_id is not None:
            server.send_progress_text(readable(text), node_id, server.client_id)

    def warn(self, text: str, node_id: str | None = None) -> None:
        log.warning("%s", text, extra={node_warnings.SHOWN: True})
        send_warning(text, node_id)


def prompt_server() -> Any:
    """ComfyUI's server; None where ComfyUI is used as a library and nobody looks on."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def running_node() -> str | None:
    """The id of the node that this thread runs."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return context.node_id if context is not None else None


def send_warning(text: str, node_id: str | None = None) -> None:
    """Mark a node (the one that runs, unless `node_id` names another) in the browser that queued it."""
    server, node_id = prompt_server(), node_id or running_node()
    # Without a client it would go to everybody, whose graphs have other nodes under that id.
    if server is not None and server.client_id is not None and node_id is not None:
        server.send_sync(WARNING_EVENT, {"node": node_id, "text": text}, server.client_id)
