"""Crops around faces, and crops put back: the second pass over a face, at the size a model likes.

A crop is a rotation, one scale and a shift of its picture, so what was changed in it lands where it came from. Pictures may
be scaled as a whole after their faces were found, and again after the crops were cut: places are scaled with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .. import host
from .alignment import TEMPLATE, TEMPLATE_SIZE, invert, similarity, warp
from .faces import FaceError, Faces
from .pictures import in_float

FINEST = 8  # largest number of samples per pixel and axis where a crop or a picture is coarser than the other


@dataclass(frozen=True)
class CropPlaces:
    """Where crops came from: crop F shows picture `rows[F]` through `inverse[F]`, from crop pixels to its pixels."""

    inverse: NDArray[np.float64]  # [F, 2, 3]
    rows: tuple[int, ...]
    side: int
    sizes: tuple[tuple[int, int], ...]  # height, width of each picture in whose pixels `inverse` is

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def pictures(self) -> int:
        """How many pictures the crops are of."""
        return len(self.sizes)

    def matrix(self, i: int, height: int, width: int) -> NDArray[np.float64]:
        """[2, 3] from the pixels of crop `i` to those of its picture, which is now of this size.

        Raises FaceError when that is no scaling of the picture whose faces were found.
        """
        tall, wide = self.sizes[self.rows[i]]
        matrix = self.inverse[i].copy()
        if (height, width) == (tall, wide):
            return matrix
        # Scaled sides are rounded to whole pixels, on the way down or on the way up.
        if abs(height * wide - width * tall) > max(height, width, tall, wide):
            raise FaceError(
                f"The faces were found in a picture of {wide} x {tall}, and this one of {width} x {height} has another "
                "shape: connect the same pictures, or the same scaled as a whole."
            )
        factor = np.array([width / wide, height / tall])
        matrix *= factor[:, None]
        matrix[:, 2] += (factor - 1) / 2  # pixel i covers [i, i + 1)
        return matrix


def crop_places(faces: Sequence[Faces], side: int, margin: float, upright: bool) -> CropPlaces:
    """One square crop per face, picture by picture.

    margin: room around the face on each side, in parts of the face's extent. upright=False turns the crop so that the
    eyes are level (ArcFace's template); True keeps the picture's angle and centres the box.
    """
    if side < 8:
        raise FaceError(f"A crop of {side} pixels is too small to hold a face; use at least 8.")
    matrices, rows = [], []
    room = 1 + 2 * margin
    for row, found in enumerate(faces):
        for box, keypoints in zip(found.boxes.numpy(), found.keypoints.numpy(), strict=True):
            rows.append(row)
            if upright:
                extent = max(float(box[2] - box[0]), float(box[3] - box[1]), 1.0) * room
                x, y = (box[0] + box[2]) / 2 - extent / 2, (box[1] + box[3]) / 2 - extent / 2
                step = extent / side
                # Pixel centres: crop pixel i covers [i, i + 1).
                matrices.append([[step, 0, x + step / 2 - 0.5], [0, step, y + step / 2 - 0.5]])
            else:
                target = (TEMPLATE / TEMPLATE_SIZE - 0.5) / room + 0.5
                matrices.append(invert(similarity(keypoints[None], (target * side).astype(np.float32)))[0])
    inverse = np.array(matrices, np.float64).reshape(-1, 2, 3)
    return CropPlaces(inverse, tuple(rows), side, tuple(found.size for found in faces))


def cut(pictures: Tensor, places: CropPlaces) -> Tensor:
    """[F, side, side, C] crops of `pictures` [B, H, W, C], averaged where a crop shrinks its face.

    Outside of its picture a crop repeats the edge: black would bleed into the border when it is pasted back. Raises
    FaceError for pictures of another number or shape.
    """
    _same_batch(pictures, places)
    height, width, channels = pictures.shape[1:]
    side, last = places.side, -1
    crops = torch.empty(len(places), side, side, channels, device=pictures.device)
    for i, row in enumerate(host.each(places.rows, "crops")):
        if row != last:
            # By itself: what a VAE decoded lies channel by channel, and would be brought in order as a batch for every crop.
            picture, last = in_float(pictures[row : row + 1]).contiguous(), row
        matrix = places.matrix(i, height, width)
        fine = int(np.ceil(_step(matrix) - 1e-6))
        crops[i] = _averaged(picture, matrix, side, side, fine, repeat_edge=True)[0]
    return crops


def _step(matrix: NDArray[np.float64]) -> float:
    """How many pixels of the source lie along one of the target."""
    return float(np.hypot(matrix[0, 0], matrix[1, 0]))


def _averaged(
    pixels: Tensor, matrix: NDArray[np.float64], height: int, width: int, fine: int, repeat_edge: bool
) -> Tensor:
    """[1, height, width, C] of `pixels` [1, H, W, C] through `matrix` [2, 3], each pixel the mean of fine x fine samples."""
    fine = min(FINEST, max(1, fine))
    shift = (1 - fine) / (2 * fine)
    finer = matrix.copy()
    finer[:, 2] += matrix[:, :2] @ np.array([shift, shift])
    finer[:, :2] /= fine
    inverse = torch.from_numpy(finer[None].astype(np.float32)).to(pixels.device)
    which = torch.zeros(1, dtype=torch.long, device=pixels.device)
    samples = warp(pixels, which, inverse, height * fine, width * fine, repeat_edge)
    return F.avg_pool2d(samples.permute(0, 3, 1, 2), fine).permute(0, 2, 3, 1)


def edge_weight(side: int, feather: float) -> Tensor:
    """[side, side] in 0..1: 0 at the border, 1 from `feather` (part of half the side) inwards, smooth between."""
    across = torch.minimum(torch.arange(side) + 0.5, side - torch.arange(side) - 0.5) / (side / 2)
    inside = (across / max(feather, 1e-6)).clamp(0, 1)
    inside = inside * inside * (3 - 2 * inside)
    return inside[:, None] * inside[None, :]


def paste(
    pictures: Tensor, crops: Tensor, places: CropPlaces, feather: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The pictures [B, H, W, C] in float32 with the crops [F, S, S, C] put back, and where [B, H, W] in 0..1.

    feather: width of the soft border, in parts of half the crop. mask: [F or 1, s, s] or [s, s], what of each crop
    counts; any size. Crops may have another side than they were cut with, and are averaged where the picture is coarser;
    the pictures may have been scaled. Raises FaceError when the number of crops or masks differs, a crop is not square,
    or the pictures have another shape.
    """
    _same_batch(pictures, places)
    if crops.shape[0] != len(places):
        raise FaceError(
            f"{crops.shape[0]} crops cannot be pasted into {len(places)} places; paste what Face Crop gave."
        )
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        if mask.dim() != 3 or mask.shape[0] not in (1, len(places)):
            raise FaceError(
                f"The masks are of the shape {list(mask.shape)} for {len(places)} crops: connect one mask per crop, or one "
                "for all of them."
            )
    # Of another dtype, `in_float` is a copy already.
    out = in_float(pictures) if pictures.dtype != torch.float32 else pictures.clone()
    touched = out.new_zeros(out.shape[:3])
    height, width, channels = pictures.shape[1:]
    for i, row in enumerate(host.each(places.rows, "crops")):
        crop = _in_channels(in_float(crops[i]).to(out), channels)
        if crop.shape[0] != crop.shape[1]:
            raise FaceError(f"A crop came back as {crop.shape[1]} x {crop.shape[0]}; crops are square, at any size.")
        side = crop.shape[0]
        weight = edge_weight(side, feather).to(out)
        if mask is not None:
            own = mask[i if mask.shape[0] > 1 else 0].to(out)
            weight = weight * F.interpolate(own[None, None], size=(side, side), mode="bilinear", antialias=True)[0, 0]
        inverse = places.matrix(i, height, width)
        ratio = places.side / side
        inverse[:, 2] += inverse[:, :2] @ np.full(2, (ratio - 1) / 2)
        inverse[:, :2] *= ratio
        corners = np.array([[-1, -1, 1], [side, -1, 1], [-1, side, 1], [side, side, 1]]) @ inverse.T
        x0, y0 = (max(0, int(v)) for v in np.floor(corners.min(0)))
        x1, y1 = (min(limit, int(v) + 1) for limit, v in zip((width, height), np.ceil(corners.max(0)), strict=True))
        if x0 >= x1 or y0 >= y1:
            continue
        forward = invert(inverse[None])
        forward[0, :, 2] += forward[0, :, :2] @ np.array([x0, y0])
        tall, wide, fine = y1 - y0, x1 - x0, int(_step(forward[0]))
        # The weight ends at the border and the colour does not: a hard border would be darkened by the black beyond.
        back = _averaged(crop[None].contiguous(), forward[0], tall, wide, fine, repeat_edge=True)[0]
        alpha = _averaged(weight[None, ..., None].contiguous(), forward[0], tall, wide, fine, repeat_edge=False)[0]
        region = out[row, y0:y1, x0:x1, : back.shape[-1]]
        out[row, y0:y1, x0:x1, : back.shape[-1]] = torch.lerp(region, back, alpha)
        region = touched[row, y0:y1, x0:x1]
        touched[row, y0:y1, x0:x1] = torch.maximum(region, alpha[..., 0])
    return out, touched


def _in_channels(crop: Tensor, channels: int) -> Tensor:
    """A crop as a picture of `channels` takes it: grey is repeated, colour averaged for grey. Without transparency of
    its own it leaves the picture's as it is, and gives only the colours."""
    given = crop.shape[-1]
    if given == 1 and channels > 1:
        return crop.expand(*crop.shape[:2], 3)
    if channels == 1 and given > 1:
        return crop[..., :3].mean(-1, keepdim=True)
    return crop[..., :channels]


def _same_batch(pictures: Tensor, places: CropPlaces) -> None:
    if pictures.shape[0] != places.pictures:
        raise FaceError(
            f"The faces are of {places.pictures} pictures and {pictures.shape[0]} are connected: connect the same batch."
        )
