"""A comparison as text, as JSON, and as a folder with a page."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..host.whole_files import refusal_told
from .page import Files, page
from .pair import FAILED, PASSED, REFUSED, Comparison, Pair, Thresholds
from .pictures import as_image, difference_map, side_by_side, stacked

FORMAT = "hotpath.comparison"
OVERVIEW_ROWS = 12  # pairs in side_by_side.png; the page has all of them
OVERVIEW_SIDE = 448  # pixels


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


class ComparisonFolder:
    """A folder that a comparison grows in: pictures pair by pair, then `results.json`, `side_by_side.png`, `index.html`.

    Only the numbers of a pair stay in memory, so a grid may be of any size.
    """

    def __init__(self, folder: Path, label_a: str, label_b: str) -> None:
        self.folder = folder
        self.labels = (label_a, label_b)
        self._pairs: list[Pair] = []
        self._files: list[Files] = []
        self._overview: list[Tensor] = []

    def __len__(self) -> int:
        """How many pairs were added."""
        return len(self._pairs)

    def add(self, pair: Pair) -> None:
        """Write the pictures of a pair."""
        rows = [side_by_side(pair, *self.labels, longest=OVERVIEW_SIDE)] if len(self._overview) < OVERVIEW_ROWS else []
        with refusal_told(self.page):
            files = _write_pair(pair, self.folder, f"{len(self._pairs) + 1:03d}_{file_name(pair.name)}")
        # Together: what fails before is no half of a pair.
        self._files.append(files)
        self._overview.extend(rows)
        self._pairs.append(pair.without_pictures())

    def finish(self, thresholds: Thresholds, notes: Sequence[str], facts: Mapping[str, str]) -> Comparison:
        """Write the rest and return the comparison. facts: what made the pictures, shown on the page."""
        made = Comparison(*self.labels, thresholds, tuple(self._pairs), tuple(notes))
        facts = {**facts, "date": time.strftime("%Y-%m-%d %H:%M")}
        data = _data(made, self._files, facts)
        text = json.dumps(data, indent=1, allow_nan=False)
        with refusal_told(self.page):
            if self._overview:
                as_image(stacked(self._overview)).save(self.folder / "side_by_side.png")
            (self.folder / "results.json").write_text(text + "\n", encoding="utf-8")
            self.page.write_text(page(made, self._files, facts), encoding="utf-8")
        return made

    @property
    def page(self) -> Path:
        return self.folder / "index.html"


def _data(made: Comparison, files: Sequence[Files], facts: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": 1,
        **facts,
        "a": made.label_a,
        "b": made.label_b,
        "thresholds": vars(made.thresholds),
        "passed": made.passed,
        "least_ssim": made.least_ssim,
        "least_cosine": made.least_cosine,
        "notes": list(made.notes),
        "pairs": [{**values(p), "files": f.as_data()} for p, f in zip(made.pairs, files, strict=True)],
    }


def _write_pair(pair: Pair, folder: Path, name: str) -> Files:
    pictures = {"a": pair.a, "b": pair.b}
    if pair.measures is not None:
        pictures["difference"] = difference_map(pair.a, pair.b)
    written = {}
    for kind, picture in pictures.items():
        path = folder / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        as_image(picture).save(path)
        written[kind] = path.relative_to(folder).as_posix()
    return Files(**written)


def file_name(name: str) -> str:
    """`name` as a part of a file name, in plain letters."""
    return re.sub(r"\.{2,}|[^\w.-]+", "_", name, flags=re.ASCII).strip("._")[:80] or "pair"
