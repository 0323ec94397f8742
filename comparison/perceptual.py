"""LPIPS, where the package `lpips` and the weights it needs are on this machine. Nothing is ever downloaded."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..host.errors import kind_and_line
from ..host.interruption import read_ahead

Perceptual = Callable[[Tensor, Tensor], float]
"""LPIPS of two pictures [H, W, 3] in 0..1: 0 for equal ones, more for others."""

BACKBONE = "alexnet-owt-*.pth"  # torchvision's AlexNet, as its own downloader names it
SMALLEST = 64  # AlexNet's pooling leaves nothing of less


def load_perceptual() -> tuple[Perceptual | None, str]:
    """LPIPS over AlexNet, version 0.1, or None and why not."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        return None, "LPIPS is not measured: the package lpips is not installed (pip install lpips)"
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    backbones = sorted(checkpoints.glob(BACKBONE))
    heads = Path(spec.origin).parent / "weights" / "v0.1" / "alex.pth"
    if not backbones:
        return None, (
            f"LPIPS is not measured: torchvision's AlexNet ({BACKBONE}) is not in {checkpoints}, and nothing is downloaded here"
        )
    if not heads.is_file():
        return None, f"LPIPS is not measured: this installation of lpips lacks {heads.name}"
    try:
        return _load(backbones[-1], heads), "LPIPS: AlexNet, version 0.1"
    except Exception as error:  # a torchvision that is missing or of another torch, a file that was cut off
        return None, f"LPIPS is not measured: it cannot be loaded ({kind_and_line(error, 200)})"


@functools.lru_cache(maxsize=1)  # 10 MB, and a file of 240 MB to read
def _load(backbone: Path, heads: Path) -> Perceptual:
    import lpips

    # The package's own way downloads AlexNet and unpickles; this builds it empty and fills it with plain tensors.
    with torch.random.fork_rng(devices=[]):
        network = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    read_ahead(backbone)
    trunk = torch.load(backbone, map_location="cpu", weights_only=True)
    state = torch.load(heads, map_location="cpu", weights_only=True)
    for name, _ in network.net.named_parameters():  # such as slice2.3.weight, which is AlexNet's features.3.weight
        _, number, kind = name.split(".")
        state[f"net.{name}"] = trunk[f"features.{number}.{kind}"]
    missing = network.load_state_dict(state, strict=False).missing_keys
    # The heads are listed twice in the module, once in the file.
    lacking = [key for key in missing if not key.startswith(("lins.", "scaling_layer."))]
    if lacking:
        raise ValueError(f"{backbone.name} and {heads.name} do not make an LPIPS network: {lacking[0]} is missing.")
    network.requires_grad_(False).eval()

    @torch.inference_mode()
    def measure(a: Tensor, b: Tensor) -> float:
        first, second = (picture.movedim(-1, 0)[None].contiguous() * 2 - 1 for picture in (a, b))
        return float(network(first, second))

    return measure
