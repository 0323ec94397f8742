"""What nodes that read a file of a models folder have in common, where a node of ours also writes such files."""

from __future__ import annotations

from typing import Any

from .. import host


class ReadsSavedFile:
    """A node with the input `file`, a name in the models folder `SAVED_IN`."""

    SAVED_IN: str

    @classmethod
    def VALIDATE_INPUTS(cls, file: Any = "") -> bool:
        # A file saved earlier in the same run is not in the list yet; a missing one is reported when the node runs.
        return True

    @classmethod
    def files(cls, suffix: str) -> list[str]:
        """The choices; an empty name where there is none yet, which is reported when the node runs."""
        return host.current().model_files(cls.SAVED_IN, (suffix,)) or [""]

    @classmethod
    def IS_CHANGED(cls, file: str | None) -> Any:
        if file is None:
            return float("nan")  # the name comes from another node, and ComfyUI does not tell it yet
        try:
            stat = host.current().model_path(cls.SAVED_IN, file).stat()
        except FileNotFoundError:
            return "missing"
        return f"{stat.st_mtime_ns}-{stat.st_size}"
