"""A workflow over many items from within a graph: the node is a form, the work is done in `distributed`.

`distributed` runs the pack's nodes and so imports them; it is imported here when the node is asked, not before.
"""

from __future__ import annotations

from typing import Any

from .. import host
from .sockets import HIDDEN

CATEGORY = "Hotpath/map"
FOLDER = "workflows"  # in the input folder
INLINE = "the text below"
OVER = ["lines", "JSON lines", "pictures of a folder", "videos of a folder", "shots of a film"]


def workflow_files() -> list[str]:
    """Workflow files below their folder in the input folder, sorted."""
    folder = host.current().input_folder() / FOLDER
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json") if path.is_file())


class HotpathMap:
    DISPLAY_NAME = "Map Workflow"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Runs a workflow in API format once per picture of a folder, line of a list, or shot of a film, on all GPUs "
        "of this machine or of a Ray cluster. Finished items are kept: after an interrupt or a crash, the same "
        "node continues. For a workflow with nodes of ComfyUI or other packs, a ComfyUI like this one is "
        "started on every GPU."
    )
    SEARCH_ALIASES = ["map", "batch", "for each", "multi gpu", "distributed", "ray", "queue", "folder"]
    RETURN_TYPES = ("STRING", "STRING", "STRING")
    RETURN_NAMES = ("results", "folder", "report")
    OUTPUT_IS_LIST = (True, False, False)
    OUTPUT_TOOLTIPS = (
        "For each item, in order: its text, else the paths of its files; empty if it failed.",
        "The folder with the results and results.jsonl.",
        "How many are done, how many failed and why, by which workers, and in what time.",
    )
    FUNCTION = "map"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "workflow": (
                    [INLINE, *workflow_files()],
                    {
                        "default": INLINE,
                        "tooltip": "A workflow in API format in input/workflows (Workflow > Export (API)).",
                    },
                ),
                "over": (OVER, {"default": OVER[2], "tooltip": "What the items are."}),
                "items": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "One item per line, or the name of a folder, film or .jsonl file in the input "
                        "folder.",
                    },
                ),
            },
            "optional": {
                "workflow_text": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "The workflow itself, if no file is chosen."},
                ),
                "target": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "The NODE.INPUT that an item goes into, such as LoadImage.image. Empty: the only "
                        "one that fits.",
                    },
                ),
                "folder": (
                    "STRING",
                    {
                        "default": "map",
                        "tooltip": "Folder for the results, in the output folder. Use one for each workflow.",
                    },
                ),
                "executor": (
                    ["local", "ray"],
                    {
                        "default": "local",
                        "tooltip": "local: processes on this machine. ray: actors, in the cluster of "
                        "HOTPATH_RAY_ADDRESS if the server sets that, else on this machine. The results are the same.",
                    },
                ),
                "workers": (
                    "INT",
                    {"default": 0, "min": 0, "max": 1024, "tooltip": "0: one per GPU, or one on the CPU."},
                ),
                "gpus": (
                    "STRING",
                    {"default": "all", "tooltip": "all, none, or numbers separated by commas, such as 0,1."},
                ),
                "policy": (
                    ["least_busy", "round_robin", "random"],
                    {"default": "least_busy", "tooltip": "Which worker gets the next item."},
                ),
                "retries": (
                    "INT",
                    {
                        "default": 2,
                        "min": 0,
                        "max": 20,
                        "tooltip": "New attempts after errors that may be temporary: a worker that died, memory, a "
                        "connection.",
                    },
                ),
                "seeds": (
                    ["item", "workflow"],
                    {
                        "default": "item",
                        "tooltip": "item: every item has its own seeds, made of the workflow's seeds and its "
                        "content, the same on any worker. workflow: the workflow's seeds for all.",
                    },
                ),
                "recursive": ("BOOLEAN", {"default": False, "tooltip": "Include subfolders."}),
                "restart": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Forget what was done before, and replace it."},
                ),
                "free_memory": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "First take ComfyUI's models off the GPU, to make room for the workers'.",
                    },
                ),
                "minutes": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100000.0,
                        "step": 1.0,
                        "tooltip": "An attempt that takes longer is ended and counts as a worker that died. 0: never.",
                    },
                ),
                "repeat": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 10000,
                        "tooltip": "How often every item is run, each time with other seeds.",
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    @classmethod
    def VALIDATE_INPUTS(cls, workflow: str = INLINE) -> bool:
        # A file that came after the list was made is found, or reported, when the node runs.
        return True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        # The folder may hold new pictures; items that are done are not done again.
        return float("nan")

    def map(
        self,
        workflow: str,
        over: str,
        items: str,
        workflow_text: str = "",
        target: str = "",
        folder: str = "map",
        recursive: bool = False,
        free_memory: bool = True,
        unique_id: str | None = None,
        **options: Any,
    ) -> tuple[list[str], str, str]:
        from ..distributed.in_graph import MapForm, map_in_graph
        from ..distributed.mapping import MapOptions

        chosen = MapOptions(**options)
        form = MapForm(workflow, workflow_text, over, items, target, folder, recursive, free_memory, chosen)
        return map_in_graph(form, unique_id)


NODES: dict[str, type[Any]] = {"HotpathMap": HotpathMap}
