"""Seeds, caches, previews, tiles, interrupts, memory: what a person relies on when pictures are drawn."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hotpath import host
from hotpath.text_to_image import decoding, denoising, generation, previews
from hotpath.text_to_image.denoising import Guidance
from hotpath.text_to_image.folders import UnusableCheckpoint
from hotpath.text_to_image.generation import Pipeline, Request, generate
from hotpath.text_to_image.loading import MODELS, LoadOptions


def count_calls(monkeypatch, owner, name):
    calls = []
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


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


@pytest.mark.parametrize("needed", [1, 1 << 60])
def test_tiles_only_without_room(load, draw, monkeypatch, needed):
    model = load()
    size = {"width": 128, "height": 96}  # tiles of this VAE are 64 pixels
    whole = draw(model, **size, tiling="never")
    monkeypatch.setattr(decoding, "activation_bytes", lambda *a: needed)
    found = draw(model, **size)
    if needed == 1:
        assert "decoded whole: about 0 MiB" in found.report and torch.equal(found.pictures, whole.pictures)
    else:
        assert "decoded in tiles: about" in found.report
        assert torch.equal(found.pictures, draw(model, **size, tiling="always").pictures)
        assert not torch.equal(found.pictures, whole.pictures) and torch.equal(found.latents, whole.latents)
    # The VAE of everybody else is as it was.
    assert not model.vae.managed.module.network.use_tiling
    assert "whole: the picture is no larger than a tile of 64 pixels" in draw(model, tiling="always").report


def full_device(monkeypatch, layer, side):
    """`layer` as on a device that has room for `side` pixels or latents; returns what it held when it ran out."""
    forward, held = layer.forward, []

    def limited(x, *args, **kwargs):
        if max(x.shape[-2:]) > side:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise RuntimeError("MPS backend out of memory (MPS allocated: 5.60 GB)")  # no OutOfMemoryError on Macs
        assert not any(activations() is not None for activations in held), "the failed try still holds its memory"
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", limited)
    return held


def test_tiles_when_the_whole_runs_out_of_memory(load, draw, monkeypatch):
    model = load()
    wanted = draw(model, width=128, height=96, tiling="always").pictures
    network = model.vae.managed.module.network
    held = full_device(monkeypatch, network.decoder, 8)
    found = draw(model, width=128, height=96)
    assert "decoded in tiles: whole it ran out of memory" in found.report and torch.equal(found.pictures, wanted)
    assert len(held) == 1 and not network.use_tiling
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, width=128, height=96, tiling="never")


def test_an_image_is_read_in_tiles_when_it_must_be(load, draw, monkeypatch):
    model, image = load(), torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(3))
    over = {"image": image, "strength": 0.5, "width": 128, "height": 96}
    whole = draw(model, **over, tiling="never").latents
    wanted = draw(model, **over, tiling="always").latents
    network = model.vae.managed.module.network
    held = full_device(monkeypatch, network.encoder, 64)
    assert torch.equal(draw(model, **over).latents, wanted) and not torch.equal(wanted, whole)
    assert len(held) == 1 and not network.use_tiling
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, **over, tiling="never")


def test_one_image_for_many_pictures_is_read_once(load, draw, monkeypatch):
    model, image = load(), torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    over = {"image": image, "strength": 0.5}
    singles = [draw(model, **over, seed=5 + i).pictures for i in range(3)]
    calls = count_calls(monkeypatch, model.vae.managed.module.network.encoder, "forward")
    assert torch.equal(draw(model, **over, seed=5, pictures=3).pictures, torch.cat(singles))
    assert len(calls) == 1


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


def test_room_is_made_before_tiles(load, monkeypatch):
    model = load()
    free = [100]
    monkeypatch.setattr(host.current(), "free_memory", lambda device: free[0])
    monkeypatch.setattr(host.current(), "make_room", lambda nbytes, device: free.__setitem__(0, 300))
    monkeypatch.setattr(decoding, "activation_bytes", lambda *a: 200)
    plan = decoding.plan(model, "auto", 2048, 2048, 512)
    assert not plan.tiled and free == [300]


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
        ({"prompt": " \n"}, "The prompt is empty"),
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


def test_an_image_of_another_shape_is_covered_and_cut(load, draw):
    image = torch.zeros(1, 100, 300, 3)
    image[:, :, 140:160] = 1.0
    fitted = decoding.fit_pictures(image, 64, 48)
    assert fitted.shape == (1, 48, 64, 3)
    assert fitted[0, 24, 32].min() > 0.9 and fitted[0, 24, 0].max() < 0.1
    assert draw(load(), image=image).pictures.shape == (1, 48, 64, 3)


def test_a_strip_is_not_blown_up_to_be_thrown_away(monkeypatch):
    strip = torch.linspace(0, 1, 3001).view(1, 3001, 1, 1).expand(-1, -1, 1, 3)
    sizes = count_calls(monkeypatch, F, "interpolate")
    fitted = decoding.fit_pictures(strip, 64, 48)
    assert sizes[0][0].shape[-2] < 20 and fitted.shape == (1, 48, 64, 3)
    assert (fitted - 0.5).abs().max() < 1e-3


@pytest.mark.parametrize(("size", "kept"), [((40, 333), (48, 64)), ((333, 40), (64, 48)), ((901, 100), (32, 32))])
def test_cutting_before_scaling_changes_nothing(size, kept):
    picture = torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(1))
    picture = F.avg_pool2d(picture.permute(0, 3, 1, 2), 9, 1, 4).permute(0, 2, 3, 1)  # as smooth as pictures are
    scale = max(kept[0] / size[0], kept[1] / size[1])
    whole = [max(side, round(old * scale)) for side, old in zip(kept, size, strict=True)]
    wanted = F.interpolate(picture.permute(0, 3, 1, 2), size=whole, mode="bicubic", antialias=True)
    top, left = (whole[0] - kept[0]) // 2, (whole[1] - kept[1]) // 2
    wanted = wanted[:, :, top : top + kept[0], left : left + kept[1]].permute(0, 2, 3, 1)
    assert (decoding.fit_pictures(picture, kept[1], kept[0]) - wanted).abs().max() < 0.03


def test_alpha_is_left_out(load, draw):
    image = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    with_alpha = torch.cat([image, torch.zeros(1, 48, 64, 1)], dim=-1)
    wanted = draw(load(), image=image, strength=0.5).pictures
    assert torch.equal(draw(load(), image=with_alpha, strength=0.5).pictures, wanted)


def test_a_mask_of_another_size_lies_on_the_image(load, draw):
    """The image is wider than the picture: its left and right, and those of the mask, are cut off."""
    image = torch.rand(1, 48, 128, 3, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 48, 128)
    mask[:, :, 80:] = 1.0
    wanted = draw(load(), image=image, mask=mask, strength=1.0)
    for other in (mask[:, ::2, ::2], mask[0, :, ::4], mask[:, ::6, ::2].bool()):
        assert torch.equal(draw(load(), image=image, mask=other, strength=1.0).latents, wanted.latents)


def test_an_empty_mask_is_told(load, draw):
    """What Load Image gives for a picture without alpha."""
    image, mask = torch.rand(2, 48, 64, 3), torch.zeros(2, 64, 64)
    assert "a mask is empty, so its image stays" in draw(load(), image=image, mask=mask, pictures=2).report
    mask[0] = 1.0
    assert "a mask is empty" in draw(load(), image=image, mask=mask, pictures=2).report
    mask[1, 30:] = 1.0
    assert "a mask is empty" not in draw(load(), image=image, mask=mask, pictures=2).report


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


def test_a_full_device_is_a_sentence(load, draw, monkeypatch):
    model = load()
    said = rf"{model.device} ran out of memory at 64 x 48 \(denoise\): choose one picture at a time, a smaller"
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")):

        def full(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(denoising, "denoise", full)
        with pytest.raises(torch.OutOfMemoryError, match=said):
            draw(model, pictures_at_a_time=2)


@pytest.mark.parametrize("row", [0, 1, 6])
def test_a_mask_thinner_than_a_latent_pixel_is_drawn_in(load, draw, row):
    model = load()
    image, mask = torch.full((1, 48, 64, 3), 0.5), torch.zeros(48, 64)
    mask[16 + row] = 1.0
    run = generation.Run(Pipeline(model), Request("x", width=64, height=48, image=image, mask=mask), None)
    where = run._source([denoising.generator(0)])[1]
    assert where.shape[-2:] == (48 // model.latent_scale, 64 // model.latent_scale)
    assert where.any(dim=-1).flatten().nonzero().flatten().tolist() == [(16 + row) // model.latent_scale]


def test_outside_a_mask_the_image_can_be_kept(load, draw):
    image, mask = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 48, 64)
    mask[0, 10:30, 20:40] = mask[1, :, :8] = 1.0
    model = load()
    plain = draw(model, image=image, mask=mask, pictures=2).pictures
    kept = draw(model, image=image, mask=mask, pictures=2, keep_outside=True).pictures
    outside = (mask == 0)[..., None].expand_as(plain)
    assert not torch.equal(plain[outside], image.expand_as(plain)[outside]), "what the VAE gives is another picture"
    assert torch.equal(kept[outside], image.expand_as(plain)[outside])
    assert torch.equal(kept[~outside], plain[~outside])


def test_room_is_asked_for_what_is_drawn(load, draw, monkeypatch):
    model = load()
    asked = count_calls(monkeypatch, model.transformer, "resident")
    draw(model)
    draw(model, pictures_at_a_time=64)
    draw(model, pictures=3, pictures_at_a_time=64)
    draw(model, guidance=Guidance(1.0), negative="blurry " * 40)
    (one,), (same,), (three,), (long,) = asked
    assert one == same and three == 3 * one and long > one


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
    with pytest.raises(UnusableCheckpoint, match=r"needs diffusers 0\.36 and transformers 4\.57 or newer.*pip install"):
        load()


def test_the_program_stays_near_the_device():
    """A GPU that is many steps behind would hear an interrupt when all is queued."""
    from hotpath.text_to_image.interruption import LEAD, Lead

    made, passed = [], []

    def mark():
        number = len(made)
        made.append(number)
        return SimpleNamespace(synchronize=lambda: passed.append(number))

    lead = Lead(mark)
    for _ in range(LEAD + 5):
        lead.step()
        assert len(made) - len(passed) <= LEAD
    assert passed == [0, 1, 2, 3, 4]


def test_a_second_gpu_is_the_current_one_while_it_computes(load, monkeypatch):
    """Else kernels without a tensor's device, and the marks that are waited for, would be the first one's."""
    from hotpath.text_to_image import interruption

    marks, entered = [], []
    event = SimpleNamespace(record=lambda stream: marks.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert interruption.recorded_event(torch.device("cuda", 1)) is event and marks == ["stream of cuda:1"]
    model = load()
    monkeypatch.setattr(model.vae.managed, "device", torch.device("cuda", 1))
    monkeypatch.setattr(model.vae.managed.module, "to", lambda device: None)
    monkeypatch.setattr(host.current(), "free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    with model.vae.resident():
        assert entered == [torch.device("cuda", 1)]


class Device:
    """A host's handle of a network that is on a device with little room, or waits beside it."""

    def __init__(self, nbytes):
        self.device, self.nbytes, self.released = torch.device("cuda"), nbytes, 0
        self.module = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=nbytes, device=torch.device("cpu"))])

    def release(self):
        self.released += 1


