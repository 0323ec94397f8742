"""GGUF files on the disk and on the hub: which models they are, what is wrong with them, and where they come from."""

from __future__ import annotations

import gc
import struct
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from gguf_files import F32, facts, of_folder, stored, tower_facts, weights, words, write
from hotpath.demo import captioner_gguf
from hotpath.host import downloads
from hotpath.vision_language import download, folders
from hotpath.vision_language.folders import UnusableModel
from hotpath.vision_language.gguf.file import Gguf, GgufFile, parts_of
from hotpath.vision_language.gguf.known import TEXT_MODELS, VISION_MODELS, origin
from hotpath.vision_language.gguf.models import rank
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS, state_of


@pytest.fixture
def place(llm, tiny_folders):
    """A GGUF of a tiny kind in a folder below models/LLM."""
    return lambda kind, where, **more: of_folder(tiny_folders[kind], llm / where, **more)


def test_every_file_is_offered_where_models_are_chosen(llm, place):
    place("qwen3_vl", "GGUF/Qwen/Tiny-GGUF/Tiny-Q8_0.gguf")
    place("qwen3", "words.gguf")
    place("qwen3", "GGUF/words.gguf")
    write(llm / "llama.gguf", {"general.architecture": "llama"}, {})
    (llm / "empty.gguf").write_bytes(b"")
    seeing, writing = folders.choices((), True), folders.choices((), False)
    assert "GGUF/Qwen/Tiny-GGUF/Tiny-Q8_0.gguf" in seeing
    assert {"words.gguf", "GGUF/words.gguf"} <= set(writing)
    offered = " ".join([*seeing, *writing])
    assert not any(word in offered for word in ("mmproj", "llama", "empty"))
    known = folders.choices(("Tiny-Q8_0.gguf",), True)
    assert "GGUF/Qwen/Tiny-GGUF/Tiny-Q8_0.gguf" not in known, "which means the one that is there"


@pytest.mark.parametrize(
    "name",
    [
        "GGUF/Qwen/Tiny-GGUF/Tiny-Q8_0.gguf", "Tiny-Q8_0.gguf", "tiny-q8_0", "Tiny-Q8_0 (bartowski)", "Tiny-GGUF",
        "Tiny-Q8_0.gguf (Tiny-GGUF)", "Qwen/Tiny-GGUF", "Tiny-GGUF\\Tiny-Q8_0.gguf",
    ],
)  # fmt: skip
def test_names_that_graphs_have(llm, place, name):
    file = place("qwen3_vl", "GGUF/Qwen/Tiny-GGUF/Tiny-Q8_0.gguf")
    found = download.locate(name)
    assert (found.path, found.model_type, found.sees) == (file, "qwen3_vl", True)
    assert found.gguf.tower.name == "mmproj-F32.gguf"
    assert state_of(name) and found.config["num_hidden_layers"] == 4


def test_a_folder_of_several_files_names_none(llm, place):
    for form in ("Q4_0", "Q8_0"):
        place("qwen3", f"GGUF/me/Words-GGUF/Words-{form}.gguf")
    with pytest.raises(
        UnusableModel, match=r"holds 2 models \(Words-Q4_0\.gguf, Words-Q8_0\.gguf\): choose one of them"
    ):
        download.locate("me/Words-GGUF")


def test_a_repository_that_holds_both_is_its_files(llm, place, tiny_folders):
    """With config.json, but no weights beside it that the library reads."""
    file = place("qwen3", "owner/Both/Both.gguf")
    file.with_name("config.json").write_bytes((tiny_folders["qwen3"] / "config.json").read_bytes())
    names = [folder.name for folder in folders.scan()]
    assert "owner/Both/Both.gguf" in names and "owner/Both" not in names


