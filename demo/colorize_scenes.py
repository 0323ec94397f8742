"""Clips whose true colours are known: camera moves over photographs and drawn scenes, for training and for the demo."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

TRAINING_PHOTOS = ("astronaut", "chelsea", "rocket")
HELD_OUT_PHOTO = "coffee"


def photograph(name: str) -> Tensor:
    """One of scikit-image's photographs, [3, H, W] in 0..1."""
    import skimage.data

    picture = np.asarray(getattr(skimage.data, name)())[..., :3]
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255


def drawn_scene(random: torch.Generator, side: int = 320) -> Tensor:
    """Soft and hard shapes in random colours over a gradient, with a texture of its own in each, [3, side, side]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    ends = torch.rand(2, 3, generator=random)
    scene = ends[0, :, None, None] * (1 - y) + ends[1, :, None, None] * y
    for _ in range(int(torch.randint(6, 14, (1,), generator=random))):
        centre = torch.rand(2, generator=random)
        radius = 0.05 + 0.2 * torch.rand(2, generator=random)
        colour = torch.rand(3, generator=random)[:, None, None]
        distance = ((y - centre[0]) / radius[0]).abs() ** 3 + ((x - centre[1]) / radius[1]).abs() ** 3
        inside = (1.2 - distance).mul(20).sigmoid()
        frequency = 10 + 60 * torch.rand(2, generator=random)
        texture = 0.85 + 0.15 * torch.sin(frequency[0] * x + frequency[1] * y)
        scene = scene * (1 - inside) + colour * texture * inside
    return scene.clamp(0, 1)


def camera_move(picture: Tensor, frames: int, height: int, width: int, random: torch.Generator) -> Tensor:
    """A camera gliding, zooming and turning a little over `picture`, [frames, 3, height, width]."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=random))

    near = between(0.35, 0.6)
    zoom = (near, near * between(0.85, 1.18))
    angle = (between(-0.15, 0.15), between(-0.15, 0.15))
    start = (between(-0.3, 0.3), between(-0.3, 0.3))
    # Most of what is seen at the end was there at the start, or nobody could know its colours.
    shift = [start, (start[0] + between(-0.15, 0.15), start[1] + between(-0.15, 0.15))]
    aspect = (picture.shape[1] / picture.shape[2]) * (width / height)
    grids = []
    for index in range(frames):
        t = index / max(frames - 1, 1)
        scale = zoom[0] * (1 - t) + zoom[1] * t
        turn = torch.tensor(angle[0] * (1 - t) + angle[1] * t)
        across = shift[0][0] * (1 - t) + shift[1][0] * t
        down = shift[0][1] * (1 - t) + shift[1][1] * t
        rotation = torch.tensor([[turn.cos() * aspect, -turn.sin() * aspect, across], [turn.sin(), turn.cos(), down]])
        rotation[:, :2] *= scale
        grids.append(F.affine_grid(rotation[None], [1, 3, height, width], align_corners=False))
    moved = F.grid_sample(picture.expand(frames, -1, -1, -1), torch.cat(grids), "bilinear", "reflection", False)
    return moved.clamp(0, 1)


def held_out_clip(frames: int = 24, height: int = 112, width: int = 112) -> Tensor:
    """The clip that tests and the demo colour: a photograph no training saw, [frames, 3, height, width]."""
    return camera_move(photograph(HELD_OUT_PHOTO), frames, height, width, torch.Generator().manual_seed(7))
