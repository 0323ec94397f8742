"""Films on Metal: what torch's convolutions there are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from film_files import frames
from hotpath.colorization import clip_job, winograd
from hotpath.colorization.colormnet import key_encoder
from hotpath.colorization.film_options import METHODS, FilmOptions, read_references
from hotpath.products.metal import readable
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("colour_host")


@pytest.mark.parametrize("method", METHODS)
def test_no_convolution_is_given_weights_in_another_order(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, told = F.conv2d, []

    def conv2d(x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        told.append(weight.is_contiguous())
        return plain(x, weight, *settings)

    monkeypatch.setattr(F, "conv2d", conv2d)
    monkeypatch.setattr("hotpath.colorization.networks.laid_out", lambda network: network)
    for module in (winograd, key_encoder):
        monkeypatch.setattr(module, "readable", Tensor.contiguous)
    chosen = FilmOptions(method=method, colour_size=32)
    coloured = clip_job.colorize_clip(clip_job.load_method(chosen), frames(4), read_references([*frames(1)]), chosen)
    assert len(coloured.pictures) == 4 and told and all(told)


def test_what_is_read_elsewhere_is_no_copy() -> None:
    part = torch.zeros(4, 8, 3, 3)[:, 2:5]
    assert readable(part) is part