def test_towers_are_told_from_each_other(llm, place, tiny_folders):
    file = place("qwen3_vl", "GGUF/one.gguf", tower="mmproj-one-F32.gguf")
    for name, changed in (("mmproj-two-F16", {}), ("mmproj-other", {"clip.vision.projection_dim": 32})):
        made = tower_facts(tiny_folders["qwen3_vl"]) | changed
        write(file.with_name(f"{name}.gguf"), made, weights(tiny_folders["qwen3_vl"])[1])
    place("qwen2_5_vl", "GGUF/old.gguf", tower="mmproj-old.gguf")
    assert folders.find("one.gguf").gguf.tower.name == "mmproj-one-F32.gguf"
    assert folders.find("old.gguf").gguf.tower.name == "mmproj-old.gguf"
    assert folders.find("old.gguf").model_type == "qwen2_5_vl"
    file.with_name("mmproj-one-F32.gguf").unlink()
    file.with_name("mmproj-two-F16.gguf").unlink()
    with pytest.raises(
        UnusableModel,
        match=r"put the mmproj file of the same model into .*GGUF\. mmproj-o.*, which is there, belongs to",
    ):
        download.locate("one.gguf")
    assert not download.locate("one.gguf", must_see=False).sees
    names = ["mmproj-Tiny-BF16.gguf", "mmproj-Tiny-F16.gguf", "mmproj-Tiny-Q8_0.gguf", "mmproj-Tiny-Thinking-F16.gguf"]
    assert min(names, key=lambda name: rank(name, "Tiny-Q4_K_M.gguf")) == "mmproj-Tiny-F16.gguf"
    assert min(names, key=lambda name: rank(name, "Tiny-Thinking-Q4_K_M.gguf")) == names[3]


def test_a_tower_of_another_model_does_not_fit(llm, place, tiny_folders):
    """Also where all that it says of itself is the same."""
    file = place("qwen3_vl", "wrong.gguf", tower="mmproj.gguf")
    tensors = dict(weights(tiny_folders["qwen3_vl"])[1])
    del tensors["v.blk.1.attn_qkv.bias"]
    write(file.with_name("mmproj.gguf"), tower_facts(tiny_folders["qwen3_vl"]), tensors)
    with pytest.raises(UnusableModel, match=r"mmproj\.gguf does not fit its model: .*blocks\.1\.attn\.qkv\.bias"):
        MODELS.get("wrong.gguf", LoadOptions())


def test_split_files_are_one_model(llm, tiny_folders, ask):
    from hotpath.vision_language.prompts import Question

    source = tiny_folders["qwen3"]
    (tensors, _), head = weights(source), facts(source) | words(source)
    names = sorted(tensors)
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        write(llm / f"big-{number + 1:05d}-of-00003.gguf", head if not number else {"split.no": number}, part)
    assert [folder.name for folder in folders.scan() if folder.gguf] == ["big-00001-of-00003.gguf"]
    model = MODELS.get("big-00002-of-00003.gguf", LoadOptions(), must_see=False)
    assert model.folder.path.name == "big-00001-of-00003.gguf" and ask(model, Question("Hello")).tokens
    (llm / "big-00003-of-00003.gguf").unlink()
    with pytest.raises(
        UnusableModel, match=r"one of 3 files that belong together, and big-00003-of-00003\.gguf is missing"
    ):
        MODELS.get("big-00001-of-00003.gguf", LoadOptions(), must_see=False)


def test_damage_is_named(llm, place):
    file = place("qwen3", "own.gguf")
    whole = file.read_bytes()
    for kept, said in (
        (len(whole) - 100, r"is not whole \([\d,]+ of [\d,]+ bytes\), as after"),
        (400, "header of .* is damaged"),
    ):
        file.write_bytes(whole[:kept])
        with pytest.raises(UnusableModel, match=said):
            download.locate("own.gguf", must_see=False)
    for start, said in (
        (b"<!doctype html><html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\3\4" + bytes(30), "it is no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1, and versions 2 and 3 are read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "is damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "is damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "is damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 4, 1 << 61), "is damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 99), "is damaged"),
    ):
        file.write_bytes(start)
        with pytest.raises(UnusableModel, match=said):
            Gguf([file])
        with pytest.raises(UnusableModel):
            download.locate("own.gguf", must_see=False)


