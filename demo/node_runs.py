"""One node of the pack at a time, on the demo's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..nodes import NODE_CLASS_MAPPINGS

HERE = Path(__file__).resolve().parent


def node(node_id: str, /, **inputs: Any) -> Any:
    """Run one node of the pack; its results."""
    node_class = NODE_CLASS_MAPPINGS[node_id]
    result = getattr(node_class(), node_class.FUNCTION)(**inputs)
    return result["result"] if isinstance(result, dict) else result


def photo(name: str) -> torch.Tensor:
    """[1, H, W, 3] in 0..1."""
    picture = Image.open(HERE / "inputs" / name).convert("RGB")
    return torch.from_numpy(np.array(picture)).float().div(255)[None]
