"""Two folders of pictures, paired by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..host.picture_files import open_picture, upright

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
LISTED = 5


class FolderError(ValueError):
    """Two folders that do not match, or a picture that cannot be read; the message says which and why."""


def pictures_in(folder: Path) -> dict[str, Path]:
    """The pictures below `folder` by their path in it without the ending, sorted. Raises FolderError when there are none."""
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or any(p.startswith(".") for p in inside.parts):
            continue
        name = inside.with_suffix("").as_posix()
        if name in found:
            raise FolderError(f"{folder} has {found[name].name} and {path.name}: only one can be compared.")
        found[name] = path
    if not found:
        raise FolderError(f"There is no picture in {folder} ({', '.join(sorted(SUFFIXES))}).")
    return found


def pair_files(a: Path, b: Path) -> tuple[list[tuple[str, Path, Path]], str]:
    """Pictures of equal names, or, where no name is in both and the counts are equal, in the order of the names.

    Returns (name, file in a, file in b), and a note where it is by order. Raises FolderError when some are left over.
    """
    first, second = pictures_in(a), pictures_in(b)
    if first.keys() == second.keys():
        return [(name, path, second[name]) for name, path in first.items()], ""
    if len(first) == len(second) and not first.keys() & second.keys():
        pairs = [(name, first[name], second[other]) for name, other in zip(first, second, strict=True)]
        return pairs, "No name is in both folders, so the pictures were paired in the order of their names."
    alone = [f"{name} is only in A" for name in first if name not in second]
    alone += [f"{name} is only in B" for name in second if name not in first]
    more = f" and {len(alone) - LISTED} more" if len(alone) > LISTED else ""
    raise FolderError(
        f"A has {len(first)} pictures and B has {len(second)}: {', '.join(alone[:LISTED])}{more}. Each needs a counterpart."
    )


def read_picture(path: Path) -> Tensor:
    """A picture file as [H, W, 3] in 0..1, upright; transparency is left out. Raises FolderError for a broken file.

    Grey of 16 bits and of floating point (taken as 0..1), as depth maps have, keeps its values.
    """
    try:
        with open_picture(path) as image:
            shown = upright(image)
            # Pillow cuts these to 0..255 when it converts them: nearly all of a picture is white then.
            if shown.mode == "F" or shown.mode.startswith("I"):
                grey = np.asarray(shown, np.float32) / (1 if shown.mode == "F" else 65535)
                return torch.from_numpy(np.repeat(grey[..., None], 3, axis=-1))
            pixels = np.asarray(shown.convert("RGB"), np.float32)
    except MemoryError:
        raise
    except Exception as error:  # Pillow has many words for damage: RuntimeError in an AVIF, ValueError in a TIFF
        raise FolderError(f"{path.name} cannot be read as a picture: {error}") from None
    return torch.from_numpy(pixels / 255)
