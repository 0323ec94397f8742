"""The server without its browser: what it refuses, and prompts that programs wrote for the older packs."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.xdist_group("browser")]


REFUSED = [
    ({"model": "https://example.com/x.bin"}, {}, 404),
    ({"model": "../../x"}, {}, 404),
    ({"model": "colormnet"}, {}, 403),
    ({"model": "instantid-controlnet"}, {"Origin": "https://evil.example"}, 403),
    ({"model": "instantid-controlnet"}, {"Content-Type": "text/plain"}, 415),
]


@pytest.mark.parametrize(("body", "headers", "status"), REFUSED)
def test_the_server_refuses(server: Any, body: Any, headers: dict[str, str], status: int) -> None:
    request = urllib.request.Request(
        f"{server.url}/hotpath/downloads/start",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == status


PICTURE = {"class_type": "LoadImage", "inputs": {"image": "colorize_small.png"}}
COLOURS = {"class_type": "LoadImage", "inputs": {"image": "colorize_reference.png"}}
# As programs that were written for the older packs post them: fewer inputs, older words, inputs that are gone.
OLDER_PROMPTS: dict[str, dict[str, Any]] = {
    "Deep Exemplar, March 2025": {
        "class_type": "DeepExColorVideoNode",
        "inputs": {"video_frames": ["1", 0], "reference_image": ["2", 0], "frame_propagate": True,
                   "use_half_resolution": True, "target_width": 64, "target_height": 64, "wls_filter_on": True,
                   "lambda_value": 500.0, "sigma_color": 4.0},
    },
    "Deep Exemplar, November 2025": {
        "class_type": "DeepExColorImageNode",
        "inputs": {"image_to_colorize": ["1", 0], "reference_image": ["2", 0], "target_width": 64, "target_height": 64,
                   "feature_encoder": "vgg19", "post_processor": "none", "post_process_strength": 0.8,
                   "wls_filter_on": False, "lambda_value": 500.0, "sigma_color": 4.0, "use_torch_compile": False,
                   "use_sage_attention": False, "text_guidance": "", "text_guidance_weight": 0.3},
    },
    "QwenVL, September 2024": {
        "class_type": "QwenVL",
        "inputs": {"text": "Describe.", "model": "hotpath-captioner", "quantization": "none",
                   "keep_model_loaded": False, "temperature": 0.7, "max_new_tokens": 4, "seed": 7, "image": ["1", 0]},
    },
    "AILab, October 2025": {
        "class_type": "AILab_QwenVL",
        "inputs": {"model_name": "hotpath-captioner", "quantization": "None (FP16)", "preset_prompt": "Describe it.",
                   "custom_prompt": "", "max_tokens": 4, "keep_model_loaded": True, "seed": 1, "image": ["1", 0]},
    },
    "ColorMNet, November 2025": {
        "class_type": "ColorMNetVideo",
        "inputs": {"video_frames": ["1", 0], "reference_image": ["2", 0], "target_width": 64, "target_height": 64,
                   "memory_mode": "balanced", "use_fp16": True},
    },
}  # fmt: skip
NO_WEIGHTS = {
    "ColorMNet, November 2025": "No ColorMNet checkpoint was found"
}  # the demo has none; what is missing is said then


@pytest.mark.parametrize("name", OLDER_PROMPTS)
def test_an_older_api_prompt_runs_unchanged(server: Any, name: str) -> None:
    prompt = {
        "1": PICTURE,
        "2": COLOURS,
        "3": OLDER_PROMPTS[name],
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
    }
    request = urllib.request.Request(f"{server.url}/prompt", json.dumps({"prompt": prompt}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        queued = json.load(answer)
    assert not queued["node_errors"]
    deadline = time.monotonic() + 120
    entry: dict[str, Any] = {}
    while not entry and time.monotonic() < deadline:
        with urllib.request.urlopen(f"{server.url}/history/{queued['prompt_id']}", timeout=30) as answer:
            entry = json.load(answer).get(queued["prompt_id"], {})
        time.sleep(0.2)
    said = json.dumps(entry.get("status", {}))
    if name in NO_WEIGHTS and entry["status"]["status_str"] == "error":
        assert NO_WEIGHTS[name] in said, said
    else:
        assert entry["status"]["status_str"] == "success" and entry["outputs"]["4"], said
