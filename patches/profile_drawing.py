"""A profile as a table and as a picture: the run on one line, and under it every step."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..host.letters import counted
from .profile_spans import DECODE, ENCODE, ENCODE_IMAGE, FINISH, PREPARE, STEP, Profile, Row

COLOURS = {
    ENCODE: "#5B8DB8",
    PREPARE: "#B9A44C",
    STEP: "#3F7D58",
    FINISH: "#B9A44C",
    DECODE: "#8C5E9B",
    ENCODE_IMAGE: "#B07AA1",
    "gaps": "#D5D8DC",
}
COMPILING = "#D1495B"
INK, FAINT = "#22303C", "#7B8794"
FAR_OUT = 4.0  # times the next longest: steps that take longer are cut off, with their time in words
MOST_APART = 3  # samplings whose steps are told apart in the headline
NEEDS_MATPLOTLIB = "The chart needs matplotlib: pip install matplotlib. Table and JSON are there without it."


def table(profile: Profile) -> str:
    """The profile as lines a person can read."""
    if not profile.rows:
        return "Nothing ran since the last report: connect model, clip and vae of Profile to the nodes that work."
    lines = [f"{profile.total:.3f} s on {profile.device}, {_share(profile.gap, profile)} in none of the stages"]
    lines.append(f"{'stage':<24}{'s':>9}{'share':>8}{'model s':>10}{'python s':>10}")
    for name, rows in _stages(profile).items():
        seconds = sum(row.seconds for row in rows)
        title = f"{len(rows)} x {name}" if len(rows) > 1 else name
        host = [row.host_seconds for row in rows if row.host_seconds is not None]
        python = f"{sum(host):>10.3f}" if host else f"{'':>10}"
        model = sum(row.model_seconds for row in rows)
        model_text = f"{model:>10.3f}" if model else f"{'':>10}"
        lines.append(f"{title:<24}{seconds:>9.3f}{_share(seconds, profile):>8}{model_text}{python}")
    number, samplings = 0, profile.samplings
    for place, steps in enumerate(samplings, 1):
        if len(samplings) > 1:
            lines.append(f"  sampling {place} of {len(samplings)}")
        for step in steps:
            number += 1
            lines.append(f"  step {number:<3}{1000 * step.seconds:>9.1f} ms{_remark(step)}")
    if ENCODE not in _stages(profile):
        lines.append("text encode did not run: its result was remembered, or another CLIP was used")
    skipped = sum(step.skipped for step in profile.steps)
    if skipped:
        lines.append(f"a step cache skipped {skipped} of {len(profile.steps)} steps")
    waiting = sum(step.waits_for_python for step in profile.steps)
    if waiting:
        lines.append(f"in {waiting} of {len(profile.steps)} steps the GPU waits for Python: CUDA graphs would help")
    lines += profile.notes
    lines.append(f"measuring took {1000 * profile.overhead:.2f} ms in all")
    return "\n".join(lines)


def _stages(profile: Profile) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in profile.rows:
        found.setdefault(row.stage, []).append(row)
    return found


def _share(seconds: float, profile: Profile) -> str:
    return f"{100 * seconds / profile.total:.0f} %" if profile.total else ""


def _remark(step: Row) -> str:
    remarks = []
    if step.calls > 1:
        remarks.append(f"{step.calls} evaluations" + (f", {step.spared} of them skipped" if step.spared else ""))
    elif step.skipped:
        remarks.append("skipped by a step cache")
    if step.graphs:
        remarks.append(f"{step.graphs} graphs compiled")
    if step.waits_for_python:
        remarks.append("waits for Python")
    return f"  {', '.join(remarks)}" if remarks else ""


def draw(profile: Profile) -> torch.Tensor:
    """A picture [1, H, W, 3] in 0..1. Without matplotlib, the sentence that says so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return _sentence(NEEDS_MATPLOTLIB)
    if not profile.rows:
        return _sentence(table(profile))
    height, below = (5.6, 0.11) if profile.steps else (2.4, 0.33)
    figure = Figure(figsize=(10, height), dpi=110, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    # In inches, so that a run without steps looks as the upper part of one with.
    figure.subplots_adjust(left=0.075, right=0.97, top=1 - 0.95 / height, bottom=below)
    title = f"{_time(profile.total)} on {profile.device}"
    figure.text(0.075, 1 - 0.31 / height, title, fontsize=15, color=INK, weight="bold")
    figure.text(0.97, 1 - 0.28 / height, _headline(profile), fontsize=9.5, color=FAINT, ha="right")
    if profile.steps:
        line, steps = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1, 3.2], "hspace": 0.62})
        _draw_steps(steps, profile)
    else:
        line = figure.subplots()
    _draw_run(line, profile)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255
    return torch.from_numpy(pixels.copy())[None]


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"


def _headline(profile: Profile) -> str:
    """How many steps, and how long an ordinary one takes; of samplings apart, as their sizes differ, while there is room."""
    samplings = profile.samplings if len(profile.samplings) <= MOST_APART else (profile.steps,)
    return ", then ".join(
        f"{counted(len(steps), 'step')}{_skipped(steps)}, median {_time(statistics.median(_ordinary(steps)))}"
        for steps in samplings
        if steps
    )


def _skipped(steps: Sequence[Row]) -> str:
    skipped = sum(step.skipped for step in steps)
    return f" ({skipped} skipped)" if skipped else ""


