"""The ComfyUI that runs in this process, as far as another one like it needs to know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Flags of one server alone: where it listens and writes, what it computes on, whom it serves. The rest, such as the folders
# of models and what is computed in which precision, holds for another one, too.
OF_ONE = frozenset(
    {
        "--listen", "--port", "--tls-keyfile", "--tls-certfile", "--enable-cors-header", "--auto-launch",
        "--disable-auto-launch", "--windows-standalone-build", "--dont-print-server", "--quick-test-for-ci", "--verbose",
        "--log-stdout", "--output-directory", "--temp-directory", "--input-directory", "--user-directory", "--database-url",
        "--multi-user", "--cuda-device", "--default-device", "--oneapi-device-selector", "--front-end-version",
        "--front-end-root", "--enable-manager", "--disable-manager-ui", "--enable-manager-legacy-ui", "--enable-assets",
        "--enable-asset-hashing", "--list-feature-flags",
    }
)  # fmt: skip


@dataclass(frozen=True)
class OwnComfyUI:
    """folder: of its main.py. arguments: with which another one finds the same nodes and models and computes alike."""

    folder: Path
    arguments: tuple[str, ...]


def for_another(arguments: Sequence[str]) -> Iterator[str]:
    """The command line of one ComfyUI without what is of that one alone."""
    kept = True
    for word in arguments:
        if word.startswith("--"):
            kept = word.partition("=")[0] not in OF_ONE
        if kept:
            yield word