@pytest.mark.parametrize(("free", "sent_away"), [(1000, 0), (120, 0), (119, 1)])
def test_a_network_without_room_sends_its_neighbours_away(headless_host, monkeypatch, caplog, free, sent_away):
    from hotpath.text_to_image import loading
    from hotpath.text_to_image.loading import Component

    monkeypatch.setattr(headless_host, "free_memory", lambda device: free)

    class Owner:
        def load(self):
            raise AssertionError("nothing is read here")

        def all(self):
            return components

    owner = Owner()
    components = [Component(name, owner.load, owner.all) for name in ("a", "b", "never read")]
    components[0]._managed, components[1]._managed = Device(100), Device(50)
    monkeypatch.setattr(loading, "memory_of", lambda device: 119)
    with caplog.at_level("WARNING", logger="hotpath.text_to_image"):
        components[0]._make_room(20)
    assert "and cuda has 0.0 GB in all: choose a smaller size, precision float8" in caplog.text
    assert (components[0]._managed.released, components[1]._managed.released) == (0, sent_away)
    assert not components[2].loaded


def test_nobody_sends_away_what_another_computes_with(load):
    model = load()
    order = []
    with model.transformer.resident():
        thread = threading.Thread(target=lambda: (model.release(), order.append("released")))
        thread.start()
        thread.join(0.2)
        order.append("computed")
    thread.join()
    assert order == ["computed", "released"]


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
