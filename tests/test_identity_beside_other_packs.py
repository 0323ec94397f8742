"""InstantID beside IPAdapter_plus and PuLID on one model, in either order, with those packs' own code.

They are looked for in ComfyUI's custom_nodes, in HOTPATH_PEERS and in a folder `peers` beside ComfyUI.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_paths import COMFYUI
from instantid_bench import attention_patches, shared_bench
from instantid_scenarios import Bench, mask, photo, sample

pytestmark = pytest.mark.comfy


@pytest.fixture
def bench() -> Bench:
    return shared_bench()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def find_pack(folder: str) -> Path:
    places = [Path(p) for p in (os.environ.get("HOTPATH_PEERS"),) if p]
    if COMFYUI is not None:
        places += [COMFYUI / "custom_nodes", COMFYUI.parent / "peers"]
    found = next((p / folder for p in places if (p / folder / "__init__.py").is_file()), None)
    if found is None:
        pytest.skip(f"{folder} is not in ComfyUI's custom_nodes, HOTPATH_PEERS or a folder peers beside ComfyUI")
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
        context = 128 if "context" not in settings else settings["context"]
        random = torch.Generator().manual_seed(3)
        shared = {
            self.extra["key"]: Adapter(widths, context),
            "weight": weight,
            "cond": torch.randn(1, 5, context, generator=random),
            "uncond": torch.randn(1, 5, context, generator=random),
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


@pytest.fixture(params=["IPAdapter_plus", "PuLID neutral", "PuLID fidelity", "PuLID style"])
def pack(request: pytest.FixtureRequest) -> Pack:
    if request.param == "IPAdapter_plus":
        arguments = {"key": "ipadapter", "arguments": {"weight_type": "linear", "embeds_scaling": "V only"}}
        return Pack(request.param, "ComfyUI_IPAdapter_plus", "IPAdapterPlus", arguments)
    ways = {"neutral": (False, False), "style": (True, False), "fidelity": (False, True)}
    ortho, ortho_v2 = ways[request.param.split()[1]]
    return Pack(
        request.param, "PuLID_ComfyUI", "pulid", {"key": "pulid", "arguments": {"ortho": ortho, "ortho_v2": ortho_v2}}
    )


def in_place(first: Any, second: Any) -> Any:
    """What the original packs do: callbacks of both in one object, in the order of the nodes."""
    model = first.clone()
    attn2 = model.model_options["transformer_options"]["patches_replace"]["attn2"]
    for block, patch in attention_patches(second).items():
        held = attn2[block]
        merged = Joined(held.callback + patch.callback, held.kwargs + patch.kwargs)
        attn2[block] = merged
    return model


class Joined:
    def __init__(self, callbacks: list[Any], kwargs: list[dict[str, Any]]) -> None:
        self.callback, self.kwargs = callbacks, kwargs

    def __call__(self, q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        out = optimized_attention(q, k, v, extra_options["n_heads"])
        sigma = float(extra_options["sigmas"][0])
        for callback, kwargs in zip(self.callback, self.kwargs, strict=True):
            if kwargs["sigma_end"] <= sigma <= kwargs["sigma_start"]:
                out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out.to(q.dtype)


def close(made: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((made - expected).abs().max() < 1e-5 * expected.abs().max())


def test_theirs_first(bench: Bench, pack: Pack) -> None:
    theirs = pack.apply(bench.model, end_at=0.6)
    alone = sample(theirs, bench.positive, bench.negative)
    expected = sample(in_place(theirs, bench.patch(weight=0.9, mask=mask(1))[0]), bench.positive, bench.negative)
    both = bench.patch(model=theirs, weight=0.9, mask=mask(1))[0]
    made = sample(both, bench.positive, bench.negative)
    assert close(made, expected)
    assert not close(made, alone)
    assert torch.equal(sample(theirs, bench.positive, bench.negative), alone), "theirs is as it was"


def test_ours_first(bench: Bench, pack: Pack) -> None:
    ours = bench.patch(weight=0.9, start_at=0.3)[0]
    alone = sample(ours, bench.positive, bench.negative)
    theirs_alone = pack.apply(bench.model, mask=mask(1))
    expected = sample(in_place(ours, theirs_alone), bench.positive, bench.negative)
    both = pack.apply(ours, mask=mask(1))
    made = sample(both, bench.positive, bench.negative)
    assert close(made, expected)
    assert not close(made, alone)
    assert torch.equal(sample(ours, bench.positive, bench.negative), alone), "ours is as it was"


def test_theirs_between_two_people_of_ours(bench: Bench, pack: Pack) -> None:
    first = bench.patch(mask=mask(1))[0]
    between = pack.apply(first, weight=0.4)
    both = bench.patch(model=between, image=photo(2), mask=1 - mask(1))[0]
    theirs, second = pack.apply(bench.model, weight=0.4), bench.patch(image=photo(2), mask=1 - mask(1))[0]
    expected = sample(in_place(in_place(first, theirs), second), bench.positive, bench.negative)
    assert close(sample(both, bench.positive, bench.negative), expected)
