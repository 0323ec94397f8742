"""The check of the colorizers' files for `hotpath selftest`: a clip as the nodes colour it against the plain networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..colorization import networks
from ..colorization.colormnet.session import ColorMNetSession
from ..colorization.colormnet.settings import ColorMNetSettings
from ..colorization.deep_exemplar.session import DeepExemplarSession
from ..host import Host, ModelNotFound
from .selftest import Absent, Finding

FRAMES, HEIGHT, WIDTH = 6, 96, 160
# Of the mean difference of a and b, which reach 110: single places may be matched with another one that is as near.
LIMIT = {torch.float32: 0.1, torch.float16: 2.0, torch.bfloat16: 4.0}

Colour = Callable[[Any, Tensor, Tensor, int], Tensor]


def check_colorization(host: Host) -> Iterator[Finding]:
    """Each method whose files are here: all frames at once on the device against one by one on the CPU in float32."""
    absent = []
    for name, load, read, colour in (
        ("ColorMNet", networks.load_colormnet, lambda files: networks.read_colormnet(files[0]), _by_colormnet),
        (
            "Deep Exemplar",
            networks.load_deep_exemplar,
            lambda _: networks.read_deep_exemplar(networks.deep_exemplar_paths()),
            _by_deep_exemplar,
        ),
    ):
        try:
            loaded = load()
        except ModelNotFound as missing:
            absent.append(str(missing))
            continue
        yield _against_plain(name, loaded, read(loaded.files), colour)
    if len(absent) == 2:
        raise Absent(" ".join(absent))


@torch.inference_mode()
def _against_plain(name: str, loaded: networks.LoadedNetwork, plain: Any, colour: Colour) -> Finding:
    luminance, reference = _clip()
    exact = colour(plain.float().eval(), luminance, reference, 1)
    with loaded.resident() as network:
        device = network.compute_device
        grey, colours = luminance.to(device), reference.to(device)
        colour(network, grey, colours, FRAMES)  # to warm up
        started = time.perf_counter()
        made = colour(network, grey, colours, FRAMES).float().cpu()
        seconds = (time.perf_counter() - started) / FRAMES
    dtype = loaded.precision.dtype
    label = f"{name} ({loaded.names}) on {device} as {str(dtype).removeprefix('torch.')}"
    what = f"{label}: {WIDTH}x{HEIGHT} against the plain network on the CPU, for each frame"
    return Finding(what, (made - exact).abs().mean().item(), LIMIT[dtype], "mean difference of a and b", seconds)


def _by_colormnet(network: Any, luminance: Tensor, reference: Tensor, portion: int) -> Tensor:
    session = ColorMNetSession(network, ColorMNetSettings(), HEIGHT, WIDTH, [reference])
    return torch.cat([session.colorize(part).chroma for part in luminance.split(portion)])


def _by_deep_exemplar(network: Any, luminance: Tensor, reference: Tensor, portion: int) -> Tensor:
    session = DeepExemplarSession(network, HEIGHT, WIDTH, reference)
    return torch.cat([session.colorize(part).chroma for part in luminance.split(portion)])


def _clip() -> tuple[Tensor, Tensor]:
    """Luminance [T, 1, H, W] of soft shapes that move, and the first frame in colours: Lab [3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 7, 12, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, size=(HEIGHT, WIDTH + 4 * FRAMES), mode="bicubic").clamp(0, 1)[0]
    frames = torch.stack([wide[:1, :, 4 * i : 4 * i + WIDTH] for i in range(FRAMES)]) * 100
    return frames, torch.cat((frames[0], (wide[1:, :, :WIDTH] - 0.5) * 100))