def _ordinary(steps: Sequence[Row]) -> list[float]:
    """Seconds of the steps that ran the model and compiled nothing, or of those that ran it, or of all."""
    ran = [step for step in steps if not step.skipped] or steps
    return [step.seconds for step in ran if not step.graphs] or [step.seconds for step in ran]


def _draw_run(axes: Any, profile: Profile) -> None:
    """Where each stage lies in the run."""
    axes.barh(0, profile.total, color=COLOURS["gaps"], height=0.9)
    seen: dict[str, float] = {}
    for row in profile.rows:
        colour = COMPILING if row.graphs else COLOURS.get(row.stage, COLOURS["gaps"])
        axes.barh(0, row.seconds, left=row.start, color=colour, height=0.9, edgecolor="white", linewidth=0.5)
        seen[row.stage] = seen.get(row.stage, 0.0) + row.seconds
    seen = {name: seconds for name, seconds in seen.items() if seconds > 0.003 * profile.total}
    handles = [axes.barh(0, 0, color=COLOURS.get(name, COLOURS["gaps"])) for name in seen]
    labels = [f"{name} {_time(seconds)}" for name, seconds in seen.items()]
    if profile.gap > 0.005 * profile.total:
        handles.append(axes.barh(0, 0, color=COLOURS["gaps"]))
        labels.append(f"gaps {_time(profile.gap)}")
    axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(-0.005, -0.32), ncol=min(4, len(labels)), frameon=False,
        fontsize=8.5, labelcolor=INK, handlelength=1.0, columnspacing=1.6,
    )  # fmt: skip
    axes.set_xlim(0, profile.total)
    axes.set_yticks([])
    axes.set_title("run, s", loc="left", fontsize=9.5, color=INK, pad=6)
    axes.tick_params(colors=FAINT, labelsize=8, length=2)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_steps(axes: Any, profile: Profile) -> None:
    """Each step's time, of which in the model, and what Python needed for it."""
    from matplotlib.ticker import MaxNLocator

    steps = profile.steps
    positions = range(1, len(steps) + 1)
    colours = [COMPILING if step.graphs else COLOURS[STEP] for step in steps]
    highest = _highest(profile)
    unit, shown = ("s", 1.0) if highest >= 10 else ("ms", 1000.0)
    axes.bar(positions, [shown * step.seconds for step in steps], color=colours, alpha=0.35, width=0.74)
    axes.bar(positions, [shown * step.model_seconds for step in steps], color=colours, width=0.74)
    host = [step.host_seconds for step in steps]
    handles = [axes.bar(0, 0, color=COLOURS[STEP]), axes.bar(0, 0, color=COLOURS[STEP], alpha=0.35)]
    labels = ["in the model", "sampler and gaps"]
    if any(value is not None for value in host):
        axes.plot(
            positions, [shown * (value or 0.0) for value in host], "_", color=INK, markeredgewidth=1.6,
            markersize=min(14.0, 420 / len(steps)),
        )  # fmt: skip
        handles.append(axes.plot([], [], "_", color=INK, markersize=10, markeredgewidth=1.6)[0])
        labels.append("Python")
    if any(step.graphs for step in steps):
        handles.append(axes.bar(0, 0, color=COMPILING))
        labels.append("compiling")
    skipped = [(place, step.seconds) for place, step in zip(positions, steps, strict=True) if step.skipped]
    if skipped:
        above = [(place, shown * (seconds + 0.04 * highest)) for place, seconds in skipped]
        handles += axes.plot(*zip(*above, strict=True), "x", color=FAINT, markersize=5)
        labels.append("skipped")
    top = 1.35 * highest
    axes.set_ylim(0, shown * top)
    for position, step in zip(positions, steps, strict=True):
        if step.seconds > top:  # it would flatten all others; its bar may be narrower than the words
            axes.text(
                position - 0.37, 0.97 * shown * top, _time(step.seconds), ha="left", va="top", fontsize=8, color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
    for end in itertools.accumulate(len(part) for part in profile.samplings[:-1]):
        axes.axvline(end + 0.5, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0.4, len(steps) + 0.6)
    axes.set_title(f"step, {unit}", loc="left", fontsize=9.5, color=INK, pad=6)
    axes.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1.005, 0.985), ncol=len(labels), frameon=False, fontsize=8.5,
        labelcolor=INK, handlelength=1.0, columnspacing=1.6,
    )  # fmt: skip
    axes.tick_params(colors=FAINT, labelsize=8, length=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#E6E9EC", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#C8CED4")


def _highest(profile: Profile) -> float:
    """Seconds of the longest step that is like others of its sampling. In a few, a compilation may have failed or kernels
    may have been tried; where many are longer, it is the others that another pack's cache spared the work."""
    highest = 0.0
    for steps in profile.samplings:
        longest = sorted(_ordinary(steps), reverse=True)
        for few in range(max(1, len(longest) // 4), 0, -1):
            if few < len(longest) and longest[few - 1] > FAR_OUT * longest[few]:
                longest = longest[few:]
                break
        highest = max(highest, longest[0])
    return highest


def _sentence(text: str) -> torch.Tensor:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (900, 60), "white")
    ImageDraw.Draw(picture).text((16, 22), text, fill=INK)
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]
