"""What nodes of several families declare alike: inputs, and the hidden one of every node that shows a report.

A family does not import another one: each must register when the others cannot. So nothing of the pack is imported here.
"""

from __future__ import annotations

from typing import Any

INSTANTID = ("INSTANTID", {"tooltip": "The InstantID adapter, from Load InstantID Model."})
INSIGHTFACE = ("FACEANALYSIS", {"tooltip": "The face models, from InstantID Face Analysis. Other packs' work too."})
CONTROL_NET = (
    "CONTROL_NET",
    {"tooltip": "InstantID's IdentityNet: its diffusion_pytorch_model, from Load ControlNet Model."},
)
FACE_IMAGE = ("IMAGE", {"tooltip": "The person. A batch of pictures of one person makes a steadier identity."})
MODEL = ("MODEL", {"tooltip": "An SDXL model. It is cloned; the one you connect stays as it is."})
POSITIVE = ("CONDITIONING", {"tooltip": "The prompt."})
NEGATIVE = ("CONDITIONING", {"tooltip": "The negative prompt."})
IMAGE_KPS = (
    "IMAGE",
    {
        "tooltip": "Sets the pose: a photo with a face, or a finished key point drawing. Without it, the pose is the face's own."
    },
)
MASK = ("MASK", {"tooltip": "Where the identity acts. Any size; one mask, or one per picture of the batch."})
START_AT = (
    "FLOAT",
    {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": "Where in the schedule it starts, from 0 to 1."},
)
END_AT = (
    "FLOAT",
    {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": "Where in the schedule it ends, from 0 to 1."},
)
MIDDLE_BLOCK = (
    "BOOLEAN",
    {
        "default": False,
        "tooltip": "Also patch the ten attention blocks in the middle of the UNet. The pack this node comes from "
        "meant to, but has missed them since September 2024. Off gives the pictures of shared workflows, on a "
        "stronger identity.",
    },
)
HIDDEN = {"unique_id": "UNIQUE_ID"}
NATIVE_MODEL = ("MODEL", {"tooltip": "Any native model. It is cloned; the one you connect stays as it is."})
FACES = ("FACES", {"tooltip": "The faces of a batch, from Find Faces."})
PICTURES = ("IMAGE", {"tooltip": "Pictures; grey and with transparency work too."})
BLOCK_PROFILE = "HOTPATH_BLOCK_PROFILE"


def number(default: float, low: float, high: float, tooltip: str, step: float = 0.01) -> tuple[str, dict[str, Any]]:
    """A FLOAT widget."""
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}
