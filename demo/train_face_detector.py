"""Train the demo's small face detector, on drawn faces and one photograph, in about ten minutes on one CPU core.

    python -m hotpath.demo.train_face_detector [--seconds 600] [--models demo/models]

Backgrounds are scikit-image's pictures and random shapes. The only photographed face is scikit-image's `astronaut`
(NASA, public domain), turned, mirrored, scaled and recoloured; its key points were set by eye. So the detector shows
the mechanics on drawn faces and on that photo, and nothing about photographs of other people.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .face_drawings import drawn_scene, plain_background
from .face_networks import ANCHORS, STRIDES, Scrfd, export_detector, randomise

SIDE, BATCH = 256, 8
ANCHOR_SIDES = ((16, 32), (64, 128), (256, 512))
ASTRONAUT_BOX = (180.0, 72.0, 268.0, 179.0)
ASTRONAUT_POINTS = ((203.0, 101.0), (246.6, 103.6), (223.6, 127.0), (204.4, 140.0), (244.4, 140.4))
PHOTOS = (
    "coffee", "chelsea", "rocket", "hubble_deep_field", "colorwheel", "brick", "grass", "gravel", "text", "coins",
    "page", "clock", "moon", "immunohistochemistry",
)  # fmt: skip

Scene = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]  # picture, boxes [N, 4], points [N, 5, 2]


def photographs() -> list[Image.Image]:
    import skimage.data

    found = []
    for name in PHOTOS:
        pixels = getattr(skimage.data, name)()
        found.append(Image.fromarray(pixels[..., :3] if pixels.ndim == 3 else pixels).convert("RGB"))
    return found


def astronaut() -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.astronaut())


def crop_of(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square piece of the photo at a random scale, mirrored half the time."""
    extent = min(photo.size) * rng.uniform(0.3, 1.0)
    x, y = rng.uniform(0, photo.width - extent), rng.uniform(0, photo.height - extent)
    piece = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (x, y, x + extent, y + extent))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def astronaut_scene(photo: Image.Image, rng: np.random.Generator) -> Scene:
    """The astronaut's photo turned, scaled and shifted so that the face lies in the picture at 24 to 200 pixels."""
    height = math.exp(rng.uniform(math.log(24), math.log(SIDE * 0.8)))
    scale, angle = height / (ASTRONAUT_BOX[3] - ASTRONAUT_BOX[1]), rng.normal() * 0.2
    mirror = rng.random() < 0.5
    centre = np.array([224.0, 125.0])
    to = rng.uniform(height * 0.5, SIDE - height * 0.5, 2)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    if mirror:
        turn = turn @ np.diag([-1.0, 1.0])
    back = np.linalg.inv(turn)
    shift = centre - back @ to
    coefficients = (back[0, 0], back[0, 1], shift[0], back[1, 0], back[1, 1], shift[1])
    # Filled with what lies under it, so that the photo's border is no cue.
    source = photo if scale > 0.25 else photo.resize((256, 256), Image.Resampling.BOX)
    factor = source.width / photo.width
    scaled = tuple(c * factor for c in coefficients)
    fill = tuple(int(v) for v in rng.integers(0, 256, 3))
    picture = source.transform((SIDE, SIDE), Image.Transform.AFFINE, scaled, Image.Resampling.BILINEAR, fillcolor=fill)
    points = (np.array(ASTRONAUT_POINTS) - centre) @ turn.T + to
    if mirror:
        points = points[[1, 0, 2, 4, 3]]
    half = np.array([44.0, 53.5])
    t = np.linspace(0, 2 * math.pi, 32)
    outline = np.stack([half[0] * np.cos(t), half[1] * np.sin(t)], 1) @ turn.T + to
    box = np.concatenate([outline.min(0), outline.max(0)])
    return np.array(picture), box[None].astype(np.float32), points[None].astype(np.float32)


