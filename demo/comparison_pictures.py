"""What block telemetry and comparisons look like, for their help pages."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import host
from ..comparison import read_picture
from .node_runs import HERE, node
from .picture_rows import card, shown, stacked


def block_telemetry() -> Image.Image:
    """The heat map of the example block_telemetry, run by a real ComfyUI on the tiny SDXL in 20 steps."""
    from ..headless.graph import Graph
    from ..headless.launcher import LaunchOptions, launched
    from ..headless.locate import find_comfyui
    from ..headless.server import run_on_server
    from ..headless.stand_ins import StandIns

    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("Block telemetry samples, which needs a ComfyUI: name one in COMFYUI_PATH.")
    twin = HERE.parent / "example_workflows" / "api" / "block_telemetry.api.json"
    graph = StandIns.read(HERE / "stand_ins.json").apply(Graph.load(twin))
    graph.set_input("12.steps=20")
    options = LaunchOptions(
        input_folder=HERE / "inputs",
        models=HERE / "models",
        custom_nodes=[HERE / "comfy_nodes" / "hotpath_demo"],
        isolated=True,
    )
    with tempfile.TemporaryDirectory() as work, launched(comfyui, options) as server:
        files = run_on_server(server.url, graph, Path(work)).files
        drawn = next(Image.open(file.path).convert("RGB") for file in files if file.node.title == "Heat map")
    return drawn.resize((560, round(drawn.height * 560 / drawn.width)), Image.Resampling.LANCZOS)


def block_profile() -> Image.Image:
    """A profile as it was kept, and what patch mode adaptive makes of it; sizes are those of an even slope."""
    from ..identity.blocks import SDXL_BLOCKS
    from ..identity.contribution_profile import ContributionProfile, save_profile
    from ..patches.sdxl_layout import AdaptiveChoice, choose_blocks

    sizes = {block: 0.02 + 0.01 * number for number, block in enumerate(SDXL_BLOCKS)}
    folder = host.current().model_folders("block_profiles")[0]
    path = save_profile(ContributionProfile("even slope", sizes, sigmas=(14.6, 0.03), date="2026-01-01"), folder)
    profile, said = node("HotpathLoadBlockProfile", file=path.name)
    lines = [choose_blocks(SDXL_BLOCKS, "adaptive", adaptive=AdaptiveChoice(profile, s))[1] for s in (0.95, 0.8, 0.5)]
    return card("Load Block Profile, InstantID with patch_mode adaptive", "\n".join([said, *lines]))


def compare() -> Image.Image:
    """The demo's photo against itself after a strong JPEG compression."""
    picture = read_picture(HERE / "inputs" / "astronaut.png")[None]
    buffer = io.BytesIO()
    Image.fromarray((picture[0] * 255).byte().numpy()).save(buffer, "JPEG", quality=12)
    again = torch.from_numpy(np.array(Image.open(buffer))).float().div(255)[None]
    options = {"min_ssim": 0.95, "min_cosine": 0.98, "faceanalysis": node("InstantIDFaceAnalysis", provider="CPU")[0]}
    row, report, *_ = node("HotpathCompare", image_a=picture, image_b=again, **options)
    said = [line for line in report.splitlines() if "LPIPS" not in line]
    return stacked([shown(row, 250), card("Compare Pictures", "\n".join(said))])
