"""Preset prompts of one's own, beside those of the nodes: text files in the folder `prompts` of an LLM path, each by the name of
its file, and those of an AILab_System_Prompts.json that lies there, the file in which users of that pack keep theirs.
"""

from __future__ import annotations

import codecs
import json
import logging
import unicodedata
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..cache import file_fingerprint
from ..host.letters import readable
from . import folders, presets

log = logging.getLogger("hotpath.vision_language")

FOLDER = "prompts"
LISTED = "AILab_System_Prompts.json"
NONE = "none"  # what a menu has for no preset
LONGEST = 64 << 10  # bytes of a prompt
LONGEST_LIST = 1 << 20
JOINER = "\u200d"  # in picture signs that are made of several
MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class UnusablePreset(ValueError):
    """A preset prompt that cannot be used; the message names it and the cure."""


def place() -> Path:
    """The folder that people are told to put theirs into."""
    return folders.roots()[0] / FOLDER


def menu(known: Mapping[str, str]) -> list[str]:
    """Names for a widget: those of `known`, DESCRIPTIONS or STYLES, then one's own."""
    own = {**_listed(known), **_files()}
    return [*known, *sorted((name for name in own if name not in known), key=str.casefold)]


def words(name: str, known: Mapping[str, str]) -> str | None:
    """What the preset `name` asks for; None where there is none. One's own comes before one of `known`.

    Raises UnusablePreset for a file that is no prompt.
    """
    name = unicodedata.normalize("NFC", name)
    if (file := _files().get(name)) is not None:
        return _read(file)
    found = _listed(known).get(name)
    return known.get(name) if found is None else found


def in_place_of(prompt: str, preset: str) -> str:
    """The words of `preset`; `prompt` where it is none.

    Raises UnusablePreset where there is no such preset.
    """
    if preset == NONE:
        return prompt
    found = words(preset, presets.DESCRIPTIONS)
    if found is None:
        raise UnusablePreset(
            f"There is no preset {preset!r}: choose one of the menu, or put {preset}.txt into {place()}."
        )
    return found


def described(asked: str) -> str:
    """The words of the preset `asked`, whose name may be given without its picture sign and in any case; of what is no
    preset's name, `asked` itself."""
    wanted = unicodedata.normalize("NFC", asked.strip()).casefold()
    for name in menu(presets.DESCRIPTIONS):
        if wanted in (name.casefold(), name.casefold().partition(" ")[2]) and wanted:
            return words(name, presets.DESCRIPTIONS) or asked
    return asked


def state(name: str | None) -> str:
    """What changes when the words of one's own preset `name` do."""
    if not name:
        return ""
    files = [_files().get(unicodedata.normalize("NFC", name)), *_lists()]
    return " ".join(file_fingerprint(file) for file in files if file is not None)


def _folders() -> Iterator[Path]:
    return (root / FOLDER for root in folders.roots())


def _files() -> dict[str, Path]:
    """Text files by the name of their preset."""
    found: dict[str, Path] = {}
    for folder in _folders():
        try:
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".txt" and file.is_file())
        except OSError:
            continue
        for file in files:
            name = unicodedata.normalize("NFC", file.stem).strip()
            if name.startswith("."):  # hidden, as macOS has one beside each file on other disks
                continue
            if not _can_be_shown(name):
                _tell(
                    f"{file} is not offered as a preset: give it a name of letters that can be shown, other than {NONE}."
                )
            else:
                found.setdefault(name, file)
    return found


def _can_be_shown(name: str) -> bool:
    return bool(name) and name.casefold() != NONE and all(sign.isprintable() or sign == JOINER for sign in name)


def _read(file: Path) -> str:
    with file.open("rb") as opened:
        content = opened.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise UnusablePreset(f"The preset {file} is longer than {LONGEST >> 10} KB, which is no prompt: shorten it.")
    try:
        text = content.decode("utf-16" if content.startswith(MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusablePreset(f"The preset {file} is not in UTF-8: save it in that encoding.") from error
    if "\0" in text:
        raise UnusablePreset(f"The preset {file} is no text: put a text file there.")
    if not text.strip():
        raise UnusablePreset(f"The preset {file} is empty: write a prompt into it.")
    return "\n".join(text.splitlines()).strip()


def _lists() -> list[Path]:
    return [file for folder in _folders() if (file := folder / LISTED).is_file()]


def _listed(known: Mapping[str, str]) -> dict[str, str]:
    """What the lists have of a kind."""
    found: dict[str, str] = {}
    for file in reversed(_lists()):
        descriptions, styles = _of_list(file, file_fingerprint(file))
        found |= styles if known is presets.STYLES else descriptions
    return found


@lru_cache(maxsize=8)
def _of_list(file: Path, fingerprint: str) -> tuple[dict[str, str], dict[str, str]]:
    """Descriptions and styles."""
    try:
        with file.open("rb") as opened:
            content = opened.read(LONGEST_LIST + 1)
        if len(content) > LONGEST_LIST:
            raise ValueError(f"it is longer than {LONGEST_LIST >> 20} MB")
        data = json.loads(content.decode("utf-8-sig"))
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        _tell(
            f"The presets in {file} are not offered, because it cannot be read: {str(error) or type(error).__name__}."
        )
        return {}, {}
    # A name in the menu without words is its own.
    named = data.get("_preset_prompts")
    descriptions = {name: name for name in named if isinstance(name, str)} if isinstance(named, list) else {}
    descriptions |= _object(data.get("qwenvl"))
    styles = _object(_object(data.get("qwen_text")).get("styles"))
    return _texts(descriptions), _texts({name: _object(style).get("system_prompt") for name, style in styles.items()})


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(named: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: text.strip()
        for name, text in ((unicodedata.normalize("NFC", name), text) for name, text in named.items())
        if isinstance(text, str) and text.strip() and len(text) <= LONGEST and _can_be_shown(name)
    }


@lru_cache(maxsize=256)
def _tell(sentence: str) -> None:
    """Once: menus are made again and again."""
    log.warning("%s", readable(sentence))  # half a letter is an error where it is written
