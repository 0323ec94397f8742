"""Our colour nodes: films, video files, pictures and chroma transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import host
from ..cache import file_fingerprint
from ..colorization.chroma_transfer import transfer_chroma
from ..colorization.clip_job import colorize_clip, colorize_stills, load_method
from ..colorization.file_job import FileJob, colorize_file
from ..colorization.file_names import VIDEO_SUFFIXES, inside, videos_in
from ..colorization.film_part import Extent
from ..colorization.film_state import FilmState
from ..colorization.made_films import note_made, times_lost
from ..colorization.networks import AUTOMATIC, COLORMNET_LICENCE
from ..colorization.shot_job import Shot, colorize_shot
from .colour_inputs import (
    CHECKPOINT,
    COLOUR_SIZE,
    COMPILE,
    EDGE_FILTER,
    METHOD,
    PRECISION,
    REFERENCE,
    STRENGTH,
    film_inputs,
    options_of,
    references_of,
)
from .colour_sockets import ALIASES as COLOUR_ALIASES
from .colour_sockets import FRAMES, STATE, AnyCheckpoint, attention_inputs, checkpoint_input
from .kept_workflow import WORKFLOW, workflow_texts
from .sockets import HIDDEN

SECONDS = {"default": 0.0, "min": 0.0, "max": 360000.0, "step": 0.5, "round": 0.001}
PLAYED = (".mp4", ".m4v", ".mov", ".webm")
CATEGORY = "Hotpath/colorization"
ALIASES = [*COLOUR_ALIASES, "ColorMNet", "Deep Exemplar", "restore film"]

REPORT_TOOLTIP = "Frames, speed, time per stage, which engine ran and why, memory."


class HotpathColorizeVideo(AnyCheckpoint):
    DISPLAY_NAME = "Colorize Video (Hotpath)"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Colours a film after reference pictures, at any size and without cropping: colours at network size on the "
        f"frames' own luminance. Long films can be coloured in portions, through the state. {COLORMNET_LICENCE}"
    )
    SEARCH_ALIASES = ALIASES
    RETURN_TYPES = ("IMAGE", "MASK", STATE, "STRING")
    RETURN_NAMES = ("frames", "confidence", "state", "report")
    OUTPUT_TOOLTIPS = (
        "The frames in colour, of their own size.",
        "How close each place is to something known: memory for ColorMNet, the reference for Deep Exemplar.",
        "What the next portion of the film needs to continue.",
        REPORT_TOOLTIP,
    )
    FUNCTION = "colorize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        state = (STATE, {"tooltip": "From the portion of the film before this one."})
        return {
            "required": {
                "frames": FRAMES,
                "reference": REFERENCE,
                "method": METHOD,
            },
            "optional": {**film_inputs(), "state": state, **attention_inputs()},
            "hidden": HIDDEN,
        }

    def colorize(
        self,
        frames: torch.Tensor,
        reference: torch.Tensor,
        method: str,
        more_references: torch.Tensor | None = None,
        reference_frames: str = "",
        precision: str = AUTOMATIC,
        checkpoint: str = AUTOMATIC,
        state: FilmState | None = None,
        unique_id: str | None = None,
        **settings: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, FilmState, str]:
        options = options_of(method, settings)
        references = references_of(reference, more_references, reference_frames)
        done = colorize_clip(load_method(options, checkpoint, precision), frames, references, options, state)
        host.current().show_text(done.report, unique_id)
        return done.pictures, done.confidence, done.state, done.report


class HotpathColorizeFile:
    DISPLAY_NAME = "Colorize Video File (Hotpath)"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Colours a video file into a video file: never whole in memory, with sound and timing. After a crash or an "
        f"interrupt, the same workflow continues where it stopped. {COLORMNET_LICENCE}"
    )
    SEARCH_ALIASES = ALIASES
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("file", "report")
    OUTPUT_TOOLTIPS = ("Path of the coloured video.", REPORT_TOOLTIP)
    FUNCTION = "colorize"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        videos = videos_in(host.current().input_folder())
        return {
            "required": {
                "video": (videos, {"video_upload": True, "tooltip": "A video file in the input folder."}),
                "reference": REFERENCE,
                "method": METHOD,
                "output": (
                    "STRING",
                    {
                        "default": "colorized.mp4",
                        "tooltip": "Name in the output folder; its ending chooses the container.",
                    },
                ),
            },
            "optional": {
                **film_inputs(),
                "quality": (
                    "INT",
                    {"default": 16, "min": 0, "max": 51, "tooltip": "x264's rate factor: lower is better and larger."},
                ),
                "resume": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Continue from the parts of an unfinished run. Off: start anew."},
                ),
                "shot_frames": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Only this shot, such as 240:480, into a part that ends in .nut and has no sound. "
                        "`hotpath map --shots` sets it, to colour the shots of a film in several places.",
                    },
                ),
                **attention_inputs(),
                "start_seconds": (
                    "FLOAT",
                    {
                        **SECONDS,
                        "tooltip": "To try settings on a part of the film: where it begins, in seconds from the first "
                        "frame. Its file has the seconds in its name, beside the whole film's.",
                    },
                ),
                "seconds": (
                    "FLOAT",
                    {**SECONDS, "tooltip": "How many seconds are coloured. 0: all that follow."},
                ),
            },
            "hidden": {**HIDDEN, **WORKFLOW},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, video: Any = "", checkpoint: Any = AUTOMATIC) -> bool:
        return True

    @classmethod
    def IS_CHANGED(
        cls,
        video: str | None = None,
        output: str | None = None,
        start_seconds: float | None = 0.0,
        seconds: float | None = 0.0,
        **settings: Any,
    ) -> str:
        here = host.current()
        # A name that comes from another node is not known yet: ComfyUI gives None.
        source = None if video is None else inside(here.input_folder(), video)
        target = None
        if output is not None and start_seconds is not None and seconds is not None:
            target = Extent(start_seconds, seconds).named(inside(here.output_folder(), output))
        # Also when the result was deleted, but the same before a run as after it.
        return f"{file_fingerprint(source) if source is not None and source.is_file() else ''} {times_lost(target)}"

    def colorize(
        self,
        video: str,
        reference: torch.Tensor,
        method: str,
        output: str,
        more_references: torch.Tensor | None = None,
        reference_frames: str = "",
        precision: str = AUTOMATIC,
        checkpoint: str = AUTOMATIC,
        quality: int = 16,
        resume: bool = True,
        shot_frames: str = "",
        start_seconds: float = 0.0,
        seconds: float = 0.0,
        unique_id: str | None = None,
        prompt: Any = None,
        extra_pnginfo: Any = None,
        **settings: Any,
    ) -> dict[str, Any]:
        here, extent = host.current(), Extent(start_seconds, seconds)
        if shot_frames.strip() and not extent.whole:
            raise ValueError(
                "shot_frames is a shot of the whole film: leave it empty, or set start_seconds and seconds to 0."
            )
        job = FileJob(
            inside(here.input_folder(), video),
            extent.named(inside(here.output_folder(), output, VIDEO_SUFFIXES)),
            options_of(method, settings),
            quality=quality,
            checkpoint=checkpoint,
            precision=precision,
            resume=resume,
            workflow=workflow_texts(prompt, extra_pnginfo),
            extent=extent,
        )
        references = references_of(reference, more_references, reference_frames)
        if shot_frames.strip():
            report = colorize_shot(job, references, Shot.parse(shot_frames))
        else:
            report = colorize_file(job, references, lambda line: here.show_text(line, unique_id))
        note_made(job.output, job.source)
        here.show_text(report, unique_id)
        return {"ui": _shown(job.output, here.output_folder()), "result": (str(job.output), report)}


def _shown(film: Path, folder: Path) -> dict[str, Any]:
    """What shows the film on the node and among the results; nothing for what no browser plays."""
    if film.suffix.lower() not in PLAYED:
        return {}
    place = film.parent.relative_to(folder).as_posix()
    shown = {"filename": film.name, "subfolder": "" if place == "." else place, "type": "output"}
    return {"images": [shown], "animated": [True]}  # ComfyUI shows a video under "images", with a mark that it moves


class HotpathColorizeImage(AnyCheckpoint):
    DISPLAY_NAME = "Colorize Images (Hotpath)"
    CATEGORY = CATEGORY
    DESCRIPTION = f"Colours pictures after reference pictures, each on its own. {COLORMNET_LICENCE}"
    SEARCH_ALIASES = ALIASES
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "report")
    OUTPUT_TOOLTIPS = ("The pictures in colour, of their own size.", REPORT_TOOLTIP)
    FUNCTION = "colorize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "One picture or a batch."}),
                "reference": REFERENCE,
                "method": METHOD,
            },
            "optional": {
                "more_references": ("IMAGE", {"tooltip": "Further references for ColorMNet, of another size."}),
                "colour_size": COLOUR_SIZE,
                "strength": STRENGTH,
                "edge_filter": EDGE_FILTER,
                "precision": PRECISION,
                "use_torch_compile": COMPILE,
                "checkpoint": checkpoint_input(CHECKPOINT),
            },
            "hidden": HIDDEN,
        }

    def colorize(
        self,
        images: torch.Tensor,
        reference: torch.Tensor,
        method: str,
        more_references: torch.Tensor | None = None,
        precision: str = AUTOMATIC,
        checkpoint: str = AUTOMATIC,
        unique_id: str | None = None,
        **settings: Any,
    ) -> tuple[torch.Tensor, str]:
        options = options_of(method, settings)
        references = references_of(reference, more_references, "")
        pictures, report = colorize_stills(load_method(options, checkpoint, precision), images, references, options)
        host.current().show_text(report, unique_id)
        return pictures, report


class HotpathColorTransfer:
    DISPLAY_NAME = "Color Transfer (Hotpath)"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Puts the chroma of one picture on the luminance of another of the same scene: full-size detail under "
        "colours that were painted or computed small. No model."
    )
    SEARCH_ALIASES = ["chroma", "luminance", "Lab", "color match"]
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("Pictures of the luminance's size.",)
    FUNCTION = "transfer"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "luminance": ("IMAGE", {"tooltip": "Where the light and the size come from."}),
                "colours": ("IMAGE", {"tooltip": "Where the chroma comes from: one picture, or as many."}),
            },
            "optional": {"strength": STRENGTH, "edge_filter": EDGE_FILTER},
        }

    def transfer(
        self, luminance: torch.Tensor, colours: torch.Tensor, strength: float = 1.0, edge_filter: str = "guided"
    ) -> tuple[torch.Tensor]:
        return (transfer_chroma(luminance, colours, strength, edge_filter, host.current().device()),)


NODES: dict[str, type[Any]] = {
    "HotpathColorizeVideo": HotpathColorizeVideo,
    "HotpathColorizeFile": HotpathColorizeFile,
    "HotpathColorizeImage": HotpathColorizeImage,
    "HotpathColorTransfer": HotpathColorTransfer,
}
