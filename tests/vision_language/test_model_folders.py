"""Finding, checking and fetching model folders."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hotpath.demo.captioner_model import write_folder
from hotpath.vision_language import download, folders
from hotpath.vision_language.folders import UnusableModel
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS


def test_every_llm_path_is_scanned(llm, headless_host, tiny_folders):
    base = llm.parent
    for place in ("LLM/Qwen-VL/deep", "llm/small", "prompt_generator/enhancer", "LLM/owner/named"):
        target = base / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tiny_folders["qwen3_vl"], target)
    (llm / ".hidden").mkdir()
    (llm / "not-a-model").mkdir()
    (llm / "not-a-model" / "config.json").write_text("{}")
    names = [folder.name for folder in folders.scan()]
    assert names == sorted(names, key=str.lower)
    assert {"Qwen-VL/deep", "small", "enhancer", "owner/named", "qwen3_vl", "qwen3"} <= set(names)
    assert "not-a-model" not in names
    assert folders.find("deep").path == llm / "Qwen-VL" / "deep"
    assert folders.find("Qwen-VL\\deep").path == llm / "Qwen-VL" / "deep"
    assert (
        folders.find("owner/named").name
        == folders.find("named").name
        == folders.find("Owner\\NAMED").name
        == "owner/named"
    )
    assert folders.find("anybody/named") is None, "another owner's model is another model"
    assert folders.find("anybody/deep").name == "Qwen-VL/deep", "whose it is, nobody knows"
    assert folders.find("Qwen/named").name == "owner/named", "what the name alone means, in a folder of the user's own"
    assert folders.find("small").path == base / "llm" / "small"
    assert folders.find("absent") is None


def test_choices_list_known_names_and_what_is_there(llm):
    offered = folders.choices(("Qwen3-VL-4B-Instruct",), True)
    assert offered[0] == "Qwen3-VL-4B-Instruct"
    assert "qwen3_vl" in offered and "qwen3" not in offered
    assert "qwen3" in folders.choices((), False)
    assert {"qwen3", "qwen3_vl"} <= set(folders.choices((), None))


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/../../b", "C:\\models", "hf://x"])
def test_names_cannot_leave_the_folders(llm, name):
    with pytest.raises(UnusableModel, match="not opened"):
        folders.find(name)


def test_an_empty_name_says_what_to_do(llm):
    with pytest.raises(UnusableModel, match="No model is chosen"):
        folders.find("  ")


def test_repositories():
    assert folders.repository("Qwen3-VL-4B-Instruct") == "Qwen/Qwen3-VL-4B-Instruct"
    assert folders.repository("SkyCaptioner-V1") == "Skywork/SkyCaptioner-V1"
    assert folders.repository("unsloth/Qwen3.5-4B") == "unsloth/Qwen3.5-4B"


@pytest.fixture
def sharded(llm, tmp_path):
    return write_folder(llm / "sharded", "qwen3_vl", shards=3)


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub

    calls = []

    def refuse(repository, **settings):
        calls.append((repository, settings))
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return calls


def test_shards_load(sharded, load):
    assert load("sharded").model_type == "qwen3_vl"


def test_missing_and_partial_shards_are_named(sharded, offline):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    whole = (sharded / "model-00003-of-00003.safetensors").read_bytes()
    (sharded / "model-00003-of-00003.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UnusableModel) as error:
        download.locate("sharded")
    message = str(error.value)
    assert "model-00002-of-00003.safetensors," in message
    assert f"model-00003-of-00003.safetensors ({len(whole) - 10:,} of {len(whole):,} bytes)" in message
    assert "model-00001" not in message
    assert "cannot reach the hub" in message
    # The download goes on in the same folder.
    assert offline[0][1]["local_dir"] == sharded


def test_a_transfer_is_told_by_what_counts_bytes(headless_host, monkeypatch):
    transfer, shown = download.Transfer(), []
    bars = SimpleNamespace(update=lambda steps=1: shown.append(steps))
    clock = [100.0]
    monkeypatch.setattr(download.time, "monotonic", lambda: clock[0])
    told = download.Shown(bars, "m")
    for unit, done, total in (("it", 9, 9), ("B", 1 << 20, 1 << 23), ("B", 1 << 24, 1 << 26), ("B", 1 << 22, 1 << 22)):
        transfer.moved(SimpleNamespace(unit=unit, n=done, total=total))
        told.update(transfer)
    assert (transfer.done, transfer.total) == (1 << 24, 1 << 26), "the others are of one file, or of files"
    assert shown == [download.STEPS // 4] and not headless_host.texts
    transfer.moved(SimpleNamespace(unit="B", n=1 << 25, total=1 << 27))  # further files have begun
    clock[0] += download.TEXT_EVERY
    told.update(transfer)
    told.update(transfer)
    transfer.moved(SimpleNamespace(unit="B", n=1 << 27, total=1 << 27))
    told.update(transfer)
    assert sum(shown) == download.STEPS and [text for _, text in headless_host.texts] == ["m: 0.0 of 0.1 GB"]
    transfer.stop()
    with pytest.raises(download.TransferStopped):
        transfer.moved(SimpleNamespace(unit="it", n=1, total=1))


@pytest.mark.parametrize("name", ["../x", "a/x", "a\\x", "C:x", "/x"])
def test_an_index_names_files_beside_it_alone(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (problem,) = folders.missing_weights(tmp_path)
    assert "which is no file beside it" in problem


@pytest.mark.parametrize(("count", "told"), [(8, "7. Download"), (11, "7 and 3 more. Download")])
def test_many_missing_files_are_counted(sharded, monkeypatch, count, told):
    monkeypatch.setattr(folders, "missing_files", lambda folder: [str(i) for i in range(count)])
    with pytest.raises(UnusableModel, match=f"missing: 0, 1, 2, 3, 4, 5, 6, {told}"):
        folders.check(SimpleNamespace(path=sharded, gguf=None), False)


def test_a_completed_download_is_used(sharded, tmp_path, monkeypatch):
    import huggingface_hub

    shard = sharded / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    asked = []

    def finish(repository, **settings):
        asked.append((repository, settings["allow_patterns"]))
        shard.write_bytes(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", finish)
    assert download.locate("sharded").path == sharded
    assert asked[0][0] == "Qwen/sharded"
    assert not any(pattern.endswith(".py") or pattern == "*" for pattern in asked[0][1])


def test_an_unknown_model_offline_says_both(llm, offline):
    with pytest.raises(UnusableModel, match=r"Qwen/Absent-VL could not be fetched \(cannot reach the hub\)"):
        download.locate("Absent-VL")
    assert not (llm / "Absent-VL").exists()


def test_a_model_of_another_owner_has_its_own_place(llm, tiny_folders, offline):
    (llm / "alice").mkdir()
    (llm / "alice" / "Tuned-VL").symlink_to(tiny_folders["qwen3_vl"], target_is_directory=True)
    with pytest.raises(UnusableModel, match="bob/Tuned-VL could not be fetched"):
        download.locate("bob/Tuned-VL")
    assert offline[0][0] == "bob/Tuned-VL" and offline[0][1]["local_dir"] == llm / "bob" / "Tuned-VL"
    assert download.locate("alice/Tuned-VL").path == download.locate("Tuned-VL").path == llm / "alice" / "Tuned-VL"


def test_a_revision_has_a_folder_of_its_own(llm, offline):
    with pytest.raises(UnusableModel):
        download.locate("qwen3_vl", "v1/x")
    assert offline[0][1]["revision"] == "v1/x"
    assert offline[0][1]["local_dir"] == llm / "qwen3_vl@v1-x"


@pytest.mark.parametrize("revision", ["/dev/zero", "../../secret", "a/../b", "a//b", "a b", "\ud800", "x\n"])
def test_a_revision_is_no_path(llm, offline, revision):
    with pytest.raises(UnusableModel, match="is no revision"):
        download.locate("Qwen3-VL-4B-Instruct", revision)
    assert not offline, "nothing was asked of the library"


def test_an_interrupt_stops_a_download(llm, headless_host, monkeypatch):
    import huggingface_hub
    from hotpath.host import Interrupted

    def fetch(repository, tqdm_class, **settings):
        bar = tqdm_class(total=10, disable=True)
        headless_host.stop()
        bar.update(1)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(Interrupted):
        download.locate("Absent-VL")


def test_a_stop_ends_every_thread_of_a_download_at_once(llm, headless_host, monkeypatch):
    """Over plain HTTP each file has its thread; the newer transport drops exceptions of a bar and has its own way out."""
    import huggingface_hub
    from hotpath.host import Interrupted

    moves, ended, aborted, left = [], [], threading.Event(), threading.Event()

    def fetch(repository, tqdm_class, **settings):
        bar = tqdm_class(total=1 << 30, unit="B", disable=False, file=io.StringIO())
        ends = time.monotonic() + 20  # a test that fails ends too

        def plain(_):
            try:
                while not left.wait(0.01) and time.monotonic() < ends:
                    bar.update(1 << 20)
                    moves.append(1)
            except BaseException as error:
                ended.append(type(error).__name__)
                raise

        def deaf():
            while not aborted.wait(0.01) and time.monotonic() < ends:
                with contextlib.suppress(BaseException):
                    bar.update(1)

        with ThreadPoolExecutor(4) as pool:
            pool.submit(deaf)
            list(pool.map(plain, range(3)))

    shown = []
    progress = headless_host.progress

    def watched(total, label=""):
        bar = progress(total, label)
        update = bar.update
        monkeypatch.setattr(bar, "update", lambda steps=1, preview=None: (shown.append(steps), update(steps)))
        return bar

    monkeypatch.setattr(headless_host, "progress", watched)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.utils._xet, "abort_xet_session", aborted.set, raising=False)
    threading.Timer(0.3, headless_host.stop).start()
    try:
        with pytest.raises(Interrupted):
            download.locate("Absent-VL")
        assert aborted.is_set() and moves and sum(shown) > 0
        for thread in threading.enumerate():
            if thread.name == "hotpath-call":
                thread.join(5)
        assert ended == ["TransferStopped"] * 3
    finally:
        left.set()
        aborted.set()


def test_damaged_folders(llm, tiny_folders, offline):
    for name in ("no-weights", "no-tokenizer", "bad-index", "bad-config", "wrong-type"):
        shutil.copytree(tiny_folders["qwen3_vl"], llm / name)
    (llm / "no-weights" / "model.safetensors").unlink()
    with pytest.raises(UnusableModel, match=r"missing: model\.safetensors"):
        download.locate("no-weights")
    (llm / "no-tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UnusableModel, match="no tokenizer"):
        download.locate("no-tokenizer")
    (llm / "bad-index" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UnusableModel, match="unreadable"):
        download.locate("bad-index")
    config = json.loads((llm / "wrong-type" / "config.json").read_text())
    (llm / "wrong-type" / "config.json").write_text(json.dumps(config | {"model_type": "qwen99"}))
    with pytest.raises(UnusableModel, match=r"the type 'qwen99', which .* update it with .*python\S* -m pip install"):
        MODELS.get("wrong-type", LoadOptions())
    (llm / "wrong-type" / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    (llm / "wrong-type" / "preprocessor_config.json").write_text("{")
    with pytest.raises(UnusableModel, match=r"processor or tokenizer in .* could not be read"):
        MODELS.get("wrong-type", LoadOptions())  # before the weights, which are no Qwen's
    (llm / "wrong-type" / "preprocessor_config.json").unlink()
    with pytest.raises(UnusableModel, match=r"missing: preprocessor_config\.json"):
        download.locate("wrong-type")
    assert offline[-1][1]["local_dir"] == llm / "wrong-type"
    (llm / "wrong-type" / "processor_config.json").write_text('{"video_processor": {}}')
    with pytest.raises(UnusableModel, match=r"missing: preprocessor_config\.json"):
        download.locate("wrong-type")
    (llm / "wrong-type" / "processor_config.json").write_text('{"image_processor": {}}')
    assert download.locate("wrong-type").model_type == "qwen2_vl"
    for words in ("{", "[" * 100_000):
        (llm / "bad-config" / "config.json").write_text(words)
        assert "bad-config" not in folders.choices((), None)
    with pytest.raises(UnusableModel, match="could not be fetched"):
        download.locate("bad-config")


def test_folders_that_lie_about_their_files(llm, tiny_folders, offline):
    folder = shutil.copytree(tiny_folders["qwen3_vl"], llm / "liar")
    for named, said in (({"a": 5, "b": "x"}, "unreadable"), ({"a": "../../x.safetensors"}, "no file beside it")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
        assert said in folders.missing_weights(folder)[0]
    (folder / "model.safetensors.index.json").unlink()
    for start in ((2).to_bytes(8, "little") + b"[]", (1 << 40).to_bytes(8, "little")):
        (folder / "model.safetensors").write_bytes(start)
        assert folders.missing_weights(folder) == ["model.safetensors (damaged)"]
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in folders.missing_weights(folder)[0]
    (folder / "model.safetensors").rename(folder / "qwen-q4.gguf")
    assert folders.missing_weights(folder) == ["model.safetensors"]


def test_what_people_have_instead_of_a_folder(llm, tiny_folders, offline):
    shutil.copytree(tiny_folders["qwen3_vl"], llm / "renamed")
    (llm / "renamed" / "model.safetensors").rename(llm / "renamed" / "small-fp16.safetensors")
    with pytest.raises(UnusableModel, match=r"are called small-fp16\.safetensors: rename them to model\.safetensors"):
        download.locate("renamed")
    with pytest.raises(UnusableModel, match="is a single file, and a model is a whole folder"):
        download.locate("Qwen-VL/qwen3-abliterated.safetensors ")
    with pytest.raises(UnusableModel, match=r"or a link to it, into .*LLM, or name the place"):
        download.locate("D:\\models\\LLM\\Qwen3-VL-4B-Instruct")
    assert not offline
