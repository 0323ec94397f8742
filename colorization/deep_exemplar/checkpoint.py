"""Deep Exemplar's three checkpoints: correspondence, colour network and VGG; widths from shapes, strict loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import TypeVar

from torch import Tensor, nn

from ..checkpoint_file import WrongCheckpoint
from .color_net import INPUTS, ColorVidNet
from .vgg import VGG19
from .warp import WarpNet

FOLDER = "deep_exemplar"
FILES = {"colornet": "colornet_iter_76000", "nonlocal_net": "nonlocal_net_iter_76000", "vgg": "vgg19_conv"}
SOURCE = "https://github.com/zhangmozhe/Deep-Exemplar-based-Video-Colorization/releases/tag/v1.0"
SIGNATURES = {
    "colornet": ("conv1_1.0.weight", "conv1_2norm_ss.weight", "conv10_ab.weight"),
    "nonlocal_net": ("layer2_1.1.weight", "theta.weight", "phi.weight"),
    "vgg": ("conv1_1.weight", "conv3_4.weight", "conv5_4.weight"),
}

Network = TypeVar("Network", bound=nn.Module)


def kind_of(keys: Set[str]) -> str | None:
    """Which of the three a set of key names is; None for something else."""
    return next((kind for kind, signature in SIGNATURES.items() if all(key in keys for key in signature)), None)


def build_vgg(state: Mapping[str, Tensor]) -> VGG19:
    return _loaded(state, "vgg", lambda rows: VGG19([rows(f"conv{block}_1.weight") for block in range(1, 6)]))


def build_warp(state: Mapping[str, Tensor]) -> WarpNet:
    heads = [f"layer{level}_1.1.weight" for level in (2, 3, 4, 5)]
    return _loaded(
        state,
        "nonlocal_net",
        lambda rows: WarpNet(
            [rows(name, 1) for name in heads],
            [rows(name) for name in heads],
            rows("layer2_1.5.weight"),
            rows("theta.weight"),
        ),
    )


def build_color_net(state: Mapping[str, Tensor]) -> ColorVidNet:
    first = state.get("conv1_1.0.weight")
    if first is not None and first.shape[1] != INPUTS:
        raise WrongCheckpoint(f"its first layer takes {first.shape[1]} channels, and the video network takes {INPUTS}")
    return _loaded(
        state,
        "colornet",
        lambda rows: ColorVidNet(
            rows("conv1_1.0.weight"),
            [rows(f"{name}.weight") for name in ("conv1_2", "conv2_1", "conv3_1", "conv4_1")],
            rows("conv10_2.weight"),
        ),
    )


def _loaded(state: Mapping[str, Tensor], kind: str, make: Callable[[Callable[..., int]], Network]) -> Network:
    def rows(key: str, axis: int = 0) -> int:
        if key not in state:
            raise WrongCheckpoint(f"it has no {key!r}, which every {FILES[kind]} file has")
        return int(state[key].shape[axis])

    network = make(rows)
    try:
        network.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise WrongCheckpoint(str(error).replace("\n\t", " ")[:600]) from None
    return network.eval().requires_grad_(False)
