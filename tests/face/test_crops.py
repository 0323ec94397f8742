"""Crops: cut, scaled, and pasted back without a seam."""

from __future__ import annotations

import pytest
import torch
from hotpath import face
from hotpath.face import FaceError, Faces, alignment
from hotpath.face.crops import crop_places, cut, paste
from made_faces import one_face

pytestmark = pytest.mark.xdist_group("face_nodes")


def test_a_picture_that_passes_through_is_averaged():
    stripes = torch.zeros(1, 64, 64, 3)
    stripes[:, :, ::4] = 1.0
    crops, _ = face.cut_faces(stripes, [Faces.none((64, 64), 640)], 16, 0.3, True, "pass through")
    assert torch.allclose(crops[0, :, 2:-2], torch.tensor(0.25), atol=0.05)


def test_an_upright_crop_has_the_pixels_of_its_box():
    picture = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(5))
    faces = one_face([32.0, 48.0, 96.0, 112.0])
    own = picture[0, 48:112, 32:96]
    assert torch.allclose(cut(picture, crop_places(faces, 64, 0.0, True))[0], own, atol=1e-5)
    halved = own.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert torch.allclose(cut(picture, crop_places(faces, 32, 0.0, True))[0], halved, atol=1e-5)


def test_crops_of_another_number_are_refused_and_those_beside_the_picture_change_nothing():
    picture = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(6))
    for box in ([300.0, 100.0, 340.0, 140.0], [100.0, -90.0, 140.0, -50.0]):
        places = crop_places(one_face(box), 32, 0.0, upright=True)
        back, where = paste(picture, torch.ones(1, 32, 32, 3), places, 0.1)
        assert torch.equal(back, picture) and where.max() == 0
        with pytest.raises(FaceError, match="2 crops cannot be pasted into 1 places"):
            paste(picture, torch.ones(2, 32, 32, 3), places, 0.1)


