"""Seeds, caches, previews, interrupts: what a person relies on when pictures are drawn."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from counted_calls import count_calls
from hotpath import host
from hotpath.text_to_image import decoding, denoising, previews
from hotpath.text_to_image.denoising import Guidance
from hotpath.text_to_image.folders import UnusableCheckpoint
from hotpath.text_to_image.generation import Pipeline, Request, generate
from hotpath.text_to_image.loading import MODELS, LoadOptions


def test_a_picture_does_not_know_its_company(load, draw):
    model = load()
    batch = draw(model, seed=40, pictures=4, guidance=Guidance(2.0))
    singles = [draw(model, seed=40 + i, guidance=Guidance(2.0)) for i in range(4)]
    assert torch.equal(batch.pictures, torch.cat([one.pictures for one in singles]))
    assert torch.equal(batch.latents, torch.cat([one.latents for one in singles]))
    assert batch.seeds == [40, 41, 42, 43]
    assert len({tuple(p.flatten().tolist()) for p in batch.pictures}) == 4
    together = draw(model, seed=40, pictures=4, guidance=Guidance(2.0), pictures_at_a_time=3)
    assert (together.pictures - batch.pictures).abs().max() < 1e-5


def test_the_last_seed_goes_on_at_the_first(load, draw):
    assert denoising.seeds((1 << 64) - 1, 2) == [(1 << 64) - 1, 0]
    wrapped = draw(load(), seed=(1 << 64) - 1, pictures=2)
    assert torch.equal(wrapped.pictures[1:], draw(load(), seed=0).pictures)
    assert f"seed {(1 << 64) - 1}," in draw(load(), seed=-1).report


def test_nothing_global_is_used_or_changed(load, draw):
    model = load()
    flags = (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.get_default_dtype())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(model).pictures, first.pictures)
    assert flags == (
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
    )
    assert not first.pictures.is_inference() and not first.latents.is_inference()


def test_runs_side_by_side_do_not_mix(load, draw):
    model = load()
    wanted = {steps: draw(model, seed=steps, steps=steps).pictures for steps in (2, 3, 4)}
    found = {}

    def run(steps):
        found[steps] = draw(model, seed=steps, steps=steps).pictures

    here = host.current()
    threads = [threading.Thread(target=run, args=(steps,)) for steps in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host.current() is here
    assert all(torch.equal(found[steps], wanted[steps]) for steps in wanted)


def test_a_known_prompt_needs_no_text_encoder(load, draw, monkeypatch):
    model = load()
    first = draw(model, guidance=Guidance(2.0), negative="blurry")
    assert first.encoded == 2 and "the text encoder read 2" in first.report
    calls = count_calls(monkeypatch, model.text_encoder.managed.module.network, "forward")
    resident = count_calls(monkeypatch, model.text_encoder, "resident")
    again = draw(model, guidance=Guidance(2.0), negative="blurry")
    assert again.encoded == 0 and not calls and not resident and "the text encoder was not needed" in again.report
    assert torch.equal(again.pictures, first.pictures)
    assert draw(model, guidance=Guidance(2.0), negative="dark").encoded == 1 and len(calls) == 1
    assert draw(model, prompt_cache="off").encoded == 1 and len(calls) == 2


def test_a_prompt_from_the_disk_does_not_even_read_the_encoder(load, draw):
    from hotpath.cache import clear_all

    first = draw(load(), prompt_cache="memory and disk")
    MODELS.clear()
    clear_all()
    model = load()
    again = draw(model, prompt_cache="memory and disk")
    assert torch.equal(again.pictures, first.pictures) and again.encoded == 0
    assert model.transformer.loaded and model.vae.loaded and not model.text_encoder.loaded


def test_another_prompt_length_or_model_is_another_entry(load, draw, folder):
    from hotpath.demo.z_image_model import write_checkpoint

    model = load()
    draw(model)
    assert draw(model, max_tokens=8).encoded == 1
    write_checkpoint(folder / "other", seed=1)
    assert draw(load("other")).encoded == 1
    assert draw(load(precision="int8")).encoded == 0  # packs the transformer, not the encoder


def test_an_interrupt_between_images(load, draw, headless_host):
    model, images = load(), torch.rand(2, 48, 64, 3)
    calls = []

    def stop(*_):
        calls.append(1)
        headless_host.stop()

    model.vae.managed.module.network.encoder.register_forward_hook(stop)
    with pytest.raises(host.Interrupted):
        draw(model, image=images, pictures=2)
    assert len(calls) == 1


def test_progress_and_previews(load, draw, headless_host, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done, self.shown = total, 0, []
            bars.append(self)

        def update(self, steps=1, preview=None):
            self.done += steps
            if preview is not None:
                self.shown.append(preview)

        def close(self):
            self.closed = True

    monkeypatch.setattr(headless_host, "progress", lambda total, label="": Bar(total))
    model = load()
    draw(model, pictures=2, steps=3, preview=previews.of_model(model))
    (bar,) = bars
    assert bar.total == bar.done == 2 * 3 + 2 and bar.closed
    assert len(bar.shown) == 6 and all(picture.size == (8, 6) for picture in bar.shown)
    assert model.preview is previews.of_model(model)


def test_a_fitted_preview_finds_a_linear_decoder():
    factors, bias = torch.tensor([[0.3, -0.1, 0.0], [0.0, 0.2, 0.4]]), torch.tensor([0.1, 0.0, -0.2])

    def decode(latents):
        rgb = torch.einsum("bchw,cr->brhw", latents, factors) + bias[:, None, None]
        return torch.nn.functional.interpolate(rgb, scale_factor=8)

    found = previews.fitted(decode, 2)
    assert (found.factors - factors).abs().max() < 5e-3 and (found.bias - bias).abs().max() < 5e-3
    shown = found.picture(torch.zeros(1, 2, 3, 5))
    assert (
        shown.size == (5, 3)
        and max(map(abs, (a - b for a, b in zip(shown.getpixel((0, 0)), (140, 128, 102), strict=True)))) <= 1
    )


def test_the_preview_of_the_last_step_is_the_picture(load, draw):
    seen = []
    preview = SimpleNamespace(picture=lambda latents: seen.append(latents.clone()))
    model = load()
    drawn = draw(model, steps=3, preview=preview)
    last = decoding.unscaled(model, seen[-1])
    assert torch.allclose(last, drawn.latents, atol=1e-5) and not torch.allclose(seen[0], seen[-1], atol=1e-2)


@pytest.mark.parametrize("compile", ["none", "regional"])
def test_an_interrupt_ends_it_within_a_step(load, draw, headless_host, monkeypatch, graphs, compile):
    model = load(compile=compile)
    wanted = draw(model).pictures
    assert bool(graphs) == (compile == "regional")
    checks = []
    check = headless_host.check_interrupt

    def stop_at_the_third():
        checks.append(1)
        if len(checks) == 3:
            headless_host.stop()
        check()

    blocks = []
    handle = model.transformer.managed.module.network.layers[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    monkeypatch.setattr(headless_host, "check_interrupt", stop_at_the_third)
    with pytest.raises(host.Interrupted):
        draw(model)
    assert len(checks) == 3 and not blocks  # after both refiners, before the first block of the first step
    handle.remove()
    monkeypatch.setattr(headless_host, "check_interrupt", check)
    assert torch.equal(draw(model).pictures, wanted)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 70}, "The width 70 is no multiple of 16, which this checkpoint needs: try 64."),
        ({"height": 4096}, "The height 4096 is over 1024"),
        ({"steps": 0}, "1 or more"),
        ({"prompt": "a \ud83d fox"}, "The prompt holds half a letter"),
        ({"negative": "\udc00"}, "The negative prompt holds half a letter"),
        ({"guidance": Guidance(-1.0)}, "Guidance -1.0 is no number from 0 up"),
        ({"guidance": Guidance(float("nan"))}, "Guidance nan is no number from 0 up"),
        ({"guidance": Guidance(float("inf"))}, "Guidance inf is no number from 0 up"),
        ({"mask": torch.ones(1, 8, 8)}, "A mask needs an image"),
        ({"image": torch.ones(2, 48, 64, 3)}, "2 images for 1 pictures"),
        ({"image": torch.ones(1, 48, 64, 3), "mask": torch.ones(2, 48, 64)}, "2 masks for 1 pictures"),
        ({"image": torch.ones(0, 48, 64, 3)}, "0 images for 1 pictures"),
        (
            {"image": torch.ones(48, 64, 3)},
            r"The image is a tensor of \[48, 64, 3] where \[pictures, height, width, RGB] is",
        ),
        ({"image": torch.ones(1, 48, 64, 1)}, r"The image is a tensor of \[1, 48, 64, 1]"),
        ({"image": torch.ones(1, 0, 64, 3)}, r"The image is a tensor of \[1, 0, 64, 3]"),
        ({"image": torch.ones(1, 48, 64, 3), "mask": torch.ones(1, 1, 48, 64)}, "The mask is a tensor of"),
        ({"image": torch.full((1, 48, 64, 3), torch.nan)}, "The image holds values that are not finite"),
        ({"image": torch.ones(1, 48, 64, 3), "mask": torch.full((48, 64), torch.nan)}, "The mask holds values"),
        ({"control": torch.ones(1, 48, 64, 3)}, "tiny has no ControlNet"),
        ({"image": torch.ones(1, 48, 64, 3), "strength": 0.0}, "A strength of 0.0 draws nothing"),
        ({"max_tokens": 700}, "A prompt has 1 to 608 tokens here, and 700 were asked for"),
        ({"prompt_cache": "cloud"}, "no prompt cache"),
        ({"tiling": "maybe"}, "no tiling"),
    ],
)
def test_requests_that_cannot_be_drawn(load, draw, fields, words):
    if words == "no tiling":
        fields = {**fields, "width": 128}
    with pytest.raises(ValueError, match=words):
        draw(load(), **fields)


def test_a_picture_of_nan_is_no_picture(load, draw, monkeypatch):
    original, made = denoising.denoise, []

    def second_is_broken(*args, **kwargs):
        made.append(1)
        return original(*args, **kwargs) * (float("nan") if len(made) == 2 else 1.0)

    monkeypatch.setattr(denoising, "denoise", second_is_broken)
    model = load()
    found = draw(model, seed=7, pictures=3)
    assert "The picture of seed 8 came out as NaN and is black here: choose dtype float32" in found.report
    assert found.latents.isfinite().all() and not found.pictures[1].any()
    monkeypatch.setattr(denoising, "denoise", original)
    others = draw(model, seed=7, pictures=3).pictures
    assert torch.equal(found.pictures[[0, 2]], others[[0, 2]]), "the others of the batch are drawn"
    monkeypatch.setattr(denoising, "denoise", lambda *args, **kwargs: original(*args, **kwargs) * float("nan"))
    with pytest.raises(ValueError, match=r"The picture of seed 8 came out as NaN: choose dtype float32"):
        draw(model, seed=8)


def test_a_report_is_about_its_own_run(load, draw, monkeypatch):
    """Another run may begin with the same transformer while this one decodes."""
    model = load()
    decode = decoding.decode

    def others_meanwhile(*args, **kwargs):
        model.attention.record.begin()
        return decode(*args, **kwargs)

    monkeypatch.setattr(decoding, "decode", others_meanwhile)
    assert "attention auto: " in draw(model).report


def test_a_negative_without_guidance_is_told(load, draw):
    assert "the negative prompt was not used, because guidance is 0" in draw(load(), negative="blurry").report
    assert "what comes after 8 was not read" in draw(load(), max_tokens=8).report


def test_one_copy_of_a_checkpoint_however_many_ask(load, draw):
    model = load()
    assert load() is model and load(dtype="float32") is not model
    assert MODELS.loaded() and MODELS.get("tiny", LoadOptions()) is model
    draw(model)
    # Gone with its last holder, not when the collector happens to run.
    del model
    assert not [m for m in MODELS.loaded() if m.options == LoadOptions()]


def test_bfloat16_draws_nearly_the_same(load, draw):
    exact, short = draw(load()), draw(load(dtype="bfloat16"))
    assert short.pictures.dtype == torch.float32
    assert (exact.pictures - short.pictures).abs().mean() < 0.02


def test_a_wrong_word_for_an_option(load):
    for options in ({"dtype": "float16"}, {"attention": "magic"}, {"compile": "all"}, {"precision": "int2"}):
        with pytest.raises(ValueError, match=r"is no (dtype|attention|compile|precision)|no attention backend"):
            load(**options)


def test_generate_shows_its_report(load, headless_host):
    drawn = generate(Pipeline(load()), Request("a red fox", width=32, height=32, steps=1), node_id="7")
    assert headless_host.texts == [("7", drawn.report)]
    assert drawn.seconds.keys() == {"prompts", "transformer", "denoise", "decode"}


def test_libraries_that_are_missing_are_named(load, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UnusableCheckpoint, match=r"needs diffusers 0\.39 and transformers 4\.57 or newer.*pip install"):
        load()


def test_a_text_encoder_saved_with_its_head(tiny_folder, folder, draw, load):
    """Published checkpoints name Qwen3Model or Qwen3ForCausalLM; the states are the same."""
    import json
    import shutil

    from transformers import Qwen3ForCausalLM, Qwen3Model

    shutil.copytree(tiny_folder, folder / "head")
    body = Qwen3Model.from_pretrained(tiny_folder / "text_encoder")
    whole = Qwen3ForCausalLM(body.config)
    whole.model.load_state_dict(body.state_dict())
    shutil.rmtree(folder / "head" / "text_encoder")
    whole.save_pretrained(folder / "head" / "text_encoder")
    index = folder / "head" / "model_index.json"
    told = json.loads(index.read_text()) | {"text_encoder": ["transformers", "Qwen3ForCausalLM"]}
    index.write_text(json.dumps(told))
    assert (draw(load("head")).pictures - draw(load()).pictures).abs().max() < 1e-5


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_products_on_a_cpu_are_onednns_where_they_are_faster(load, draw, monkeypatch):
    from hotpath.products import rerouting

    seen: list[torch.Size] = []
    real = rerouting.product
    monkeypatch.setattr(rerouting, "LARGE", 256)
    monkeypatch.setattr(rerouting, "product", lambda *given: (seen.append(given[0].shape), real(*given))[1])
    monkeypatch.setattr(rerouting, "why_not", lambda *_, **__: "oneDNN is no faster on this CPU")
    plain = draw(load())
    assert "by torch itself, because oneDNN is no faster" in plain.report and not seen
    monkeypatch.setattr(rerouting, "why_not", lambda *_, **__: "")
    found = draw(load())
    assert "multiplied by oneDNN" in found.report and seen
    assert (found.pictures - plain.pictures).abs().max() < 1e-4
