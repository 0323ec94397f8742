"""The workflow inside the files that a node makes, so that dropping one on ComfyUI opens it, as with ComfyUI's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import host

WORKFLOW = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


def workflow_texts(prompt: Any, extra_pnginfo: Any) -> dict[str, str]:
    """Texts by name, as ComfyUI's Save Video writes them: the prompt, and what the front end sent with it. None where the
    host is told to keep them out of files."""
    if not host.current().keeps_workflows():
        return {}
    sent = extra_pnginfo if isinstance(extra_pnginfo, Mapping) else {}
    told = {**sent, **({} if prompt is None else {"prompt": prompt})}
    return {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}
