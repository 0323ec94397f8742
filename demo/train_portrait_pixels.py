"""Trains the coder between the demo's portraits and their latents, and draws the portraits to train on.

    python -m hotpath.demo.train_portrait_pixels --work FOLDER [--minutes 10] [--portraits 3000]

Writes FOLDER/portraits.pt (pictures, words, key point drawings, embeddings of another drawing of each person) and
FOLDER/pixels.pt, which `train_portraits` reads.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import face
from .comfy_nodes.hotpath_demo.portraits import PixelCoder
from .muon import Muon
from .portrait_drawings import SIDE, pose_drawing, random_portrait, reference_crop

MODELS = Path(__file__).resolve().parent / "models"
PATCH, BATCH, RATE = 64, 16, 0.02


def draw_all(count: int, seed: int = 0) -> dict[str, Any]:
    """Every fifth portrait shows two people. embeddings: [N, 2, 512], the second again the first where there is one."""
    rng = np.random.default_rng(seed)
    analyser = face.load_analyser([MODELS / "insightface"], engine="torch", device=torch.device("cpu"), remember=False)
    pictures, poses, crops, texts, pairs = [], [], [], [], []
    for number in range(count):
        portrait = random_portrait(rng, two=number % 5 == 4)
        drawn = [reference_crop(person, rng) for person in portrait.people]
        crops += [crop.byte() for crop in drawn]
        pictures.append(torch.from_numpy(portrait.picture).movedim(-1, 0))
        poses.append(pose_drawing(rng, portrait.keypoints).movedim(-1, 0))
        texts.append(portrait.text)
        pairs.append(len(portrait.people) == 2)
        if number % 500 == 499:
            print(f"{number + 1} portraits", flush=True)
    with torch.inference_mode():
        found = torch.cat(
            [analyser.recogniser.embed(torch.stack(crops[i : i + 64]).float()) for i in range(0, len(crops), 64)]
        )
    two = torch.tensor(pairs)
    last = (two + 1).cumsum(0) - 1
    return {
        "pictures": torch.stack(pictures),
        "poses": torch.stack(poses),
        "embeddings": torch.stack([found[last - two.long()], found[last]], 1).half(),
        "texts": texts,
        "two": two,
    }


def loss_of(coder: PixelCoder, pictures: Tensor) -> Tensor:
    """Absolute error of colours and of their differences, and a pull of the latents to size one; noise makes them smooth."""
    latents = coder.encode(pictures)
    pull = (latents.mean((0, 2, 3)) ** 2).mean() + (latents.var((0, 2, 3)).clamp_min(1e-4).log() ** 2).mean()
    shown = coder.decode(latents + 0.04 * torch.randn_like(latents))
    edges = sum((shown.diff(dim=d) - pictures.diff(dim=d)).abs().mean() for d in (2, 3))
    return (shown - pictures).abs().mean() + edges + 0.01 * pull


def corners_at_faces(poses: Tensor) -> Tensor:
    """[N, 2] y and x, in latents, of the patch around each portrait's key points: that is where the small things are."""
    drawn = poses.amax(1).float()
    places = torch.arange(drawn.shape[-1], dtype=torch.float32) * (SIDE / drawn.shape[-1])
    total = drawn.sum((1, 2)).clamp_min(1)
    middle = torch.stack([(drawn.sum(2) @ places) / total, (drawn.sum(1) @ places) / total], 1)
    return ((middle - PATCH / 2) / 8).round().long()


def train(coder: PixelCoder, pictures: Tensor, poses: Tensor, seconds: float, seed: int = 0) -> PixelCoder:
    torch.manual_seed(seed)
    faces = corners_at_faces(poses)
    optimiser = Muon(coder)
    began, step, losses = time.time(), 0, []
    while (done := (time.time() - began) / seconds) < 1:
        rate = RATE * min(1, (step + 1) / 20) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        rows = torch.randint(len(pictures), (BATCH,)).tolist()
        corners = faces[rows] + torch.randint(-2, 3, (BATCH, 2))
        corners = (corners.clamp(0, (SIDE - PATCH) // 8) * 8).tolist()
        batch = torch.stack(
            [pictures[r, :, y : y + PATCH, x : x + PATCH] for r, (y, x) in zip(rows, corners, strict=True)]
        )
        loss = loss_of(coder, batch.float() / 255)
        coder.zero_grad()
        loss.backward()
        optimiser.step(rate)
        losses.append(float(loss.detach()))
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {time.time() - began:.0f} s, loss {np.mean(losses[-50:]):.4f}", flush=True)
    return coder.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--portraits", type=int, default=3000)
    parser.add_argument("--resume", action="store_true", help="go on with FOLDER/pixels.pt")
    parser.add_argument("--decoder", action="store_true", help="leave the encoder as it is: latents stay what they are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    drawn = options.work / "portraits.pt"
    if not drawn.exists():
        torch.save(draw_all(options.portraits), drawn)
    loaded = torch.load(drawn, weights_only=True)
    pictures, poses = loaded["pictures"], loaded["poses"]
    coder = PixelCoder()
    if options.resume:
        coder.load_state_dict(torch.load(options.work / "pixels.pt", weights_only=True))
    coder.encoder.requires_grad_(not options.decoder)
    train(coder, pictures[:-100], poses[:-100], 60 * options.minutes, int(options.resume))
    with torch.inference_mode():
        truth = pictures[-100:].float() / 255
        error = (coder.decode(coder.encode(truth)) - truth).abs().mean()
    print(f"mean error on 100 portraits it never saw: {255 * float(error):.2f} of 255")
    torch.save(coder.state_dict(), options.work / "pixels.pt")


if __name__ == "__main__":
    main()
