"""ComfyUI's own video nodes, rebuilt for runs without it: same ids, inputs and outputs.

A nested choice of ComfyUI's Save Video arrives in API JSON as inputs with dotted names ("format.codec"); they are
declared here as they arrive.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor

from .. import host
from ..host.whole_files import new_file
from . import files
from .video import VideoComponents, VideoFile, VideoFrames
from .video_encoding import SUFFIXES

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".ogv", ".ts")
CODECS = ["auto", "h264", "av1"]
COLOR_SPACES = ["auto", "sRGB"]


class LoadVideo:
    """A video from the input folder, decoded when its frames are asked for."""

    DISPLAY_NAME = "Load Video"
    DESCRIPTION = "Loads a video from the input folder."
    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "load"
    CATEGORY = "video"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (files.listed(VIDEO_SUFFIXES), {"video_upload": True})}}

    def load(self, file: str) -> tuple[VideoFile]:
        return (VideoFile(files.input_file(file)),)

    @classmethod
    def IS_CHANGED(cls, file: str) -> list[int]:
        # A film is long to hash; its time and size say enough.
        stat = files.input_file(file).stat()
        return [stat.st_mtime_ns, stat.st_size]

    @classmethod
    def VALIDATE_INPUTS(cls, file: str) -> bool | str:
        try:
            files.input_file(file)
        except (OSError, ValueError) as error:
            return str(error)
        return True


class GetVideoComponents:
    """Frames, sound and rate of a video."""

    DISPLAY_NAME = "Get Video Components"
    DESCRIPTION = "Takes a video apart: frames, sound, frame rate, bit depth and colour space."
    RETURN_TYPES = ("IMAGE", "AUDIO", "FLOAT", "INT", "COMBO")
    RETURN_NAMES = ("images", "audio", "fps", "bit_depth", "color_space")
    FUNCTION = "split"
    CATEGORY = "video"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"video": ("VIDEO", {"tooltip": "The video to take apart."})}}

    def split(self, video: Any) -> tuple[Tensor, dict[str, Any] | None, float, int, str]:
        parts = video.get_components()
        return parts.images, parts.audio, float(parts.frame_rate), video.get_bit_depth(), video.get_color_space()


class CreateVideo:
    """A video from frames, and sound where there is some."""

    DISPLAY_NAME = "Create Video"
    DESCRIPTION = "Makes a video of pictures."
    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "create"
    CATEGORY = "video"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The frames."}),
                "fps": ("FLOAT", {"default": 30.0, "min": 1.0, "max": 120.0, "step": 1.0}),
            },
            "optional": {
                "audio": ("AUDIO", {"tooltip": "The sound."}),
                "bit_depth": ("INT", {"default": 8, "min": 8, "max": 10, "step": 2}),
            },
        }

    def create(
        self, images: Tensor, fps: float, audio: dict[str, Any] | None = None, bit_depth: int = 8
    ) -> tuple[VideoFrames]:
        return (VideoFrames(VideoComponents(images, Fraction(fps), audio), bit_depth),)


class SaveVideo:
    """A numbered video file in the output folder, the workflow inside."""

    DISPLAY_NAME = "Save Video"
    DESCRIPTION = "Saves a video into the output folder, with the workflow in its metadata."
    RETURN_TYPES = ("VIDEO",)
    RETURN_NAMES = ("video",)
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "video"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        crf = ("FLOAT", {"default": 23.0, "min": 0.0, "max": 63.0, "step": 1.0})
        optional: dict[str, Any] = {}
        for prefix in ("codec", "format.codec"):
            optional[prefix] = (CODECS,)
            optional[f"{prefix}.encoding"] = (["auto", "re-encode"],)
            optional[f"{prefix}.encoding.crf"] = crf
            optional[f"{prefix}.encoding.color_space"] = (COLOR_SPACES,)
        return {
            "required": {
                "video": ("VIDEO", {"tooltip": "The video to save."}),
                "filename_prefix": ("STRING", {"default": "video/ComfyUI", "tooltip": "Name of the file."}),
                "format": (list(SUFFIXES), {"default": "auto", "tooltip": "The container."}),
            },
            "optional": optional,
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save(
        self,
        video: Any,
        filename_prefix: str,
        format: str,
        codec: str | None = None,
        prompt: Any = None,
        extra_pnginfo: Any = None,
        **nested: Any,
    ) -> dict[str, Any]:
        prefix = "format.codec" if "format.codec" in nested else "codec"
        codec = nested.get("format.codec") or codec or "auto"
        crf = nested.get(f"{prefix}.encoding.crf")
        width, height = video.get_dimensions()
        name = files.output_name(host.current().output_folder(), filename_prefix, width, height)
        told = {**({} if prompt is None else {"prompt": prompt}), **(extra_pnginfo or {})}
        metadata = told if host.current().keeps_workflows() else {}
        save = partial(video.save_to, format=format, codec=codec, metadata=metadata, crf=crf)
        path = new_file(name.paths(SUFFIXES[format]), save, SUFFIXES[format])
        # ComfyUI shows a video under "images", with a mark that it moves.
        shown = {"filename": path.name, "subfolder": name.subfolder, "type": "output"}
        return {"ui": {"images": [shown], "animated": [True]}, "result": (video,)}


NODES: dict[str, type[Any]] = {
    "LoadVideo": LoadVideo,
    "GetVideoComponents": GetVideoComponents,
    "CreateVideo": CreateVideo,
    "SaveVideo": SaveVideo,
}
