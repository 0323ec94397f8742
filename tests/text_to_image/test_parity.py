"""Our loop draws what diffusers' pipelines draw; what we leave out changes nothing."""

from __future__ import annotations

import pytest
import torch
from hotpath.demo.z_image_model import write_checkpoint
from hotpath.text_to_image import stream_attention
from hotpath.text_to_image.denoising import Guidance, shift
from hotpath.text_to_image.loading import without_last_layer
from hotpath.text_to_image.prompts import PromptCache, encode, tokenize
from safetensors.torch import load_file

TOLERANCE = 1e-5  # float32 on the CPU; measured 3e-6
LONG = "a very long negative prompt that has far more tokens than the prompt itself has, so that lengths differ " * 2

CASES = {
    "plain": ({}, {"guidance_scale": 0.0}),
    "guidance": (
        {"guidance": Guidance(3.0), "negative": "blurry"},
        {"guidance_scale": 3.0, "negative_prompt": "blurry"},
    ),
    "guidance of one is not off": ({"guidance": Guidance(1.0)}, {"guidance_scale": 1.0}),
    "lengths differ": ({"guidance": Guidance(2.0), "negative": LONG}, {"guidance_scale": 2.0, "negative_prompt": LONG}),
    "normalization": (
        {"guidance": Guidance(6.0, normalization=0.8), "negative": "blurry"},
        {"guidance_scale": 6.0, "cfg_normalization": 0.8, "negative_prompt": "blurry"},
    ),
    "truncation": (
        {"guidance": Guidance(4.0, truncation=0.2), "negative": "blurry", "steps": 4},
        {"guidance_scale": 4.0, "cfg_truncation": 0.2, "negative_prompt": "blurry", "num_inference_steps": 4},
    ),
    "an empty prompt": ({"prompt": ""}, {"prompt": "", "guidance_scale": 0.0}),
    "tall": ({"height": 128, "width": 32}, {"guidance_scale": 0.0, "height": 128, "width": 32}),
    "tokens that need padding": ({"height": 80, "width": 48}, {"guidance_scale": 0.0, "height": 80, "width": 48}),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_diffusers(load, draw, library, case):
    ours, theirs = CASES[case]
    usual = {"prompt": "a red fox", "width": 64, "height": 48, "num_inference_steps": 2}
    wanted = library(seeds=(7,), **{**usual, **theirs})
    found = draw(load(), seed=7, **ours)
    assert found.pictures.shape == wanted.shape and wanted.std() > 0.05
    assert (found.pictures - wanted).abs().max() <= TOLERANCE


def test_truncation_leaves_out_what_comes_late(load, draw):
    """The parity above must not hold because both never truncate."""
    whole = draw(load(), steps=4, guidance=Guidance(4.0), negative="blurry")
    cut = draw(load(), steps=4, guidance=Guidance(4.0, truncation=0.2), negative="blurry")
    none = draw(load(), steps=4)
    assert (whole.pictures - cut.pictures).abs().max() > 1e-3 < (none.pictures - cut.pictures).abs().max()


def test_a_batch_is_diffusers_with_a_generator_each(load, draw, library):
    wanted = library(
        prompt=["a red fox"] * 3, seeds=(5, 6, 7), width=64, height=48, num_inference_steps=2, guidance_scale=0.0
    )
    assert (draw(load(), seed=5, pictures=3).pictures - wanted).abs().max() <= TOLERANCE


def test_drawing_over_an_image(load, draw, library):
    image = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    wanted = library(
        "ZImageImg2ImgPipeline", seeds=(4,), prompt="a red fox", image=image.permute(0, 3, 1, 2), strength=0.5,
        width=64, height=48, num_inference_steps=4, guidance_scale=0.0,
    )  # fmt: skip
    found = draw(load(), image=image, strength=0.5, steps=4, seed=4)
    assert (found.pictures - wanted).abs().max() <= TOLERANCE
    assert "image " in found.report and "2 steps" in found.report


def test_drawing_in_a_mask(load, draw, library):
    image = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 48, 64)
    mask[:, 16:, 24:] = 1.0
    wanted = library(
        "ZImageInpaintPipeline", seeds=(4,), prompt="a red fox", image=image.permute(0, 3, 1, 2),
        mask_image=mask[:, None], strength=1.0, width=64, height=48, num_inference_steps=3, guidance_scale=0.0,
    )  # fmt: skip
    found = draw(load(), image=image, mask=mask, strength=1.0, steps=3, seed=4)
    assert (found.pictures - wanted).abs().max() <= TOLERANCE
    kept, drawn = found.latents[:, :, :2], found.latents[:, :, 2:]
    # A mask for each of two pictures.
    both = draw(load(), image=image, mask=torch.cat([1 - mask, mask]), strength=1.0, steps=3, seed=3, pictures=2)
    assert torch.equal(both.latents[1:], found.latents)
    over = draw(load(), image=image, mask=mask, prompt="something else", strength=1.0, steps=3, seed=4)
    assert torch.equal(over.latents[:, :, :2], kept) and not torch.equal(over.latents[:, :, 2:], drawn)


