"""One picture as a job, and the command that does many: resumed, atomic, the same wherever it runs."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hotpath import cli
from hotpath.commands import generate as command
from hotpath.text_to_image import generation, jobs
from hotpath.text_to_image.jobs import Item, described, prepare, run_item, write_picture
from PIL import Image

ITEM = {"model": "tiny", "prompt": "a red fox", "seed": 3, "width": 64, "height": 48, "steps": 2}


def pixels(file):
    return np.asarray(Image.open(file))


def test_an_item_goes_anywhere_and_its_picture_comes_back(folder, draw, load, tmp_path):
    item = pickle.loads(pickle.dumps(ITEM))
    done = run_item(item, tmp_path / "out")
    assert json.loads(json.dumps(done)) == done == pickle.loads(pickle.dumps(done))
    assert not done["skipped"] and done["seconds"].keys() == {"prompts", "transformer", "denoise", "decode"}
    (file,) = done["files"]
    wanted = (draw(load(), seed=3).pictures[0] * 255).round().byte().numpy()
    assert np.array_equal(pixels(file), wanted)
    told = described(tmp_path / "out" / "x.png") | described(next((tmp_path / "out").iterdir()))
    assert told["id"] == done["id"] and told["prompt"] == "a red fox" and told["seed"] == 3
    again = run_item(item, tmp_path / "out")
    assert again["skipped"] and again["files"] == done["files"] and again["id"] == done["id"]


def test_a_picture_does_not_depend_on_what_was_drawn_before(folder, tmp_path):
    alone = run_item(ITEM, tmp_path / "a")
    run_item({**ITEM, "seed": 9, "width": 32, "guidance": 2.0}, tmp_path / "b")
    after = run_item(ITEM, tmp_path / "b")
    assert np.array_equal(pixels(alone["files"][0]), pixels(after["files"][0]))


def test_what_the_id_is_made_of(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hotpath.products.int8.why_not", lambda: "")  # where int8 cannot be had, it is the same picture

    def key(**changes):
        return prepare(Item.of({**ITEM, **changes}), tmp_path).id

    base = key()
    for change in ({"prompt": "a blue fox"}, {"seed": 4}, {"width": 80}, {"height": 64}, {"steps": 3}, {"guidance": 1.0},
                   {"dtype": "bfloat16"}, {"precision": "int8"}, {"max_tokens": 99}, {"attention": "sage"},
                   {"attention": "sage1"}, {"tiling": "always"}):  # fmt: skip
        assert key(**change) != base, change
    # The same picture under another name, by another route, or with words nobody reads.
    for change in ({"name": "fox"}, {"negative": "blurry"}, {"attention": "sdpa_math"}, {"prompt_cache": "off"}):
        assert key(**change) == base, change
    assert key(guidance=2.0, negative="blurry") != key(guidance=2.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"promt": "x"}, "'promt' is no part of a picture's description"),
        ({"seed": "3"}, "seed is '3', and should be a whole number"),
        ({"width": 64.5}, "width is 64.5"),
        ({"seed": True}, "seed is True"),
        ({"prompt": 3}, "prompt is 3, and should be text"),
        ({"prompt": " "}, "needs a prompt"),
        ({"model": ""}, "needs a model"),
        ({"loras": [["a"]]}, "is no LoRA"),
        ({"loras": "a.safetensors"}, "loras is 'a.safetensors', and should be a list"),
    ],
)
def test_descriptions_that_are_wrong(change, words):
    with pytest.raises(ValueError, match=words):
        Item.of({**ITEM, **change})


def test_only_a_whole_file_of_the_same_job_is_done(folder, tmp_path):
    done = run_item(ITEM, tmp_path)
    job = prepare(Item.of(ITEM), tmp_path)
    whole = job.file.read_bytes()
    job.file.write_bytes(whole[: len(whole) // 2])
    assert not job.is_done()
    Image.new("RGB", (64, 48)).save(job.file)
    assert not job.is_done()
    assert not run_item(ITEM, tmp_path)["skipped"] and job.file.read_bytes() == whole and job.is_done()
    assert done["files"] == [str(job.file)]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    write_picture(torch.zeros(4, 4, 3), file, {"id": "1"})
    before = file.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        write_picture(torch.ones(4, 4, 3), file, {"id": "2"})
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_lora_by_path_by_name_and_by_folder(folder, headless_host, tmp_path):
    place = headless_host.model_folders("loras")[0]
    place.mkdir(parents=True)
    for path in (place / "a.safetensors", tmp_path / "one" / "b.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert jobs.adapter_file("a.safetensors") == place / "a.safetensors"
    assert jobs.adapter_file(str(tmp_path / "one")) == tmp_path / "one" / "b.safetensors"
    (tmp_path / "one" / "c.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds 2 safetensors files"):
        jobs.adapter_file(str(tmp_path / "one"))
    with pytest.raises(FileNotFoundError, match=r"'c\.safetensors' was not found"):
        jobs.adapter_file("c.safetensors")


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capfd):
    """hotpath generate on the tiny checkpoint -> (exit code, files written now, what was said)."""
    monkeypatch.setenv("HOTPATH_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def ran(*words):
        given = ["generate", "--model", str(tiny_folder), "--device", "cpu", "--steps", "1", "--width", "32"]
        code = cli.main([*given, "--height", "32", "-o", "out", *map(str, words)])
        said = capfd.readouterr()
        return code, said.out.split(), said.err

    return ran


def test_prompts_of_every_kind(run, tmp_path):
    (tmp_path / "list.txt").write_text("a red fox\n\n a blue house \n", encoding="utf-8")
    lines = [{"prompt": "grün", "seed": 7, "width": 64}, {"prompt": "b", "guidance": 2, "negative": "c"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    code, files, said = run("--prompt", "a cat", "--prompts", "list.txt", "--prompts", "list.jsonl", "--seed", 5)
    assert code == 0 and len(files) == 5 and "5 drawn, 0 were there already, 0 failed" in said
    told = [described(tmp_path / file) for file in files]
    assert [(t["prompt"], t["seed"], t["width"]) for t in told] == [
        ("a cat", 5, 32), ("a red fox", 5, 32), ("a blue house", 5, 32), ("grün", 7, 64), ("b", 5, 32)
    ]  # fmt: skip
    assert told[4]["guidance"] == 2.0 and Image.open(tmp_path / files[3]).size == (64, 32)
    code, files, said = run("--prompt", "a cat", "--prompts", "list.txt", "--seed", 5, "--count", 2)
    assert code == 0 and len(files) == 3 and "3 drawn, 3 were there already" in said
    code, files, _ = run("--prompt", "a cat", "--seed", 5, "--overwrite", "--quiet")
    assert code == 0 and len(files) == 1


def test_stopped_and_gone_on(run, tmp_path, monkeypatch):
    job, drawn = jobs.Job.run, []

    def stops_at_the_third(self):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(self.file)
        return job(self)

    monkeypatch.setattr(jobs.Job, "run", stops_at_the_third)
    code, files, said = run("--prompt", "a cat", "--count", 4)
    assert code == command.INTERRUPTED and len(files) == 2 and "goes on from there" in said
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(kept) == 2
    monkeypatch.setattr(jobs.Job, "run", job)
    code, files, said = run("--prompt", "a cat", "--count", 4)
    assert code == 0 and len(files) == 2 and "2 drawn, 2 were there already" in said
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_real_ctrl_c_is_heard_within_a_step(run, monkeypatch):
    import os
    import signal

    from hotpath.text_to_image import denoising

    denoise = denoising.denoise

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return denoise(*args, **kwargs)

    monkeypatch.setattr(denoising, "denoise", interrupted)
    code, files, said = run("--prompt", "a cat", "--count", 2)
    assert code == command.INTERRUPTED and not files and "Stopped" in said


def test_refusals_and_failures(run, tmp_path):
    assert run()[0] == command.REFUSED
    code, _, said = run("--prompt", "x", "--width", 50)
    assert code == command.REFUSED and "no multiple of 16" in said
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "with": 64}\n')
    code, _, said = run("--prompts", "bad.jsonl")
    assert code == command.REFUSED and "bad.jsonl, line 2: 'with' is no part" in said
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompt" in run("--prompts", "empty.txt")[2]
    assert "There is no file" in run("--prompts", "none.txt")[2]
    assert "a number such as 0.8" in run("--prompt", "x", "--lora", "a.safetensors=strong")[2]
    assert "--count 0 draws nothing" in run("--prompt", "x", "--count", 0)[2]
    (tmp_path / "mixed.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "width": 50}\n{"prompt": "c"}\n')
    code, files, said = run("--prompts", "mixed.jsonl")
    assert code == command.FAILED and len(files) == 2 and "2 drawn, 0 were there already, 1 failed" in said


def test_a_first_prompt_that_cannot_be_drawn_stops_no_other(run, tmp_path):
    (tmp_path / "first.jsonl").write_text('{"prompt": "a", "width": 50}\n{"prompt": "b"}\n')
    code, files, said = run("--prompts", "first.jsonl")
    assert code == command.FAILED and len(files) == 1 and "1 of 2: The width 50 is no multiple" in said
    # What is wrong with all of them is said once.
    for wrong in (("--width", 50), ("--lora", "none.safetensors")):
        code, files, said = run("--prompt", "a", "--prompt", "b", *wrong)
        assert code == command.REFUSED and not files and said.count("hotpath: ") == 1
    (tmp_path / "all.jsonl").write_text('{"prompt": "a", "width": 50}\n{"prompt": "b", "width": 51}\n')
    assert run("--prompts", "all.jsonl")[0] == command.REFUSED


def test_a_prompt_without_room_stops_no_other(run, monkeypatch):
    drawn = generation.Run._draw

    def full(self):
        if self.request.prompt == "a":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        if self.request.prompt == "c":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return drawn(self)

    monkeypatch.setattr(generation.Run, "_draw", full)
    code, files, said = run("--prompt", "a", "--prompt", "b", "--prompt", "c", "--prompt", "d")
    assert code == command.FAILED and len(files) == 1 and "3 of 4: CUDA error: an illegal memory access" in said
    assert "the same command goes on from there" in said and "[4/4]" not in said
    assert "ran out of memory at 32 x 32" in said and "choose a smaller width and height" in said


@pytest.mark.parametrize(
    "change",
    [{"width": 50}, {"tiling": "sometimes"}, {"prompt_cache": "tape"}, {"max_tokens": 100000}, {"guidance": -1}],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(folder, tmp_path, change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        prepare(Item.of({**ITEM, **change}), tmp_path)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("strength", [None, "x", [1], True, float("nan"), float("inf")])
def test_a_strength_is_a_number(strength):
    with pytest.raises(ValueError, match=r"a number such as 0\.8"):
        Item.of({**ITEM, "loras": [["a.safetensors", strength]]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_of_an_item_are_finite(value):
    with pytest.raises(ValueError, match=r"guidance is .*finite"):
        Item.of({**ITEM, "guidance": value})


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    """JSON and pages of the web have other separators within a text."""
    told = [{"prompt": "a\u2028b"}, {"prompt": "c\x85d", "seed": 3}]
    text = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in told)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8", newline="")
    assert command.read_prompts(tmp_path / "a.jsonl") == told
    (tmp_path / "a.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1"):
        command.read_prompts(tmp_path / "a.jsonl")


def test_prompts_in_another_encoding_or_place_are_one_sentence(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("ein Fuchs".encode("utf-16"))
    for wrong in (file, tmp_path):
        with pytest.raises(ValueError, match=f"{wrong.name} cannot be read .*UTF-8"):
            command.read_prompts(wrong)
