"""All accelerations of a model by one name: what a speed profile sets, and how it is applied.

The names are those of `PROFILES`, or of the sections of a `hotpath.yaml` (see `speed_profile_files`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..cache import named_cache
from .attention_override import set_attention
from .compilation import REGIONS, CompileSettings, compile_model
from .precision import SCHEMES, PrecisionUnavailable, set_precision, slow_on_a_cpu
from .warmup import warm_up

NONE = "none"
MIB = 1 << 20


@dataclass(frozen=True)
class Attention:
    """backend: see Attention Backend; "none" leaves ComfyUI's. strict: stop instead of taking another backend."""

    backend: str = NONE
    strict: bool = False


@dataclass(frozen=True)
class Compile:
    """mode: see Compile Model; "none" compiles nothing. The others as there."""

    mode: str = NONE
    regions: str = REGIONS[0]
    dynamic: bool = True
    strict: bool = False
    captured_sizes: int = 4


@dataclass(frozen=True)
class Precision:
    """scheme: see Precision; "none" changes nothing. exclude: patterns of layers that stay, or None for the usual ones.
    strict: stop where the scheme cannot run, instead of leaving the model as it is.
    """

    scheme: str = NONE
    exclude: tuple[str, ...] | None = None
    strict: bool = False


@dataclass(frozen=True)
class Warmup:
    """sizes: [(width, height)] run before the first picture. batch, cfg: as the pictures will have."""

    sizes: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    cfg: float = 1.0


@dataclass(frozen=True)
class Caches:
    """Limits in MiB of what the pack remembers in memory; None leaves a limit as it is."""

    prompt_embeddings_mib: int | None = None
    image_embeddings_mib: int | None = None
    identities_mib: int | None = None
    faces_mib: int | None = None
    colorizers_mib: int | None = None


CACHE_NAMES = {
    "prompt_embeddings_mib": "prompt embeddings",
    "image_embeddings_mib": "image embeddings",
    "identities_mib": "InstantID identities",
    "faces_mib": "faces",
    "colorizers_mib": "colorizers",
}


@dataclass(frozen=True)
class SpeedProfile:
    """Everything a profile sets. `name` is for the report."""

    name: str
    attention: Attention = field(default_factory=Attention)
    compile: Compile = field(default_factory=Compile)
    precision: Precision = field(default_factory=Precision)
    warmup: Warmup = field(default_factory=Warmup)
    caches: Caches = field(default_factory=Caches)


PROFILES = {
    "maximum speed": SpeedProfile("maximum speed", Attention("auto"), Compile("reduce-overhead"), Precision("fp8")),
    "balanced": SpeedProfile("balanced", Attention("auto"), Compile("default")),
    # Compiled graphs want the whole model in place, so here nothing is compiled and ComfyUI may stream weights.
    "memory-constrained": SpeedProfile(
        "memory-constrained",
        Attention("auto"),
        precision=Precision("fp8_weights"),
        caches=Caches(64, 64, 64, 64, 512),
    ),
}


def apply_profile(model: Any, profile: SpeedProfile) -> tuple[Any, str]:
    """A clone of `model` with everything `profile` sets, and a report with a part for each.

    Raises what the parts raise under `strict`; without it, a part that cannot be had is left out with the reason. A warm-up,
    which changes nothing, is never a reason to stop.
    """
    made, lines = model.clone(), [f"Speed profile: {profile.name}"]
    precision, attention, compiled, warmup = profile.precision, profile.attention, profile.compile, profile.warmup
    if precision.scheme != NONE:
        made, text = _or_left_out(made, precision.strict, lambda model: _set_precision(model, precision))
        lines += _section("precision", text)
    if attention.backend != NONE:
        made, text = set_attention(made, attention.backend, attention.strict)
        lines += _section("attention", text)
    if compiled.mode != NONE:
        settings = CompileSettings(**dataclasses.asdict(compiled))
        made, text = _or_left_out(made, compiled.strict, lambda model: compile_model(model, settings))
        lines += _section("compile", text)
    lines += _limit_caches(profile.caches)
    if warmup.sizes:
        made, text = _or_left_out(
            made, False, lambda model: (model, warm_up(model, warmup.sizes, warmup.batch, cfg=warmup.cfg)[1])
        )
        lines += _section("warm-up", text)
    return made, "\n".join(lines)


def _set_precision(model: Any, precision: Precision) -> tuple[Any, str]:
    """On a CPU, unless asked for strictly, only what is no slower than the model as it is: int8 for fp8, where it has that."""
    scheme, note = SCHEMES[precision.scheme], ""
    if model.load_device.type == "cpu" and not precision.strict and (reason := slow_on_a_cpu(scheme)):
        instead = SCHEMES["int8"] if scheme.name == "fp8" else scheme
        if slow := slow_on_a_cpu(instead):
            raise PrecisionUnavailable(f"{instead.name} would be slower than the model as it is, because {slow}.")
        scheme, note = instead, f"\nint8 and not fp8, because {reason}"
    made, text = set_precision(model, scheme.name, precision.exclude)
    return made, text + note


def _or_left_out(model: Any, strict: bool, part: Callable[[Any], tuple[Any, str]]) -> tuple[Any, str]:
    """What `part` makes of `model`, or `model` as it is and why: what cannot be had here says so by these two errors."""
    try:
        return part(model)
    except (PrecisionUnavailable, ValueError) as error:
        if strict:
            raise
        return model, f"left out: {error}"


def _section(title: str, text: str) -> list[str]:
    first, *rest = text.splitlines()
    return [f"{title}: {first}", *(f"  {line}" for line in rest)]


def _limit_caches(caches: Caches) -> list[str]:
    set_to = {name: size for name, size in dataclasses.asdict(caches).items() if size is not None}
    for name, size in set_to.items():
        named_cache(CACHE_NAMES[name], size * MIB).resize(size * MIB)
    if not set_to:
        return []
    return ["caches: " + ", ".join(f"{CACHE_NAMES[name]} {size} MiB" for name, size in set_to.items())]
