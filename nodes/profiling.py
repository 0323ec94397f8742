"""Measured runs, and all accelerations of a model by the name of a profile."""

from __future__ import annotations

import json
from typing import Any

from .. import host
from ..patches.profile_drawing import draw, table
from ..patches.profiling import ProfileSession, profile
from ..patches.speed_profile_files import load_profile, source_fingerprint
from ..patches.speed_profiles import PROFILES, apply_profile
from .sockets import HIDDEN, NATIVE_MODEL

CATEGORY = "Hotpath/acceleration"
SESSION = "HOTPATH_PROFILE"
FROM_FILE = "hotpath.yaml"


class HotpathProfile:
    DISPLAY_NAME = "Profile"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measures where the time of a picture goes. Put it after the loader and use its model, clip and vae; then "
        "connect the profile and the finished picture to Profile Report. Costs a few microseconds per step."
    )
    SEARCH_ALIASES = ["benchmark", "timing", "measure", "seconds per step", "performance"]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", SESSION)
    RETURN_NAMES = ("model", "clip", "vae", "profile")
    OUTPUT_TOOLTIPS = (
        "The model, measured.",
        "The text encoder, measured; nothing if none is connected.",
        "The VAE, measured; nothing if none is connected.",
        "To Profile Report.",
    )
    FUNCTION = "measure"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL", {"tooltip": "Any native model. It is cloned."})},
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoder, to measure it too."}),
                "vae": ("VAE", {"tooltip": "The VAE, to measure decoding and encoding too."}),
            },
        }

    def measure(self, model: Any, clip: Any = None, vae: Any = None) -> tuple[Any, Any, Any, ProfileSession]:
        return profile(model, clip, vae)


class HotpathProfileReport:
    DISPLAY_NAME = "Profile Report"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows what Profile measured since the last report, as chart, table and JSON: every stage, every step, gaps, "
        "recompilations, fallbacks and their reasons."
    )
    SEARCH_ALIASES = ["benchmark", "timing", "chart", "recompile", "performance"]
    RETURN_TYPES = ("IMAGE", "STRING", "STRING")
    RETURN_NAMES = ("chart", "table", "json")
    OUTPUT_TOOLTIPS = ("The run and its steps as bars.", "The same as lines.", "The same for programs.")
    OUTPUT_NODE = True
    FUNCTION = "report"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"profile": (SESSION, {"tooltip": "From Profile."})},
            "optional": {
                "image": ("IMAGE", {"tooltip": "The finished picture, so that the report comes last."}),
                "latent": ("LATENT", {"tooltip": "Or the sampler's latent, where nothing is decoded."}),
            },
            "hidden": HIDDEN,
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # every run has its own times

    def report(
        self, profile: ProfileSession, image: Any = None, latent: Any = None, unique_id: str | None = None
    ) -> tuple[Any, str, str]:
        found = profile.take()
        text = table(found)
        host.current().show_text(text, unique_id)
        return draw(found), text, json.dumps(found.as_dict(), indent=1)


class HotpathSpeedProfile:
    DISPLAY_NAME = "Speed Profile"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Applies attention, compilation, precision and cache sizes together: maximum speed, balanced, memory-constrained, or "
        "a section of a hotpath.yaml. The report says what each of them did."
    )
    SEARCH_ALIASES = [
        "preset",
        "speed up",
        "faster",
        "optimize",
        "low vram",
        "acceleration",
        "hotpath.yaml",
        "settings",
    ]
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model, accelerated.", "What was applied and what was left out, with the reason.")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": NATIVE_MODEL,
                "profile": (
                    [*PROFILES, FROM_FILE],
                    {
                        "default": "balanced",
                        "tooltip": "balanced gives the same pictures, faster. maximum speed also computes in 8 bits where that "
                        "is faster, and records steps. memory-constrained takes less memory. hotpath.yaml: the section below.",
                    },
                ),
            },
            "optional": {
                "section": ("STRING", {"default": "", "tooltip": "The section of hotpath.yaml."}),
                "file": (
                    "STRING",
                    {
                        "default": FROM_FILE,
                        "tooltip": "A file in ComfyUI's user or input folder, or in this pack's. See hotpath.example.yaml.",
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    @classmethod
    def IS_CHANGED(cls, profile: str | None = "", file: str | None = FROM_FILE, **_: Any) -> Any:
        if profile is None or (profile == FROM_FILE and file is None):
            return float("nan")  # it comes from another node, and ComfyUI does not tell it yet
        return source_fingerprint(file or "") if profile == FROM_FILE else ""

    def apply(
        self, model: Any, profile: str, section: str = "", file: str = FROM_FILE, unique_id: str | None = None
    ) -> tuple[Any, str]:
        chosen = PROFILES[profile] if profile in PROFILES else load_profile(section, file)
        made, report = apply_profile(model, chosen)
        host.current().show_text(report, unique_id)
        return made, report


NODES: dict[str, type[Any]] = {
    "HotpathProfile": HotpathProfile,
    "HotpathProfileReport": HotpathProfileReport,
    "HotpathSpeedProfile": HotpathSpeedProfile,
}
