"""What `card.py` runs, in which order, and the goals that its results are held against."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@dataclass(frozen=True)
class Stage:
    """One process. full, tiny: its arguments, where {json} is the file it writes its results to, {seconds} and {minutes}
    its own deadline, a little before `seconds`, after which it is stopped. least: seconds under which it isn't begun.
    peers: arguments added where there are peers. needs: modules without which it cannot run at all.
    """

    name: str
    title: str
    full: tuple[str, ...]
    tiny: tuple[str, ...]
    seconds: int
    least: int = 30
    peers: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def command(self, work: Path, limit: float, tiny: bool, peers: Path | None) -> list[str]:
        parts = self.tiny if tiny else self.full + (self.peers if peers is not None else ())
        own = max(limit - 12, limit * 0.8)
        known = {
            "json": str(work / f"{self.name}.json"), "work": str(work), "seconds": f"{own:.0f}",
            "minutes": f"{own / 60:.2f}", "peers": str(peers),
        }  # fmt: skip
        first = (
            [sys.executable, "-m", "pytest"] if parts[0] == "pytest" else [sys.executable, str(BENCHMARKS / parts[0])]
        )
        return first + [part.format(**known) for part in parts[1:]]


def gpu_tests() -> tuple[str, ...]:
    """Files of tests that need a CUDA device: only these are imported."""
    marked = (
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text("utf-8")
    )
    return tuple(str(path) for path in marked)


def _colour(size: str, frames: int, peer_frames: int) -> tuple[str, ...]:
    return (
        "colorization.py", "--sizes", size, "--precisions", "float32", "float16", "--frames", str(frames), "--rounds", "2",
        "--peer-frames", str(peer_frames), "--seconds", "{seconds}", "--json", "{json}",
    )  # fmt: skip


def _acceleration(family: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    shared = ("acceleration.py", "--only", family, "--out", "{work}", "--json", "{json}")
    return (*shared, "--rounds", "4", "--minutes", "{minutes}"), (*shared, "--rounds", "1", "--tiny")


_Z_IMAGE, _SDXL = _acceleration("z_image"), _acceleration("sdxl")
_TINY_COLOUR = ("colorization.py", "--tiny", "--json", "{json}")

STAGES = (
    Stage(
        "health", "The card", ("card_checks.py", "health", "--json", "{json}"),
        ("card_checks.py", "health", "--tiny", "--json", "{json}"), 45, 15,
    ),
    Stage(
        "kernels", "Triton kernels against their references, on true sizes",
        ("card_checks.py", "kernels", "--json", "{json}"), ("card_checks.py", "kernels", "--tiny", "--json", "{json}"), 100,
    ),
    Stage(
        "tests", "Tests that need a card", ("card_checks.py", "tests", "--json", "{json}", "--seconds", "{seconds}"),
        ("card_checks.py", "tests", "--json", "{json}", "--tiny"), 150, 45,
        needs=("pytest", "pytest_timeout"),
    ),
    Stage(
        "instantid", "InstantID: what 70 patched blocks cost",
        ("instantid.py", "--sizes", "1024x1024", "--dtypes", "fp16", "--rounds", "5", "--steps", "5", "--compile",
         "--seconds", "{seconds}", "--json", "{json}"),
        ("instantid.py", "--tiny", "--json", "{json}"), 120, 50,
    ),
    Stage(
        "colour_small", "Colour films at 768x432", _colour("768x432", 60, 20), _TINY_COLOUR, 80,
        peers=("--peers", "{peers}"),
    ),
    Stage(
        "colour_large", "Colour films at 1920x1080", _colour("1920x1080", 40, 5), _TINY_COLOUR, 120, 40,
        peers=("--peers", "{peers}"),
    ),
    Stage(
        "faces", "Faces: detect and embed",
        ("faces.py", "--pictures", "1", "6", "32", "--rounds", "9", "--cpu-rounds", "1", "--cpu-most", "6", "--json", "{json}"),
        ("faces.py", "--pictures", "1", "2", "--side", "160", "--rounds", "1", "--width", "0.25", "--depth", "18", "--json",
         "{json}"), 75, 35,
    ),
    Stage(
        "qwen_vl", "Qwen3-VL of the 4B shape",
        ("qwen_vl.py", "--tokens", "96", "--pictures", "32", "--decode-with", "greedy", "--rounds", "2", "--only", "decode",
         "first_token", "captions", "memory", "agreement", "--json", "{json}"),
        ("qwen_vl.py", "--shape", "tiny", "--tokens", "6", "--pictures", "2", "--side", "112", "--json", "{json}"), 170, 70,
        needs=("transformers",),
    ),
    Stage("z_image", "Z-Image in ComfyUI, accelerated", *_Z_IMAGE, 180, 60),
    Stage("sdxl", "SDXL in ComfyUI, accelerated", *_SDXL, 180, 60),
    Stage(
        "attention", "Attention backends",
        ("attention.py", "--shapes", "z_image_1024", "sdxl_self", "sdxl_cross", "wan_480p", "qwen_vision", "--repeats", "9",
         "--json", "{json}"),
        ("attention.py", "--shapes", "sdxl_deep", "--repeats", "1", "--json", "{json}"), 50, 20,
    ),
    Stage(
        "text_to_image", "Z-Image through diffusers",
        ("text_to_image.py", "--repeats", "3", "--only", "hotpath regional", "--json", "{json}"),
        ("text_to_image.py", "--tiny", "--repeats", "1", "--steps", "2", "--only", "never", "--json", "{json}"), 170, 75,
        needs=("diffusers",),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """measured: from the results of all stages to a number; a missing result raises KeyError and the like."""

    what: str
    least: float | None
    most: float | None
    unit: str
    measured: Callable[[Mapping[str, Any]], float] = field(repr=False)

    def row(self, results: Mapping[str, Any]) -> tuple[str, str, str]:
        """Goal, measured, reached / missed / not measured."""
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        try:
            value = self.measured(results)
        except (KeyError, IndexError, TypeError, ValueError, StopIteration, ZeroDivisionError):
            return f"{bound} {self.unit}".strip(), "", "not measured"
        reached = value >= self.least if self.least is not None else value <= (self.most or 0)
        return f"{bound} {self.unit}".strip(), f"{value:.4g} {self.unit}".strip(), "reached" if reached else "missed"


def _step(results: Mapping[str, Any], name: str, case: str, against: str = "unpatched") -> float:
    steps = results["instantid"]["results"]["fp16"]["steps"]
    return steps[name][case] / steps[against][case]


def _identity_cost(results: Mapping[str, Any], *starts: str) -> float:
    costs = results["instantid"]["results"]["fp16"]["costs"]
    return max(value for name, value in costs.items() if name.startswith(starts))


def _faces(results: Mapping[str, Any], count: int, entry: str = "milliseconds") -> Any:
    ours = next(row for row in results["faces"]["rows"] if row["name"] == "Hotpath, torch cuda fp32")
    return ours[entry] if entry == "waits" else ours[entry][str(count)]


def _film(stage: str, method: str, entry: str, against_original: bool) -> Callable[[Mapping[str, Any]], float]:
    def measured(results: Mapping[str, Any]) -> float:
        rows = [row for row in results[stage]["rows"] if row["method"] == method]
        ours = next(row for row in rows if row["contestant"] == "Hotpath float16")
        if not against_original:
            return ours[entry] / 1024
        return ours[entry] / next(row for row in rows if row["contestant"].startswith("original"))[entry]

    return measured


def _near(stage: str, method: str) -> Callable[[Mapping[str, Any]], float]:
    def measured(results: Mapping[str, Any]) -> float:
        row = next(r for r in results[stage]["rows"] if (r["method"], r["contestant"]) == (method, "Hotpath float16"))
        return float(row["note"].split("near: ")[1].split()[0])

    return measured


def _qwen(results: Mapping[str, Any], what: str, entry: str = "value") -> float:
    found = next((row for row in results["qwen_vl"]["rows"] if row["what"].startswith(what)), None)
    if found is None:  # not StopIteration, which would end the generators that ask
        raise KeyError(what)
    return found[entry]


def _contestant(results: Mapping[str, Any], stage: str, name: str) -> Mapping[str, Any]:
    found = next(c for c in results[stage]["families"][0]["contestants"] if c["name"] == name)
    if found["left_out"]:
        raise KeyError(name)
    return found


def _first_of(results: Mapping[str, Any], stage: str, names: Sequence[str]) -> Mapping[str, Any]:
    """The first of the contestants `names` that ran."""
    for name in names:
        try:
            found = _contestant(results, stage, name)
        except (KeyError, StopIteration):
            continue
        if found["seconds"]:
            return found
    raise KeyError(names)


def _times_stock(stage: str, *names: str, against: str = "ComfyUI") -> Callable[[Mapping[str, Any]], float]:
    def measured(results: Mapping[str, Any]) -> float:
        both = _first_of(results, stage, names), _contestant(results, stage, against)
        ours, stock = (statistics.median(contestant["seconds"]["first"]) for contestant in both)
        return ours / stock

    return measured


def _new_graphs(stage: str, *names: str) -> Callable[[Mapping[str, Any]], float]:
    def measured(results: Mapping[str, Any]) -> float:
        new = _first_of(results, stage, names)["new_graphs"]
        return sum(count for case, count in new.items() if case != "first")

    return measured


_GRAPHS = "Hotpath compile, reduce-overhead"
_COMPILED = "Hotpath compile, default"
# What is judged: attention by the fastest exact kernel and steps from a recording; where it did not run, the plain compile.
_FASTEST_EXACT = ("Hotpath attention auto, reduce-overhead", _GRAPHS, _COMPILED)
GOALS = (
    Goal("Kernels that differ from their references", None, 0, "", lambda r: r["kernels"]["wrong"]),
    Goal("Tests on the card that failed", None, 0, "", lambda r: r["tests"]["failed"]),
    Goal("InstantID, 70 blocks, CFG, against unpatched", None, 1.03, "x",
         lambda r: _step(r, "Hotpath, 70 blocks", "1024x1024, CFG")),
    Goal("InstantID, 70 blocks, no CFG, against unpatched", None, 1.03, "x",
         lambda r: _step(r, "Hotpath, 70 blocks", "1024x1024, no CFG")),
    Goal("InstantID telemetry, CFG, against without", None, 1.05, "x",
         lambda r: _step(r, "Hotpath, 70 blocks, telemetry", "1024x1024, CFG", "Hotpath, 70 blocks")),
    Goal("InstantID, other weight, range or mask", None, 3, "ms", lambda r: _identity_cost(r, "re-apply")),
    Goal("InstantID, new face: the engine and the node", None, 30, "ms",
         lambda r: _identity_cost(r, "new face") + _faces(r, 1)),
    Goal("InstantID, memory while sampling", None, 25, "MiB", lambda r: _identity_cost(r, "memory while")),
    Goal("InstantID, memory after 200 re-applies", None, 1, "MiB", lambda r: _identity_cost(r, "memory after")),
    Goal("Faces, 6 pictures of 1024x1024", None, 25, "ms", lambda r: _faces(r, 6)),
    Goal("Faces, waits for the card per call, the copy of the result among them", None, 2, "", lambda r: _faces(r, 6, "waits")),
    Goal("Faces, 32 pictures against 32 times one", None, 1, "x", lambda r: _faces(r, 32) / _faces(r, 1) / 32),
    *(
        Goal(f"{method}, {size}, {what}, against the original", least, None, "x",
             _film(stage, method, entry, True))
        for method, size, stage, what, entry, least in (
            ("ColorMNet", "768x432", "colour_small", "end to end", "film_fps", 6),
            ("ColorMNet", "768x432", "colour_small", "network", "network_fps", 2.5),
            ("ColorMNet", "1920x1080", "colour_large", "end to end", "film_fps", 10),
            ("ColorMNet", "1920x1080", "colour_large", "network", "network_fps", 2.5),
            ("Deep Exemplar", "768x432", "colour_small", "end to end", "film_fps", 8),
            ("Deep Exemplar", "1920x1080", "colour_large", "end to end", "film_fps", 18),
        )
    ),
    Goal("ColorMNet, 1920x1080, reserved", None, 8, "GiB", _film("colour_large", "ColorMNet", "reserved", False)),
    Goal("Deep Exemplar, 1920x1080, reserved", None, 6, "GiB", _film("colour_large", "Deep Exemplar", "reserved", False)),
    Goal("ColorMNet, pixels within 1/255 of float32", 0.99, None, "", _near("colour_small", "ColorMNet")),
    Goal("Deep Exemplar, pixels within 1/255 of float32", 0.99, None, "", _near("colour_small", "Deep Exemplar")),
    Goal("Qwen3-VL 4B, decode, batch 1", 250, None, "tokens/s",
         lambda r: max(_qwen(r, f"decode, batch 1, greedy: {path}") for path in ("auto", "compiled"))),
    Goal("Qwen3-VL 4B, captions, batch 16, against transformers", 20, None, "x",
         lambda r: _qwen(r, "captions, 64 tokens, batch 16", "times the peer")),
    Goal("Qwen3-VL 4B, first token, known picture, against a new one", None, 0.25, "x",
         lambda r: _qwen(r, "first token, known picture (hit)") / _qwen(r, "first token, new picture (miss)")),
    Goal("Z-Image, bfloat16, against ComfyUI", None, 0.72, "x", _times_stock("z_image", *_FASTEST_EXACT)),
    Goal("Z-Image, PSNR to ComfyUI's latent", 40, None, "dB",
         lambda r: min(_first_of(r, "z_image", _FASTEST_EXACT)["psnr"].values())),
    Goal("Z-Image, graphs compiled for a second prompt and size", None, 0, "", _new_graphs("z_image", *_FASTEST_EXACT)),
    Goal("Z-Image, warm-up", None, 40, "s", lambda r: _contestant(r, "z_image", _COMPILED)["warm_up"]),
    Goal("Z-Image, fp8, against ComfyUI", None, 0.5, "x", _times_stock("z_image", "Hotpath maximum speed (fp8)")),
    Goal("SDXL, CFG, against ComfyUI", None, 0.5, "x", _times_stock("sdxl", _GRAPHS)),
    Goal("SDXL with InstantID, against InstantID in ComfyUI", None, 0.5, "x",
         _times_stock("sdxl", "InstantID, Hotpath compile, reduce-overhead", against="InstantID")),
    Goal("SDXL, graphs compiled for a second prompt and size", None, 0, "", _new_graphs("sdxl", _GRAPHS)),
    Goal("SDXL, warm-up", None, 40, "s", lambda r: _contestant(r, "sdxl", _COMPILED)["warm_up"]),
    Goal("Prompt that is known: until its embedding is there", None, 0.005, "s",
         lambda r: r["text_to_image"]["prompt_seconds"]["cached"]),
)  # fmt: skip


def goal_table(results: Mapping[str, Any]) -> str:
    lines = ["The goals were set for an H200.", "", "| | goal | measured | |", "|---|---|---|---|"]
    lines += [f"| {goal.what} | " + " | ".join(goal.row(results)) + " |" for goal in GOALS]
    return "\n".join(lines)


def table(results: Any) -> str:
    """Results whose program prints no Markdown of its own."""
    if isinstance(results, Mapping):
        rows = results.get("rows") or results.get("results")
        if isinstance(rows, list) and rows and isinstance(rows[0], Mapping):
            return _rows(rows)
        return "\n".join(f"- {name}: {_cell(value)}" for name, value in results.items())
    return ""


def _rows(rows: list[Mapping[str, Any]]) -> str:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in heads) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")
