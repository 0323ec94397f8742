"""The GGUF files that menus offer and that are fetched when they are missing, by the names that shared workflows have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..unusable import UnusableModel
from .models import READ, SUFFIX, file_name

# Types of forks of llama.cpp, and old ones for some processors.
UNREAD = re.compile(
    r"(?:^|[-._])(iq[1-6]_k(?:s|ss|t|l)?|iq[12]_bn|i2_s|(?:q4_0|iq4_nl)_[48]_[48])(?=[-._]|$)", re.IGNORECASE
)
UNREAD_FAMILIES = ("qwen3.8", "qwen3-next")


@dataclass(frozen=True)
class Origin:
    """Where a file is fetched from. tower: the mmproj file beside it; "" where it is to be looked for, if there is one."""

    repository: str
    file: str
    tower: str = ""

    @property
    def folder(self) -> str:
        """Where it lies below the folder of all models, as in the pack that the nodes come from."""
        return f"GGUF/{self.repository}"


def _seeing(size: str, kind: str) -> list[Origin]:
    name = f"Qwen3VL-{size}-{kind}"
    repository, tower = f"Qwen/Qwen3-VL-{size}-{kind}-GGUF", f"mmproj-{name}-F16{SUFFIX}"
    return [Origin(repository, f"{name}-{form}{SUFFIX}", tower) for form in ("F16", "Q4_K_M", "Q8_0")]


_VISION = [origin for size in ("4B", "8B") for kind in ("Instruct", "Thinking") for origin in _seeing(size, kind)]
_ABLITERATED = (
    "bf16", "bf16_q8_0", "f16_q8_0", "iq4_nl", "iq4_xs", "q2_k_s", "q3_k_m", "q3_k_s", "q4_0", "q4_1", "q4_k_m", "q4_k_s",
    "q5_0", "q5_1", "q5_k_m", "q5_k_s", "q6_k_m", "q8_0",
)  # fmt: skip
_TEXT = [
    *(
        Origin("Qwen/Qwen3-4B-GGUF", f"Qwen3-4B-{form}{SUFFIX}")
        for form in ("Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0")
    ),
    *(Origin("Mungert/Qwen3-4B-abliterated-GGUF", f"Qwen3-4B-abliterated-{form}{SUFFIX}") for form in _ABLITERATED),
]
_NEWER = [
    Origin(f"unsloth/{name}-GGUF", f"{name}-UD-{form}{SUFFIX}", f"mmproj-BF16{SUFFIX}")
    for name, form in (("Qwen3.5-4B", "Q4_K_XL"), ("Qwen3.6-27B", "Q3_K_XL"))
]
VISION_MODELS: dict[str, Origin] = {origin.file: origin for origin in (*_VISION, *_NEWER)}
TEXT_MODELS: dict[str, Origin] = {origin.file: origin for origin in _TEXT}


def origin(name: str) -> Origin | None:
    """Where the file that `name` means comes from: a name of a menu, or owner/repository/file. None when it does not say.

    Raises UnusableModel for a file that would not be read, before it is fetched.
    """
    wanted = name.strip().replace("\\", "/").strip("/")
    file = file_name(wanted)
    low = file.lower()
    if form := UNREAD.search(file):
        raise UnusableModel(
            f"{file} is quantised as {form[1].upper()}, which is not read here: take another file of the model, such as "
            "Q4_K_M, Q5_K_M or Q8_0."
        )
    if low.startswith(UNREAD_FAMILIES):
        family = file.split("-")[0]
        raise UnusableModel(
            f"{file} is of {family}, whose GGUF files are not read here ({READ} are): take another model, such as "
            "Qwen3.5-4B-UD-Q4_K_XL.gguf."
        )
    known = {**VISION_MODELS, **TEXT_MODELS}
    found = next((known[key] for key in known if key.lower() == low), None)
    parts = wanted.split("/")
    if len(parts) >= 4 and parts[0].lower() == "gguf":
        parts = parts[1:]
    if len(parts) >= 3 and parts[-1].lower().endswith(SUFFIX):
        repository = "/".join(parts[:2])
        if found is None or found.repository.lower() != repository.lower():
            return Origin(repository, "/".join(parts[2:]))
    return found
