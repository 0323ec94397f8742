"""The nodes: contracts, saved graphs of every layout, and whole runs of each class on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hotpath import cli
from hotpath.host import saved_layouts as migration
from hotpath.nodes import FAILED_FAMILIES, NODE_CLASS_MAPPINGS
from hotpath.vision_language import presets
from hotpath.vision_language.answering import AnswerOptions
from hotpath.vision_language.budgets import OLD_PRESETS, PRESETS
from hotpath.vision_language.caption_job import CaptionJob
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.sampling import Sampling

ROOT = Path(__file__).parents[2]
CONTRACT = json.loads((ROOT / "tests" / "data" / "contracts" / "qwen_vl.json").read_text(encoding="utf-8"))
IMAGE = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))


def declared(node_class):
    found = {}
    for section in ("required", "optional"):
        for name, spec in node_class.INPUT_TYPES().get(section, {}).items():
            found[name] = (section, spec)
    return found


def is_socket(spec):
    return isinstance(spec[0], str) and spec[0] not in ("INT", "FLOAT", "STRING", "BOOLEAN")


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


@pytest.mark.parametrize("where", ["folder", "captions_to"])
def test_captions_stay_where_others_may_write(headless_host, tmp_path, monkeypatch, where):
    monkeypatch.setenv("HOTPATH_FOLDERS", str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="others can reach this server: choose a folder in"):
        NODE_CLASS_MAPPINGS["HotpathCaptionFolder"]().caption(
            None, **{"folder": "", "prompt": "?", where: str(tmp_path)}
        )


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
    assert isinstance(advanced.process(*order, image=IMAGE, token_budget="fast")[0], str)
    assert "2 beams" in headless_host.texts[-1][1] and "int8" in headless_host.texts[-1][1]
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

    monkeypatch.setattr(ailab_qwen_vl, "run", lambda *given: given)
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

    monkeypatch.setattr(qwen_vl, "run", lambda *given: given)
    sees = node_id.endswith("VL")
    old = node_id == "Qwen2VL"
    given = SET_AT_QWEN | settings | {"text" if sees else "prompt": "Say it.", "max_new_tokens": 9}
    given |= {} if old else {"system": "Brief.", "attention_mode": "sdpa", "strip_thoughts": True}
    given |= {"enable_image_cache": False} if sees and not old else {}
    name, question, load, chosen, options, strip = NODE_CLASS_MAPPINGS[node_id]().inference(**given, unique_id="4")
    assert (name, question.prompt, question.system, strip) == ("m", "Say it.", "" if old else "Brief.", not old)
    assert load == LoadOptions(quantization="8bit", attention="auto" if old else "sdpa")
    assert chosen == Sampling(*sampling, seed=5)
    assert options == AnswerOptions(9, budget, cache_images=old or not sees, keep_loaded=True, node_id="4")


def test_what_is_set_at_the_folder_node_or_the_command_reaches_the_captions(headless_host, tmp_path, monkeypatch):
    from hotpath.commands import caption
    from hotpath.nodes import captioning as nodes
    from hotpath.vision_language.caption_job import CaptionSummary

    given = []

    class Captioner:
        def __init__(self, *asked):
            given.append(asked)

        def run(self):
            return CaptionSummary(captions={tmp_path / "a.png": "a cat"}, notes="noted")

    monkeypatch.setattr(nodes, "FolderCaptioner", Captioner)
    monkeypatch.setattr(caption, "FolderCaptioner", Captioner)
    folder, target = headless_host.input_folder() / "in", headless_host.output_folder() / "out"
    folder.mkdir(parents=True)
    (folder / "a.png").touch()
    made = NODE_CLASS_MAPPINGS["HotpathCaptionFolder"]().caption(
        "model", "in", "Say it.", "Be brief.", "both", 3, True, True, "a, ", ", b", "high", 9, 0.5, 7,
        "memory and disk", "graph", False, "a*", "out", "on", "4",
    )  # fmt: skip
    job = CaptionJob(folder, "Say it.", "Be brief.", "both", True, True, 3, "a, ", ", b", target, "a*", True)
    kept = AnswerOptions(9, PRESETS["high"], cache_on_disk=True, decode="graph", keep_loaded=False, node_id="4")
    assert given.pop() == ("model", job, Sampling(True, 0.5, seed=7), kept)
    assert made["result"][:2] == (["a cat"], [str(tmp_path / "a.png")]) and "noted" in made["ui"]["text"][0]
    for cache, memory, disk in (("off", False, False), ("memory", True, False)):
        NODE_CLASS_MAPPINGS["HotpathCaptionFolder"]().caption("model", "in", "Say it.", image_cache=cache)
        _, job, sampling, options = given.pop()
        assert (options.cache_images, options.cache_on_disk) == (memory, disk)
        assert job.target is None and sampling == Sampling(False, 0.0, seed=0)

    monkeypatch.setattr(caption.MODELS, "get", lambda *asked: asked)
    flags = "--model m --system Brief. --format both --pattern a* --recursive --overwrite --batch-size 3 --seed 7"
    flags += (
        " --token-budget high --max-new-tokens 9 --thinking on --temperature 0.5 --dtype float32 --quantization int8"
    )
    words = ["caption", str(folder), *flags.split(), "--prompt", "tags", "--before", "a, ", "--after", ", b"]
    assert cli.main([*words, "--captions-to", str(target), "--models", str(tmp_path)]) == 0
    tags = presets.described("tags")
    job = CaptionJob(folder, tags, "Brief.", "both", True, True, 3, "a, ", ", b", target, "a*", True)
    load = LoadOptions(dtype="float32", quantization="int8")
    assert given.pop() == (
        ("m", load), job, Sampling(True, 0.5, seed=7), AnswerOptions(9, PRESETS["high"], cache_images=False)
    )  # fmt: skip


def test_a_model_is_looked_for_in_the_revision_that_is_asked_for(monkeypatch):
    from hotpath.nodes import vision_language as nodes

    monkeypatch.setattr(nodes, "state_of", lambda *asked: asked)
    assert nodes.HotpathVLMLoader.IS_CHANGED(model="m", revision=" v2 ") == ("m", "v2")
    assert nodes.HotpathVLMLoader.IS_CHANGED() == ("", "")


def test_every_preset_has_words_of_its_own():
    for words in (presets.DESCRIPTIONS, presets.STYLES):
        assert len(set(words.values())) == len(words) and all(len(text) > 20 for text in words.values())


def test_presets_are_found_by_the_names_that_the_command_line_lists():
    from hotpath.cli import parser

    default = parser().parse_args(["caption", "."]).prompt
    assert presets.described(default) == presets.DESCRIPTIONS[presets.DEFAULT_DESCRIPTION]
    assert presets.described("tags") == presets.described("🖼️ Tags") == presets.DESCRIPTIONS["🖼️ Tags"]
    assert presets.described("What is this?") == "What is this?"


def test_a_preset_of_another_pack_is_told(headless_host):
    from hotpath.nodes.ailab_qwen_vl import ask

    assert (
        ask("Describe this in detail.", "", None, None, 16).prompt == "Describe this in detail."
        and not headless_host.texts
    )
    assert ask("🍿 Wan 2.2 I2V", "", None, None, 16).prompt == "🍿 Wan 2.2 I2V"
    assert "write them into custom_prompt" in headless_host.texts[-1][1]
    assert ask("🍿 Wan 2.2 I2V", "Describe.", None, None, 16).prompt == "Describe." and len(headless_host.texts) == 1


class TestOwnNodes:
    @pytest.fixture
    def model(self, llm):
        loaded, report = NODE_CLASS_MAPPINGS["HotpathVLMLoader"]().load("qwen3_vl")
        assert "qwen3_vl" in report
        return loaded

    def ask(self, model, prompt, **settings):
        node = NODE_CLASS_MAPPINGS["HotpathVLM"]()
        shared = {"max_new_tokens": [8], "token_budget": ["fast"]}
        return node.ask([model], [prompt], **(shared | settings))["result"]

    def test_any_number_of_pictures_of_any_size(self, model):
        pictures = [torch.rand(2, 64, 64, 3), torch.rand(1, 96, 40, 3), torch.rand(3, 33, 70, 3)]
        answer, answers, thoughts, found, shown, report = self.ask(model, "Compare.", images=pictures)
        assert answers == [answer] and thoughts == "" and found == "[]"
        assert "pictures: 6" in report
        assert [list(picture.shape) for picture in shown][2] == [1, 96, 40, 3]

    def test_one_answer_for_each_picture_is_what_it_would_be_alone(self, model):
        pictures = [torch.rand(3, 64, 64, 3), torch.rand(1, 96, 40, 3)]
        _, answers, *_ = self.ask(model, "x", images=pictures, one_answer_each=[True], batch_size=[3])
        singles = [self.ask(model, "x", images=[p[None]])[0] for batch in pictures for p in batch]
        assert answers == singles and len(answers) == 4
        with pytest.raises(ValueError, match="do not go together"):
            self.ask(model, "x", images=pictures, one_answer_each=[True], answers=[2])

    def test_a_picture_that_fails_costs_no_other_its_answer(self, model, monkeypatch):
        from hotpath.vision_language import asking

        real = asking.answer

        def picky(model, questions, *rest):
            if any(question.pictures[0].pixels.max() == 0 for question in questions):
                raise RuntimeError("too dark")
            return real(model, questions, *rest)

        pictures = torch.rand(5, 40, 40, 3)
        common = {"images": [pictures], "one_answer_each": [True], "batch_size": [2], "answer_format": ["boxes"]}
        _, wanted, *_ = self.ask(model, "x", **common)
        pictures[2] = 0
        monkeypatch.setattr(asking, "answer", picky)
        _, answers, _, _, shown, report = self.ask(model, "x", **common)
        assert answers == [*wanted[:2], "", *wanted[3:]] and len(shown) == 5
        assert "picture 3 was not answered: RuntimeError: too dark" in report
        pictures[:] = 0
        with pytest.raises(RuntimeError, match="too dark"):
            self.ask(model, "x", **common)

    def test_pictures_go_on_as_they_came(self, model):
        images = [torch.rand(2, 40, 40, 4), torch.rand(1, 30, 30, 3)]
        *_, shown, _ = self.ask(model, "x", images=images, max_new_tokens=[1])
        assert [picture.data_ptr() for picture in shown] == [
            images[0].data_ptr(), images[0][1].data_ptr(), images[1].data_ptr()
        ]  # fmt: skip
        assert torch.equal(shown[1], images[0][1:2, ..., :3]) and shown[1].shape == (1, 40, 40, 3)

    def test_several_answers_video_and_no_picture(self, model):
        _, answers, *_ = self.ask(model, "x", answers=[3], temperature=[1.0], seed=[2])
        assert len(set(answers)) == 3
        *_, shown, report = self.ask(model, "x", video=[torch.rand(50, 32, 32, 3)], fps=[25.0], max_frames=[6])
        assert "pictures: 1" in report and list(shown[0].shape) == [1, 64, 64, 3]

    def test_boxes_are_drawn_and_json_is_read(self, model, monkeypatch):
        from hotpath.vision_language import asking

        real = asking.answer

        def says(*arguments):
            made = real(*arguments)
            for part in made:
                part.text = '```json\n[{"bbox_2d": [0, 0, 500, 500], "label": "cat"}]\n```'
            return made

        monkeypatch.setattr(asking, "answer", says)
        black = torch.zeros(1, 100, 100, 3)
        _, _, _, found, shown, _ = self.ask(model, "Find cats.", images=[black], answer_format=["boxes"])
        assert json.loads(found) == [{"bbox_2d": [0, 0, 500, 500], "label": "cat"}]
        assert shown[0][0, 50, 20].sum() > 0 and shown[0][0, 70, 70].sum() == 0
        several = [torch.zeros(2, 100, 100, 3), torch.ones(1, 50, 60, 3)]
        *_, shown, _ = self.ask(model, "Find cats.", images=several, answer_format=["boxes"])
        assert [picture.shape[1] for picture in shown] == [100, 100, 50], "none of the pictures is lost"
        assert shown[0].sum() > 0 and shown[1].sum() == 0 and shown[2].min() == 1
        _, _, _, found, shown, _ = self.ask(model, "Find cats.", images=[black], answer_format=["json"])
        assert json.loads(found)[0]["label"] == "cat" and shown[0].sum() == 0

    def test_a_video_stands_beside_each_picture_and_only_the_first_prompt_is_asked(self, model):
        batch = torch.cat((IMAGE, IMAGE.flip(1)))
        video = torch.rand(4, 60, 60, 3, generator=torch.Generator().manual_seed(1))
        common = {"images": [batch], "one_answer_each": [True]}
        _, answers, *_, report = self.ask(model, "x", video=[video], **common)
        assert len(answers) == 2 and "pictures: 4," in report and "prompts" not in report
        node = NODE_CLASS_MAPPINGS["HotpathVLM"]()
        *_, report = node.ask([model], ["x", "y"], max_new_tokens=[2])["result"]
        assert "2 prompts came as a list; the first was asked" in report

    def test_an_answer_without_json_says_so(self, model):
        *_, report = self.ask(model, "x", images=[IMAGE], answer_format=["json"])
        assert "1 of 1 answers hold no JSON" in report

    def test_the_caption_node(self, model, headless_host):
        from PIL import Image

        folder = headless_host.input_folder() / "set"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(folder / "a.png")
        node = NODE_CLASS_MAPPINGS["HotpathCaptionFolder"]()
        made = node.caption(model, "set", "Describe.", max_new_tokens=6, before="x ")
        captions, files, report = made["result"]
        assert captions == [(folder / "a.txt").read_text(encoding="utf-8")] and captions[0].startswith("x ")
        assert files == [str(folder / "a.png")] and "1 captioned" in report
        again = node.caption(model, "set", "Describe.", max_new_tokens=6)["result"]
        assert again[:2] == (captions, files) and "1 skipped" in again[2], "what is connected goes on with all of them"
        (folder / "a.png").unlink()
        # ComfyUI cannot run a node on an empty list.
        assert node.caption(model, "set", "Describe.")["result"][:2] == ([""], [""])


SPEC = ["sys", "ask", "Qwen3-VL-4B-Instruct", "none", "auto", "high", True, False, False, True, 0.7, 0.9, 50, 0.0, 1.0, 512, 7,
        "randomize", "v.mp4"]  # fmt: skip
HEAD = ["sys", "ask", "Qwen3-VL-4B-Instruct", "none", "auto", False, False, True, 0.7, 0.9, 50, 0, 1, 512, 7, "fixed",
        "high (768x28x28)", "v.mp4"]  # fmt: skip
FIRST = ["ask", "Qwen2.5-VL-7B-Instruct", "8bit", False, 0.7, 512, 7, "randomize", "v.mp4"]


class TestMigration:
    @pytest.mark.parametrize("node_id", ["QwenVL", "Qwen2.5VL"])
    def test_all_three_vision_layouts(self, node_id):
        spec, head, first = (migration.widget_values(node_id, values) for values in (SPEC, HEAD, FIRST))
        assert spec["image_quality"] == head["image_quality"] == "high"
        assert spec["system"] == head["system"] == "sys" and "system" not in first
        for found in (spec, head, first):
            assert (found["text"], found["seed"], found["max_new_tokens"]) == ("ask", 7, 512)
            assert found["video_path"] == "v.mp4" and "control_after_generate" not in found
        assert first["quantization"] == "8bit" and first["temperature"] == 0.7

    def test_values_without_the_browsers_own_entry_and_without_video(self):
        assert migration.widget_values("QwenVL", SPEC[:17])["seed"] == 7
        assert migration.widget_values("QwenVL", [*SPEC, "tokens", True])["strip_thoughts"] is True
        assert migration.widget_values("QwenVL", FIRST[:-1])["max_new_tokens"] == 512

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
            assert migration.widget_values(node_id, old)["seed"] == 1158
            assert migration.widget_values(node_id, new)["seed"] == 3

    def test_the_later_ailab_layout(self):
        now = ["Qwen3-VL-2B-Instruct", "None (FP16)", "auto", False, "auto", "🖼️ Tags", "", 512, 0.6, 0.9, 1, 1.2, 16, True, 1,
               "randomize"]  # fmt: skip
        later = [*now[:13], "auto", *now[13:]]
        first, second = (migration.widget_values("AILab_QwenVL_Advanced", values) for values in (now, later))
        assert first == second and first["frame_count"] == 16 and first["keep_model_loaded"] is True

    def test_what_fits_nothing_is_left_alone(self):
        assert migration.widget_values("QwenVL", [1, 2, 3]) is None
        assert migration.widget_values("QwenVL", SPEC[:5]) is None
        assert migration.widget_values("KSampler", SPEC) is None

    def test_api_prompts(self):
        prompt = {
            "1": {
                "class_type": "QwenVL",
                "inputs": {"text": "x", "image": ["2", 0], "image_resolution": "low (256x28x28)"},
            },
            "2": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        }
        found = migration.migrate_prompt(prompt)
        assert found["1"]["inputs"] == {"text": "x", "image1": ["2", 0], "image_quality": "fast"}
        assert found["2"] == prompt["2"] and "image" in prompt["1"]["inputs"]
        other = {
            "1": {"class_type": "AILab_QwenVL_Advanced", "inputs": {"image": ["2", 0], "video_frame_size": "auto"}}
        }
        assert migration.migrate_prompt(other)["1"]["inputs"] == {
            "image": ["2", 0], "quantization": "None (FP16)", "attention_mode": "auto", "use_torch_compile": False
        }  # fmt: skip
        forked = {
            "1": {"class_type": "AILab_QwenVL", "inputs": {"quantization": "8-bit (Balanced)", "image2": ["2", 0]}}
        }
        found = migration.migrate_prompt(forked)["1"]["inputs"]
        assert found["video"] == ["2", 0] and found["quantization"] == "8-bit (Balanced)"
        both = {"1": {"class_type": "QwenVL", "inputs": {"image": ["2", 0], "image1": ["3", 0]}}}
        assert migration.migrate_prompt(both)["1"]["inputs"] == both["1"]["inputs"]

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


@pytest.mark.parametrize("name", ["caption_pictures", "caption_qwenvl", "captions_of_a_folder"])
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