@pytest.mark.parametrize(("compile", "channels"), [("none", 4), pytest.param("regional", 9, marks=pytest.mark.long)])
def test_drawing_after_a_control_image(load, draw, folder, graphs, channels, compile):
    from diffusers import ZImageControlNetModel, ZImageControlNetPipeline, ZImagePipeline

    path = write_checkpoint(folder / "control", control=channels)
    parts = ZImagePipeline.from_pretrained(path).components
    own = ZImageControlNetModel(**{k: v for k, v in ZImageControlNetModel.load_config(path / "controlnet").items()
                                   if not k.startswith("_")})  # fmt: skip
    own.load_state_dict(load_file(path / "controlnet" / "diffusion_pytorch_model.safetensors"), strict=False)
    pipeline = ZImageControlNetPipeline(controlnet=own.eval(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    control = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    wanted = pipeline(
        "a red fox", control_image=control.permute(0, 3, 1, 2) * 2 - 1, controlnet_conditioning_scale=0.8, width=64,
        height=48, num_inference_steps=2, guidance_scale=2.0, negative_prompt="blurry", output_type="np",
        generator=torch.Generator().manual_seed(4),
    ).images  # fmt: skip
    model = load("control", compile=compile)
    drawing = {"negative": "blurry", "guidance": Guidance(2.0), "seed": 4}
    found = draw(model, control=control, control_strength=0.8, **drawing)
    assert (found.pictures - torch.from_numpy(wanted)).abs().max() <= TOLERANCE
    plain = draw(model, **drawing).pictures
    assert (found.pictures - plain).abs().max() > 0.01
    assert (plain - draw(load(), **drawing).pictures).abs().max() <= TOLERANCE
    calls = []
    handle = model.transformer.managed.module.network.controlnet.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(draw(model, control=control, control_strength=0.0, **drawing).pictures, plain) and not calls
    handle.remove()
    holder = model.transformer.managed.module
    assert not [name for name in holder.state_dict() if "controlnet.noise_refiner" in name]  # counted once
    model.release()
    assert torch.equal(draw(model, control=control, control_strength=0.8, **drawing).pictures, found.pictures)


@pytest.mark.parametrize("side", ["right", "left"])
def test_no_padding_changes_no_state(load, folder, side):
    """diffusers pads to 512 and cuts again; with either padding side the states are those of the prompt alone."""
    from diffusers import ZImagePipeline

    write_checkpoint(folder / side, padding_side=side)
    model = load(side)
    pipeline = ZImagePipeline.from_pretrained(folder / side, transformer=None, vae=None)
    texts = ["a red fox", "", LONG * 20]
    wanted, _ = pipeline.encode_prompt(list(texts), device=torch.device("cpu"), do_classifier_free_guidance=False)
    found, made = encode(model, texts, PromptCache("off"))
    assert made == 3
    for text, states in zip(texts, wanted, strict=True):
        assert found[text].states.shape == states.shape
        assert (found[text].states - states).abs().max() <= 1e-5 * states.abs().max()
    assert found[LONG * 20].cut and found[LONG * 20].tokens > 512 and not found["a red fox"].cut


def test_the_left_out_layer_is_not_missed(tiny_folder):
    from transformers import Qwen3Model

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        whole = Qwen3Model.from_pretrained(tiny_folder / "text_encoder")
        layers = len(whole.layers)
        wanted = whole(ids, output_hidden_states=True).hidden_states[-2]
        short = without_last_layer(whole)
        assert torch.equal(short(ids).last_hidden_state, wanted) and len(short.layers) == layers - 1


def test_prompts_are_written_as_a_chat(load):
    ids = tokenize(load(), "a red fox")
    assert load().tokenizer.decode(ids) == "<|im_start|>user\na red fox<|im_end|>\n<|im_start|>assistant\n"


def test_the_schedule_leans_as_diffusers_says():
    from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

    for tokens in (64, 1024, 4096, 9216):
        assert shift(tokens, {}) == pytest.approx(calculate_shift(tokens), abs=1e-12)


def test_rotation_in_real_numbers():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1)) * 6
    turn = torch.polar(torch.ones_like(angles), angles)
    wanted = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn.unsqueeze(2)).flatten(3)
    assert (stream_attention.rotate(x, torch.view_as_real(turn)) - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["sdpa_math", "flash2"])
def test_attention_is_set_for_the_modules_and_nothing_else(load, draw, backend):
    """diffusers' own switch changes a process-wide default; ours does not, and says what ran instead of what cannot."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry.get_active_backend()
    wanted = draw(load())
    found = draw(load(attention=backend))
    assert registry.get_active_backend() == before
    assert (found.pictures - wanted.pictures).abs().max() <= TOLERANCE
    assert f"attention {backend}" in found.report
    if backend == "flash2":
        assert "flash2:" in found.report  # the reason why it does not run here
