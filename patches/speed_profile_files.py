"""Speed profiles from a `hotpath.yaml`: a section for each, a mapping of parts (attention, compile, ...) to their settings.

A key or value that is not known is refused with the file, the key and what is allowed: a switch with a typing error must
not do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .. import host
from ..cache import file_fingerprint
from .attention_override import POLICIES
from .compilation import MODES, REGIONS
from .precision import SCHEMES
from .speed_profiles import CACHE_NAMES, NONE, Attention, Caches, Compile, Precision, SpeedProfile, Warmup
from .warmup import EXAMPLE, parse_sizes

FILE_NAME = "hotpath.yaml"
SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 1 << 18  # of a profile file
PACK = Path(__file__).resolve().parent.parent


class ProfileError(ValueError):
    """A profile or its file is wrong; the message names file, key and what is allowed."""


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
        raise ProfileError(f"{path.name} has no section {section!r}; it has {', '.join(sections)}.")
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
            raise ProfileError(f"{where} has no key {key!r}; the keys are {', '.join(known)}.")


def _shown(value: Any) -> str:
    """The beginning of a value: with its aliases, one of a hundred letters may be gigabytes when written out."""
    short = reprlib.Repr()
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # more digits than Python writes
        return "a number without end"


Check = Callable[[Any], Any]


def _one_of(*choices: str) -> Check:
    def check(value: Any) -> Any:
        if value is None:
            value = NONE  # YAML reads an empty value so
        if value not in choices:
            raise ValueError(f"allowed are {', '.join(choices)}.")
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
