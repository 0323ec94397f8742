"""Pictures drawn from images: how an image is fitted, and what a mask keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counted_calls import count_calls
from hotpath.text_to_image import decoding, denoising, generation
from hotpath.text_to_image.generation import Pipeline, Request


def test_one_image_for_many_pictures_is_read_once(load, draw, monkeypatch):
    model, image = load(), torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    over = {"image": image, "strength": 0.5}
    singles = [draw(model, **over, seed=5 + i).pictures for i in range(3)]
    calls = count_calls(monkeypatch, model.vae.managed.module.network.encoder, "forward")
    assert torch.equal(draw(model, **over, seed=5, pictures=3).pictures, torch.cat(singles))
    assert len(calls) == 1


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


@pytest.mark.parametrize("row", [0, 1, 6])
def test_a_mask_thinner_than_a_latent_pixel_is_drawn_in(load, draw, row):
    model = load()
    image, mask = torch.full((1, 48, 64, 3), 0.5), torch.zeros(48, 64)
    mask[16 + row] = 1.0
    run = generation.Run(Pipeline(model), Request("x", width=64, height=48, image=image, mask=mask), None)
    where = run._image([denoising.generator(0)])[1]
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
