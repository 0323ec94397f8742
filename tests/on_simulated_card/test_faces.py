"""Faces on the card: the host waits once for what was found and once for the vectors, and they are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hotpath import face

MODELS = Path(__file__).resolve().parents[2] / "demo" / "models" / "insightface"
OPTIONS = face.DetectionOptions(sizes=(320,))


def test_a_batch_is_two_waits_and_the_cpus_result(card: Any) -> None:
    import skimage.data

    photo = torch.from_numpy(skimage.data.astronaut()).float() / 255
    pictures = torch.stack([photo.roll(8 * i, 1) for i in range(3)])
    here, there = (
        face.load_analyser([MODELS], engine="torch", device=torch.device(device), remember=False)
        for device in ("cpu", "cuda")
    )
    largest = face.FaceChoice.largest()
    expected = here.analyse(pictures, choose=largest, options=OPTIONS)
    there.analyse(pictures, choose=largest, options=OPTIONS)
    card.waits.clear()
    card.launches.clear()
    found = there.analyse(pictures, choose=largest, options=OPTIONS)
    assert card.waits == ["copy to the host"] * 2
    assert card.launches["aten::convolution"] < 100  # of one batch, not of every picture
    for one, other in zip(found, expected, strict=True):
        assert len(one) == 1 and torch.allclose(one.boxes, other.boxes, atol=1e-2)
        assert torch.cosine_similarity(one.embeddings, other.embeddings).min() > 0.99999
