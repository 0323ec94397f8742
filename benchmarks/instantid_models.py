"""What samples in `benchmarks/instantid.py`: SDXL with random weights, unpatched and patched by the pack and by others."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from checkout import load


@dataclass
class Contestant:
    """A MODEL to sample with. seconds: of one step, a value per round."""

    name: str
    model: Any
    seconds: dict[str, list[float]] = field(default_factory=dict)


class Stage:
    """The models of one dtype and the conditionings."""

    def __init__(self, dtype: torch.dtype, tiny: bool, half: bool = False) -> None:
        from hotpath.identity.adapter import InstantIDAdapter
        from hotpath.nodes import NODE_CLASS_MAPPINGS
        from instantid_scenarios import Bench

        self.sdxl = sys.modules["hotpath_demo.tiny_sdxl"]
        self.channels, self.context = (self.sdxl.CHANNELS, self.sdxl.CONTEXT) if tiny else (160 if half else 320, 2048)
        model = self._random_sdxl(dtype)
        self.state = self.sdxl.make_adapter_state(dim=1280, depth=4, context=self.context, channels=self.channels)
        adapter = InstantIDAdapter(self.state["image_proj"], self.state["ip_adapter"], "random.bin", "random").to(dtype)
        self.bench = Bench(NODE_CLASS_MAPPINGS, adapter, self.sdxl, model, None)
        self.positive, self.negative = (
            self.sdxl.encode_text(text, context=self.context) for text in ("a portrait", "blurry")
        )
        self.dtype = dtype
        self.originals: Any = None  # the original pack's nodes and adapter, once `original` has found them

    def _random_sdxl(self, dtype: torch.dtype) -> Any:
        import comfy.model_management

        device = comfy.model_management.get_torch_device()
        fill = self.sdxl.fill

        def on_device(module: torch.nn.Module, seed: int) -> None:
            module.to(device)
            random = torch.Generator(device).manual_seed(seed)
            for parameter in module.parameters():
                scale = 0.02 if parameter.ndim == 1 else 0.7 / parameter[0].numel() ** 0.5
                parameter.data.normal_(0, scale, generator=random)
                if parameter.ndim == 1:
                    parameter.data.add_(1)

        self.sdxl.fill = on_device  # 2.6 billion numbers take half a minute on a CPU
        try:
            return self.sdxl.make_sdxl(dtype=dtype, model_channels=self.channels, context_dim=self.context)
        finally:
            self.sdxl.fill = fill

    def sample(self, model: Any, size: tuple[int, int], cfg: float, steps: int) -> torch.Tensor:
        import comfy.sample

        latent = torch.zeros(1, 4, size[1] // 8, size[0] // 8)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(11))
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "euler",
            "normal",
            self.positive,
            self.negative,
            latent,
            disable_pbar=True,
            seed=11,
        )

    def ours(self, **changes: Any) -> Any:
        return self.bench.patch(**changes)[0]

    def ours_in(self, patch_mode: str) -> Any:
        from hotpath.patches.instantid import AttentionSettings, attach_identity, prepare_identity
        from instantid_scenarios import photo

        face = self.bench.faces.get((photo(1)[0].numpy() * 255).astype("uint8")[..., ::-1])[-1]
        prepared = prepare_identity(self.bench.instantid, torch.from_numpy(face["embedding"])[None, None])
        return attach_identity(
            self.bench.model, self.bench.instantid, prepared, AttentionSettings(0.8, patch_mode=patch_mode)
        )[0]

    def original(self) -> Any | None:
        """The original pack's patch on 70 blocks."""
        from instantid_scenarios import Bench, photo
        from peer_packs import PackMissing, find_pack

        try:
            folder = find_pack("ComfyUI_InstantID")
        except PackMissing as missing:
            print(f"original pack left out: {missing}")
            return None
        pack = load("reference_pack", folder)
        module = sys.modules["reference_pack.InstantID"]
        adapter = module.InstantID(
            self.state, cross_attention_dim=1280, output_cross_attention_dim=self.context, clip_embeddings_dim=512
        )
        self.originals = Bench(pack.NODE_CLASS_MAPPINGS, adapter, self.sdxl, self.bench.model.clone(), None)
        return self.originals.patch(weight=0.8, image=photo(1))[0]

    def ip_adapter(self) -> Any | None:
        from peer_packs import PackMissing, pack_named

        try:
            return pack_named("IPAdapter_plus").apply(
                self.bench.model, context=self.context, place=(self.bench.model.load_device, self.dtype)
            )
        except PackMissing as missing:
            print(f"IPAdapter_plus left out: {missing}")
            return None


def compiled(model: Any, way: str) -> Any:
    """`model` under ComfyUI's own TorchCompileModel or under ours."""
    if way == "core":
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        return TorchCompileModel.execute(model, "inductor").args[0]
    from hotpath.nodes import NODE_CLASS_MAPPINGS

    node = NODE_CLASS_MAPPINGS["HotpathCompile"]()
    return getattr(node, node.FUNCTION)(model=model)[0]


def contestants(stage: Stage, ways: list[str], few: bool = False) -> list[Contestant]:
    from hotpath.patches.telemetry import record_blocks
    from instantid_scenarios import mask, photo

    if few:
        chosen = {
            "unpatched": stage.bench.model,
            "Hotpath, 70 blocks": stage.ours(weight=0.8),
            "Hotpath, 70 blocks, mask": stage.ours(weight=0.8, mask=mask(1)),
            "original pack, 70 blocks": stage.original(),
        }
        return [Contestant(name, model) for name, model in chosen.items() if model is not None]
    two = stage.ours(weight=0.8, mask=mask(1))
    models = {
        "unpatched": stage.bench.model,
        "Hotpath, 70 blocks": stage.ours(weight=0.8),
        "Hotpath, 70 blocks, mask": stage.ours(weight=0.8, mask=mask(1)),
        "Hotpath, 70 blocks, half the steps": stage.ours(weight=0.8, end_at=0.5),
        "Hotpath, two people": stage.ours(model=two, weight=0.8, image=photo(2), mask=1 - mask(1)),
        "Hotpath, balanced (55)": stage.ours_in("balanced"),
        "Hotpath, output_only (36)": stage.ours_in("output_only"),
        "Hotpath, fast (20)": stage.ours_in("fast"),
        "Hotpath, 70 blocks, telemetry": record_blocks(stage.ours(weight=0.8))[0],
        "original pack, 70 blocks": stage.original(),
        "IPAdapter_plus, 70 blocks": stage.ip_adapter(),
    }
    made = [Contestant(name, model) for name, model in models.items() if model is not None]
    for way in ways:
        for name in ("unpatched", "Hotpath, 70 blocks"):
            made.append(Contestant(f"{name}, {way} compile", compiled(models[name], way)))
    return made
