"""All accelerations of a model by one name, built in or from a section of a `hotpath.yaml`.

A section is a mapping of parts (attention, compile, precision, warmup, caches) to their settings. A key or value that is
not known is refused with the file, the key and what is allowed: a switch with a typing error must not do nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import host
from ..cache import file_fingerprint, named_cache
from .attention_override import POLICIES, set_attention
from .compilation import MODES, REGIONS, CompileSettings, compile_model
from .precision import SCHEMES, PrecisionUnavailable, set_precision, slow_on_a_cpu
from .warmup import EXAMPLE, parse_sizes, warm_up

FILE_NAME = "hotpath.yaml"
SUFFIXES = (".yaml", ".yml")
NONE = "none"
MIB = 1 << 20
MAX_BYTES = 1 << 18  # of a profile file
PACK = Path(__file__).resolve().parent.parent


class ProfileError(ValueError):
    """A profile or its file is wrong; the message names file, key and what is allowed."""


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
    "maximum speed": SpeedProfile(
        "maximum speed", Attention("auto"), Compile("reduce-overhead", REGIONS[0]), Precision("fp8")
    ),
    "balanced": SpeedProfile("balanced", Attention("auto"), Compile("default", REGIONS[0])),
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


# --- hotpath.yaml


def folders() -> list[Path]:
    """Where a profile file may lie: ComfyUI's user and input folders, and the pack's own."""
    here = host.current()
    found = [here.input_folder(), PACK]
    if "ComfyUI" in here.name:
        import folder_paths

        found.insert(0, Path(folder_paths.get_user_directory()))
    return found


def find_file(name: str) -> Path:
    """The file `name` in one of `folders`. Raises ProfileError, also for names that point outside of them."""
    if not name.lower().endswith(SUFFIXES):
        raise ProfileError(f"{name!r} is no profile file: its name must end in {' or '.join(SUFFIXES)}.")
    for folder in folders():
        with contextlib.suppress(OSError, ValueError):  # no name that a file can have
            path = (folder / name).resolve()
            if path.is_relative_to(folder.resolve()) and path.is_file():
                return path
    looked = ", ".join(str(folder) for folder in folders())
    raise ProfileError(
        f"There is no {name!r} in {looked}. Copy hotpath.example.yaml of this pack to {FILE_NAME} in one of them."
    )


def source_fingerprint(name: str) -> str:
    """Changes when the file does; "" while there is none."""
    try:
        return file_fingerprint(find_file(name or FILE_NAME))
    except ProfileError:
        return ""


def load_profile(section: str, name: str = FILE_NAME) -> SpeedProfile:
    """The section of a profile file. Raises ProfileError, naming what is wrong and what would be right."""
    path = find_file(name or FILE_NAME)
    sections = parse_file(path)
    if section not in sections:
        raise ProfileError(f"{path.name} has no section {section!r}; it has {_listed(sections)}.")
    return sections[section]


def parse_file(path: Path) -> dict[str, SpeedProfile]:
    """Every section of the file at `path`, checked."""
    import yaml

    if path.stat().st_size > MAX_BYTES:
        raise ProfileError(f"{path.name} is no profile file: it is larger than {MAX_BYTES >> 10} KiB.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path.name} is not in UTF-8: save it in that encoding.") from error
    except OSError as error:
        raise ProfileError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    try:
        content = yaml.load(text, _loader())  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date or a number that there is not
        raise ProfileError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ProfileError(f"{path.name} has no sections; hotpath.example.yaml shows how it is written.")
    return {str(title): parse_section(str(title), body, path.name) for title, body in content.items()}


@functools.cache
def _loader() -> Any:
    import yaml

    class OnceEach(yaml.SafeLoader):
        """YAML as it should be: of a key written twice, the first would be dropped without a word."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            # Looked at as it was written: later, what `<<` brings along stands among a mapping's own keys.
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value!r} is there twice", key.start_mark
                        )
                    seen.add(key.value)
            return node

        def flatten_mapping(self, node: Any) -> None:
            # What is merged may itself be merged of others, tenfold each time: of a key only the value that counts is kept.
            super().flatten_mapping(node)
            last = {(key.tag, key.value): (key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
            others = [(key, value) for key, value in node.value if not isinstance(key, yaml.ScalarNode)]
            node.value = [*others, *last.values()]

    return OnceEach


def parse_section(title: str, body: Any, file: str = FILE_NAME) -> SpeedProfile:
    """One section, {part: {key: value}}, checked."""
    where = f"{file}: {title}"
    parts = _mapping(body, where)
    _known(parts, PARTS, where)
    made = {name: _part(name, _mapping(value, f"{where}.{name}"), f"{where}.{name}") for name, value in parts.items()}
    return SpeedProfile(title, **made)


def _part(name: str, values: dict[str, Any], where: str) -> Any:
    kind, checks = PARTS[name]
    _known(values, checks, where)
    checked = {}
    for key, value in values.items():
        try:
            checked[key] = checks[key](value)
        except ValueError as error:
            raise ProfileError(f"{where}.{key} is {_shown(value)}; {error}") from error
    return kind(**checked)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProfileError(
            f"{where} is {_shown(value)}, and must be keys with values, such as in hotpath.example.yaml."
        )
    return value


def _known(values: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ProfileError(f"{where} has no key {key!r}; the keys are {_listed(known)}.")


def _shown(value: Any) -> str:
    """The beginning of a value: with its aliases, one of a hundred letters may be gigabytes when written out."""
    short = reprlib.Repr()
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # more digits than Python writes
        return "a number without end"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


Check = Callable[[Any], Any]


def _one_of(*choices: str) -> Check:
    def check(value: Any) -> Any:
        if value is None:
            value = NONE  # YAML reads an empty value so
        if value not in choices:
            raise ValueError(f"allowed are {_listed(choices)}.")
        return value

    return check


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("allowed are true and false.")
    return value


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"allowed are whole numbers from {low} to {high}.")
        return value

    return check


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise ValueError("allowed are numbers from 0 to 100.")
    return float(value)


def _patterns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise ValueError("allowed is a list of layer names, in which * stands for anything.")
    return tuple(value)


def _sizes(value: Any) -> tuple[tuple[int, int], ...]:
    pieces = value if isinstance(value, list) else [value]
    if not all(isinstance(piece, str | int) for piece in pieces):
        raise ValueError(f"allowed are sizes such as {EXAMPLE}.")
    return tuple(parse_sizes(", ".join(map(str, pieces))))


_MEMORY = _whole(0, 1 << 20)

PARTS: dict[str, tuple[type, dict[str, Check]]] = {
    "attention": (Attention, {"backend": _one_of(NONE, *POLICIES), "strict": _switch}),
    "compile": (
        Compile,
        {
            "mode": _one_of(NONE, *MODES),
            "regions": _one_of(*REGIONS),
            "dynamic": _switch,
            "strict": _switch,
            "captured_sizes": _whole(1, 64),
        },
    ),
    "precision": (
        Precision,
        {"scheme": _one_of(NONE, *SCHEMES), "exclude": _patterns, "strict": _switch},
    ),
    "warmup": (Warmup, {"sizes": _sizes, "batch": _whole(1, 64), "cfg": _number}),
    "caches": (Caches, dict.fromkeys(CACHE_NAMES, _MEMORY)),
}
