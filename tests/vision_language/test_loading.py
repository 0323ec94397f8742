"""Loading and sharing models: who holds them, what is refused, what room is asked for."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from hotpath import host
from hotpath.demo.captioner_model import write_folder
from hotpath.host.saved_configs import misread
from hotpath.host.streamed_layers import whole_bytes
from hotpath.vision_language import decoding, loading
from hotpath.vision_language.folders import UnusableModel
from hotpath.vision_language.loaded_model import PREFILL_BYTES_PER_TOKEN, LoadOptions, compute_device
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from transformers.utils import is_flash_attn_2_available


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


@pytest.mark.parametrize("stated", [None, {"quant_method": "modelopt", "quant_algo": "FP8"}])
def test_codes_of_an_unknown_packing_are_not_taken_for_weights(llm, tiny_folders, stated):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folders["qwen3"], llm / "scaled")
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith("mlp.down_proj.weight"))
    state |= {name: (state[name] * 100).to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor([0.01])}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": stated} if stated else {})))
    with pytest.raises(
        UnusableModel, match=r"not known here \(they come with .*_scale\)\. Choose the model as it was published"
    ):
        MODELS.get("scaled", LoadOptions(), must_see=False)


def test_a_library_that_a_quantised_folder_needs_is_not_the_only_cure(llm, tiny_folders):
    folder = shutil.copytree(tiny_folders["qwen3"], llm / "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnusableModel, match=r"could not be loaded as qwen3: .*int8 or int4, which need no package"):
        MODELS.get("awq", LoadOptions(), must_see=False)


def test_a_folder_without_a_chat_template(llm, tiny_folders):
    folder = shutil.copytree(tiny_folders["qwen3"], llm / "merged")
    for file in folder.glob("chat_template*"):
        file.unlink()
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    with pytest.raises(UnusableModel, match="has no chat template: copy chat_template"):
        MODELS.get("merged", LoadOptions(), must_see=False)


def test_a_text_model_in_a_vision_node(llm):
    with pytest.raises(UnusableModel, match=r"text-only model \(qwen3\)"):
        MODELS.get("qwen3", LoadOptions(), must_see=True)


def test_an_older_library_is_named(llm, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    with pytest.raises(UnusableModel, match=r"need transformers 4\.57 or newer"):
        MODELS.get("qwen3_vl", LoadOptions())


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_vl"])
def test_positions_that_an_older_library_passes_over(llm, tiny_folders, monkeypatch, kind):
    """As release 5 writes them; release 4.57 loads such a folder with others, and says nothing."""
    import transformers

    file = shutil.copytree(tiny_folders[kind], llm / "newer") / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    text["rope_parameters"] = {**(text.pop("rope_scaling", None) or {}), "rope_theta": text.pop("rope_theta")}
    file.write_text(json.dumps(config))
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(UnusableModel, match=r"newer was saved by transformers 5, and the 4\.57\.6 .* --upgrade transf"):
        MODELS.get("newer", LoadOptions(), must_see=False)
    assert misread({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6}}) == misread({"text_config": None}) == ""


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


def test_kept_models_of_earlier_prompts_are_given_back_when_the_host_is_short(load, ask, monkeypatch):
    prompt = [1]
    monkeypatch.setattr(loading, "prompts_begun", lambda: prompt[0])
    first, second = (load(kind) for kind in ("qwen2", "qwen3"))
    for model in (first, second):
        ask(model, Question("x"))
    sizes = [whole_bytes(model.network) for model in (first, second)]
    assert MODELS.give_back(1 << 40) == 0, "the running prompt may ask once more"
    MODELS._held.clear()  # as of nodes that borrow
    prompt[0] = 2
    with MODELS.borrowed("qwen3", LoadOptions(), False):
        assert MODELS.give_back(1) == sizes[0] and MODELS.loaded() == [second]
        assert MODELS.give_back(1 << 40) == 0, "it is being asked"
    assert MODELS.give_back(1 << 40) == sizes[1] and MODELS.loaded() == []


@pytest.mark.parametrize(("device", "counts"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_weights_on_metal_are_in_the_computers_memory(device, counts):
    weight = SimpleNamespace(nbytes=7, device=torch.device(device))
    network = SimpleNamespace(parameters=lambda: [weight], buffers=list)
    assert loading.host_bytes(network) == (7 if counts else 0)


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
