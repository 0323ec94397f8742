"""Positions of pictures and clips against the rule of Qwen2-VL's paper, by hand."""

from __future__ import annotations

import pytest
import torch
from hotpath.vision_language.embeddings import VisualItem
from hotpath.vision_language.rotary import given_to, positions

CLIP, PICTURE = VisualItem("video", (2, 4, 6), step=1.0), VisualItem("image", (1, 4, 4))


def row(*runs: tuple[int, int], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    kinds = [0] * padding + [kind for kind, count in runs for _ in range(count)]
    return torch.tensor([kinds]), torch.tensor([[0] * padding + [1] * (len(kinds) - padding)])


@pytest.mark.parametrize(("step", "second"), [(1.0, 7), (0.5, 5), (0.25, 4), (0.2, 3), (1.25, 8)])
def test_words_follow_the_last_frame(step, second):
    kinds, mask = row((0, 3), (2, 12), (0, 2), padding=1)
    made = positions(kinds, mask, [VisualItem("video", (2, 4, 6), step=step)], 2, 4.0)[:, 0]
    time = [0, 0, 1, 2, *[3] * 6, *[second] * 6]
    behind = max(second, 5) + 1
    assert made[0].tolist() == [*time, behind, behind + 1]
    assert made[1].tolist() == [0, 0, 1, 2, *[3, 3, 3, 4, 4, 4] * 2, behind, behind + 1]
    assert made[2].tolist() == [0, 0, 1, 2, *[3, 4, 5] * 4, behind, behind + 1]


def test_pictures_have_no_time_and_rows_have_their_own():
    together = row((0, 1), (1, 4), (0, 1), (2, 12), (0, 1)), row((0, 2), (1, 4), (0, 1), padding=12)
    kinds, mask = (torch.cat(parts) for parts in zip(*together, strict=True))
    both = positions(kinds, mask, [PICTURE, CLIP, PICTURE], 2, 2.0)
    assert both[0, 0].tolist() == [0, 1, 1, 1, 1, 3, *[4] * 6, *[6] * 6, 7]
    assert both[0, 1].tolist() == [*[0] * 12, 0, 1, 2, 2, 2, 2, 4]
    for place, (items, (k, m)) in enumerate(zip(([PICTURE, CLIP], [PICTURE]), together, strict=True)):
        assert torch.equal(both[:, place : place + 1], positions(k, m, items, 2, 2.0))
    # Qwen2-VL knows no seconds: each grid of a clip is one.
    kinds, mask = row((2, 12), (0, 1))
    assert positions(kinds, mask, [VisualItem("video", (2, 4, 6), step=9.0)], 2, None)[0, 0].tolist() == [
        *[0] * 6,
        *[1] * 6,
        3,
    ]


def test_the_library_is_given_them_for_one_call():
    class Inner:
        def get_rope_index(self, input_ids):
            return None

    inner, axes = Inner(), torch.arange(12).view(3, 1, 4)
    with given_to(inner, axes):
        given, behind = inner.get_rope_index(torch.zeros(2, 4, dtype=torch.long))
        assert given.shape == (3, 2, 4) and behind.tolist() == [[8], [8]]
    assert inner.get_rope_index(None) is None
