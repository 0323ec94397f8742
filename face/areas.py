"""Faces as areas of their pictures: masks, and pictures with the faces marked."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .faces import FaceError, Faces
from .pictures import in_float

SHAPES = ("oval", "box")
MARKS = ((80, 220, 100), (255, 170, 40), (90, 160, 255), (240, 90, 200))
POINT_COLOURS = ((255, 70, 70), (70, 255, 70), (70, 70, 255), (255, 255, 70), (255, 70, 255))


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


def mark_faces(picture: Tensor, faces: Faces) -> Tensor:
    """[H, W, 3] float RGB: the picture [H, W, C] in 0..1 with each face's box, key points, index and score drawn."""
    from PIL import Image, ImageDraw, ImageFont

    picture = in_float(picture.detach())
    rgb = picture[..., :3] if picture.shape[-1] >= 3 else picture[..., :1].expand(*picture.shape[:2], 3)
    image = Image.fromarray((rgb.cpu().clamp(0, 1).numpy() * 255).astype(np.uint8))
    ink = ImageDraw.Draw(image)
    thick = max(1, round(max(image.size) / 400))
    font = ImageFont.load_default(max(10, max(image.size) // 40))
    for i, (box, points) in enumerate(zip(faces.boxes.tolist(), faces.keypoints.tolist(), strict=True)):
        colour = MARKS[i % len(MARKS)]
        # A weak detection may have its sides the wrong way round.
        box = [min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])]
        ink.rectangle(box, outline=colour, width=thick)
        for (px, py), point_colour in zip(points, POINT_COLOURS, strict=True):
            ink.ellipse((px - 1.5 * thick, py - 1.5 * thick, px + 1.5 * thick, py + 1.5 * thick), fill=point_colour)
        label = f"{i}  {float(faces.scores[i]):.2f}"
        left, top, right, bottom = ink.textbbox((0, 0), label, font=font)
        tall = bottom - top + 2 * thick
        # Above the box, or inside it at the top of the picture.
        at = (box[0], box[1] - tall if box[1] >= tall else box[1])
        ink.rectangle((at[0], at[1], at[0] + right - left + 2 * thick, at[1] + tall), fill=colour)
        ink.text((at[0] + thick - left, at[1] + thick - top), label, fill=(0, 0, 0), font=font)
    return torch.from_numpy(np.array(image)).float() / 255.0


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
