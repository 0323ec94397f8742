"""Contributions as a heat map: blocks down, steps across, and beside it what part of the whole each block carries."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..host.letters import counted
from .contributions import GROUPS, Contributions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"input": "#2f6f9f", "middle": "#7a5195", "output": "#c8553d"}
DOTS_PER_INCH = 110
ROW_INCHES = 0.155
SHOWN_STEPS = 24  # labels along the bottom; more of them would run into each other
LETTERS_PER_INCH = 7.2  # of the title, if all were as wide as they get
# For letters that matplotlib's own font lacks, as systems bring them.
OTHER_SCRIPTS = ("Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "Arial Unicode MS")


def draw_contributions(found: Contributions, title: str = "") -> Tensor:
    """A picture [1, H, W, 3] in 0..1. Without matplotlib, the sentence that says so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return _sentence(
            "The heat map needs matplotlib: pip install matplotlib. Table and profile are there without it."
        )
    order = found.in_network_order()
    steps = len(found.sigmas)
    relative = found.relative[:, order].T if steps else np.full((len(order), 1), np.nan)
    width = 5.2 + min(max(steps, 8), 60) * 0.16
    height = 1.7 + ROW_INCHES * max(len(order), 8)
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    heat, bars = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [width - 4.2, 2.0]})
    _heat(figure, heat, found, order, relative)
    _bars(bars, found, order)
    title = title or "What the identity adds to each block, relative to the block's own output"
    figure.suptitle(
        "\n".join(textwrap.wrap(title, int(width * LETTERS_PER_INCH))),
        fontsize=10,
        fontfamily=_families(),
        parse_math=False,
    )
    from PIL import Image

    buffer = io.BytesIO()
    canvas.print_png(buffer)
    pixels = np.asarray(Image.open(buffer).convert("RGB"), np.float32) / 255
    return torch.from_numpy(pixels)[None]


def _families() -> list[str]:
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)]


def _heat(figure: Any, axes: Axes, found: Contributions, order: list[int], relative: Any) -> None:
    known = relative[np.isfinite(relative)]
    top = float(np.quantile(known, 0.995)) if known.size else 1.0
    axes.set_facecolor("#dddddd")
    image = axes.imshow(relative, aspect="auto", cmap="magma", vmin=0, vmax=top or 1.0, interpolation="nearest")
    blocks = [found.blocks[i] for i in order]
    axes.set_yticks(range(len(blocks)), [f"{kind} {number}.{index}" for kind, number, index in blocks], fontsize=6.5)
    for label, block in zip(axes.get_yticklabels(), blocks, strict=True):
        label.set_color(COLOURS[block[0]])
    steps = len(found.sigmas)
    shown = list(range(0, steps, max(1, -(-steps // SHOWN_STEPS))))
    axes.set_xticks(shown, [f"{found.sigmas[s]:.3g}" for s in shown], fontsize=6.5, rotation=90)
    axes.set_xlabel(f"noise level (sigma) of the {counted(steps, 'step')}; grey: not measured", fontsize=8)
    for row in _borders(blocks):
        axes.axhline(row - 0.5, color="white", linewidth=1.6)
    bar = figure.colorbar(image, ax=axes, location="left", fraction=0.03, pad=0.02, shrink=0.5)
    bar.ax.tick_params(labelsize=6.5)
    bar.set_label("size of what the identity adds / size of the block's own output", fontsize=7)


def _bars(axes: Axes, found: Contributions, order: list[int]) -> None:
    blocks, share = [found.blocks[i] for i in order], found.share[order] * 100
    axes.barh(range(len(order)), share, height=0.78, color=[COLOURS[block[0]] for block in blocks])
    axes.set_xlabel("share of the whole, %", fontsize=8)
    axes.tick_params(axis="x", labelsize=6.5)
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.55 * max(float(share.max(initial=0.0)), 1e-9))  # room for the group's names beside its bars
    for kind in GROUPS:
        rows = [row for row, block in enumerate(blocks) if block[0] == kind]
        if rows:
            text = f"{kind} {share[rows].sum():.0f} %" if found.measured[order][rows].any() else f"{kind}: not measured"
            axes.text(
                1.0, (rows[0] + 0.6), text, transform=axes.get_yaxis_transform(), fontsize=8, weight="bold",
                color=COLOURS[kind], ha="right", va="center",
            )  # fmt: skip
    for row in _borders(blocks):
        axes.axhline(row - 0.5, color="#bbbbbb", linewidth=0.6)


def _borders(blocks: list[Any]) -> list[int]:
    """Rows at which another group begins."""
    return [row for row in range(1, len(blocks)) if blocks[row][:2] != blocks[row - 1][:2]]


def _sentence(text: str) -> Tensor:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (640, 64), "white")
    ImageDraw.Draw(picture).text((12, 24), text, fill="black")
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]