def test_what_a_header_may_say(tmp_path):
    made = {"a": 5, "b": 0.5, "c": True, "d": "ä", "e": [1, 2], "f": ["x", ""], "g": [], "h": [True, False]}
    one = {"t": stored(torch.arange(6.0).view(2, 3), F32)}
    for version in (2, 3):
        file = Gguf([write(tmp_path / "a.gguf", made, one, version)])
        assert file.metadata == made and file.stored("t").shape == (2, 3) and file.nbytes == 24
    write(tmp_path / "a.gguf", {"a": 1, "tokenizer.ggml.tokens": ["x"] * 9, "z": 2}, {})
    assert GgufFile(tmp_path / "a.gguf", head=True).metadata == {"a": 1}
    odd = write(tmp_path / "b.gguf", {}, {"t": (99, (2, 3), bytes(24))})
    with pytest.raises(UnusableModel, match=r"of a type that is not known here \(t: 99\): take another quantization"):
        Gguf([odd])
    assert [part.name for part in parts_of(odd)] == ["b.gguf"]


def test_a_file_is_mapped_to_be_read_alone(tmp_path, recwarn):
    file = GgufFile(write(tmp_path / "a.gguf", {}, {"t": stored(torch.arange(6.0), F32)}))
    with pytest.raises(TypeError, match="readonly"):
        file._data[0] = 0  # Windows sets memory aside for pages that could be written to
    found = file.bytes_of(file.tensors[0])
    del file
    gc.collect()
    assert found.view(torch.float32).tolist() == [0, 1, 2, 3, 4, 5] and not recwarn.list


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general.architecture": "llama"}, "is of the architecture 'llama', whose GGUF files are not read here"),
        ({"general.architecture": "qwen3next"}, "is of Qwen3-Next, whose GGUF files are not read here"),
        ({"general.architecture": "clip"}, r"is the tower of a model \(mmproj\), without its language model"),
        ({"general.architecture": "qwen3"}, r"is a text-only model \(qwen3\), which cannot look at pictures"),
    ],
)
def test_other_models_are_refused_by_name(llm, metadata, said):
    write(llm / "other.gguf", metadata, {})
    with pytest.raises(UnusableModel, match=said):
        download.locate("other.gguf")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Absent-Q4_K_M.gguf", r"There is no GGUF file 'Absent-Q4_K_M\.gguf' .* as owner/repository/file\.gguf"),
        ("Qwen/Some-GGUF", "There is no GGUF file .* as owner/repository/file"),
        ("me/some/Qwen3-4B-IQ4_KSS-00001-of-00002.gguf", "is quantised as IQ4_KSS, which is not read here"),
        ("Qwen2.5-7B-Q4_0_4_8", "is quantised as Q4_0_4_8, which is not read here: take another file"),
        (
            "Qwen3.8-27B-UD-Q3_K_XL.gguf",
            r"is of Qwen3\.8, whose GGUF files are not read here .* Qwen3\.5-4B-UD-Q4_K_XL",
        ),
        ("../x.gguf", "is not opened"),
        ("a/../../x.gguf", "is not opened"),
    ],
)
def test_names_that_lead_nowhere_ask_nothing_of_the_hub(llm, monkeypatch, name, said):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UnusableModel, match=said):
        download.locate(name)


