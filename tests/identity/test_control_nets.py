"""The ControlNet beside the adapter: one of another kind is refused before the sampler stops at sizes of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotpath.host.headless import HeadlessHost
from hotpath.patches.identity_conditioning import IdentityNet, apply_identity_net
from hotpath.patches.sdxl_layout import UnsupportedModel
from torch import nn

CURE = "choose InstantID's diffusion_pytorch_model.safetensors in the ControlNet loader."


class ControlNet(nn.Module):
    """Two blocks, one with cross-attention over text that is `context` wide."""

    def __init__(self, context: int, **others: Any) -> None:
        super().__init__()
        attention = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(context, 8)})})
        self.input_blocks = nn.ModuleList([nn.Conv2d(4, 8, 3), attention])
        vars(self).update(others)


class ControlNetFlux(nn.Linear):
    """Nothing of a UNet."""


class Held:
    """As ComfyUI hands networks over."""

    def __init__(self, network: nn.Module | None) -> None:
        self.control_model = network

    def copy(self) -> Any:
        return self

    def set_cond_hint(self, *_: Any) -> Any:
        return self

    def set_previous_controlnet(self, _: Any) -> Any:
        return self


def apply(network: nn.Module | None) -> Any:
    tokens = torch.zeros(1, 16, 64)
    net = IdentityNet(Held(network), torch.zeros(1, 8, 8, 3), 0.8, (0.0, 1.0), (tokens, tokens))
    return apply_identity_net([[tokens, {}]], [[tokens, {}]], net)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (ControlNet(24), f"control_net (ControlNet, text 24 wide) is not for SDXL, whose text is 64 wide: {CURE}"),
        (ControlNetFlux(3, 3), f"control_net (ControlNetFlux) is not for SDXL, whose text is 64 wide: {CURE}"),
    ],
)
def test_a_control_net_of_another_model_is_refused(network: nn.Module, sentence: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        apply(network)
    assert str(caught.value) == sentence


@pytest.mark.comfy
@pytest.mark.parametrize("network", [None, ControlNet(64), ControlNet(64, num_control_type=6)])
def test_what_fits_is_taken_and_a_union_is_named(headless_host: HeadlessHost, network: Any) -> None:
    positive, _ = apply(network)
    assert positive[0][1]["control"].control_model is network
    union = (None, f"Warning: control_net is a union ControlNet, which knows no faces: {CURE}")
    assert headless_host.texts == ([union] if hasattr(network, "num_control_type") else [])
