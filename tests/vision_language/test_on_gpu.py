"""What only a CUDA device can show: graphs, compiled layers, room that is given back."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GREEDY = Sampling(sample=False)
PATHS = ["graph", *(["compiled"] if importlib.util.find_spec("triton") else [])]


@pytest.fixture
def on_gpu(load, headless_host):
    headless_host._device = torch.device("cuda")
    return lambda kind="qwen3_vl", **options: load(kind, **({"dtype": "float32"} | options))


def write(model, question, sampling=GREEDY, **options):
    settings = {"max_new_tokens": 40, "budget": PRESETS["fast"]} | options
    return answer(model, [question], sampling, AnswerOptions(**settings))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_graphs_write_what_the_plain_path_writes(on_gpu, pictures, kind, path):
    model = on_gpu(kind)
    shown = (pictures.a,) if model.processor is not None else ()
    for prompt in ("Describe.", "And again, in other words."):
        question = Question(prompt, "", shown)
        assert write(model, question, decode=path)[0].raw == write(model, question, decode="plain")[0].raw
    assert all(space.graph is not None for space in model.device_state["workspaces"].values())
    assert "not graph" not in write(model, question, decode=path)[0].report


@pytest.mark.parametrize("path", PATHS)
def test_sampling_batches_and_several_answers(on_gpu, pictures, path):
    model = on_gpu()
    question = Question("Describe.", "", (pictures.a,))
    sampling = Sampling(temperature=1.0, seed=3)
    wanted = [made.raw for made in write(model, question, sampling, decode="plain", answers=3)]
    assert [made.raw for made in write(model, question, sampling, decode=path, answers=3)] == wanted
    batch = [question, Question("A longer question about another one.", "", (pictures.b,))]
    options = AnswerOptions(20, PRESETS["fast"], decode=path)
    singles = [answer(model, [one], GREEDY, options)[0].raw for one in batch]
    assert [made.raw for made in answer(model, batch, GREEDY, options)] == singles


def test_a_bucket_is_recorded_once(on_gpu, pictures, monkeypatch):
    from hotpath.vision_language import decoding

    captures = []
    capture = decoding.Workspace.capture
    monkeypatch.setattr(decoding.Workspace, "capture", lambda self: (captures.append(1), capture(self))[1])
    model = on_gpu()
    for prompt in ("a", "something longer", "b"):
        write(model, Question(prompt, "", (pictures.a,)), decode="graph")
    assert len(captures) == 1


@pytest.mark.parametrize("path", ["plain", *PATHS])
def test_an_interrupt_leaves_the_model_usable(on_gpu, headless_host, pictures, monkeypatch, path):
    from hotpath.host import Interrupted

    model = on_gpu()
    question = Question("Describe.", "", (pictures.a,))
    wanted = write(model, question, decode=path)[0].raw
    steps = []
    check = headless_host.check_interrupt

    def counted():
        steps.append(1)
        if len(steps) == 6:
            headless_host.stop()
        check()

    monkeypatch.setattr(headless_host, "check_interrupt", counted)
    with pytest.raises(Interrupted):
        write(model, question, decode=path, max_new_tokens=300)
    assert len(steps) == 6
    monkeypatch.undo()
    assert write(model, question, decode=path)[0].raw == wanted


def test_everything_is_given_back(on_gpu, pictures):
    def held():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # scratch memory of the maths library, one for each stream
        return torch.cuda.memory_allocated()

    before = held()
    model = on_gpu()
    for path in PATHS:
        write(model, Question("Describe.", "", (pictures.a,)), decode=path)
    assert held() > before
    write(model, Question("Describe.", "", (pictures.a,)), keep_loaded=False)
    assert held() <= before + (1 << 20)
    assert write(model, Question("Describe.", "", (pictures.a,)), decode=PATHS[-1])[0].tokens


@pytest.mark.parametrize("quantization", ["int8", "int4", "float8"])
def test_packed_weights_compile(on_gpu, pictures, quantization):
    model = on_gpu(quantization=quantization)
    question = Question("Describe.", "", (pictures.a,))
    assert write(model, question, decode=PATHS[-1])[0].raw == write(model, question, decode="plain")[0].raw


def test_streamed_layers(on_gpu, pictures):
    question = Question("Describe.", "", (pictures.a,))
    wanted = write(on_gpu(), question, decode="plain")[0].raw
    model = MODELS.get("qwen3_vl", LoadOptions(dtype="float32", stream_layers=2))
    assert write(model, question)[0].raw == wanted


def test_stages_are_timed_by_the_device(on_gpu, pictures):
    found = write(on_gpu(), Question("Describe.", "", (pictures.a,)))[0].timing
    assert {"processor", "transfer", "tower", "prefill", "decode"} <= set(found)
    assert all(seconds >= 0 for seconds in found.values()) and found["decode"] > 0
