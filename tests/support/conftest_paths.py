"""Where the real ComfyUI is, for test modules: the same answer as conftest's."""

from __future__ import annotations

import sys
from pathlib import Path

COMFYUI = next((Path(p) for p in sys.path if (Path(p) / "comfy_api").is_dir()), Path())