def scene(rng: np.random.Generator, photos: list[Image.Image], person: Image.Image) -> Scene:
    """A training picture: 0 to 3 drawn faces on a photo or on shapes, or the astronaut; then noise and other light."""
    if rng.random() < 0.3:
        picture, boxes, points = astronaut_scene(person, rng)
    else:
        plain = rng.random() < 0.35
        background = plain_background(rng, (SIDE, SIDE)) if plain else crop_of(photos[rng.integers(len(photos))], rng)
        drawn_on, faces = drawn_scene(rng, background, int(rng.integers(0, 4)), 18, 0.8)
        picture = np.array(drawn_on)
        boxes = np.array([f.box for f in faces], np.float32).reshape(-1, 4)
        points = np.array([f.keypoints for f in faces], np.float32).reshape(-1, 5, 2)
    if rng.random() < 0.6:
        light = picture.astype(np.float32) * rng.uniform(0.6, 1.3, 3 if rng.random() < 0.3 else 1)
        picture = np.clip(light + rng.normal(0, rng.uniform(0, 8), picture.shape), 0, 255).astype(np.uint8)
    if rng.random() < 0.1:
        picture = np.repeat(picture.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    return picture, boxes, points


def targets(boxes: NDArray[np.float32], points: NDArray[np.float32]) -> list[list[NDArray[np.float32]]]:
    """Per stride: wanted scores, sides and points, and 0 where an anchor of a neighbouring size is left out."""
    levels = []
    for stride in STRIDES:
        grid = SIDE // stride
        levels.append(
            [
                np.zeros((grid, grid, ANCHORS, c), np.float32) if c else np.ones((grid, grid, ANCHORS, 1), np.float32)
                for c in (1, 4, 10, 0)
            ]
        )
    for box, face in zip(boxes, points, strict=True):
        extent = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        distance = [[abs(math.log2(extent / anchor)) for anchor in pair] for pair in ANCHOR_SIDES]
        nearest = min(min(pair) for pair in distance)
        centre = (box[:2] + box[2:]) / 2
        for level, stride in enumerate(STRIDES):
            at = np.arange(SIDE // stride) * stride
            radius = max(stride * 0.75, 0.16 * extent)
            ys, xs = np.nonzero((abs(at[:, None] - centre[1]) <= radius) & (abs(at[None] - centre[0]) <= radius))
            for anchor in range(ANCHORS):
                score, sides, offsets, counts = levels[level]
                if distance[level][anchor] <= nearest + 1e-6:
                    where = np.stack([at[xs], at[ys]], -1).astype(np.float32)
                    score[ys, xs, anchor] = 1
                    sides[ys, xs, anchor] = np.concatenate([where - box[:2], box[2:] - where], -1) / stride
                    offsets[ys, xs, anchor] = ((face[None] - where[:, None]) / stride).reshape(-1, 10)
                elif distance[level][anchor] < 1.2:
                    counts[ys, xs, anchor] = 0
    return levels


def loss_of(network: Scrfd, pictures: Tensor, wanted: list[list[list[NDArray[np.float32]]]]) -> Tensor:
    """Focal loss on the scores, smooth L1 in strides on sides and points."""
    total = pictures.new_zeros(())
    positives = max(1.0, float(sum(t[level][0].sum() for t in wanted for level in range(len(STRIDES)))))
    for level, outputs in enumerate(network.heads(pictures)):
        score, sides, points, counts = (torch.from_numpy(np.stack([t[level][k] for t in wanted])) for k in range(4))

        def arranged(x: Tensor, like: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1).reshape(like.shape)

        logits = arranged(outputs[0], score)
        p = logits.sigmoid()
        focal = torch.where(score > 0, 0.5 * (1 - p) ** 2, 0.5 * p**2) * counts
        bce = F.binary_cross_entropy_with_logits(logits, score, reduction="none")
        total = total + 4 * (focal * bce).sum() / positives
        hit = score[..., 0] > 0
        if hit.any():
            for output, target in ((outputs[1], sides), (outputs[2], points)):
                error = F.smooth_l1_loss(arranged(output, target)[hit], target[hit], reduction="none", beta=0.2)
                total = total + error.mean(-1).sum() / positives
    return total


@torch.no_grad()
def start(network: Scrfd) -> None:
    """Few faces at first, and boxes and points of the anchors' sizes."""
    shape = torch.tensor([(-0.34, -0.15), (0.34, -0.15), (0, 0.18), (-0.26, 0.52), (0.26, 0.52)]).flatten()
    for level, (stride, sizes) in enumerate(zip(STRIDES, ANCHOR_SIDES, strict=True)):
        for head in (network.score[level], network.sides[level], network.points[level]):
            head.weight.mul_(0.1)
        network.score[level].bias.fill_(-4.5)
        network.sides[level].bias.copy_(torch.tensor([s / 2 / stride for s in sizes for _ in range(4)]))
        network.points[level].bias.copy_(torch.cat([shape * s / 2 / stride for s in sizes]))


def train(seconds: float, seed: int = 0) -> Scrfd:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    photos, person = photographs(), astronaut()
    network = Scrfd(0.25)
    randomise(network, seed)
    start(network)
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-4)
    began, step, losses = time.time(), 0, []
    while (done := (time.time() - began) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, step / 50 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * done))
        scenes = [scene(rng, photos, person) for _ in range(BATCH)]
        pictures = torch.from_numpy(np.stack([s[0] for s in scenes])).permute(0, 3, 1, 2).float()
        loss = loss_of(network, (pictures - 127.5) / 128, [targets(s[1], s[2]) for s in scenes])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {time.time() - began:.0f} s, loss {np.mean(losses[-50:]):.3f}", flush=True)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent / "models")
    options = parser.parse_args()
    network = train(options.seconds, options.seed)
    path = options.models / "insightface" / "models" / "antelopev2" / "scrfd_10g_bnkps.onnx"
    export_detector(network, path)
    print(f"wrote {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
