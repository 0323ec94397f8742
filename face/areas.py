"""Faces as areas of their pictures: masks, and key points in pictures of another size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .faces import FaceError, Faces

SHAPES = ("oval", "box")


def face_mask(faces: Faces, height: int, width: int, shape: str, grow: float, feather: float) -> Tensor:
    """[height, width] in 0..1, 1 on every face; black without one.

    shape: "oval" follows the eyes, also of a face that lies or stands on its head; "box" is the detector's. grow: added
    on each side, in parts of the box's extent. feather: width of the soft edge in pixels, outside of the shape.
    """
    if shape not in SHAPES:
        raise FaceError(f"{shape!r} is no mask shape; it is one of: {', '.join(SHAPES)}.")
    mask = torch.zeros(height, width)
    scale = torch.tensor([width / faces.size[1], height / faces.size[0]])
    soft = max(feather, 1.0)
    for box, points in zip(faces.boxes, faces.keypoints, strict=True):
        low, high = box[:2] * scale, box[2:] * scale
        centre, half = (low + high) / 2, ((high - low) / 2 * (1 + 2 * grow)).clamp(min=0.5)
        if shape == "oval":
            eyes = (points[1] - points[0]) * scale
            tilt = math.atan2(float(eyes[1]), float(eyes[0])) if float(eyes.abs().sum()) > 0 else 0.0
            cos, sin = math.cos(tilt), math.sin(tilt)
            # The box's extent along the eyes and along the nose: a face that lies has them the other way round.
            axes = torch.tensor([[cos, sin], [sin, cos]]).mul(half).norm(dim=1)
            axes *= (half.prod() / axes.prod()).sqrt()  # in between, the area stays
            reach = torch.tensor([[cos, sin], [sin, cos]]).mul(axes).norm(dim=1) * (1 + soft / float(axes.min()))
        else:
            reach = half + soft
        # Beyond the soft edge there is nothing to compute.
        limit = torch.tensor([width, height])
        x0, y0 = torch.minimum((centre - reach).floor().clamp(min=0), limit).long().tolist()
        x1, y1 = torch.minimum((centre + reach).ceil().clamp(min=0), limit).long().tolist()
        dx = torch.arange(x0, x1) + 0.5 - centre[0]
        dy = (torch.arange(y0, y1) + 0.5 - centre[1])[:, None]
        if shape == "oval":
            across, along = dx * cos + dy * sin, -dx * sin + dy * cos
            # Distance to the edge, exact on the axes, which is all a soft edge needs.
            distance = (torch.hypot(across / axes[0], along / axes[1]) - 1) * float(axes.min())
        else:
            distance = torch.maximum(dx.abs() - half[0], dy.abs() - half[1])
        region = mask[y0:y1, x0:x1]
        torch.maximum(region, 1 - (distance / soft).clamp(0, 1), out=region)
    return mask


def fit_keypoints(faces: Faces, height: int, width: int, fit: str) -> Tensor:
    """[N, 5, 2] the key points in a picture of another size: "stretch", "contain" (all of it) or "cover" (filled)."""
    sx, sy = width / faces.size[1], height / faces.size[0]
    if fit == "stretch":
        return faces.keypoints * torch.tensor([sx, sy])
    if fit not in ("contain", "cover"):
        raise FaceError(f"{fit!r} is no way to fit a drawing; it is one of: stretch, contain, cover.")
    scale = min(sx, sy) if fit == "contain" else max(sx, sy)
    shift = torch.tensor([width - faces.size[1] * scale, height - faces.size[0] * scale]) / 2
    return faces.keypoints * scale + shift
