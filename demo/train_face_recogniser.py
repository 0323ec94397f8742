"""Train the demo's small face recogniser to tell drawn people apart, in about five minutes on one CPU core.

    python -m hotpath.demo.train_face_recogniser [--seconds 300] [--models demo/models]

Aligned crops of a fixed set of drawn people at different places, sizes, angles and light; cosine softmax over the set
(CosFace, arXiv:1801.09414, without margin). It tells drawn people apart; of real faces it knows nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..face.alignment import invert, similarity, template, warp
from .face_drawings import Person, draw_face, plain_background
from .face_networks import IResNet, export_recogniser

SIDE, CROP, PEOPLE, BATCH = 160, 112, 160, 32
TEMPERATURE = 16.0


def crop_of(person: Person, rng: np.random.Generator) -> Tensor:
    """[112, 112, 3] float 0..255: `person` drawn somewhere, aligned by key points that are a little off."""
    picture = plain_background(rng, (SIDE, SIDE))
    height = float(rng.uniform(40, 130))
    x, y = rng.uniform(height * 0.45, SIDE - height * 0.45, 2)
    face = draw_face(picture, person, (float(x), float(y)), height, float(rng.normal() * 0.25))
    points = face.keypoints + rng.normal(0, 0.015 * height, (5, 2)).astype(np.float32)
    inverse = invert(similarity(points[None].astype(np.float32), template(CROP))).astype(np.float32)
    pixels = torch.from_numpy(np.array(picture))[None]
    crop = warp(pixels, torch.zeros(1, dtype=torch.long), torch.from_numpy(inverse), CROP, CROP)[0]
    light = (
        crop * float(rng.uniform(0.75, 1.2)) + torch.from_numpy(rng.normal(0, rng.uniform(0, 6), crop.shape)).float()
    )
    return light.clamp(0, 255)


def train(seconds: float, seed: int = 0) -> IResNet:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    people = [Person.random(rng) for _ in range(PEOPLE)]
    network = IResNet(18, 0.125, squeeze=6)
    centres = nn.Parameter(torch.randn(PEOPLE, 512) * 0.05)
    optimiser = torch.optim.AdamW([*network.parameters(), centres], 3e-3, weight_decay=5e-4)
    network.train()
    began, step, losses = time.time(), 0, []
    while (done := (time.time() - began) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, step / 30 + 0.03) * (0.5 + 0.5 * math.cos(math.pi * done))
        who = rng.integers(0, PEOPLE, BATCH)
        # Contiguous: torch 2.11 corrupts memory in PReLU's backward pass on channels-last pictures on the CPU.
        crops = torch.stack([crop_of(people[i], rng) for i in who]).permute(0, 3, 1, 2).contiguous()
        embedding = F.normalize(network((crops - 127.5) / 127.5))
        loss = F.cross_entropy(TEMPERATURE * embedding @ F.normalize(centres).t(), torch.from_numpy(who))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        step += 1
        if step % 25 == 0:
            print(f"step {step}, {time.time() - began:.0f} s, loss {np.mean(losses[-25:]):.3f}", flush=True)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent / "models")
    options = parser.parse_args()
    network = train(options.seconds, options.seed)
    path = options.models / "insightface" / "models" / "antelopev2" / "glintr100.onnx"
    export_recogniser(network, path)
    print(f"wrote {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
