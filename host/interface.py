"""What the pack asks of the program it runs in, and the types both implementations share.

`comfyui.ComfyUIHost` answers inside ComfyUI, `headless.HeadlessHost` everywhere else. The rest of the pack talks to
`host.current()` and never asks which of the two it got.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from .own_comfyui import OwnComfyUI

if TYPE_CHECKING:  # torch is seconds to load, and much of the command line needs none
    import torch
    from torch import nn


class ModelNotFound(FileNotFoundError):
    """A model file is missing; the message says which, where it was looked for, and where it belongs."""


class Interrupted(KeyboardInterrupt):
    """Raised by `check_interrupt` outside ComfyUI. Inside, ComfyUI's own InterruptProcessingException is raised."""


Network = TypeVar("Network", bound="nn.Module")
Item = TypeVar("Item")


class Managed(Protocol):
    """A network of ours in the host's memory management.

    `module` may be on any device while nobody uses it. Inside `resident()` it is whole on `device`.
    """

    module: Any
    device: torch.device

    def resident(self, extra_bytes: int = 0, keep: bool = True) -> AbstractContextManager[Any]:
        """Bring the module to `device`, with room for `extra_bytes` of activations, and yield it.

        keep=True leaves it there afterwards until the host needs the room; keep=False sends it back at once.
        """

    def release(self) -> None:
        """Send the weights back to the offload device now."""


class Progress(Protocol):
    """A progress bar. Every call also checks for an interrupt, so a loop that reports progress can be stopped."""

    def update(self, steps: int = 1, preview: Any = None) -> None:
        """Advance by `steps`; `preview` is a PIL image or None."""

    def close(self) -> None: ...


@runtime_checkable
class Host(Protocol):
    """The one door to the program around us."""

    name: str

    # models and files
    def model_folders(self, kind: str) -> list[Path]:
        """Every folder searched for `kind` (such as "instantid"), the one to download into first. May not exist yet."""

    def all_model_folders(self) -> tuple[tuple[Path, ...], dict[str, list[Path]]]:
        """What a host in another process needs to find the same models: folders that hold a folder for each kind, and
        further folders by kind."""

    def model_files(self, kind: str, suffixes: Sequence[str] = ()) -> list[str]:
        """File names under the folders of `kind`, relative to them, sorted; sub-folders included."""

    def announce_models(self, kind: str) -> None:
        """Make the folders of `kind` known to the program around us, so that other packs list the same files."""

    def model_path(self, kind: str, name: str) -> Path:
        """The file `name` of `kind`. Raises ModelNotFound, also for names that point outside the folders."""

    def input_folder(self) -> Path: ...
    def output_folder(self) -> Path: ...
    def temp_folder(self) -> Path: ...

    def cache_folder(self) -> Path:
        """A folder that outlives the process, for caches and measurements."""

    def open_folders(self) -> list[Path] | None:
        """Where whole paths in a prompt may lead, beside the three folders above; None: anywhere. See `whole_paths`."""

    def keeps_workflows(self) -> bool:
        """Whether files that are made may hold the workflow they were made with."""

    def own_comfyui(self) -> OwnComfyUI | None:
        """The ComfyUI that runs in this process, for others like it to be started; None where there is none."""

    # devices and memory
    def device(self) -> torch.device:
        """Where networks compute."""

    def vae_device(self) -> torch.device:
        """Where pictures become latents, and latents pictures."""

    def offload_device(self) -> torch.device:
        """Where weights wait."""

    def picture_device(self) -> torch.device:
        """Where pictures and latents lie between nodes."""

    def compute_dtype(
        self,
        parameters: int = 0,
        supported: Sequence[torch.dtype] = ...,
        device: torch.device | None = None,
    ) -> torch.dtype:
        """The dtype the host would compute a network of `parameters` weights in. device: another one than `device()`."""

    def free_memory(self, device: torch.device) -> int:
        """Bytes that can be allocated on `device` now."""

    def locked_memory(self) -> int | None:
        """Bytes that the host itself keeps in memory that is locked for its device; None where no weights are to be there."""

    def make_room(self, nbytes: int, device: torch.device) -> None:
        """Evict what the host can evict until `nbytes` are free on `device`, never what is inside `resident()`. Best
        effort."""

    def manage(self, module: nn.Module, device: torch.device | None = None) -> Managed:
        """Put a network of ours under the host's memory management. It starts on the offload device.

        device: where it computes, when that is another one than `device()`; of the same kind, or the CPU.
        """

    # the person in front of it
    def progress(self, total: int, label: str = "") -> Progress: ...

    def check_interrupt(self) -> None:
        """Raise if the user asked to stop."""

    def show_text(self, text: str, node_id: str | None = None) -> None:
        """Show `text` under a node (the one that is running, unless `node_id` names another)."""

    def warn(self, text: str, node_id: str | None = None) -> None:
        """Mark the node with a warning: a sentence that says what is not as asked, and the cure. It is logged, too.

        `log.warning` of a "hotpath" logger does the same for the node that runs in this thread.
        """


@contextmanager
def tracked(host: Host, total: int, label: str = "") -> Iterator[Progress]:
    """A progress bar that is closed whatever happens."""
    bar = host.progress(total, label)
    try:
        yield bar
    finally:
        bar.close()
