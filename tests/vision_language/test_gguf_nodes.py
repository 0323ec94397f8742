"""The nodes of GGUF files, and GGUF files at the other nodes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gguf_files import Q8_0, of_folder
from hotpath.nodes import NODE_CLASS_MAPPINGS, ailab_downloader, ailab_qwen_vl_gguf
from hotpath.vision_language import answers, presets
from hotpath.vision_language.budgets import Budget
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.sampling import Sampling
from hotpath.vision_language.unusable import UnusableModel

SET = {"preset_prompt": "🖼️ Tags", "custom_prompt": "", "max_tokens": 6, "keep_model_loaded": True, "seed": 5}
FURTHER = {
    "device": "auto", "temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.3, "frame_count": 3, "ctx": 4096,
    "n_batch": 64, "gpu_layers": -1, "image_max_tokens": 256, "top_k": 7, "pool_size": 1048576,
}  # fmt: skip
REWRITING = {
    "prompt_text": "a cat", "preset_system_prompt": "📝 Refine", "custom_system_prompt": "", "max_tokens": 6,
    "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "english_output": False, "device": "auto", "seed": 5,
}  # fmt: skip
IMAGE = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def files(llm, tiny_folders):
    of_folder(tiny_folders["qwen3_vl"], llm / "GGUF" / "me" / "Seeing.gguf", Q8_0)
    of_folder(tiny_folders["qwen3"], llm / "Words.gguf", Q8_0)


@pytest.fixture
def asked(monkeypatch):
    """What reaches the model, and an answer to it."""
    given = []

    def answer(loaded, questions, sampling, options):
        given.append((questions[0], sampling, options))
        return [SimpleNamespace(text=f"```\nsaid {len(given)}\n```", raw="<think>x</think>", report="how")]

    monkeypatch.setattr(ailab_qwen_vl_gguf, "answer", answer)
    return given


def test_menus_offer_files(files):
    seeing = NODE_CLASS_MAPPINGS["AILab_QwenVL_GGUF"].INPUT_TYPES()["required"]["model_name"][0]
    writing = NODE_CLASS_MAPPINGS["AILab_QwenVL_GGUF_PromptEnhancer"].INPUT_TYPES()["required"]["model_name"][0]
    assert seeing[-1] == "GGUF/me/Seeing.gguf" and {"Words.gguf", "GGUF/me/Seeing.gguf"} <= set(writing)
    assert all(name.endswith(".gguf") for name in (*seeing, *writing))
    for node in ("AILab_QwenVL", "QwenVL", "HotpathVLMLoader"):
        declared = NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
        every = {**declared["required"], **declared["optional"]}
        assert "GGUF/me/Seeing.gguf" in every.get("model_name", every.get("model"))[0], node


def test_nodes_of_files_answer(files, headless_host):
    node = NODE_CLASS_MAPPINGS["AILab_QwenVL_GGUF"]
    (text,) = node().process("Seeing.gguf", **SET, image=IMAGE, unique_id="7")
    assert isinstance(text, str) and any(
        node_id == "7" and "quantization gguf" in shown for shown, node_id in map(reversed, headless_host.texts)
    )
    assert NODE_CLASS_MAPPINGS["AILab_QwenVL_GGUF_Advanced"]().process("Seeing.gguf", **SET, **FURTHER, video=IMAGE)
    assert NODE_CLASS_MAPPINGS["AILab_QwenVL_GGUF_PromptEnhancer"]().process("Seeing.gguf", **REWRITING)
    with pytest.raises(ValueError, match="is a text-only model"):
        node().process("Words.gguf", **SET, image=IMAGE)
    assert node.IS_CHANGED("Words.gguf") and node.VALIDATE_INPUTS("anything.gguf")


@pytest.mark.parametrize(
    ("node", "given", "sampling", "budget"),
    [
        ("AILab_QwenVL_GGUF", {}, Sampling(True, 0.6, 0.9, 40, 0.05, 1.2, seed=5), 4096),
        ("AILab_QwenVL_GGUF_Advanced", FURTHER, Sampling(True, 0.5, 0.8, 7, 0.05, 1.3, seed=5), 256),
        ("AILab_QwenVL_GGUF_Advanced", FURTHER | {"top_k": 0}, Sampling(True, 0.5, 0.8, 40, 0.05, 1.3, seed=5), 256),
    ],
)
def test_what_is_set_reaches_the_model(files, asked, node, given, sampling, budget):
    frames = IMAGE.expand(9, -1, -1, -1)
    assert NODE_CLASS_MAPPINGS[node]().process("Seeing.gguf", **SET, **given, image=IMAGE, video=frames) == ("said 1",)
    ((question, chosen, options),) = asked
    assert (question.prompt, question.system) == (presets.DESCRIPTIONS["🖼️ Tags"], presets.ANSWER_ALONE)
    assert question.thinking is False and len(question.pictures) == 1
    assert len(question.clips[0].frames) == (given.get("frame_count") or 9)
    assert chosen == sampling and options.budget == Budget("image_max_tokens", None, budget)
    assert (options.max_new_tokens, options.keep_loaded) == (6, True)


def test_a_prompt_is_rewritten_and_then_in_english(files, asked):
    node = NODE_CLASS_MAPPINGS["AILab_QwenVL_GGUF_PromptEnhancer"]()
    assert node.process("Words.gguf", **REWRITING) == ("said 1",)
    assert node.process("Words.gguf", **REWRITING | {"english_output": True, "prompt_text": " "}) == ("said 3",)
    first, second, third = (question for question, _, _ in asked)
    assert (first.prompt, second.prompt, third.prompt) == ("a cat", presets.EMPTY_ENHANCEMENT, "said 2")
    assert first.system == f"{presets.STYLES['📝 Refine']}\n\n{presets.PROMPT_ALONE}"
    assert third.system == presets.INTO_ENGLISH
    assert [chosen.seed for _, chosen, _ in asked] == [5, 5, 6] and asked[2][1].temperature == 0.3
    node.process("Words.gguf", **REWRITING | {"custom_system_prompt": " Shout. "})
    assert asked[-1][0].system == f"Shout.\n\n{presets.PROMPT_ALONE}"


@pytest.mark.parametrize(
    ("device", "layers", "means"),
    [
        ("auto", -1, LoadOptions()), ("auto", 0, LoadOptions(device="cpu")), ("cpu", 5, LoadOptions(device="cpu")),
        ("auto", 3, LoadOptions(stream_layers=1)), ("cuda:0", 99, LoadOptions(device="cuda:0", stream_layers=0)),
    ],
)  # fmt: skip
def test_layers_on_the_device(files, device, layers, means):
    """The tiny model has four."""
    assert ailab_qwen_vl_gguf.on_device("Seeing.gguf", device, layers, True) == means


def test_a_file_at_our_own_nodes(files, tmp_path, headless_host):
    loaded, report = NODE_CLASS_MAPPINGS["HotpathVLMLoader"]().load("Seeing.gguf")
    assert "pictures by mmproj-F32.gguf" in report and "GB in the file" in report
    from PIL import Image

    (tmp_path / "shown").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "shown" / "a.png")
    made = NODE_CLASS_MAPPINGS["HotpathCaptionFolder"]().caption(
        loaded, str(tmp_path / "shown"), "What?", max_new_tokens=4
    )
    assert (tmp_path / "shown" / "a.txt").is_file() and made["result"][0]
    assert MODELS.loaded() == [loaded]


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("a cat", "a cat"), ("```\na cat\n```", "a cat"), (" ```json\n{}\n``` ", "{}"), ("```a``` and ```b```", None),
        ("see\n```\nx\n```", None), ("```\na\n```\nand\n```\nb\n```", None),
    ],
)  # fmt: skip
def test_marks_of_code_around_all_of_it_go(text, bare):
    assert answers.unfenced(text) == (text if bare is None else bare)


@pytest.fixture
def fetched(monkeypatch):
    """What the downloader asks for; the repository has these files."""
    names = ["README.md", "run.py", "w.bin", "config.json", "model.safetensors", "a/b.safetensors"]
    asked = []

    def fetch(repository, target, revision, choose):
        asked.append((repository, target, choose(names)))

    monkeypatch.setattr(ailab_downloader.download, "fetch", fetch)
    return asked


@pytest.mark.parametrize(
    ("given", "where", "files"),
    [
        (("me/Model", "model.safetensors", "loras"), "loras/me/Model/model.safetensors", ["model.safetensors"]),
        ((" me/Model ", " a/b.safetensors", "LLM/GGUF"), "LLM/GGUF/me/Model/a/b.safetensors", ["a/b.safetensors"]),
        (("me/Model", "", "LLM/hf"), "LLM/hf/me/Model", ["config.json", "model.safetensors", "a/b.safetensors"]),
    ],
)
def test_the_downloader_fetches_into_fixed_folders(headless_host, fetched, given, where, files):
    (path,) = NODE_CLASS_MAPPINGS["AILab_HuggingFaceDownloader"]().download_model(*given)
    models = headless_host.model_folders("loras")[0].parent
    assert path == str(models / where) and [asked[2] for asked in fetched] == [files]
    assert fetched[0][0] == "me/Model" and fetched[0][1] == models / where.partition("/Model")[0] / "Model"


@pytest.mark.parametrize(
    ("repository", "file", "said"),
    [
        ("../x", "a.gguf", "is no repository"), ("a/..", "a.gguf", "is no repository"), ("a/b/c", "a.gguf", "is no repository"),
        ("/a", "a.gguf", "is no repository"), ("a/b\n", "a.gguf", None), ("a/b", "../a.gguf", "is not a file name inside"),
        ("a/b", "/etc/a.gguf", "is not a file name inside"), ("a/b", "C:\\a.gguf", "is not a file name inside"),
        ("a/b", "w.bin", "may run code"), ("a/b", "run.py", "may run code"), ("a/b", "w.safetensors", "has no file 'w"),
    ],
)  # fmt: skip
def test_the_downloader_fetches_nothing_else(headless_host, fetched, repository, file, said):
    with pytest.raises(UnusableModel, match=said or "has no file"):
        NODE_CLASS_MAPPINGS["AILab_HuggingFaceDownloader"]().download_model(repository, file, "checkpoints")
    assert not fetched


def test_the_downloader_keeps_what_is_there(headless_host, fetched):
    place = headless_host.model_folders("LLM")[0] / "GGUF" / "a" / "b" / "c.gguf"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x")
    assert NODE_CLASS_MAPPINGS["AILab_HuggingFaceDownloader"]().download_model("a/b", "c.gguf", "LLM/GGUF") == (
        str(place),
    )
    assert not fetched
    with pytest.raises(UnusableModel, match=r"2 GGUF files, each a model: name one of x\.gguf, y\.gguf"):
        ailab_downloader.choose("", ["x.gguf", "y.gguf", "config.json"])
