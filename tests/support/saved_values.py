"""Widget values of older layouts, and what they mean: read here once more in Python, to compare the browser's half with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hotpath.host import saved_layouts

CONTROLS = ("fixed", "increment", "decrement", "randomize")

# Saved values as published graphs of each time have them, and what they mean today. The last: notes on what is gone.
SAVED: list[tuple[str, list[Any], dict[str, Any], int]] = [
    (
        "DeepExColorVideoNode",  # March 2025
        [True, True, 768, 432, True, 500, 4],
        {"target_width": 768, "target_height": 432, "frame_propagate": True},
        1,
    ),
    (
        "DeepExColorVideoNode",  # November 2025, for three days
        [True, False, 640, 384, "vgg19", "wls", 0.8, True, False, 500, 4, False, True, "", 0.3],
        {"use_half_resolution": False, "target_width": 640, "use_torch_compile": False, "use_sage_attention": True},
        1,
    ),
    ("DeepExColorVideoNode", [True, True, 768, 432, False, True], {}, 0),  # the present one: nothing to do
    ("DeepExColorImageNode", [768, 432, False, 500, 4], {"target_width": 768, "target_height": 432}, 0),
    (
        "DeepExColorImageNode",
        [768, 432, "vgg19", "none", 0.8, True, 500, 4, True, False, "", 0.3],
        {"use_torch_compile": True, "use_sage_attention": False},
        1,
    ),
    ("ColorMNetVideo", [768, 432, "low_memory", True], {"memory_mode": "low_memory", "use_fp16": True}, 0),
    (
        "ColorMNetVideo",
        [512, 288, "balanced", "dinov2_vitb", "color_matcher", 0.8, True, False, True, "warm", 0.3],
        {"feature_encoder": "dinov2_vitb", "use_fp16": False, "use_torch_compile": True, "text_guidance": "warm"},
        1,
    ),
    ("ColorMNetVideo", [768, 432, "balanced", "dinov2_vitl", True, False, "", 0.3], {}, 0),
    ("ColorMNetImage", [768, 432, "none", 0.8, False, True], {"use_fp16": False, "use_torch_compile": True}, 0),
    ("ColorMNetImage", [768, 432, True, False], {}, 0),
    (
        "AILab_QwenVL",  # October 2025
        ["Qwen3-VL-4B-Instruct", "8-bit (Balanced)", "Describe it.", "", 1024, True, 2895649, "randomize"],
        {"preset_prompt": "Describe it.", "max_tokens": 1024, "keep_model_loaded": True, "seed": 2895649},
        0,
    ),
    (
        "AILab_QwenVL_Advanced",
        [
            "Qwen3-VL-4B-Instruct",
            "8-bit (Balanced)",
            "Describe.",
            "",
            1024,
            0.6,
            0.9,
            1,
            1.2,
            16,
            "auto",
            True,
            1,
            "fixed",
        ],
        {"preset_prompt": "Describe.", "temperature": 0.6, "frame_count": 16, "device": "auto", "seed": 1},
        0,
    ),
    (
        "Qwen2.5VL",  # December 2025, for twelve days
        [
            "Be brief.",
            "What?",
            "Qwen3-VL-4B-Instruct",
            "none",
            "sdpa",
            True,
            False,
            True,
            0.7,
            0.9,
            50,
            0,
            1,
            640,
            7,
            "fixed",
            "",
        ],
        {"attention_mode": "sdpa", "keep_model_loaded": True, "top_k": 50, "max_new_tokens": 640, "seed": 7},
        0,
    ),
    (
        "QwenVL",  # with another name and other words for a choice
        [
            "Be brief.",
            "What?",
            "Qwen3-VL-4B-Instruct",
            "none",
            "sdpa",
            True,
            False,
            True,
            0.7,
            0.9,
            50,
            0,
            1,
            640,
            7,
            "fixed",
            "ultra (1024x28x28)",
            "",
        ],
        {"image_quality": "ultra", "attention_mode": "sdpa", "max_new_tokens": 640, "seed": 7},
        0,
    ),
    (
        "QwenVL",  # and for a day each
        ["Be brief.", "What?", "Qwen3-VL-4B-Instruct", "8bit", True, False, 0.7, 640, 7, "fixed", "film.mp4"],
        {"text": "What?", "keep_model_loaded": True, "max_new_tokens": 640, "seed": 7, "video_path": "film.mp4"},
        0,
    ),
    (
        "Qwen",
        ["Be brief.", "What?", "Qwen3-4B-Instruct-2507", "none", False, True, 0.7, 640, 1.1, 7, "fixed"],
        {"prompt": "What?", "bypass": True, "repetition_penalty": 1.1, "seed": 7},
        0,
    ),
    (
        "AILab_QwenVL_Advanced",  # QwenVL-Mod: without quantization, and one more at the end
        ["mine", "auto", False, "cpu", "Describe.", "", 2048, 0.6, 0.9, 1, 1.2, 16, False, 9, "randomize", False],
        {"attention_mode": "auto", "device": "cpu", "max_tokens": 2048, "keep_model_loaded": False, "seed": 9},
        0,
    ),
    (
        "AILab_QwenVL",  # one more at the end, where token_budget is here
        ["mine", "None (FP16)", "sdpa", "Describe.", "", 512, True, 1, "fixed", True],
        {"quantization": "None (FP16)", "attention_mode": "sdpa", "seed": 1},
        1,
    ),
    (
        "AILab_QwenVL_GGUF_Advanced",  # August 2026
        ["mine", "cpu", "Describe.", "", 512, 0.6, 0.9, 1.2, 9, 8192, 512, -1, 4096, 7, 4194304, True, 3, "fixed"],
        {},
        0,
    ),
    (
        "AILab_QwenVL_GGUF_Advanced",  # September 2026
        ["m", "cpu", "Say.", "", 512, 0.6, 0.9, 1.2, 9, "auto", 8192, 512, -1, 4096, 7, 4194304, True, 3, "fixed"],
        {"device": "cpu", "frame_count": 9, "gpu_layers": -1, "top_k": 7, "keep_model_loaded": True, "seed": 3},
        0,
    ),
    (
        "AILab_QwenVL_GGUF_PromptEnhancer",  # QwenVL-Mod
        ["mine", "a cat", "Describe.", "", 256, 0.7, 0.9, 1.1, False, "auto", True, 4, "fixed", False],
        {"prompt_text": "a cat", "english_output": False, "device": "auto", "seed": 4},
        0,
    ),
]


def accepts(widget: Mapping[str, Any], value: Any) -> bool:
    """Whether `value` can be what `widget` held."""
    kind = widget["type"]
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    if kind in ("INT", "FLOAT"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str):
        return False
    return "options" not in widget or value in widget["options"]


def named(layout: Sequence[Mapping[str, Any]], values: Sequence[Any], forked: bool = False) -> dict[str, Any] | None:
    """The values by widget name when `layout` explains every one of them, else None.

    A value after the seed may be the browser's own (fixed, randomize, ...). Widgets at the end may be missing. forked: the
    last values need no explanation, where they stand in place of this pack's own inputs.
    """
    found: dict[str, Any] = {}
    rest = list(values)
    for index, widget in enumerate(layout):
        if not rest:
            return found if all(w.get("optional") for w in layout[index:]) else None
        if not accepts(widget, rest[0]):
            return found if forked and widget.get("optional") else None
        found[widget["name"]] = rest.pop(0)
        if widget["name"] == "seed" and rest and rest[0] in CONTROLS:
            found[saved_layouts.CONTROL] = rest.pop(0)
    return None if rest and not forked else found


def widget_values(node_id: str, values: Sequence[Any]) -> dict[str, Any] | None:
    """Inputs by their present names for the saved `widgets_values` of a node; None when no known layout fits."""
    for forked in (False, True):
        for layout in saved_layouts.table()["layouts"].get(node_id, []):
            if (found := named(layout, values, forked)) is not None:
                return saved_layouts.present(node_id, found)
    return None


def saved_names(node_id: str, values: Sequence[Any]) -> dict[str, Any]:
    """The same values by the names they were saved under, as newer front ends write them; of what only a fork has, by names
    of its own."""
    for forked in (False, True):
        for layout in saved_layouts.table()["layouts"][node_id]:
            if (found := named(layout, values, forked)) is not None:
                return found | {f"of_the_fork_{n}": value for n, value in enumerate(values[len(found) :])}
    raise AssertionError(f"no layout of {node_id} fits")
