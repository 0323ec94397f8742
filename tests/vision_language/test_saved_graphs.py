"""Saved graphs of every layout of the Qwen nodes, the first shared workflow and the examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hotpath.host.saved_layouts import migrate_prompt
from hotpath.nodes import NODE_CLASS_MAPPINGS
from node_inputs import IMAGE, declared, is_socket
from saved_values import widget_values

ROOT = Path(__file__).parents[2]

SPEC = ["sys", "ask", "Qwen3-VL-4B-Instruct", "none", "auto", "high", True, False, False, True, 0.7, 0.9, 50, 0.0, 1.0, 512, 7,
        "randomize", "v.mp4"]  # fmt: skip
HEAD = ["sys", "ask", "Qwen3-VL-4B-Instruct", "none", "auto", False, False, True, 0.7, 0.9, 50, 0, 1, 512, 7, "fixed",
        "high (768x28x28)", "v.mp4"]  # fmt: skip
FIRST = ["ask", "Qwen2.5-VL-7B-Instruct", "8bit", False, 0.7, 512, 7, "randomize", "v.mp4"]


class TestMigration:
    @pytest.mark.parametrize("node_id", ["QwenVL", "Qwen2.5VL"])
    def test_all_three_vision_layouts(self, node_id):
        spec, head, first = (widget_values(node_id, values) for values in (SPEC, HEAD, FIRST))
        assert spec["image_quality"] == head["image_quality"] == "high"
        assert spec["system"] == head["system"] == "sys" and "system" not in first
        for found in (spec, head, first):
            assert (found["text"], found["seed"], found["max_new_tokens"]) == ("ask", 7, 512)
            assert found["video_path"] == "v.mp4" and "control_after_generate" not in found
        assert first["quantization"] == "8bit" and first["temperature"] == 0.7

    def test_values_without_the_browsers_own_entry_and_without_video(self):
        assert widget_values("QwenVL", SPEC[:17])["seed"] == 7
        assert widget_values("QwenVL", [*SPEC, "tokens", True])["strip_thoughts"] is True
        assert widget_values("QwenVL", FIRST[:-1])["max_new_tokens"] == 512

    def test_both_text_layouts(self):
        old = ["sys", "ask", "Qwen2.5-7B-Instruct", "8bit", False, 0.7, 512, 1158, "randomize"]
        new = [
            "sys",
            "ask",
            "Qwen3-4B-Instruct-2507",
            "none",
            "auto",
            False,
            False,
            True,
            0.7,
            0.9,
            50,
            0,
            1,
            512,
            3,
            "fixed",
        ]
        for node_id in ("Qwen", "Qwen2.5"):
            assert widget_values(node_id, old)["seed"] == 1158
            assert widget_values(node_id, new)["seed"] == 3

    def test_the_later_ailab_layout(self):
        now = ["Qwen3-VL-2B-Instruct", "None (FP16)", "auto", False, "auto", "🖼️ Tags", "", 512, 0.6, 0.9, 1, 1.2, 16, True, 1,
               "randomize"]  # fmt: skip
        later = [*now[:13], "auto", *now[13:]]
        first, second = (widget_values("AILab_QwenVL_Advanced", values) for values in (now, later))
        assert first == second and first["frame_count"] == 16 and first["keep_model_loaded"] is True

    def test_what_fits_nothing_is_left_alone(self):
        assert widget_values("QwenVL", [1, 2, 3]) is None
        assert widget_values("QwenVL", SPEC[:5]) is None
        assert widget_values("KSampler", SPEC) is None

    def test_api_prompts(self):
        prompt = {
            "1": {
                "class_type": "QwenVL",
                "inputs": {"text": "x", "image": ["2", 0], "image_resolution": "low (256x28x28)"},
            },
            "2": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        }
        found = migrate_prompt(prompt)
        assert found["1"]["inputs"] == {"text": "x", "image1": ["2", 0], "image_quality": "fast"}
        assert found["2"] == prompt["2"] and "image" in prompt["1"]["inputs"]
        other = {
            "1": {"class_type": "AILab_QwenVL_Advanced", "inputs": {"image": ["2", 0], "video_frame_size": "auto"}}
        }
        assert migrate_prompt(other)["1"]["inputs"] == {
            "image": ["2", 0], "quantization": "None (FP16)", "attention_mode": "auto", "use_torch_compile": False
        }  # fmt: skip
        forked = {
            "1": {"class_type": "AILab_QwenVL", "inputs": {"quantization": "8-bit (Balanced)", "image2": ["2", 0]}}
        }
        found = migrate_prompt(forked)["1"]["inputs"]
        assert found["video"] == ["2", 0] and found["quantization"] == "8-bit (Balanced)"
        both = {"1": {"class_type": "QwenVL", "inputs": {"image": ["2", 0], "image1": ["3", 0]}}}
        assert migrate_prompt(both)["1"]["inputs"] == both["1"]["inputs"]

    def test_an_api_prompt_of_the_first_layout_has_all_it_needs(self, llm):
        """Nothing is required that an older layout lacks, and what it lacks has a default in the function."""
        required = NODE_CLASS_MAPPINGS["QwenVL"].INPUT_TYPES()["required"]
        assert set(required) <= {
            "text",
            "model",
            "quantization",
            "keep_model_loaded",
            "temperature",
            "max_new_tokens",
            "seed",
        }
        node = NODE_CLASS_MAPPINGS["QwenVL"]()
        assert node.inference(text="x", model="qwen3_vl", max_new_tokens=4, seed=1, image=IMAGE)


def test_the_first_shared_workflow(llm):
    """A graph of September 2024: every value finds its widget."""
    graph = json.loads(
        (ROOT / "tests" / "data" / "vision_language" / "QwenVL_Qwen2VL.json").read_text(encoding="utf-8")
    )
    order = [name for name, (_, spec) in declared(NODE_CLASS_MAPPINGS["Qwen2VL"]).items() if not is_socket(spec)]
    for node in graph["nodes"]:
        if node["type"] == "Qwen2VL":
            values = dict(zip([*order, "control_after_generate"], node["widgets_values"], strict=True))
            assert values["model"] == "Qwen2-VL-7B-Instruct" and values["max_new_tokens"] == 512
            assert node["inputs"][0]["name"] == "image"


@pytest.mark.parametrize("name", ["caption_gguf", "caption_pictures", "caption_qwenvl", "captions_of_a_folder"])
def test_the_example_graphs_hold_what_the_nodes_declare(llm, name):
    """The graph of the browser and its API twin: the same nodes, links and values, every widget in its place."""
    folder = ROOT / "example_workflows"
    graph = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    prompt = json.loads((folder / "api" / f"{name}.api.json").read_text(encoding="utf-8"))
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    assert {str(node["id"]): node["type"] for node in graph["nodes"]} == {k: n["class_type"] for k, n in prompt.items()}
    checked = 0
    for node in graph["nodes"]:
        inputs = prompt[str(node["id"])]["inputs"]
        linked = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        assert linked == {key: value for key, value in inputs.items() if isinstance(value, list)}
        if node["type"] not in NODE_CLASS_MAPPINGS:
            continue
        order = []
        for key, (_, spec) in declared(NODE_CLASS_MAPPINGS[node["type"]]).items():
            if not is_socket(spec):
                order += [key, "control_after_generate"] if key == "seed" else [key]
        values = dict(zip(order, node["widgets_values"], strict=True))
        for key, value in inputs.items():
            if not isinstance(value, list):
                assert values[key] == value, key
                checked += 1
    assert checked > 3
