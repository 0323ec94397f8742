"""The pack that is measured: the checkout this file lies in, as `hotpath`, whatever its folder is called and whatever other
copy is installed. Importing this module is enough for `from hotpath import ...` behind it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def load(name: str, folder: Path) -> Any:
    """The package in `folder`, importable as `name` from now on."""
    if name not in sys.modules:
        init = folder / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def use_comfyui(on_cpu: bool) -> None:
    """Let a ComfyUI be imported, set for the CPU or for the card. Ends the program where there is none."""
    from hotpath.headless.locate import find_comfyui

    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("No ComfyUI found: set COMFYUI_PATH.")
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = on_cpu


# On the path, as of one who stands in it, the checkout's `nodes` would hide ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
load("hotpath", ROOT)
