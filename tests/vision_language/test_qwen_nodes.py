"""The nodes of other packs: contracts, and whole runs of each class on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hotpath.nodes import FAILED_FAMILIES, NODE_CLASS_MAPPINGS
from hotpath.vision_language import own_presets, presets
from hotpath.vision_language.answering import AnswerOptions
from hotpath.vision_language.budgets import OLD_PRESETS, PRESETS
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.sampling import Sampling
from node_inputs import IMAGE, declared, is_socket

ROOT = Path(__file__).parents[2]
CONTRACT = json.loads((ROOT / "tests" / "data" / "contracts" / "qwen_vl.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("node_id", list(CONTRACT["nodes"]))
def test_contract(llm, node_id):
    """Ids, function, inputs with order, defaults and ranges, outputs: as the older packs had them, or wider."""
    wanted, node_class = CONTRACT["nodes"][node_id], NODE_CLASS_MAPPINGS[node_id]
    assert wanted["function"] == node_class.FUNCTION and callable(getattr(node_class(), wanted["function"]))
    assert [o["type"] for o in wanted["outputs"]] == list(node_class.RETURN_TYPES)
    assert wanted["display_name"] == node_class.DISPLAY_NAME and wanted["category"] == node_class.CATEGORY
    ours = declared(node_class)
    names = [entry["name"] for entry in wanted["inputs"]]
    assert [name for name in ours if name in names] == names
    for sockets in (True, False):
        order = [name for name, (_, spec) in ours.items() if is_socket(spec) == sockets]
        old = [name for name in order if name in names]
        assert order[: len(old)] == old, "what is new stands after what was there"
    for entry in wanted["inputs"]:
        section, spec = ours[entry["name"]]
        options = spec[1] if len(spec) > 1 else {}
        assert section in (entry["section"], "optional")
        if entry["type"] == "COMBO":
            assert set(entry["options"]) <= set(spec[0])
        else:
            assert spec[0] == entry["type"]
        if "default" in entry:
            assert options["default"] == entry["default"]
        if "min" in entry:
            assert options["min"] <= entry["min"] and options["max"] >= entry["max"]
        if "step" in entry:
            assert options.get("step", 1) <= entry["step"]
    for name, (section, _) in ours.items():
        assert name in names or section == "optional"


@pytest.mark.parametrize("node_id", [*CONTRACT["nodes"], "HotpathVLMLoader", "HotpathVLM", "HotpathCaptionFolder"])
def test_every_input_is_explained(llm, node_id):
    node_class = NODE_CLASS_MAPPINGS[node_id]
    assert not FAILED_FAMILIES
    assert node_class.DESCRIPTION and node_class.SEARCH_ALIASES and node_class.OUTPUT_TOOLTIPS
    assert len(node_class.OUTPUT_TOOLTIPS) == len(node_class.RETURN_TYPES)
    for name, (_, spec) in declared(node_class).items():
        assert spec[1].get("tooltip"), name


def test_models_of_other_machines_pass_validation(llm):
    for node_id in CONTRACT["nodes"]:
        node_class = NODE_CLASS_MAPPINGS[node_id]
        name = "model_name" if node_id.startswith("AILab") else "model"
        if name not in node_class.INPUT_TYPES()["required"] | node_class.INPUT_TYPES().get("optional", {}):
            continue
        assert node_class.VALIDATE_INPUTS(**{name: "somebody/Unknown-9B (Q4)"}) is True


SCG = dict(
    model="qwen3_vl", quantization="none", attention_mode="auto", keep_model_loaded=True, bypass=False, do_sample=False,
    temperature=0.7, top_p=0.9, top_k=50, min_p=0.0, repetition_penalty=1.0, max_new_tokens=8, seed=5,
)  # fmt: skip


@pytest.mark.parametrize("node_id", ["QwenVL", "Qwen2.5VL"])
def test_the_vision_nodes_answer(llm, headless_host, node_id):
    node = NODE_CLASS_MAPPINGS[node_id]()
    settings = SCG | {"system": "Be brief.", "text": "Describe.", "image_quality": "fast", "enable_image_cache": True}
    (first,) = node.inference(**settings, image1=IMAGE, image3=IMAGE[:, :32], unique_id="4")
    assert isinstance(first, str) and first
    assert headless_host.texts[-1][0] == "4" and "visual tokens" in headless_host.texts[-1][1]
    assert node.inference(**settings, image1=IMAGE, image3=IMAGE[:, :32]) == (first,)
    assert node.inference(**settings, image=IMAGE, image3=IMAGE[:, :32]) == (first,)
    assert node.inference(**settings, image1=torch.cat((IMAGE, 1 - IMAGE)), image3=IMAGE[:, :32]) == (first,)
    # A 64 x 96 picture is enlarged to 128 old tokens by the old meaning, and has 6 of its own.
    node.inference(**settings, image1=IMAGE, token_budget="tokens")
    assert "1, 6 visual tokens" in headless_host.texts[-1][1]
    node.inference(**settings, image1=IMAGE)
    tokens = int(headless_host.texts[-1][1].split("pictures: 1, ")[1].split(" visual")[0])
    assert 96 <= tokens <= 130


def test_bypass_passes_the_text_on(llm):
    assert NODE_CLASS_MAPPINGS["QwenVL"]().inference(text="as it is", bypass=True) == ("as it is",)
    assert NODE_CLASS_MAPPINGS["Qwen"]().inference(prompt="as it is", bypass=True) == ("as it is",)


def test_video_path(llm, headless_host, tmp_path, monkeypatch):
    import av
    import numpy as np

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), index * 30, dtype=np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    node = NODE_CLASS_MAPPINGS["QwenVL"]()
    (text,) = node.inference(**SCG, text="What?", video_path=str(path))
    assert text and "pictures: 1" in headless_host.texts[-1][1]
    before = node.IS_CHANGED(seed=3, video_path=str(path))
    assert node.IS_CHANGED(seed=3, video_path=f" {path}") == before != node.IS_CHANGED(seed=3, video_path="")
    with path.open("ab") as file:
        file.write(b"x")
    assert node.IS_CHANGED(seed=3, video_path=str(path)) != before, "another film under the same name"
    with pytest.raises(FileNotFoundError, match="video_path"):
        node.inference(**SCG, text="What?", video_path=str(tmp_path / "absent.mp4"))
    monkeypatch.setenv("HOTPATH_FOLDERS", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="others can reach this server"):
        node.inference(**SCG, text="What?", video_path=str(path))


@pytest.mark.parametrize("node_id", ["Qwen", "Qwen2.5"])
def test_the_text_nodes_answer(llm, node_id):
    node = NODE_CLASS_MAPPINGS[node_id]()
    settings = SCG | {"model": "qwen3", "do_sample": True, "temperature": 1.0}
    (first,) = node.inference(prompt="Hello", **settings)
    assert node.inference(prompt="Hello", **settings) == (first,)
    assert node.inference(prompt="Hello", **(settings | {"seed": 6})) != (first,)


def test_qwen2vl_answers_with_and_without_a_picture(llm, headless_host):
    node = NODE_CLASS_MAPPINGS["Qwen2VL"]()
    for picture in (IMAGE, None):
        (text,) = node.inference("Describe this image", "qwen2_vl", "none", False, 0.0, 8, 1558, picture)
        assert isinstance(text, str)
    assert node.IS_CHANGED(seed=3, text="x") == 3
    assert math.isnan(node.IS_CHANGED(seed=-1))


def test_the_ailab_nodes_answer(llm, headless_host):
    basic = NODE_CLASS_MAPPINGS["AILab_QwenVL"]()
    (text,) = basic.process(
        "qwen3_vl", "None (FP16)", "🖼️ Tags", "", "auto", 8, True, 1, image=IMAGE, video=IMAGE.expand(40, -1, -1, -1)
    )
    assert isinstance(text, str)
    assert "pictures: 2" in headless_host.texts[-1][1] and "temperature 0.6" in headless_host.texts[-1][1]
    advanced = NODE_CLASS_MAPPINGS["AILab_QwenVL_Advanced"]()
    order = ["qwen3_vl", "8-bit (Balanced)", "sage", False, "cpu", "🖼️ Tags", "Say it.", 8, 0.6, 0.9, 2, 1.2, 4, True, 1]
    assert isinstance(advanced.process(*order, image=IMAGE.expand(3, -1, -1, -1), token_budget="fast")[0], str)
    assert "2 beams" in headless_host.texts[-1][1] and "int8" in headless_host.texts[-1][1]
    assert [text for _, text in headless_host.texts if "image holds 3 pictures, of which" in text]
    enhancer = NODE_CLASS_MAPPINGS["AILab_QwenVL_PromptEnhancer"]()
    for model in ("qwen3", "qwen3_vl"):
        order = [model, "None (FP16)", "auto", False, "auto", "a cat", "📝 Enhance", "", 8, 0.7, 0.9, 1.1, True, 1]
        assert isinstance(enhancer.process(*order)[0], str)


SET_AT_AILAB = ["m", "8-bit (Balanced)", "sage", True, "cpu"]


@pytest.mark.parametrize(
    ("node_id", "order", "chosen", "asked"),
    [
        (
            "AILab_QwenVL_Advanced",
            [*SET_AT_AILAB, "🖼️ Tags", "Say it.", 9, 0.7, 0.8, 1, 1.3, 4, False, 5],
            (True, 0.7, 0.8, None, None, 1.3, 1, 5),
            "Say it.",
        ),
        (
            "AILab_QwenVL_PromptEnhancer",
            [*SET_AT_AILAB, " a cat ", "📝 Enhance", "", 9, 0.7, 0.8, 1.3, False, 5],
            (True, 0.7, 0.8, None, None, 1.3, 1, 5),
            f"{presets.STYLES['📝 Enhance']}\n\na cat",
        ),
        (
            "AILab_QwenVL_PromptEnhancer",
            [*SET_AT_AILAB, "", "📝 Enhance", " Shout. ", 9, 0.7, 0.8, 1.3, False, 5],
            (True, 0.7, 0.8, None, None, 1.3, 1, 5),
            f"Shout.\n\n{presets.EMPTY_ENHANCEMENT}",
        ),
    ],
)
def test_what_is_set_at_the_ailab_nodes_reaches_the_model(monkeypatch, node_id, order, chosen, asked):
    from hotpath.nodes import ailab_qwen_vl

    monkeypatch.setattr(ailab_qwen_vl, "one_answer", lambda *given: given)
    name, question, load, sampling, answer = NODE_CLASS_MAPPINGS[node_id]().process(*order, unique_id="7")
    assert (name, question.prompt) == ("m", asked)
    assert load == LoadOptions(quantization="8-bit (Balanced)", attention="sage", device="cpu")
    assert sampling == Sampling(*chosen)
    assert (answer.max_new_tokens, answer.decode, answer.keep_loaded, answer.node_id) == (9, "compiled", False, "7")
    eager = [*order[:3], False, *order[4:]]
    assert NODE_CLASS_MAPPINGS[node_id]().process(*eager)[-1].decode == "auto"


SET_AT_QWEN = {"model": "m", "quantization": "8bit", "keep_model_loaded": True, "temperature": 0.5, "seed": 5}
FURTHER = {"do_sample": False, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}


@pytest.mark.parametrize(
    ("node_id", "settings", "sampling", "budget"),
    [
        ("Qwen2VL", {}, (None, 0.5, None, None, None, None), OLD_PRESETS["ultra"]),
        ("QwenVL", FURTHER | {"image_quality": "fast"}, (False, 0.5, 0.8, 7, 0.1, 1.2), OLD_PRESETS["fast"]),
        (
            "Qwen2.5VL",
            FURTHER | {"image_quality": "high", "token_budget": "tokens"},
            (False, 0.5, 0.8, 7, 0.1, 1.2),
            PRESETS["high"],
        ),
        ("Qwen", FURTHER, (False, 0.5, 0.8, 7, 0.1, 1.2), PRESETS["balanced"]),
        ("Qwen2.5", FURTHER, (False, 0.5, 0.8, 7, 0.1, 1.2), PRESETS["balanced"]),
    ],
)
def test_what_is_set_at_the_qwen_nodes_reaches_the_model(monkeypatch, node_id, settings, sampling, budget):
    from hotpath.nodes import qwen_vl

    monkeypatch.setattr(qwen_vl, "one_answer", lambda *given: given)
    sees = node_id.endswith("VL")
    old = node_id == "Qwen2VL"
    given = SET_AT_QWEN | settings | {"text" if sees else "prompt": "Say it.", "max_new_tokens": 9}
    given |= {} if old else {"system": "Brief.", "attention_mode": "sdpa", "strip_thoughts": True}
    given |= {"enable_image_cache": False} if sees and not old else {}
    name, question, load, chosen, options, *strip = NODE_CLASS_MAPPINGS[node_id]().inference(**given, unique_id="4")
    assert (name, question.prompt, question.system, strip) == (
        "m",
        "Say it.",
        "" if old else "Brief.",
        [] if old else [True],
    )
    assert load == LoadOptions(quantization="8bit", attention="auto" if old else "sdpa")
    assert chosen == Sampling(*sampling, seed=5)
    assert options == AnswerOptions(9, budget, cache_images=old or not sees, keep_loaded=True, node_id="4")


def test_every_preset_has_words_of_its_own():
    for words in (presets.DESCRIPTIONS, presets.STYLES):
        assert len(set(words.values())) == len(words) and all(len(text) > 20 for text in words.values())


def test_presets_are_found_by_the_names_that_the_command_line_lists(headless_host):
    from hotpath.cli import parser

    default = parser().parse_args(["caption", "."]).prompt
    assert own_presets.described(default) == presets.DESCRIPTIONS[presets.DEFAULT_DESCRIPTION]
    assert own_presets.described("tags") == own_presets.described("🖼️ Tags") == presets.DESCRIPTIONS["🖼️ Tags"]
    assert own_presets.described("What is this?") == "What is this?"


@pytest.mark.parametrize("name", presets.EARLIER)
def test_what_presets_were_called_before(headless_host, name):
    from hotpath.nodes.ailab_qwen_vl import ask

    assert ask(name, "", None, None, 16).prompt == presets.DESCRIPTIONS[presets.EARLIER[name]]
    assert not headless_host.texts


def test_a_preset_of_another_pack_is_told(headless_host):
    from hotpath.nodes.ailab_qwen_vl import ask

    assert (
        ask("Describe this in detail.", "", None, None, 16).prompt == "Describe this in detail."
        and not headless_host.texts
    )
    assert ask("🍿 Wan 2.2 I2V", "", None, None, 16).prompt == "🍿 Wan 2.2 I2V"
    assert "write its words into custom_prompt, or into 🍿 Wan 2.2 I2V.txt in" in headless_host.texts[-1][1]
    assert ask("🍿 Wan 2.2 I2V", "Describe.", None, None, 16).prompt == "Describe." and len(headless_host.texts) == 1
