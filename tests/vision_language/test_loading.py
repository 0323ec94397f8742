"""Finding, checking, fetching and sharing model folders."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hotpath import host
from hotpath.demo.captioner_model import write_folder
from hotpath.vision_language import decoding, download, folders
from hotpath.vision_language.folders import UnusableModel
from hotpath.vision_language.loaded_model import PREFILL_BYTES_PER_TOKEN, LoadOptions, compute_device
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.offloading import whole_bytes
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from transformers.utils import is_flash_attn_2_available


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
        folders.check(SimpleNamespace(path=sharded), False)


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
    with pytest.raises(UnusableModel, match="could not be loaded as qwen99"):
        MODELS.get("wrong-type", LoadOptions())
    (llm / "wrong-type" / "preprocessor_config.json").write_text("{")
    with pytest.raises(UnusableModel, match=r"processor or tokenizer in .* could not be read"):
        MODELS.get("wrong-type", LoadOptions())  # before the weights, which are no Qwen's
    (llm / "wrong-type" / "preprocessor_config.json").unlink()
    with pytest.raises(UnusableModel, match=r"missing: preprocessor_config\.json"):
        download.locate("wrong-type")
    assert offline[-1][1]["local_dir"] == llm / "wrong-type"
    (llm / "wrong-type" / "processor_config.json").write_text('{"image_processor": {}}')
    assert download.locate("wrong-type").model_type == "qwen99"
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


@pytest.mark.parametrize("name", ["zzz", "cpu:x", "meta", "\0", "\ud800", "vulkan"])
def test_a_device_that_there_is_not(name):
    with pytest.raises(UnusableModel, match="is not there: choose auto"):
        compute_device(name)


def test_the_code_of_a_folder_is_not_even_asked_about(llm, tiny_folders, monkeypatch):
    """The library would ask at the terminal whether to run it, and take a yes."""
    folder = shutil.copytree(tiny_folders["qwen3_vl"], llm / "with-code")
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil:\n    pass\n")
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        known = json.loads((folder / name).read_text())
        for key in [key for key in known if key.endswith(("_class", "_type"))]:
            del known[key]
        mapped = {f"Auto{kind}": "evil.Evil" for kind in ("Processor", "ImageProcessor")}
        (folder / name).write_text(json.dumps(known | {"processor_class": "Evil", "auto_map": mapped}))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    with contextlib.suppress(UnusableModel):
        MODELS.get("with-code", LoadOptions())
    assert not asked and not ran.exists()


def test_weights_that_do_not_fit_are_not_made_up(llm, tiny_folders):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folders["qwen3_vl"], llm / "holes")
    state = load_file(llm / "holes" / "model.safetensors")
    name = next(key for key in state if key.endswith("mlp.down_proj.weight"))
    whole = state.pop(name)
    save_file(state, llm / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=r"do not fit its config.json: 1 are missing.*mlp\.down_proj"):
        MODELS.get("holes", LoadOptions())
    save_file(state | {name: whole[:-1].clone()}, llm / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=r"(do not fit its config.json|could not be loaded)"):
        MODELS.get("holes", LoadOptions())


def test_a_text_model_in_a_vision_node(llm):
    with pytest.raises(UnusableModel, match=r"text-only model \(qwen3\)"):
        MODELS.get("qwen3", LoadOptions(), must_see=True)


def test_an_older_library_is_named(llm, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    with pytest.raises(UnusableModel, match=r"need transformers 4\.57 or newer"):
        MODELS.get("qwen3_vl", LoadOptions())


def test_one_copy_for_all_who_ask(load):
    model = load("qwen3_vl")
    assert load("qwen3_vl") is model
    assert load("qwen3_vl", dtype="bfloat16") is not model
    assert load("qwen3_vl", dtype="bfloat16").dtype == torch.bfloat16


def test_other_files_under_the_same_name_are_another_model(llm, load, ask, pictures):
    """Also on the disk: what the old weights saw must not be found by the new ones after a restart."""
    from hotpath.nodes import NODE_CLASS_MAPPINGS

    changed = NODE_CLASS_MAPPINGS["HotpathVLMLoader"].IS_CHANGED
    folder = write_folder(llm / "mine", "qwen3_vl")
    nodes = [
        lambda: changed(model="mine", revision=""),
        lambda: NODE_CLASS_MAPPINGS["QwenVL"].IS_CHANGED(seed=3, model="mine", text="x"),
        lambda: NODE_CLASS_MAPPINGS["AILab_QwenVL"].IS_CHANGED(model_name="mine", seed=1),
    ]
    states = [node() for node in nodes]
    model = load("mine")
    ask(model, Question("x"), max_new_tokens=1)  # kept
    write_folder(llm / "other", "qwen3_vl", seed=1)
    (llm / "other" / "model.safetensors").replace(folder / "model.safetensors")
    assert not any(node() == before for node, before in zip(nodes, states, strict=True))
    again = load("mine")
    assert again is not model and load("mine") is again
    assert model.identity != again.identity, "as they were loaded, not as the files are now"
    old = weakref.ref(model)
    del model
    gc.collect()
    assert old() is None, "the registry keeps one copy"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load("mine") is not again
    assert changed(model="absent") == "" == changed(model="../x")


def test_a_model_is_freed_with_its_last_holder(load, ask):
    model = load("qwen3")
    ask(model, Question("x"), keep_loaded=True)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is not None
    model = load("qwen3")
    assert model is watched()
    ask(model, Question("x"), keep_loaded=False)
    assert watched() is model
    del model
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_vl"])
def test_weights_go_with_their_model_at_once(load, ask, kind, quantization):
    gc.collect()
    gc.disable()
    try:
        model = load(kind, quantization=quantization)
        ask(model, Question("x"), keep_loaded=False)
        decoder = decoding.text_decoder(model.network)
        attention = decoder.layers[0].self_attn
        held = [weakref.ref(it) for it in (attention, attention.qkv_proj.weight, decoder.embed_tokens.weight)]
        del model, decoder, attention
        assert [it() for it in held] == [None] * len(held)
    finally:
        gc.enable()


def test_two_nodes_with_and_without_keep_share_and_release(load, ask):
    model = load("qwen3_vl")
    for keep in (True, False, True):
        assert ask(model, Question("x"), keep_loaded=keep).tokens
    assert load("qwen3_vl") is model


class TestBorrowed:
    """A model that nobody holds and nobody keeps is gone with the call that used it, and no weight is moved for that."""

    @pytest.fixture
    def moved(self, llm, monkeypatch):
        """Bytes of weights at each release."""
        found = []
        kind = type(host.current().manage(torch.nn.Identity()))
        release = kind.release
        monkeypatch.setattr(
            kind, "release", lambda it: (found.append(sum(p.nbytes for p in it.module.parameters())), release(it))
        )
        return found

    @pytest.mark.parametrize("packing", ["none", "int4"])
    def test_weights_are_freed_where_they_are(self, ask, moved, packing):
        options = LoadOptions(quantization=packing)
        with MODELS.borrowed("qwen3_vl", options) as model:
            first = ask(model, Question("x"), keep_loaded=False).raw
            assert ask(model, Question("x"), keep_loaded=False).raw == first and not moved
        assert moved == [0] and MODELS.loaded() == []
        assert not any(tensor.nbytes for tensor in (*model.network.parameters(), *model.network.buffers()))
        with MODELS.borrowed("qwen3_vl", options) as another:
            assert another is not model and ask(another, Question("x"), keep_loaded=False).raw == first

    def test_kept_it_stays(self, ask, moved):
        with MODELS.borrowed("qwen3_vl", LoadOptions()) as model:
            first = ask(model, Question("x")).raw
        assert MODELS.loaded() == [model] and not moved
        with MODELS.borrowed("qwen3_vl", LoadOptions()) as again:
            assert again is model and ask(model, Question("x")).raw == first

    def test_one_that_somebody_holds_is_sent_away_whole(self, load, ask, moved):
        model = load("qwen3_vl")
        with MODELS.borrowed("qwen3_vl", LoadOptions()) as borrowed:
            first = ask(borrowed, Question("x"), keep_loaded=False).raw
        assert borrowed is model and len(moved) == 1 and moved[0] > 0
        assert ask(model, Question("x")).raw == first and MODELS.loaded() == [model]

    def test_the_last_of_several_borrowers_gives_it_back(self, ask, moved):
        with MODELS.borrowed("qwen3_vl", LoadOptions()) as one:
            with MODELS.borrowed("qwen3_vl", LoadOptions()) as other:
                first = ask(other, Question("x"), keep_loaded=False).raw
            assert one is other and ask(one, Question("x"), keep_loaded=False).raw == first
            assert not moved
        assert moved == [0]

    def test_an_error_leaves_nothing(self, ask, moved):
        with pytest.raises(ValueError, match="nothing to answer"), MODELS.borrowed("qwen3", LoadOptions(), False) as it:
            ask(it, Question(" "))
        assert moved == [0] and MODELS.loaded() == []


def test_words_that_mean_the_same_share_a_model(load):
    words = [("none", "auto"), ("None (FP16)", "sdpa"), ("", "sage"), ("none", "flash_attention_2")]
    if is_flash_attn_2_available():
        words.pop()
    first, *others = [load("qwen3", quantization=packing, attention=attention) for packing, attention in words]
    assert all(other is first for other in others)
    assert load("qwen3", device="cpu", dtype="float32") is first and load("qwen3", device="auto") is first
    packed = load("qwen3", quantization="8bit")
    assert packed is load("qwen3", quantization="8-bit (Balanced)") is load("qwen3", quantization="int8") is not first
    assert load("qwen3", attention="eager") is not first
    assert load("qwen3", stream_layers=1) is not first
    # The reasons are those of who asked last.
    assert load("qwen3", attention="sage").notes != load("qwen3").notes == []


def test_kept_models_are_let_go_when_memory_is_short(load, ask, headless_host):
    kinds = ("qwen2", "qwen3", "qwen3_vl")

    def kept(free):
        headless_host.free_memory = lambda device: free
        for kind in kinds:
            ask(load(kind), Question("x"))
        found = [model.folder.name for model in MODELS.loaded()]
        MODELS.clear()
        return found

    sizes = [whole_bytes(load(kind).network) for kind in kinds]
    assert sorted(kept(sum(sizes))) == sorted(kinds)
    assert sorted(kept(sum(sizes[1:]))) == ["qwen3", "qwen3_vl"]
    assert kept(0) == ["qwen3_vl"]


def test_the_size_of_a_model_has_its_streamed_layers_in_it(load):
    assert whole_bytes(load("qwen3", stream_layers=2).network) == whole_bytes(load("qwen3").network)


def test_float32_on_the_cpu(load):
    assert load("qwen3_vl").dtype == torch.float32
    assert load("qwen3_vl", device="cpu").device.type == "cpu"
    for absent in ("cuda:99", "xpu"):
        with pytest.raises(UnusableModel, match="is not there"):
            MODELS.get("qwen3_vl", LoadOptions(device=absent))


def test_attention_that_cannot_run_says_so(load, ask):
    report = ask(load("qwen3_vl", attention="sage"), Question("x")).report
    assert "attention: sdpa, because SageAttention" in report
    if not is_flash_attn_2_available():
        report = ask(load("qwen3_vl", attention="flash_attention_2"), Question("x")).report
        assert "sdpa, because the flash_attn package is not installed" in report


def test_the_context_and_cache_sizes_come_from_the_config(load):
    model = load("qwen3_vl")
    assert model.context_length == 4096
    # 4 layers, 2 key/value heads of 16, keys and values, 4 bytes, for a bucket of 768.
    assert model.cache_bytes(600) == 4 * 2 * 16 * 2 * 4 * 768
    assert model.image_sizes.side == 32 and load("qwen2_5_vl").image_sizes.side == 28


@pytest.fixture
def asked(llm, monkeypatch):
    """Bytes that were asked for beside the weights of a model, by each call."""
    found = []
    kind = type(host.current().manage(torch.nn.Identity()))
    resident = kind.resident

    def watched(self, extra_bytes=0, keep=True):
        found.append(extra_bytes)
        return resident(self, extra_bytes, keep)

    monkeypatch.setattr(kind, "resident", watched)
    return found


def test_room_is_asked_for_keys_values_and_activations(load, ask, asked):
    """Activations are the prompt's alone, and buffers that are there are no more asked for, however long an answer may be."""
    model, question = load("qwen3_vl"), Question("x")
    prompt = ask(model, question, max_new_tokens=1).report
    tokens = int(re.search(r"prompt: (\d+) tokens", prompt).group(1))
    least = tokens * PREFILL_BYTES_PER_TOKEN + model.cache_bytes(tokens)
    model.drop_device_state()
    asked.clear()
    model.stop_ids = frozenset(range(model.text_config.vocab_size))  # whatever is written first ends the answer
    for most in (700, 700, 2000):
        ask(model, question, max_new_tokens=most)
    assert asked == [least + model.cache_bytes(tokens + 700), least, least + model.cache_bytes(tokens + 2000)]


def test_room_of_batches_answers_and_beams(load, ask, asked):
    model, question = load("qwen3_vl"), Question("x")
    ask(model, question, answers=3)
    ask(model, question, Sampling(sample=False, beams=3))
    ask(model, question, decode="plain")
    several, beams, plain = asked
    assert several < beams  # whose prefill has three rows
    # The library's cache grows by a copy of a layer at a time.
    whole = model.cache_bytes(100)
    assert plain - (several - 2 * 3 * whole) == 2 * whole + whole // 4
