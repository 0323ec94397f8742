"""Trains the demo's small Deep Exemplar on camera moves over photographs and drawn scenes, on one CPU core.

python -m hotpath.demo.train_colorizers --minutes 15
python -m hotpath.demo.train_colorizers --minutes 15 --continue --seed 2

The networks are the published architectures at a fraction of their widths. What they learn is to match places of two
pictures by their luminance and to carry chroma over; a photograph that training never saw is the measure.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..colorization.checkpoint_file import read_tensors
from ..colorization.colour_space import lab_to_rgb, rgb_to_lab
from ..colorization.deep_exemplar.color_net import HALF_SIZE_GAIN, ColorVidNet
from ..colorization.deep_exemplar.networks import DeepExemplar
from ..colorization.deep_exemplar.vgg import VGG19
from ..colorization.deep_exemplar.warp import WarpNet
from .colorize_scenes import TRAINING_PHOTOS, camera_move, drawn_scene, photograph

MODELS = Path(__file__).parent / "models"
SIDE = 112
RATE = 1.5e-3
FRAMES = 3
WARM_UP = 50  # steps


class Scenes:
    """An endless supply of clips: Lab, [frames, 3, side, side]."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        drawn = [drawn_scene(self.random) for _ in range(24)]
        self.pictures = [photograph(name) for name in TRAINING_PHOTOS] * 8 + drawn

    def clip(self, frames: int, side: int) -> Tensor:
        picture = self.pictures[int(torch.randint(0, len(self.pictures), (1,), generator=self.random))]
        # Other colours for the same shapes, or colours would be learnt by heart.
        picture = picture[torch.randperm(3, generator=self.random)]
        picture = picture ** (0.6 + 0.8 * torch.rand(3, 1, 1, generator=self.random))
        if float(torch.rand(1, generator=self.random)) < 0.5:
            picture = picture.flip(-1)
        return rgb_to_lab(camera_move(picture, frames, side, side, self.random))


def small_deep_exemplar() -> DeepExemplar:
    return DeepExemplar(
        VGG19((12, 16, 24, 32, 32)),
        WarpNet((16, 24, 32, 32), (24, 24, 32, 32), 16, 48),
        ColorVidNet(12, (16, 24, 32, 40), 24),
    )


def deep_exemplar_loss(networks: DeepExemplar, lab: Tensor) -> Tensor:
    """The first frame is the reference; a soft match stands in for the argmax, which has no gradient."""
    reference, frames = lab[:1], lab[1:]
    phi = networks.warp.reference_features(networks.vgg(lab_to_rgb(reference)))[0].flatten(1)
    theta = networks.warp.frame_features(networks.vgg((frames[:, :1] / 100).expand(-1, 3, -1, -1))).flatten(2)
    correlation = theta.transpose(1, 2) @ phi
    colours = F.avg_pool2d(reference, 4)[0, 1:].flatten(1)
    soft = (correlation / 0.02).softmax(-1) @ colours.T
    wanted = F.avg_pool2d(frames[:, 1:], 4).flatten(2).transpose(1, 2)
    loss = F.smooth_l1_loss(soft / 110, wanted / 110, beta=0.05)
    size = (frames.shape[-2] // 4, frames.shape[-1] // 4)
    with torch.no_grad():
        score, index = correlation.max(-1)
        matched = colours.T[index].transpose(1, 2).unflatten(2, size)
        known = torch.cat((matched, score.unflatten(1, size)[:, None]), dim=1)
        known = F.interpolate(known, scale_factor=4, mode="nearest")
    last = torch.zeros_like(lab[:1])
    for number in range(len(frames)):
        centred = frames[number : number + 1, :1] - 50
        chroma = networks.color_net(torch.cat((centred, known[number : number + 1], last), dim=1))
        target = frames[number : number + 1, 1:] / HALF_SIZE_GAIN
        loss = loss + F.smooth_l1_loss(chroma / 110, target / 110, beta=0.05)
        last = torch.cat((centred, chroma.detach()), dim=1)
    return loss


def prepare(network: nn.Module) -> None:
    """Weights that keep the size of signals through many layers."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith("conv10_ab"):
                nn.init.normal_(module.weight, std=0.02)


def train(network: nn.Module, loss_of: Callable[[int], Tensor], minutes: float, rate: float) -> None:
    """Adam with a cosine schedule over wall time. loss_of: of the step's number."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)
    start, steps, shown = time.monotonic(), 0, 0.0
    while (spent := (time.monotonic() - start) / 60) < minutes:
        cosine = 0.5 + 0.5 * math.cos(math.pi * spent / minutes)
        for group in optimiser.param_groups:
            group["lr"] = rate * cosine * min(1.0, (steps + 1) / WARM_UP) + 1e-5
        loss = loss_of(steps)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        steps += 1
        shown += loss.item()
        if steps % 50 == 0:
            print(f"{spent:5.1f} min, step {steps}: loss {shown / 50:.4f}", flush=True)
            shown = 0.0


def save(network: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()
    }
    save_file(state, path)
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=15)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--continue", dest="more", action="store_true", help="from the files that are there")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(chosen.seed)
    networks = small_deep_exemplar()
    parts = {"vgg": networks.vgg, "nonlocal_net": networks.warp, "colornet": networks.color_net}
    paths = {name: MODELS / "deep_exemplar" / f"demo_{name}.safetensors" for name in parts}
    if chosen.more:
        for name, part in parts.items():
            part.load_state_dict(read_tensors(paths[name]))
    else:
        prepare(networks)
    scenes = Scenes(chosen.seed)
    train(networks, lambda step: deep_exemplar_loss(networks, scenes.clip(FRAMES, SIDE)), chosen.minutes, RATE)
    for name, part in parts.items():
        save(part, paths[name])


if __name__ == "__main__":
    main()
