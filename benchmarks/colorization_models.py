"""What colours films in `benchmarks/colorization.py`: the pack, on random weights or the demo's own, and the originals."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from checkout import ROOT
from quiet import alone
from torch import Tensor
from torch.nn import functional as F


def clip(frames: int, height: int, width: int) -> Tensor:
    """[frames, H, W, 3] uint8, moving, the same on every machine."""
    random = torch.Generator().manual_seed(1)
    ends = torch.rand(2, 3, height // 24 + 2, width // 24 + 2, generator=random)
    parts = []
    for index in range(frames):
        blend = index / max(frames - 1, 1)
        picture = F.interpolate(ends[:1] * (1 - blend) + ends[1:] * blend, (height, width), mode="bicubic")
        parts.append((picture.clamp(0, 1) * 255).to(torch.uint8)[0].permute(1, 2, 0))
    return torch.stack(parts)


def networks(method: str, tiny: bool = False) -> Any:
    """(state, network) of random weights, the same every time."""
    from hotpath.colorization.colormnet.checkpoint import build
    from hotpath.colorization.colormnet.network import ColorMNet
    from hotpath.colorization.deep_exemplar.color_net import ColorVidNet
    from hotpath.colorization.deep_exemplar.networks import DeepExemplar
    from hotpath.colorization.deep_exemplar.vgg import VGG19
    from hotpath.colorization.deep_exemplar.warp import WarpNet
    from hotpath.demo import train_colorizers, train_colormnet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if method == "ColorMNet":
            state = ColorMNet(train_colormnet.WIDTHS if tiny else None).state_dict()
            return state, build(state)
        small = train_colorizers.small_deep_exemplar
        network = small() if tiny else DeepExemplar(VGG19(), WarpNet(), ColorVidNet())
        network.eval().requires_grad_(False)
        return {name: getattr(network, name).state_dict() for name in ("vgg", "warp", "color_net")}, network


def trained(method: str) -> Any:
    """The demo's network, small and trained. Random weights make of a rounding another film: what they predict for one frame
    is what they are given for the next, ten times as far apart."""
    from hotpath.colorization import networks as loading

    files = ROOT / "demo" / "models"
    if method == "ColorMNet":
        return loading.read_colormnet(files / "colormnet" / "demo_colormnet.safetensors")
    parts = {"vgg": "demo_vgg", "nonlocal_net": "demo_nonlocal_net", "colornet": "demo_colornet"}
    return loading.read_deep_exemplar(
        {part: files / "deep_exemplar" / f"{name}.safetensors" for part, name in parts.items()}
    )


class Ours:
    """The pack's film session without a model folder: the networks are handed in."""

    def __init__(self, method: str, network: Any, precision: str, compiled: bool) -> None:
        from hotpath.colorization.networks import LoadedNetwork, Precision, laid_out

        self.method, self.compiled = method, compiled
        dtype = getattr(torch, precision)
        if method == "ColorMNet":
            network = network.to(dtype)
        else:
            network.color_net.to(dtype)
        self.loaded = LoadedNetwork(laid_out(network), (), Precision(dtype, precision))

    def _session(self, network: Any, height: int, width: int, short_side: int) -> Any:
        from hotpath.colorization.film import FilmSession
        from hotpath.colorization.film_options import FilmOptions, read_references

        options = FilmOptions(method=self.method, colour_size=short_side, compile=self.compiled)
        references = read_references([clip(1, height, width)[0]])
        return FilmSession(network, self.loaded, options, references, height, width)

    def film(self, frames: Tensor, portion: int = 20) -> Tensor:
        """As the jobs do it: one portion on its way to the device, one computed, one on its way back."""
        done: list[Tensor] = []
        with self.loaded.resident() as network:
            session = self._session(network, *frames.shape[1:3], 0)
            waiting: list[Any] = []
            for start in range(0, len(frames), portion):
                prepared = session.prepare(frames[start : start + portion])
                waiting += [session.colour(prepared, segment) for segment in prepared.segments]
                if len(waiting) > 1:
                    done.append(waiting.pop(0).wait().pictures)
            done += [queued.wait().pictures for queued in waiting]
            self.engines = "; ".join(f"{name}: {status}" for name, status in session.engines().items())
        return torch.cat(done)

    def network_only(self, frames: Tensor) -> Callable[[], object]:
        """The sessions alone, on luminance that is on the device already."""
        from hotpath.colorization.colour_space import luminance_of
        from hotpath.colorization.pictures import resized, to_channels_first

        with self.loaded.resident() as network:
            session = self._session(network, *frames.shape[1:3], 0)
            luminance = luminance_of(to_channels_first(frames, network.compute_device))
            small = resized(luminance, *session.small)

        def run() -> None:
            with self.loaded.resident() as network:
                inner = self._session(network, *frames.shape[1:3], 0)._session
                for start in range(0, len(small), 20):
                    inner.colorize(small[start : start + 20])

        return run

    def long(self, frames: int, height: int, width: int) -> list[float]:
        """Milliseconds per frame in each tenth of a film of `frames`."""
        turns, count = max(1, frames // 200), min(20, max(1, frames // 10))
        portion = clip(count, height, width)
        tenths: list[float] = []
        with self.loaded.resident() as network:
            session = self._session(network, height, width, 0)
            with alone():
                for _ in range(10):
                    start = time.perf_counter()
                    for _ in range(turns):
                        session.colorize(portion)
                    tenths.append((time.perf_counter() - start) / (turns * count) * 1000)
        return tenths


Work = Callable[[], object]


def peer_work(
    method: str, frames: Tensor, options: argparse.Namespace, device: torch.device
) -> tuple[str, tuple[Work, Work], str]:
    """The original's name, its network alone and its film, and a note on the frames."""
    import colorization_peers as peers

    state, network = networks(method)
    del network
    note = f"{len(frames)} frames"
    original: Any
    if method == "Deep Exemplar":
        # The original takes no other sizes: its half size must be a multiple of 8 by 16.
        down, across = -frames.shape[1] % 16, -frames.shape[2] % 32
        if down or across:
            planes = F.pad(frames.permute(0, 3, 1, 2).float(), (0, across, 0, down), mode="replicate")
            frames = planes.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            note += f" of {frames.shape[2]}x{frames.shape[1]}"
    arrays, reference = frames.numpy(), clip(1, *frames.shape[1:3])[0].numpy()
    height, width = frames.shape[1:3]
    luminance = (torch.rand(len(frames), 1, height, width) * 2 - 1).to(device)
    if method == "ColorMNet":
        original = peers.OriginalColorMNet(options.peers, state, device, half=device.type == "cuda")
        lab = torch.rand(3, height, width).to(device) * 2 - 1
        label = "original" + (" fp16 autocast" if original.half else " float32")
        return label, (lambda: original.network_only(luminance, lab), lambda: original.film(arrays, reference)), note
    original = peers.OriginalDeepExemplar(options.peers, state, device)
    half = torch.rand(len(frames), 3, height // 2, width // 2).to(device) * 50
    alone = lambda: original.network_only(half, half[:1])  # noqa: E731
    return "original float32", (alone, lambda: original.film(arrays, reference)), note
