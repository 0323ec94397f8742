"""Which attention blocks carry an identity: recorded during a run, shown, kept as a profile for patch_mode adaptive."""

from __future__ import annotations

from typing import Any

import torch

from .. import host
from ..identity.contribution_drawing import draw_contributions
from ..identity.contribution_profile import (
    ContributionProfile,
    ProfileError,
    load_profile,
    make_profile,
    save_profile,
)
from ..identity.contributions import table
from ..patches.telemetry import BlockTelemetry, record_blocks
from .saved_files import ReadsSavedFile
from .sockets import BLOCK_PROFILE, HIDDEN

CATEGORY = "Hotpath/InstantID"
FOLDER = "block_profiles"
TELEMETRY = "HOTPATH_TELEMETRY"


class HotpathBlockTelemetry:
    DISPLAY_NAME = "Block Telemetry"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Records, for each of the UNet's attention blocks and each step, how much the identity adds to what the block "
        "computes from the prompt. The picture stays the same; nothing is read back while it is sampled."
    )
    SEARCH_ALIASES = ["block weights", "heat map", "measure", "profile", "attention"]
    RETURN_TYPES = ("MODEL", TELEMETRY)
    RETURN_NAMES = ("model", "telemetry")
    OUTPUT_TOOLTIPS = ("The model, to the sampler.", "The record, to Block Telemetry Report.")
    FUNCTION = "record"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model with the identity, from InstantID."}),
                "keep_runs": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "On: runs add up, so that several seeds or prompts make one steadier measurement. Off: "
                        "each run begins anew.",
                    },
                ),
            }
        }

    def record(self, model: Any, keep_runs: bool) -> tuple[Any, BlockTelemetry]:
        return record_blocks(model, keep_runs)


class HotpathBlockTelemetryReport:
    DISPLAY_NAME = "Block Telemetry Report"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows what Block Telemetry recorded: a heat map of blocks and steps, a table, and a profile for patch_mode "
        "adaptive, saved in models/block_profiles."
    )
    SEARCH_ALIASES = ["block weights", "heat map", "profile"]
    RETURN_TYPES = ("IMAGE", "STRING", BLOCK_PROFILE)
    RETURN_NAMES = ("heat_map", "table", "profile")
    OUTPUT_TOOLTIPS = (
        "Blocks down, steps across; bright where the identity changes most.",
        "Every block with its share, the largest first.",
        "For profile of InstantID, with patch_mode adaptive.",
    )
    OUTPUT_NODE = True
    FUNCTION = "report"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "telemetry": (TELEMETRY, {"tooltip": "From Block Telemetry."}),
                "after": ("LATENT,IMAGE", {"tooltip": "What was sampled: the report waits for it."}),
                "name": (
                    "STRING",
                    {
                        "default": "portrait",
                        "tooltip": "What the profile is for, such as portrait, full body or several people. An older "
                        "file of that name is replaced.",
                    },
                ),
                "save": ("BOOLEAN", {"default": True, "tooltip": "Write the profile to models/block_profiles."}),
            },
            "hidden": HIDDEN,
        }

    def report(
        self, telemetry: BlockTelemetry, after: Any, name: str, save: bool, unique_id: str | None = None
    ) -> tuple[torch.Tensor, str, ContributionProfile | None]:
        here = host.current()
        found = telemetry.contributions()
        lines = table(found)
        try:
            profile = make_profile(found, name.strip() or "profile", telemetry.model, telemetry.settings, here.name)
        except ProfileError as error:
            if not found.measured.any():
                raise
            # The picture of another UNet's blocks is worth having without a file.
            here.show_text(f"{error}\n{lines}", unique_id)
            return draw_contributions(found), f"{error}\n{lines}", None
        said = f"profile {profile.describe()}"
        if len(profile.size) < len(found.blocks):
            said += f"; {len(found.blocks) - len(profile.size)} blocks were not patched: measure with patch_mode full"
        if save:
            path = save_profile(profile, here.model_folders(FOLDER)[0])
            said += f"\nsaved as {path.name} in models/{FOLDER}"
        text = f"{said}\n{lines}"
        here.show_text(text, unique_id)
        return draw_contributions(found, f"{profile.name}: what the identity adds to each block"), text, profile


class HotpathLoadBlockProfile(ReadsSavedFile):
    SAVED_IN = FOLDER
    DISPLAY_NAME = "Load Block Profile"
    CATEGORY = CATEGORY
    DESCRIPTION = "Reads a profile that Block Telemetry Report saved in models/block_profiles."
    SEARCH_ALIASES = ["adaptive", "block weights", "preset"]
    RETURN_TYPES = (BLOCK_PROFILE, "STRING")
    RETURN_NAMES = ("profile", "report")
    OUTPUT_TOOLTIPS = ("For profile of InstantID, with patch_mode adaptive.", "What it was measured on, and when.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (cls.files(".json"), {"tooltip": "A file in models/block_profiles."})}}

    def load(self, file: str, unique_id: str | None = None) -> tuple[ContributionProfile, str]:
        profile = load_profile(host.current().model_path(FOLDER, file or ""))
        weights = ", ".join(f"{entry.get('weight'):g}" for entry in profile.settings if _is_plain(entry.get("weight")))
        report = profile.describe() + (f", weight {weights}" if weights else "")
        host.current().show_text(report, unique_id)
        return profile, report


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float)


NODES: dict[str, type[Any]] = {
    "HotpathBlockTelemetry": HotpathBlockTelemetry,
    "HotpathBlockTelemetryReport": HotpathBlockTelemetryReport,
    "HotpathLoadBlockProfile": HotpathLoadBlockProfile,
}
