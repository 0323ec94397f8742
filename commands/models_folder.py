"""The host whose model folders a command works on: --models, else HOTPATH_MODELS, else a ComfyUI that is found."""

from __future__ import annotations

import os
from pathlib import Path

from ..headless.locate import find_comfyui, model_folders
from ..host.headless import HeadlessHost


def headless_host(
    models: Path | None = None,
    input_folder: Path | None = None,
    output_folder: Path | None = None,
    device: str | None = None,
    show_progress: bool = True,
    temp_folder: Path | None = None,
) -> HeadlessHost:
    """A headless host; where no folder is named, the models of a ComfyUI on this machine are used as well."""
    extra: list[Path] = []
    kinds: dict[str, list[Path]] = {}
    if models is None:
        comfyui = find_comfyui()
        if comfyui is not None:
            theirs, kinds = model_folders(comfyui)
            if os.environ.get("HOTPATH_MODELS"):
                extra.append(theirs)
            else:
                models = theirs
    return HeadlessHost(
        models=models,
        input_folder=input_folder,
        output_folder=output_folder,
        device=device,
        extra_models=extra,
        show_progress=show_progress,
        kind_folders=kinds,
        temp_folder=temp_folder,
    )
