"""The downloader of the AILab QwenVL pack: model files of the hub, into folders that are fixed, and nothing that could run."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

from .. import host
from ..host.downloads import DownloadError, safe_target
from ..host.hub import REPOSITORY_FILES
from ..vision_language import download
from ..vision_language.unusable import UnusableModel
from .ailab_sockets import CATEGORY

# The kind of models and the folder among them.
PLACES = {
    "LLM/GGUF": ("LLM", "GGUF"),
    "LLM/hf": ("LLM", "hf"),
    "checkpoints": ("checkpoints", ""),
    "loras": ("loras", ""),
}
NAME = re.compile(r"[A-Za-z0-9_](?:[\w-]|\.(?!\.))*/[A-Za-z0-9_](?:[\w-]|\.(?!\.))*", re.ASCII)
# A graph of somebody else's may ask for anything: pickles run code where they are loaded, and scripts where they are found.
SUFFIXES = (".gguf", ".safetensors", ".sft", ".json", ".txt", ".jinja", ".model")


def place_of(repo_id: str, save_folder: str) -> Path:
    """Where the files of a repository go: below a models folder, by owner and name, as in the original."""
    if not NAME.fullmatch(repo_id):
        raise UnusableModel(f"{repo_id!r} is no repository: write it as owner/name.")
    kind, inside = PLACES[save_folder]
    return host.current().model_folders(kind)[0] / inside / repo_id


def choose(filename: str, names: list[str]) -> list[str]:
    """What is fetched of a repository that has the files `names`. Raises UnusableModel."""
    if filename:
        if filename not in names:
            others = ", ".join(name for name in names if name.lower().endswith(SUFFIXES[:3]))[:300]
            raise UnusableModel(
                f"The repository has no file {filename!r}: check its name. It has {others or 'no models'}."
            )
        return [filename]
    files = [name for name in names if name.lower().endswith(".gguf")]
    if files:
        raise UnusableModel(
            f"The repository has {len(files)} GGUF files, each a model: name one of {', '.join(files[:8])}."
        )
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in REPOSITORY_FILES)]


class AILabHuggingFaceDownloader:
    DISPLAY_NAME = "QwenVL HuggingFace Downloader 📥"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Fetches a model file, or a model folder, of the hub into a folder of models. In new workflows, use the "
        "model inputs of Load Vision-Language Model (HotpathVLMLoader), which fetch what is missing."
    )
    SEARCH_ALIASES = ["download", "gguf", "hugging face"]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("downloaded_path",)
    OUTPUT_TOOLTIPS = ("Where the file, or the folder, lies.",)
    FUNCTION = "download_model"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "repo_id": (
                    "STRING",
                    {"default": "Qwen/Qwen1.5-0.5B-Chat-GGUF", "tooltip": "A repository of the hub, as owner/name."},
                ),
                "filename": (
                    "STRING",
                    {
                        "default": "qwen1_5-0_5b-chat-q4_k_m.gguf",
                        "tooltip": "A file of it: GGUF, safetensors, or text. Empty: the whole model folder.",
                    },
                ),
                "save_folder": (
                    list(PLACES),
                    {"default": "LLM/GGUF", "tooltip": "Where it goes, in a folder of the repository's name."},
                ),
            }
        }

    def download_model(self, repo_id: str, filename: str, save_folder: str) -> tuple[str]:
        repository, wanted = repo_id.strip(), filename.strip()
        target = place_of(repository, save_folder)
        if wanted and not wanted.lower().endswith(SUFFIXES):
            raise UnusableModel(
                f"{wanted!r} is not fetched, because files of its kind may run code: take one that ends in "
                f"{', '.join(SUFFIXES[:3])}."
            )
        try:
            path = safe_target(target, wanted) if wanted else target
        except DownloadError as error:
            raise UnusableModel(str(error)) from error
        if not (wanted and path.is_file()):
            download.fetch(repository, target, "", lambda names: choose(wanted, names))
        return (str(path),)


NODES = {"AILab_HuggingFaceDownloader": AILabHuggingFaceDownloader}