@pytest.fixture
def hub(monkeypatch, tiny_folders, tmp_path):
    """A hub with one repository, from which files come by the pack's own downloader."""
    source = of_folder(tiny_folders["qwen3_vl"], tmp_path / "Tiny-Q4_K_M.gguf", tower="mmproj-Tiny-F16.gguf")
    there = {
        "Tiny-Q4_K_M.gguf": source.read_bytes(),
        "mmproj-Tiny-F16.gguf": source.with_name("mmproj-Tiny-F16.gguf").read_bytes(),
        "mmproj-Tiny-BF16.gguf": b"other", "Tiny-Q8_0.gguf": b"other", "README.md": b"x",
    }  # fmt: skip
    asked = []

    def model_info(self, repository, **settings):
        asked.append(repository)
        files = [
            SimpleNamespace(rfilename=name, size=len(data), lfs=SimpleNamespace(sha256="0"))
            for name, data in there.items()
        ]
        return SimpleNamespace(siblings=files, gated=False, private=False, sha="main")

    def fetch(url, path, size, sha256, progress):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(there[path.name])
        progress(size, size)
        asked.append(path.name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(downloads, "fetch", fetch)
    return asked


def test_a_file_is_fetched_with_its_tower(llm, hub):
    found = download.locate("someone/Tiny-GGUF/Tiny-Q4_K_M.gguf")
    assert found.path == llm / "GGUF" / "someone" / "Tiny-GGUF" / "Tiny-Q4_K_M.gguf" and found.sees
    assert hub[0] == "someone/Tiny-GGUF" and sorted(hub[1:]) == ["Tiny-Q4_K_M.gguf", "mmproj-Tiny-F16.gguf"]
    hub.clear()
    assert download.locate("someone/Tiny-GGUF/Tiny-Q4_K_M.gguf").path == found.path
    assert download.locate("Tiny-Q4_K_M.gguf").path == found.path and not hub
    assert download.locate("someone/Tiny-GGUF/Tiny-Q4_K_M.gguf", "v1").path.parent.name == "Tiny-GGUF@v1"
    with pytest.raises(
        UnusableModel, match=r"has no file Absent\.gguf: check the name\. It has Tiny-Q4_K_M\.gguf, Tiny-Q8_0"
    ):
        download.locate("someone/Tiny-GGUF/Absent.gguf")


def test_menus_of_the_old_pack_mean_repositories(llm):
    assert len(VISION_MODELS) == 14 and len(TEXT_MODELS) == 23
    known = origin("Qwen3VL-4B-Instruct-Q4_K_M.gguf")
    assert (known.repository, known.tower) == ("Qwen/Qwen3-VL-4B-Instruct-GGUF", "mmproj-Qwen3VL-4B-Instruct-F16.gguf")
    assert known.folder == "GGUF/Qwen/Qwen3-VL-4B-Instruct-GGUF"
    assert origin("GGUF/Qwen/Qwen3-4B-GGUF/Qwen3-4B-Q8_0.gguf").repository == "Qwen/Qwen3-4B-GGUF"
    other = origin("someone/else/Qwen3-4B-Q8_0.gguf")
    assert (other.repository, other.file) == ("someone/else", "Qwen3-4B-Q8_0.gguf"), "another owner's is another file"
    assert origin("nothing.gguf") is None
    for form in ("UD-IQ2_M", "UD-Q2_K_XL", "IQ4_XS", "i1-IQ3_XXS", "TQ1_0", "MXFP4_MOE", "NVFP4", "Q1_0"):
        assert origin(f"someone/else/Qwen3-4B-{form}.gguf").file == f"Qwen3-4B-{form}.gguf"


def test_the_demo_has_its_captioner_as_a_file(tmp_path):
    captioner_gguf.main(target=tmp_path)
    for name in (captioner_gguf.MODEL, captioner_gguf.TOWER):
        kept = captioner_gguf.TARGET / name
        assert kept.read_bytes() == (tmp_path / name).read_bytes(), "run python -m hotpath.demo.captioner_gguf"
    files = Gguf([captioner_gguf.TARGET / captioner_gguf.MODEL]), Gguf([kept])
    assert sum(file.nbytes for file in files) < 1e6
