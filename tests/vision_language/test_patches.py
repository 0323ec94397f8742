"""What the card makes of pixels, and what is read of a long row of pads: the library's, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hotpath.vision_language import embeddings, patches
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.prompts import Question, build, tokenized


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_are_the_librarys(load, pictures, kind):
    model = load(kind)
    worker = model.processor.image_processor
    assert not patches.serves(worker, model.device) and patches.serves(worker, torch.device("cuda"))
    table = patches.values(worker)
    for name, (height, width) in {"fast": (150, 200), "ultra": (777, 1333), "native": (84, 84)}.items():
        picture = pictures.noise(height, width, height)
        size = PRESETS[name].edges(model.image_sizes)
        wanted = embeddings.process_picture(model, picture, size, "", "")
        shown = patches.resized(worker, picture.pixels, size)
        assert shown.dtype == torch.uint8 and patches.grid_of(worker, shown) == wanted.grid
        assert torch.equal(patches.patches(worker, shown, table), wanted.patches)
        half = patches.patches(worker, shown, table.bfloat16())
        assert torch.equal(half, wanted.patches.bfloat16())


def test_what_older_releases_read_as_lists_is_looked_up_too(load, monkeypatch):
    """transformers 4.57 and 5.0 leave the mean as the file has it, and remember what they make of it by what no list can be."""
    worker = load("qwen3_vl").processor.image_processor
    wanted = patches.values(worker)
    for name in ("image_mean", "image_std"):
        monkeypatch.setattr(worker, name, list(getattr(worker, name)))
    assert torch.equal(patches.values(worker), wanted)


def test_a_processor_that_does_otherwise_is_the_librarys(load):
    worker = load("qwen3_vl").processor.image_processor
    for name, value in (("do_resize", False), ("do_normalize", False), ("resample", 2)):
        before = getattr(worker, name)
        setattr(worker, name, value)
        assert not patches.serves(worker, torch.device("cuda")), name
        setattr(worker, name, before)
    assert not patches.serves(object(), torch.device("cuda"))


def test_pixels_that_cannot_be_written_are_not(load):
    worker = load("qwen3_vl").processor.image_processor
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels.setflags(write=False)
    assert patches.resized(worker, pixels, PRESETS["fast"].edges(load("qwen3_vl").image_sizes)).shape == (3, 64, 64)


def test_rows_of_pads_are_read_once(load, pictures):
    model = load("qwen3_vl")
    question = Question("Which <|image_pad|><|image_pad|>?", "", (pictures.a, pictures.b), (pictures.clip,))
    timing, cache = embeddings.Timing(model.device), embeddings.EmbeddingCache(False)
    items = embeddings.look_up(model, question.pictures, question.clips, PRESETS["fast"], cache, timing)
    made = build(model, question, items)
    assert made.kinds.sum() == sum(i.tokens(2) * (1 if i.kind == "image" else 2) for i in items)
    for written in ("no picture", "<|image_pad|>" * 300 + "x" + "<|image_pad|>", "a<|video_pad|><|image_pad|>b"):
        wanted = model.tokenizer(written, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert torch.equal(tokenized(model, written), wanted)


def test_every_pixel_is_in_the_key():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = embeddings.pixels_key(pixels)
    assert embeddings.pixels_key(np.asfortranarray(pixels)) == embeddings.pixels_key(pixels.copy()) == whole
    keys = {whole}
    for place in range(0, pixels.size, 997):
        changed = pixels.copy()
        changed.reshape(-1)[place] ^= 1
        keys.add(embeddings.pixels_key(changed))
    assert len(keys) == 1 + len(range(0, pixels.size, 997))
