"""The original programs as contestants of `benchmarks/colorization.py`, from checkouts the caller has.

Needs `einops` beside what the pack needs. Their code is imported as it is; what it downloads or compiles at import is
replaced: pretrained ResNets (our random weights are loaded over them), DINOv2 (from its own checkout, without weights)
and spatial-correlation-sampler (unfold, which was measured to be as fast on an H200, where it is not installed).
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CONFIG = {
    "max_mid_term_frames": 10,
    "min_mid_term_frames": 5,
    "max_long_term_elements": 10000,
    "num_prototypes": 128,
    "top_k": 30,
    "mem_every": 5,
    "deep_update_every": -1,
    "enable_long_term": True,
    "enable_long_term_count_usage": True,
    "key_dim": 64,
    "value_dim": 512,
    "hidden_dim": 64,
    "single_object": False,
}


class UnfoldedCorrelation(torch.nn.Module):
    def __init__(self, patch_size: int, **others: Any) -> None:
        super().__init__()
        self.patch = patch_size

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        batch, channels, height, width = key.shape
        keys = F.unfold(key, self.patch, padding=self.patch // 2).view(batch, channels, -1, height, width)
        return (query[:, :, None] * keys).sum(1)


class OriginalColorMNet:
    """The original's inference loop as its app runs it: Lab by scikit-image on the CPU, fp16 autocast on CUDA."""

    def __init__(self, checkouts: Path, state: dict[str, Tensor], device: torch.device, half: bool) -> None:
        sampler: Any = types.ModuleType("spatial_correlation_sampler")
        sampler.SpatialCorrelationSampler = UnfoldedCorrelation
        sys.modules["spatial_correlation_sampler"] = sampler
        sys.path[:0] = [str(checkouts / "colormnet"), str(checkouts / "dinov2")]
        import torch.utils.model_zoo as zoo
        from dinov2.hub.backbones import dinov2_vits14

        zoo.load_url = lambda *_, **__: {}
        from model import resnet

        resnet.load = lambda *_, **__: dinov2_vits14(pretrained=False)
        resnet.load_weights_add_extra_dim = lambda *_, **__: None
        from inference.inference_core import InferenceCore
        from model.network import ColorMNet

        self.network = ColorMNet(dict(CONFIG)).eval().to(device)
        self.network.load_state_dict(state)
        self.core = InferenceCore
        self.device, self.half = device, half and device.type == "cuda"

    def network_only(self, luminance: Tensor, reference: Tensor) -> None:
        """luminance [T, 1, H, W] in -1..1 and Lab reference [3, H, W] normalised, on the device."""
        core = self._start()
        for index, frame in enumerate(luminance):
            self._step(core, frame.expand(3, -1, -1), reference, index)

    def film(self, frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] to uint8."""
        from skimage import color

        core = self._start()
        example = self._lab(reference)
        done = []
        for index, frame in enumerate(frames):
            lab = self._lab(frame)
            chroma = self._step(core, lab[:1].expand(3, -1, -1), example, index)
            joined = torch.cat((lab[:1] * 50 + 50, chroma.float() * 110)).permute(1, 2, 0).cpu().numpy()
            done.append((np.clip(color.lab2rgb(joined), 0, 1) * 255).astype(np.uint8))
        return np.stack(done)

    def _lab(self, picture: np.ndarray) -> Tensor:
        from skimage import color

        lab = torch.from_numpy(np.float32(color.rgb2lab(picture))).permute(2, 0, 1)
        lab[0] = (lab[0] - 50) / 50
        lab[1:] /= 110
        return lab.to(self.device)

    def _start(self) -> Any:
        core = self.core(self.network, dict(CONFIG))
        core.set_all_labels([1, 2])
        return core

    def _step(self, core: Any, frame: Tensor, example: Tensor, index: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", enabled=self.half):
            if index == 0:
                return core.step_AnyExemplar(frame, example[:1].expand(3, -1, -1), example[1:], [1, 2], end=False)
            return core.step_AnyExemplar(frame, None, None, None, end=False)


class OriginalDeepExemplar:
    """The original's loop: Lab and result by scikit-image on the CPU, half size, float32, without its WLS filter."""

    def __init__(self, checkouts: Path, states: dict[str, dict[str, Tensor]], device: torch.device) -> None:
        for name in ("matplotlib", "matplotlib.pyplot", "cv2"):
            try:
                __import__(name)
            except ImportError:
                sys.modules[name] = types.ModuleType(name)
        sys.path.insert(0, str(checkouts / "deep_exemplar"))
        # Loads a file at import, for a network that nothing uses.
        unused: Any = types.ModuleType("models.vgg19_gray")
        unused.vgg19_gray = unused.vgg19_gray_new = None
        sys.modules["models.vgg19_gray"] = unused
        from models.ColorVidNet import ColorVidNet
        from models.FrameColor import frame_colorization
        from models.NonlocalNet import VGG19_pytorch, WarpNet
        from utils import util

        self.parts = [VGG19_pytorch(), WarpNet(1), ColorVidNet(7)]
        for part, name in zip(self.parts, ("vgg", "warp", "color_net"), strict=True):
            part.load_state_dict(states[name])
            part.eval().to(device)
        self.colorize, self.util, self.device = frame_colorization, util, device

    def network_only(self, half: Tensor, reference: Tensor) -> None:
        """half [T, 3, h, w] and reference [1, 3, h, w], Lab with L centred, on the device."""
        features = self._features(reference)
        last = torch.zeros_like(half[:1])
        for frame in half:
            last = self._step(frame[None], reference, features, last)[1]

    def film(self, frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
        example = F.interpolate(self._lab(reference), scale_factor=0.5, mode="bilinear")
        features = self._features(example)
        last, done = torch.zeros_like(example), []
        for frame in frames:
            lab = self._lab(frame)
            half = F.interpolate(lab, scale_factor=0.5, mode="bilinear")
            chroma, last = self._step(half, example, features, last)
            large = F.interpolate(chroma.cpu(), scale_factor=2, mode="bilinear") * 1.25
            done.append(self.util.batch_lab2rgb_transpose_mc(lab[:, :1], large))
        return np.stack(done)

    def _lab(self, picture: np.ndarray) -> Tensor:
        from skimage import color

        lab = torch.from_numpy(np.float32(color.rgb2lab(picture))).permute(2, 0, 1)[None]
        lab[:, 0] -= 50
        return lab.to(self.device)

    def _features(self, reference: Tensor) -> Any:
        rgb = self.util.tensor_lab2rgb(torch.cat((reference[:, :1] + 50, reference[:, 1:]), 1))
        with torch.no_grad():
            return self.parts[0](rgb, ["r12", "r22", "r32", "r42", "r52"], preprocess=True)

    def _step(self, half: Tensor, reference: Tensor, features: Any, last: Tensor) -> tuple[Tensor, Tensor]:
        vgg, warp, color_net = self.parts
        # Their function turns gradients on again; inference mode keeps them off.
        with torch.inference_mode():
            chroma = self.colorize(
                half, reference, last, features, vgg, warp, color_net, feature_noise=0, temperature=1e-10
            )[0]
        return chroma, torch.cat((half[:, :1], chroma), 1)
