"""The picture of Map Workflow's help page: the demo's captioner over the demo's pictures."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from .. import host
from ..nodes import NODE_CLASS_MAPPINGS
from .picture_rows import card, labelled, stacked

PATTERN = "captioner_shapes_*.png"
CAPTION: dict[str, Any] = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "any.png"}},
    "2": {"class_type": "HotpathVLMLoader", "inputs": {"model": "hotpath-captioner"}},
    "3": {
        "class_type": "HotpathVLM",
        "inputs": {
            "model": ["2", 0], "prompt": "Describe this image.", "images": ["1", 0],
            "system": "You are a helpful assistant.", "max_new_tokens": 16, "token_budget": "fast",
        },
    },
    "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
}  # fmt: skip


def map_workflow() -> Image.Image:
    here = host.current().input_folder()
    names = sorted(path.name for path in here.glob(PATTERN))
    node = NODE_CLASS_MAPPINGS["HotpathMap"]
    results, _, report = getattr(node(), node.FUNCTION)(
        "the text below", "lines", "\n".join(names), json.dumps(CAPTION), "1.image", "captions", gpus="none"
    )
    pictures = []
    for name, text in zip(names, results, strict=True):
        with Image.open(here / name) as opened:
            pictures.append((text.splitlines()[0], opened.convert("RGB").resize((180, 180))))
    row = labelled(pictures)
    return stacked([row, card("Map Workflow", report, row.width)])
