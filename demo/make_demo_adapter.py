"""Writes demo/models/instantid/demo_adapter.safetensors: an InstantID adapter for the tiny SDXL, random weights, fp16.

    python demo/make_demo_adapter.py

True layout (a resampler, and a key and a value projection for each of SDXL's 70 blocks), small widths. It is not
trained: it shows that an identity travels the whole way, not what a face looks like.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
TINY = HERE / "comfy_nodes" / "hotpath_demo" / "tiny_sdxl.py"


def main() -> None:
    spec = importlib.util.spec_from_file_location("tiny_sdxl", TINY)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    state = {
        f"{part}.{key}": value.half().contiguous()
        for part, weights in tiny.make_adapter_state(dim=64, depth=2).items()
        for key, value in weights.items()
    }
    path = HERE / "models" / "instantid" / "demo_adapter.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


if __name__ == "__main__":
    main()
