"""A comparison as text, as JSON, and as a folder with a page."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .page import Files, page
from .pair import FAILED, PASSED, REFUSED, Comparison, Pair
from .pictures import as_image, difference_map, side_by_side, stacked

FORMAT = "hotpath.comparison"
OVERVIEW_ROWS = 12  # pairs in side_by_side.png; the page has all of them


def describe(comparison: Comparison) -> str:
    """A verdict, then a line per pair."""
    count = len(comparison.pairs)
    verdict = "passed" if comparison.passed else "not passed"
    parts = [f"{comparison.count(state)} {state}" for state in (PASSED, FAILED, REFUSED) if comparison.count(state)]
    lines = [
        f"{verdict}: {count} pair{'s' if count != 1 else ''}, {', '.join(parts)} ({comparison.thresholds.describe()})"
    ]
    least = [
        f"{name} {value:.4f}"
        for name, value in (("SSIM", comparison.least_ssim), ("face cosine", comparison.least_cosine))
        if value is not None
    ]
    if least:
        lines.append(f"lowest: {', '.join(least)}")
    for pair in comparison.pairs:
        lines.append(f"{pair.name}: {pair.state}: {pair.numbers()}")
        lines += [f"  {remark}" for remark in pair.remarks() if remark != pair.problem]
    return "\n".join([*lines, *comparison.notes])


def values(pair: Pair) -> dict[str, Any]:
    """A pair's numbers, fit for JSON: null where something was not measured, and for the PSNR of equal pictures."""
    measured: dict[str, Any] = {}
    if pair.measures is not None:
        m = pair.measures
        measured = {
            "ssim": m.ssim,
            "psnr": m.psnr if math.isfinite(m.psnr) else None,
            "identical": m.identical,
            "mean_difference": m.mean_difference,
            "max_difference": m.max_difference,
            "lpips": pair.lpips,
        }
    faces = None
    if pair.faces is not None:
        faces = {"a": pair.faces.in_a, "b": pair.faces.in_b, "cosines": list(pair.faces.cosines), "least": pair.cosine}
    return {
        "name": pair.name,
        **pair.at,
        "state": pair.state,
        **measured,
        "faces": faces,
        "failures": list(pair.failures),
        "problem": pair.problem,
    }


def write_comparison(
    comparison: Comparison,
    folder: Path,
    facts: dict[str, str],
    done: Callable[[], None] = lambda: None,
) -> Path:
    """Write pictures, `results.json`, `side_by_side.png` and `index.html` into `folder`; returns the page.

    facts: what made the pictures, shown on the page. done: called after each pair.
    """
    date = time.strftime("%Y-%m-%d %H:%M")
    files: list[Files] = []
    for number, pair in enumerate(comparison.pairs):
        files.append(_write_pair(pair, folder, f"{number + 1:03d}_{_file_name(pair.name)}"))
        done()
    shown = [side_by_side(p, comparison.label_a, comparison.label_b) for p in comparison.pairs[:OVERVIEW_ROWS]]
    if shown:
        as_image(stacked(shown)).save(folder / "side_by_side.png")
    data = {
        "format": FORMAT,
        "version": 1,
        "date": date,
        "facts": facts,
        "a": comparison.label_a,
        "b": comparison.label_b,
        "thresholds": {
            "min_ssim": comparison.thresholds.min_ssim,
            "min_cosine": comparison.thresholds.min_cosine,
            "max_lpips": comparison.thresholds.max_lpips,
        },
        "passed": comparison.passed,
        "least_ssim": comparison.least_ssim,
        "least_cosine": comparison.least_cosine,
        "notes": list(comparison.notes),
        "pairs": [{**values(p), "files": f.as_data()} for p, f in zip(comparison.pairs, files, strict=True)],
    }
    (folder / "results.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    path = folder / "index.html"
    path.write_text(page(comparison, files, {**facts, "date": date}), encoding="utf-8")
    return path


def _write_pair(pair: Pair, folder: Path, name: str) -> Files:
    pictures = {"a": pair.a, "b": pair.b}
    if pair.measures is not None:
        pictures["difference"] = difference_map(pair.a, pair.b)
    written = {}
    for kind, picture in pictures.items():
        if picture.ndim != 3 or 0 in picture.shape:
            continue
        path = folder / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        as_image(picture).save(path)
        written[kind] = path.relative_to(folder).as_posix()
    return Files(**written)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._")[:80] or "pair"
