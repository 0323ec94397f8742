"""Our own vision-language nodes on tiny models: questions, boxes, captions of a folder."""

from __future__ import annotations

import json

import pytest
import torch
from hotpath import cli
from hotpath.nodes import NODE_CLASS_MAPPINGS
from hotpath.vision_language import own_presets
from hotpath.vision_language.answering import AnswerOptions
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.caption_job import CaptionJob
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.sampling import Sampling
from node_inputs import IMAGE


@pytest.mark.parametrize("where", ["folder", "captions_to"])
def test_captions_stay_where_others_may_write(headless_host, tmp_path, monkeypatch, where):
    monkeypatch.setenv("HOTPATH_FOLDERS", str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="others can reach this server: choose a folder in"):
        NODE_CLASS_MAPPINGS["HotpathCaptionFolder"]().caption(
            None, **{"folder": "", "prompt": "?", where: str(tmp_path)}
        )


def test_what_is_set_at_the_folder_node_or_the_command_reaches_the_captions(headless_host, tmp_path, monkeypatch):
    from hotpath.commands import caption
    from hotpath.nodes import captioning as nodes
    from hotpath.vision_language.caption_job import CaptionSummary

    given = []

    class Captioner:
        def __init__(self, *asked):
            given.append(asked)

        def run(self, shares=None):
            return CaptionSummary(captions={tmp_path / "a.png": "a cat"}, notes="noted")

    monkeypatch.setattr(nodes, "FolderCaptioner", Captioner)
    monkeypatch.setattr(caption, "FolderCaptioner", Captioner)
    folder, target = headless_host.input_folder() / "in", headless_host.output_folder() / "out"
    folder.mkdir(parents=True)
    (folder / "a.png").touch()
    made = NODE_CLASS_MAPPINGS["HotpathCaptionFolder"]().caption(
        "model", "in", "Say it.", "Be brief.", "both", 3, True, True, "a, ", ", b", "high", 9, 0.5, 7,
        "memory and disk", "graph", False, "a*", "out", "on", "pictures and videos", 5, "none", "4",
    )  # fmt: skip
    named = (True, "pictures and videos", 5)
    job = CaptionJob(folder, "Say it.", "Be brief.", "both", True, True, 3, "a, ", ", b", target, "a*", *named)
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
    flags += " --media pictures-and-videos --max-frames 5"
    flags += (
        " --token-budget high --max-new-tokens 9 --thinking on --temperature 0.5 --dtype float32 --quantization int8"
    )
    words = ["caption", str(folder), *flags.split(), "--prompt", "tags", "--before", "a, ", "--after", ", b"]
    assert cli.main([*words, "--captions-to", str(target), "--models", str(tmp_path)]) == 0
    tags = own_presets.described("tags")
    job = CaptionJob(folder, tags, "Brief.", "both", True, True, 3, "a, ", ", b", target, "a*", *named)
    load = LoadOptions(dtype="float32", quantization="int8")
    assert given.pop() == (
        ("m", load), job, Sampling(True, 0.5, seed=7), AnswerOptions(9, PRESETS["high"], cache_images=False)
    )  # fmt: skip


def test_a_model_is_looked_for_in_the_revision_that_is_asked_for(monkeypatch):
    from hotpath.nodes import vision_language as nodes

    monkeypatch.setattr(nodes, "state_of", lambda *asked: asked)
    assert nodes.HotpathVLMLoader.IS_CHANGED(model="m", revision=" v2 ") == ("m", "v2")
    assert nodes.HotpathVLMLoader.IS_CHANGED() == ("", "")
    assert nodes.HotpathVLMLoader.IS_CHANGED(model="m", repository=" a/tuned ") == ("a/tuned", "")


@pytest.mark.parametrize(("given", "asked"), [(" a/tuned ", "a/tuned"), (" ", "m")])
def test_a_repository_takes_the_place_of_the_list(monkeypatch, given, asked):
    from hotpath.nodes import vision_language as nodes

    named = []
    monkeypatch.setattr(nodes.MODELS, "get", lambda name, *_: named.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nodes.HotpathVLMLoader().load("m", repository=given)
    assert named == [asked]


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
