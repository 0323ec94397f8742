"""What lets blocks share a graph although they look different."""

from __future__ import annotations

import pytest
import torch
from hotpath.patches.compilation.blocks import constants_of
from hotpath.patches.compilation.graphs import usual_order

pytestmark = pytest.mark.comfy


def test_classes_that_a_function_makes_are_one_kind() -> None:
    """As Stable Cascade's norms, which are of a class of their own in each block."""
    from comfy.ldm.cascade.common import LayerNorm2d_op

    first, second = (LayerNorm2d_op(torch.nn)(8) for _ in range(2))
    assert type(first) is not type(second) and constants_of(first) == constants_of(second)
    type(second).forward = lambda self, x: x
    assert constants_of(first) != constants_of(second)


def test_a_class_may_name_what_is_not_set_yet() -> None:
    def made(sets: bool) -> type[torch.nn.Module]:
        class Block(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return later(x)

        if sets:
            later = torch.relu
        return Block

    unset, again, whole = (constants_of(made(sets)()) for sets in (False, False, True))
    assert unset == again != whole


def test_tokens_that_are_a_turned_picture_are_put_in_order() -> None:
    picture = torch.rand(2, 8, 12)
    tokens = picture.transpose(1, 2)
    assert usual_order(tokens).is_contiguous() and torch.equal(usual_order(tokens), tokens)
    assert usual_order(torch.rand(2, 9, 8)[:, 4:]).is_contiguous()
    heads = torch.rand(2, 12, 4, 8).transpose(1, 2)
    for kept in (picture, heads, picture[0].T, torch.rand(2, 1, 1).expand(2, 5, 8), None):
        assert usual_order(kept) is kept
