"""The nodes that keep the state of an unfinished film in a file, and read it again for the next portion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import host
from ..cache import file_fingerprint
from ..colorization.file_names import inside
from ..colorization.film_state import FilmState, load_state, save_state
from .colour_sockets import STATE

CATEGORY = "Hotpath/colorization"
STATES_FOLDER = "color_states"  # in the output folder
NAME = ("STRING", {"default": "film", "tooltip": "Name of the file, without its ending."})


def _file(name: str) -> Path:
    return inside(host.current().output_folder() / STATES_FOLDER, f"{name}.safetensors")


class HotpathSaveColorState:
    DISPLAY_NAME = "Save Color State (Hotpath)"
    CATEGORY = CATEGORY
    DESCRIPTION = "Saves the state of an unfinished film as a safetensors file in the output folder."
    SEARCH_ALIASES = ["resume", "continue film"]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    OUTPUT_TOOLTIPS = ("Path of the file.",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"state": (STATE, {"tooltip": "From Colorize Video."}), "name": NAME}}

    def save(self, state: FilmState, name: str) -> tuple[str]:
        path = _file(name)
        save_state(state, path)
        return (str(path),)


class HotpathLoadColorState:
    DISPLAY_NAME = "Load Color State (Hotpath)"
    CATEGORY = CATEGORY
    DESCRIPTION = "Reads what Save Color State wrote, so that Colorize Video can continue the film."
    SEARCH_ALIASES = ["resume", "continue film"]
    RETURN_TYPES = (STATE, "INT")
    RETURN_NAMES = ("state", "next_frame")
    OUTPUT_TOOLTIPS = ("For Colorize Video.", "Index of the frame with which the film continues.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": NAME}}

    @classmethod
    def IS_CHANGED(cls, name: str | None) -> Any:
        if name is None:
            return float("nan")  # it comes from another node, and ComfyUI does not tell it yet
        path = _file(name)
        return file_fingerprint(path) if path.is_file() else ""

    def load(self, name: str) -> tuple[FilmState, int]:
        path = _file(name)
        if not path.is_file():
            raise FileNotFoundError(f"There is no color state {path}; save one first.")
        state = load_state(path)
        return state, state.frame


NODES: dict[str, type[Any]] = {
    "HotpathSaveColorState": HotpathSaveColorState,
    "HotpathLoadColorState": HotpathLoadColorState,
}
