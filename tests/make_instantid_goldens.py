"""Writes tests/data/instantid/goldens.safetensors: the latents of every scenario as the original pack gives them.

    python tests/make_instantid_goldens.py --comfyui PATH --reference PATH_OF_THE_ORIGINAL_PACK

The original (cubiq/ComfyUI_InstantID 1ef34ef) is imported from where you keep it; none of it is in this repository.
It needs insightface and opencv-python in the environment. Not run by the test suite.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_package(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    options = parser.parse_args()
    sys.path[:0] = [str(options.comfyui), str(ROOT / "tests" / "support")]
    sys.argv = sys.argv[:1]

    from comfy.cli_args import args

    args.cpu = True
    import torch

    torch.set_num_threads(1)
    from instantid_scenarios import SCENARIOS, Bench
    from safetensors.torch import save_file

    load_package(ROOT / "demo" / "comfy_nodes" / "hotpath_demo", "hotpath_demo")
    tiny = sys.modules["hotpath_demo.tiny_sdxl"]
    reference = load_package(options.reference, "reference_pack")
    original = sys.modules["reference_pack.InstantID"]
    state = tiny.make_adapter_state(dim=20 * 64, depth=4)  # the original's sizes are fixed
    adapter = original.InstantID(
        state, cross_attention_dim=1280, output_cross_attention_dim=tiny.CONTEXT, clip_embeddings_dim=512
    )
    bench = Bench(reference.NODE_CLASS_MAPPINGS, adapter, tiny, tiny.make_sdxl(), tiny.make_identity_net())
    goldens = {}
    with torch.inference_mode():
        for name, run in SCENARIOS.items():
            # Each scenario starts from a fresh model: the original's patches leak into the one it is given.
            bench.model = bench.model.clone()
            goldens[name] = run(bench).float().cpu().clone()
            sys.stdout.write(f"{name}: {goldens[name].std():.3f}\n")
    folder = ROOT / "tests" / "data" / "instantid"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(goldens, folder / "goldens.safetensors")


if __name__ == "__main__":
    main()
