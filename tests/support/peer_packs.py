"""Other packs' own attention code on our tiny models: IPAdapter_plus and PuLID, where somebody keeps them.

They are looked for in ComfyUI's custom_nodes, in HOTPATH_PEERS and in a folder `peers` beside ComfyUI.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from conftest_paths import COMFYUI


class PackMissing(Exception):
    """A pack is not on this machine."""


def find_pack(folder: str) -> Path:
    places = [Path(p) for p in (os.environ.get("HOTPATH_PEERS"),) if p]
    if COMFYUI is not None:
        places += [COMFYUI / "custom_nodes", COMFYUI.parent / "peers"]
    found = next((p / folder for p in places if (p / folder / "__init__.py").is_file()), None)
    if found is None:
        raise PackMissing(f"{folder} is not in ComfyUI's custom_nodes, HOTPATH_PEERS or a folder peers beside ComfyUI")
    return found


def package_of(folder: Path) -> str:
    package = f"peer_{folder.name.lower()}"
    if package not in sys.modules:
        made = types.ModuleType(package)
        made.__path__ = [str(folder)]
        sys.modules[package] = made
    return package


def load_module(folder: Path, name: str) -> Any:
    """One module of a pack, without running the pack's own __init__, which registers nodes and paths."""
    full = f"{package_of(folder)}.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


class FewLayers(torch.nn.Module):
    """The projections of an adapter, which both packs keep in `ip_layers.to_kvs`, made as they are asked for."""

    def __init__(self, widths: dict[str, int], context: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(7)
        self.to_kvs = torch.nn.ModuleDict()
        for key, width in widths.items():
            for part in ("k", "v"):
                layer = torch.nn.Linear(context, width, bias=False)
                layer.weight.data = torch.randn(width, context, generator=random) * context**-0.5
                self.to_kvs[f"{key}_to_{part}_ip"] = layer


class Adapter(torch.nn.Module):
    def __init__(self, widths: dict[str, int], context: int) -> None:
        super().__init__()
        self.ip_layers = FewLayers(widths, context)

    def get_multigpu_clone(self, _: torch.device) -> Any:
        return self


class Pack:
    """How one of them patches a model: its own function with its own arguments, over the blocks it goes over."""

    def __init__(self, name: str, folder: str, module: str, extra: dict[str, Any]) -> None:
        self.name = name
        self.folder = find_pack(folder)
        if folder == "PuLID_ComfyUI":
            _stand_in_for("facexlib.parsing", "init_parsing_model")
            _stand_in_for("facexlib.utils.face_restoration_helper", "FaceRestoreHelper")
            _stand_in_for(f"{package_of(self.folder)}.eva_clip.constants", "OPENAI_DATASET_MEAN", "OPENAI_DATASET_STD")
        self.module = load_module(self.folder, module)
        self.extra = extra

    def apply(self, model: Any, weight: float = 0.8, **settings: Any) -> Any:
        from hotpath.identity.blocks import SDXL_BLOCKS

        sampling = model.get_model_object("model_sampling")
        patched = model.clone()
        widths = {str(2 * n + 1): _width(model, block) for n, block in enumerate(SDXL_BLOCKS)}
        context = settings.get("context", 128)
        random = torch.Generator().manual_seed(3)
        device, dtype = settings.get("place", (torch.device("cpu"), torch.float32))
        shared = {
            self.extra["key"]: Adapter(widths, context).to(device, dtype),
            "weight": weight,
            "cond": torch.randn(1, 5, context, generator=random).to(device, dtype),
            "uncond": torch.randn(1, 5, context, generator=random).to(device, dtype),
            "sigma_start": sampling.percent_to_sigma(settings.get("start_at", 0.0)),
            "sigma_end": sampling.percent_to_sigma(settings.get("end_at", 1.0)),
            "mask": settings.get("mask"),
            **self.extra["arguments"],
        }
        for number, block in enumerate(SDXL_BLOCKS):
            self.module.set_model_patch_replace(patched, {**shared, "module_key": str(2 * number + 1)}, block)
        return patched


def _stand_in_for(name: str, *names: str) -> None:
    """Packages of a pack that its attention code never touches, where they are not installed."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        part = ".".join(parts[:depth])
        if part not in sys.modules:
            try:
                importlib.import_module(part)
            except Exception:
                made = types.ModuleType(part)
                made.__path__ = []
                sys.modules[part] = made
    for attribute in names:
        if not hasattr(sys.modules[name], attribute):
            setattr(sys.modules[name], attribute, None)


def _width(model: Any, block: tuple[str, int, int]) -> int:
    from hotpath.patches.sdxl_layout import cross_attention_blocks

    return int(cross_attention_blocks(model)[block].to_k.out_features)


WAYS = {"neutral": (False, False), "style": (True, False), "fidelity": (False, True)}


def pack_named(name: str) -> Pack:
    """ "IPAdapter_plus", or "PuLID" with one of its projections. Raises PackMissing."""
    if name == "IPAdapter_plus":
        arguments = {"weight_type": "linear", "embeds_scaling": "V only"}
        return Pack(name, "ComfyUI_IPAdapter_plus", "IPAdapterPlus", {"key": "ipadapter", "arguments": arguments})
    ortho, ortho_v2 = WAYS[name.split()[1]]
    return Pack(name, "PuLID_ComfyUI", "pulid", {"key": "pulid", "arguments": {"ortho": ortho, "ortho_v2": ortho_v2}})
