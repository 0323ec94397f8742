"""What the colour families declare alike; neither imports another one, since each must register when the others cannot."""

from __future__ import annotations

from typing import Any

import torch

from .. import host
from ..attention.dispatch import POLICIES
from ..attention.local_window import BACKENDS
from ..colorization.networks import AUTOMATIC, colormnet_files

ALIASES = ["colorize", "colourise", "black and white", "b&w", "grayscale", "recolor"]
STATE = "HOTPATH_COLOR_STATE"
FRAMES = ("IMAGE", {"tooltip": "The frames. Only their luminance is looked at."})


def compile_input(what: str) -> tuple[str, dict[str, Any]]:
    """The widget of torch.compile. what: it compiles."""
    return (
        "BOOLEAN",
        {
            "default": False,
            "tooltip": f"torch.compile for {what}: a minute or more at the first run of a size, then faster. The report "
            "says if this machine cannot.",
        },
    )


def checkpoint_input(tooltip: str) -> tuple[list[str], dict[str, Any]]:
    """The widget of ColorMNet's file."""
    return colormnet_files(), {"default": AUTOMATIC, "tooltip": tooltip}


def attention_inputs() -> dict[str, Any]:
    """How ColorMNet's attention is computed; the report says what ran."""
    return {
        "attention": (
            list(POLICIES),
            {
                "default": "auto",
                "advanced": True,
                "tooltip": "ColorMNet: what computes DINOv2's attention. auto: the fastest exact kernel, measured here. "
                "SageAttention and the other quantized ones are faster and lossy; what cannot run gives way to an exact one.",
            },
        ),
        "local_attention": (
            list(BACKENDS),
            {
                "default": BACKENDS[0],
                "advanced": True,
                "tooltip": "ColorMNet: what computes the 15x15 attention around every place. All are exact; "
                "spatial_correlation_sampler is the original's extension, which has to be installed.",
            },
        ),
    }


class AnyCheckpoint:
    """A node with a `checkpoint` widget. A name from somebody else's workflow is reported when the node runs, with the
    folders that were searched."""

    @classmethod
    def VALIDATE_INPUTS(cls, checkpoint: Any = AUTOMATIC) -> bool:
        return True


class CompatibleVideoNode:
    """The outputs of both families' video nodes."""

    SEARCH_ALIASES = [*ALIASES, "restore film"]
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("colorized_frames", "performance_report")
    FUNCTION = "colorize_video"


class CompatibleImageNode:
    """The same of their image nodes."""

    SEARCH_ALIASES = ALIASES
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("colorized_image", "performance_report")
    FUNCTION = "colorize_image"


def shown(done: tuple[torch.Tensor, str], unique_id: str | None) -> tuple[torch.Tensor, str]:
    """A node's results, the report also on the node."""
    host.current().show_text(done[1], unique_id)
    return done
