"""ComfyUI's own image nodes that our workflows use, rebuilt for runs without it: same ids, inputs and outputs.

IMAGE is float RGB in 0..1, [N, H, W, 3]; MASK is float in 0..1, [N, H, W], 1 where a picture is transparent.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import host
from ..host.picture_files import open_picture, upright
from ..host.whole_files import new_file
from . import files

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
NO_MASK_SIZE = 64  # what ComfyUI gives for a picture without transparency: a mask of 64 x 64 zeros
MAX_SIZE = 16384


class LoadImage:
    """A picture from the input folder; every frame of an animated one."""

    DISPLAY_NAME = "Load Image"
    DESCRIPTION = "Loads a picture from the input folder."
    RETURN_TYPES: tuple[str, ...] = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    CATEGORY = "image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (files.listed(IMAGE_SUFFIXES), {"image_upload": True})}}

    def load_image(self, image: str) -> tuple[Tensor, ...]:
        return read_image(image)

    @classmethod
    def IS_CHANGED(cls, image: str, **_: Any) -> str:
        return hashlib.sha256(files.input_file(image).read_bytes()).hexdigest()

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        try:
            files.input_file(image)
        except (OSError, ValueError) as error:
            return str(error)
        return True


class LoadImageMask(LoadImage):
    """One channel of a picture as a mask."""

    DISPLAY_NAME = "Load Image (as Mask)"
    DESCRIPTION = "Loads one channel of a picture from the input folder as a mask."
    RETURN_TYPES = ("MASK",)
    FUNCTION = "load_image_mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**super().INPUT_TYPES()["required"], "channel": (["alpha", "red", "green", "blue"],)}}

    def load_image_mask(self, image: str, channel: str) -> tuple[Tensor]:
        picture, mask = read_image(image)
        if channel == "alpha":
            return (mask,)
        return (picture[..., ["red", "green", "blue"].index(channel)].clone(),)


class SaveImage:
    """Numbered PNG files in the output folder, the workflow inside."""

    DISPLAY_NAME = "Save Image"
    DESCRIPTION = "Saves pictures as PNG into the output folder, with the workflow in their metadata."
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "image"
    KIND = "output"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The pictures to save."}),
                "filename_prefix": (
                    "STRING",
                    {"default": "ComfyUI", "tooltip": "Name of the files."},
                ),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(
        self, images: Tensor, filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
    ) -> dict[str, Any]:
        shown = write_images(images, filename_prefix, self.KIND, prompt, extra_pnginfo)
        return {"ui": {"images": shown}, "result": (images,)}


class PreviewImage(SaveImage):
    """PNG files in the folder for temporary files."""

    DISPLAY_NAME = "Preview Image"
    DESCRIPTION = "Shows pictures without keeping them: they go into the folder for temporary files."
    KIND = "temp"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE", {"tooltip": "The pictures to show."})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(
        self, images: Tensor, filename_prefix: str = "preview", prompt: Any = None, extra_pnginfo: Any = None
    ) -> dict[str, Any]:
        return super().save_images(images, filename_prefix, prompt, extra_pnginfo)


class ImageBatch:
    """Two batches in one; the second is scaled and cropped to the size of the first."""

    DISPLAY_NAME = "Batch Images"
    DESCRIPTION = "Puts two batches of pictures into one; the second is scaled to cover the first's size, then cropped."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "batch"
    CATEGORY = "image/batch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image1": ("IMAGE",), "image2": ("IMAGE",)}}

    def batch(self, image1: Tensor, image2: Tensor) -> tuple[Tensor]:
        channels = max(image1.shape[-1], image2.shape[-1])
        first, second = (
            torch.nn.functional.pad(image, (0, channels - image.shape[-1]), value=1.0) for image in (image1, image2)
        )
        if second.shape[1:3] != first.shape[1:3]:
            second = cover(second, first.shape[1], first.shape[2])
        return (torch.cat((first, second.to(first))),)


class SolidMask:
    """A mask of one value."""

    DISPLAY_NAME = "Solid Mask"
    DESCRIPTION = "A mask of one value everywhere."
    RETURN_TYPES = ("MASK",)
    FUNCTION = "solid"
    CATEGORY = "mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 512, "min": 1, "max": MAX_SIZE, "step": 1}
        return {
            "required": {
                "value": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
                "width": ("INT", side),
                "height": ("INT", side),
            }
        }

    def solid(self, value: float, width: int, height: int) -> tuple[Tensor]:
        return (torch.full((1, height, width), value),)


class MaskToImage:
    """Masks as grey pictures."""

    DISPLAY_NAME = "Convert Mask to Image"
    DESCRIPTION = "Masks as grey pictures."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "convert"
    CATEGORY = "mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"mask": ("MASK", {})}}

    def convert(self, mask: Tensor) -> tuple[Tensor]:
        return (mask.reshape(-1, mask.shape[-2], mask.shape[-1])[..., None].expand(-1, -1, -1, 3),)


class ImageFromBatch:
    """Some pictures of a batch; an index below 0 counts from the end."""

    DISPLAY_NAME = "Get Image from Batch"
    DESCRIPTION = "Some pictures of a batch."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "take"
    CATEGORY = "image/batch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {}),
                "batch_index": ("INT", {"default": 0, "min": -MAX_SIZE, "max": MAX_SIZE}),
                "length": ("INT", {"default": 1, "min": 1, "max": 4096}),
            }
        }

    def take(self, image: Tensor, batch_index: int, length: int) -> tuple[Tensor]:
        first = batch_index + len(image) if batch_index < 0 else batch_index
        first = min(max(first, 0), len(image) - 1)
        return (image[first : first + length].clone(),)


class PreviewAny:
    """Any value as text."""

    DISPLAY_NAME = "Preview as Text"
    DESCRIPTION = "Shows a value as text."
    RETURN_TYPES = ("STRING",)
    FUNCTION = "main"
    OUTPUT_NODE = True
    CATEGORY = "utilities"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"source": ("*", {})}}

    def main(self, source: Any = None) -> dict[str, Any]:
        if isinstance(source, str):
            text = source
        else:
            try:
                text = json.dumps(source, indent=4, ensure_ascii=False)
            except (TypeError, ValueError):
                text = str(source)
        return {"ui": {"text": (text,)}, "result": (text,)}


def read_image(name: str) -> tuple[Tensor, Tensor]:
    """Frames [N, H, W, 3] and masks [N, H, W] (or [N, 64, 64] zeros) of a file a workflow names.

    Turned as its EXIF says. 16-bit greyscale keeps its depth. Frames of another size than the first are left out.
    """
    from PIL import ImageSequence, UnidentifiedImageError

    path = files.input_file(name)
    frames: list[Tensor] = []
    masks: list[Tensor] = []
    try:
        with open_picture(path) as opened:
            for raw in ImageSequence.Iterator(opened):
                frame = upright(raw)
                if frame.mode.startswith("I"):
                    grey = torch.from_numpy(np.asarray(frame).astype(np.float32) / 65535.0).clamp(0, 1)
                    picture, alpha = grey[..., None].expand(-1, -1, 3).contiguous(), None
                else:
                    rgba = np.array(frame.convert("RGBA" if frame.has_transparency_data else "RGB"), dtype=np.float32)
                    picture = torch.from_numpy(rgba[..., :3] / 255.0)
                    alpha = torch.from_numpy(rgba[..., 3] / 255.0) if rgba.shape[-1] == 4 else None
                if frames and picture.shape != frames[0].shape:
                    continue
                frames.append(picture)
                masks.append(torch.zeros(NO_MASK_SIZE, NO_MASK_SIZE) if alpha is None else 1.0 - alpha)
    except UnidentifiedImageError:
        raise ValueError(f"{path.name} is not a picture that can be read.") from None
    if any(mask.shape != masks[0].shape for mask in masks):
        masks = [mask if mask.shape == frames[0].shape[:2] else torch.zeros(frames[0].shape[:2]) for mask in masks]
    return torch.stack(frames), torch.stack(masks)


def write_images(images: Tensor, prefix: str, kind: str, prompt: Any, extra: Any) -> list[dict[str, str]]:
    """Write [N, H, W, C] as numbered PNG files into the folder of `kind`; returns ComfyUI's records of them."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    here = host.current()
    root = here.output_folder() if kind == "output" else here.temp_folder()
    name = files.output_name(root, prefix, images.shape[2], images.shape[1])
    metadata = PngInfo()
    for key, value in {"prompt": prompt, **(extra or {})}.items():
        if value is not None and here.keeps_workflows():
            metadata.add_text(key, json.dumps(value))
    shown = []
    for i, image in enumerate(images):
        pixels = (image.detach().float().cpu() * 255.0).clamp(0, 255).to(torch.uint8).numpy()
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        save = partial(picture.save, format="PNG", pnginfo=metadata, compress_level=4 if kind == "output" else 1)
        path = new_file(name.paths(".png", i), save)
        shown.append({"filename": path.name, "subfolder": name.subfolder, "type": kind})
    return shown


def cover(images: Tensor, height: int, width: int) -> Tensor:
    """Crop the centre of [N, H, W, C] to the aspect of height x width, then scale to it (bilinear)."""
    old_height, old_width = images.shape[1:3]
    if old_width / old_height > width / height:
        cut = round((old_width - old_height * width / height) / 2)
        images = images[:, :, cut : old_width - cut]
    else:
        cut = round((old_height - old_width * height / width) / 2)
        images = images[:, cut : old_height - cut]
    scaled = torch.nn.functional.interpolate(images.movedim(-1, 1), size=(height, width), mode="bilinear")
    return scaled.movedim(1, -1)


NODES: dict[str, type[Any]] = {
    "LoadImage": LoadImage,
    "LoadImageMask": LoadImageMask,
    "SaveImage": SaveImage,
    "PreviewImage": PreviewImage,
    "ImageBatch": ImageBatch,
    "SolidMask": SolidMask,
    "MaskToImage": MaskToImage,
    "ImageFromBatch": ImageFromBatch,
    "PreviewAny": PreviewAny,
}