def test_a_crop_that_shrinks_its_face_is_averaged(three):
    stripes = torch.zeros(1, 256, 256, 3)
    stripes[:, :, ::2] = 1.0
    box = torch.tensor([[0.0, 0, 256, 256]])
    faces = [Faces(box, torch.rand(1, 5, 2), torch.ones(1), None, (256, 256), 640)]
    crop = cut(stripes, crop_places(faces, 32, 0.0, upright=True))
    assert (crop[:, 2:-2, 2:-2] - 0.5).abs().max() < 0.01


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("feather", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("box", [[60.3, 70.6, 133.1, 140.2], [-30.0, -20.5, 50.2, 60.0], [200.0, 210.0, 290.0, 280.0]])
def test_pasting_leaves_no_seam(upright, feather, box):
    """Neither around the crop, hard border or soft, nor where it reaches over the picture's."""
    white = torch.ones(1, 256, 256, 3)
    places = crop_places(one_face(box), 96, 0.4, upright)
    back, where = paste(white, cut(white, places), places, feather)
    assert (back - white).abs().max() < 1e-5 and where.max() > 0.99


def scaled(picture, height, width):
    return torch.nn.functional.interpolate(picture.movedim(-1, 1), size=(height, width), mode="area").movedim(1, -1)


@pytest.mark.parametrize("align", [True, False])
def test_places_follow_pictures_that_were_scaled(align):
    """After their faces were found, and again after the crops were cut; sides are rounded to whole pixels."""
    picture = torch.zeros(1, 150, 101, 3)
    picture[:, 60:90, 40:70, 0] = 1
    faces = one_face([40.0, 60.0, 70.0, 90.0], (150, 101))
    crops, places = face.cut_faces(picture, faces, 64, 0.5, not align, "error")
    for height, width in ((300, 202), (449, 303), (75, 50)):
        large = scaled(picture, height, width)
        again, found_again = face.cut_faces(large, faces, 64, 0.5, not align, "error")
        assert (again - crops).abs().mean() < 0.02
        for where_from in (places, found_again):
            green = torch.zeros_like(crops)
            green[..., 1] = crops[..., 0]
            pasted, where = paste(large, green, where_from, 0.2)
            inside = large[..., 0] > 0.5
            assert pasted[..., 1][inside].mean() > 0.8 and pasted[..., 1][~inside].mean() < 0.01
            assert where[inside].min() > 0.9
    for shape in ((150, 150), (300, 101), (150, 104)):
        other = torch.zeros(1, *shape, 3)
        words = rf"found in a picture of 101 x 150, and this one of {shape[1]} x {shape[0]} has another shape"
        with pytest.raises(FaceError, match=words):
            face.cut_faces(other, faces, 64, 0.5, not align, "error")
        with pytest.raises(FaceError, match=words):
            paste(other, crops, places, 0.2)


def test_crops_copy_one_picture_at_a_time_of_a_batch_that_lies_channel_by_channel(monkeypatch):
    """As a VAE leaves it: brought in order as a whole for every strip of every crop, time grows with the square."""
    batch = torch.rand(6, 3, 40, 48, generator=torch.Generator().manual_seed(3)).movedim(1, -1)
    faces = one_face([10.0, 12.0, 30.0, 32.0], (40, 48)) * 6
    wanted, _ = face.cut_faces(batch.contiguous(), faces, 64, 0.3, False, "error")
    seen = []
    strip = alignment._strip
    monkeypatch.setattr(alignment, "_strip", lambda pixels, *a: (seen.append(pixels), strip(pixels, *a))[1])
    assert torch.equal(face.cut_faces(batch, faces, 64, 0.3, False, "error")[0], wanted)
    assert len(seen) >= 6 and all(len(p) == 1 and p.is_contiguous() for p in seen)


def test_masks_of_crops_are_one_or_as_many_as_the_crops():
    pictures = torch.zeros(3, 64, 64, 3)
    crops, places = face.cut_faces(pictures, one_face([10.0, 12.0, 40.0, 44.0], (64, 64)) * 3, 32, 0.3, True, "error")
    half = torch.zeros(16, 16)
    half[:, :8] = 1
    one, alike = paste(pictures, crops + 1, places, 0.1, half[None]), paste(pictures, crops + 1, places, 0.1, half)
    assert all(torch.equal(a, b) for a, b in zip(one, alike, strict=True)) and 0.9 < one[1].amax() <= 1
    assert one[0][:, 28, 15].min() > 0.9 and one[0][:, 28, 35].max() == 0 == one[1][:, 28, 35].max()
    each = torch.stack([half, 1 - half, half * 0])
    assert (paste(pictures, crops + 1, places, 0.1, each)[1][:, 28, 15] > 0.9).tolist() == [True, False, False]
    for masks in (half.expand(2, 16, 16), half[None, None]):
        with pytest.raises(FaceError, match=rf"the shape \[{', '.join(map(str, masks.shape))}\] for 3 crops"):
            paste(pictures, crops, places, 0.1, masks)


def test_a_crop_finer_than_its_picture_is_averaged_when_it_is_pasted():
    picture = torch.full((1, 256, 256, 3), 0.5)
    places = crop_places(one_face([96.0, 96.0, 160.0, 160.0]), 512, 0.0, upright=True)
    checks = ((torch.arange(512)[:, None] + torch.arange(512)[None]) % 2).float()[None, :, :, None].expand(1, -1, -1, 3)
    back, _ = paste(picture, checks, places, 0.1)
    assert (back - 0.5).abs().max() < 0.02
    noise = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    back, _ = paste(picture, noise, places, 0.1)
    assert back[0, 110:146, 110:146].std() < 0.08  # a pixel is the mean of 64; one alone would have 0.29


def test_crops_with_other_channels_than_the_picture():
    coloured = torch.rand(1, 256, 256, 4, generator=torch.Generator().manual_seed(1))
    places = crop_places(one_face([96.0, 96.0, 160.0, 160.0]), 64, 0.0, upright=True)
    red = torch.zeros(1, 64, 64, 3)
    red[..., 0] = 1.0
    back, _ = paste(coloured, red, places, 0.1)
    assert torch.allclose(back[0, 128, 128, :3], red[0, 0, 0], atol=1e-5)
    assert torch.equal(back[..., 3], coloured[..., 3]), "transparency stays"
    grey, _ = paste(coloured[..., :1], red, places, 0.1)
    assert abs(float(grey[0, 128, 128, 0]) - 1 / 3) < 1e-5
    for given in (1, 4):
        for channels in (1, 3):
            back, _ = paste(coloured[..., :channels], torch.full((1, 64, 64, given), 0.25), places, 0.1)
            assert torch.allclose(back[0, 128, 128], torch.full((channels,), 0.25), atol=1e-5)
    back, _ = paste(coloured, torch.full((1, 64, 64, 4), 0.25), places, 0.1)
    assert torch.allclose(back[0, 128, 128], torch.full((4,), 0.25), atol=1e-5)
    with pytest.raises(FaceError, match="came back as 80 x 64; crops are square"):
        paste(coloured, torch.zeros(1, 64, 80, 3), places, 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_pictures_of_other_dtypes(dtype):
    """As some packs give them; numpy's own floats are double."""
    whole = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    odd = (whole * 255).to(dtype) if dtype == torch.uint8 else whole.to(dtype)
    faces = [*one_face([10.0, 12.0, 40.0, 44.0], (64, 64)), Faces.none((64, 64), 640)]
    crops, places = face.cut_faces(odd, faces, 32, 0.3, True, "pass through")
    wanted, _ = face.cut_faces(whole, faces, 32, 0.3, True, "pass through")
    assert crops.dtype == torch.float32 and torch.allclose(crops, wanted, atol=0.01)
    pasted, where = paste(odd, 1 - crops, places, 0.2)
    assert pasted.dtype == where.dtype == torch.float32
    assert torch.allclose(pasted, paste(whole, 1 - wanted, places, 0.2)[0], atol=0.02)
    assert torch.allclose(face.mark_faces(odd[0], faces[0]), face.mark_faces(whole[0], faces[0]), atol=0.02)


def test_large_crops_are_computed_in_strips_with_equal_results(monkeypatch):
    """A crop of 512 pixels around a face eight times as large has 4096 x 4096 samples."""
    picture = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(2))
    places = crop_places(one_face([20.0, 30.0, 220.0, 230.0]), 64, 0.2, upright=False)
    whole = cut(picture, places)
    pasted = paste(picture, whole, places, 0.3)
    asked: list[int] = []
    strip = alignment._strip
    monkeypatch.setattr(alignment, "_strip", lambda *a: (asked.append(len(a[3]) * a[4]), strip(*a))[1])
    monkeypatch.setattr(alignment, "SAMPLES_AT_ONCE", 2000)
    assert torch.equal(cut(picture, places), whole)
    assert all(torch.equal(a, b) for a, b in zip(paste(picture, whole, places, 0.3), pasted, strict=True))
    assert len(asked) > 10 and max(asked) <= 2000
