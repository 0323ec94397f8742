"""The colorizers' networks as the host keeps them: found in the model folders, loaded once, shared by all jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import host
from ..attention.capabilities import on_device
from ..cache import BoundedCache, content_key, file_fingerprint, named_cache
from ..products.linear import OrderedLinear, large_linears
from .checkpoint_file import SUFFIXES, key_names, load_network
from .colormnet import checkpoint as colormnet_checkpoint
from .colormnet.network import ColorMNet
from .deep_exemplar import checkpoint as deep_exemplar_checkpoint
from .deep_exemplar.networks import DeepExemplar
from .exact_float32 import exact_float32
from .winograd import prepare_convolutions

log = logging.getLogger("hotpath.colorization")

Kept = TypeVar("Kept")

AUTOMATIC = "automatic"
PRECISIONS = ("automatic", "float32", "float16", "bfloat16")
COLORMNET_LICENCE = (
    "ColorMNet's weights are licensed CC BY-NC-SA 4.0: for non-commercial use only. The licence of the code that runs "
    "them here does not change that."
)
_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Precision:
    """What a network computes in and why."""

    dtype: torch.dtype
    reason: str


class LoadedNetwork:
    """A network in the host's memory management, the files it came from and what it computes in."""

    def __init__(self, network: torch.nn.Module, files: tuple[Path, ...], precision: Precision) -> None:
        self.managed: Any = host.current().manage(network)
        self.files = files
        self.precision = precision
        self.widths: Any = getattr(network, "widths", None)  # ColorMNet's
        # Of the weights alone: a state may be continued where the same file has another date.
        self.identity = content_key(*(file_fingerprint(path, dated=False) for path in files))
        self.nbytes = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        self._kept: dict[object, Any] = {}

    @property
    def names(self) -> str:
        return ", ".join(path.name for path in self.files)

    def kept(self, name: object, make: Callable[[], Kept]) -> Kept:
        """What `make` gave the first time: what is worth keeping as long as the network, such as compiled functions."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: Kept = self._kept[name]
        return kept

    @contextmanager
    def resident(self, extra_bytes: int = 0) -> Iterator[Any]:
        """The network on its device, which is the current one inside, with inference mode on and float32 meaning float32:
        neither convolutions nor products use TF32.

        Whether cuDNN is used, or tries out its algorithms, stays as it is set: ComfyUI switches it off on some AMD cards.
        """
        with self.managed.resident(extra_bytes) as network, torch.inference_mode():
            if network.compute_device.type != "cuda":
                yield network
                return
            # Streams, events and graphs are made on the current device, and the host's need not be it.
            with on_device(network.compute_device), exact_float32():
                yield network


def choose_precision(name: str) -> Precision:
    """The dtype for `name` of PRECISIONS on the host's device."""
    device = host.current().device()
    if name == "float32":
        return Precision(torch.float32, "float32 was asked for")
    if device.type == "cpu":
        asked = "" if name == AUTOMATIC else f" instead of {name}"
        return Precision(torch.float32, f"float32{asked}: half precision is slower and less exact on a CPU")
    if name == AUTOMATIC:
        dtype = host.current().compute_dtype()
        return Precision(dtype, f"{str(dtype).removeprefix('torch.')}: the host's choice for {device.type}")
    if name not in PRECISIONS:
        raise ValueError(f"There is no precision {name!r}; choose one of {', '.join(PRECISIONS)}.")
    return Precision(getattr(torch, name), f"{name} was asked for")


def colormnet_files() -> list[str]:
    """What a ColorMNet node offers: automatic, then every file in models/colormnet."""
    return [AUTOMATIC, *host.current().model_files(colormnet_checkpoint.FOLDER, SUFFIXES)]


def load_colormnet(name: str = AUTOMATIC, precision: str = AUTOMATIC) -> LoadedNetwork:
    """ColorMNet from models/colormnet. Raises ModelNotFound or WrongCheckpoint with what to do about it."""
    path = _colormnet_path(name)
    chosen = choose_precision(precision)
    key = content_key(
        "colormnet", file_fingerprint(path), chosen.dtype, str(host.current().device()), host.current().name
    )

    def load() -> LoadedNetwork:
        return LoadedNetwork(laid_out(read_colormnet(path).to(chosen.dtype)), (path,), chosen)

    return _networks().get_or_compute(key, load)


def read_colormnet(path: Path) -> ColorMNet:
    """The network of a file as it is: on the CPU, in the file's dtype."""
    return load_network(path, "a ColorMNet checkpoint", colormnet_checkpoint.build)


def load_deep_exemplar(precision: str = AUTOMATIC) -> LoadedNetwork:
    """Deep Exemplar's three networks from models/deep_exemplar.

    Matching stays in float32: `precision` is what the colour network computes in.
    """
    paths = deep_exemplar_paths()
    chosen = choose_precision(precision)
    prints = [file_fingerprint(path) for path in paths.values()]
    key = content_key("deep exemplar", prints, chosen.dtype, str(host.current().device()), host.current().name)

    def load() -> LoadedNetwork:
        network = read_deep_exemplar(paths)
        network.color_net.to(chosen.dtype)
        return LoadedNetwork(laid_out(network), tuple(paths.values()), chosen)

    return _networks().get_or_compute(key, load)


def read_deep_exemplar(paths: Mapping[str, Path]) -> DeepExemplar:
    """The networks of the files for vgg, nonlocal_net and colornet as they are: on the CPU, in the files' dtype."""
    checkpoint = deep_exemplar_checkpoint
    vgg = load_network(paths["vgg"], "Deep Exemplar's VGG-19 (vgg19_conv)", checkpoint.build_vgg)
    warp = load_network(paths["nonlocal_net"], "Deep Exemplar's nonlocal_net", checkpoint.build_warp)
    color_net = load_network(paths["colornet"], "Deep Exemplar's colornet", checkpoint.build_color_net)
    return DeepExemplar(vgg, warp, color_net)


def _networks() -> BoundedCache[LoadedNetwork]:
    return named_cache("colorizers", _CACHE_BYTES)


def laid_out(network: Any) -> Any:
    """`network` as the host's device computes it fastest: what is in half precision with channels last on CUDA, and on a CPU
    with the weights of wide convolutions and of linear layers in another order.

    In float32 without TF32, cuDNN asked on an H200 for 50 GiB beside one convolution of five frames of 768x432 with channels
    last, and ColorMNet had a tenth of the speed of half precision.
    """
    device = host.current().device().type
    if device == "cuda":
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 4 and weight.dtype != torch.float32:
                module.to(memory_format=torch.channels_last)
    if device == "cpu":
        prepare_convolutions(network)
        for owner, name in large_linears(network):
            setattr(owner, name, OrderedLinear(getattr(owner, name)))
    return network


def _colormnet_path(name: str) -> Path:
    here, checkpoint = host.current(), colormnet_checkpoint
    if name != AUTOMATIC:
        return here.model_path(checkpoint.FOLDER, name)
    files = here.model_files(checkpoint.FOLDER, SUFFIXES)
    for file in sorted(files, key=lambda file: Path(file).stem != checkpoint.FILE):
        path = here.model_path(checkpoint.FOLDER, file)
        # The published name needs no look inside; loading will tell.
        if path.stem == checkpoint.FILE or checkpoint.matches(key_names(path)):
            return path
    if len(files) == 1:
        return here.model_path(checkpoint.FOLDER, files[0])
    raise host.ModelNotFound(
        f"No ColorMNet checkpoint was found. Download {checkpoint.FILE}.pth from {checkpoint.SOURCE} into "
        f"{here.model_folders(checkpoint.FOLDER)[0]} and press R; the panel Hotpath in the sidebar, or `hotpath models "
        f"download colormnet`, does it for you. {COLORMNET_LICENCE}"
    )


def deep_exemplar_paths() -> dict[str, Path]:
    """The file of each of the three networks: by its published name, else by what is in it."""
    here, checkpoint = host.current(), deep_exemplar_checkpoint
    files = here.model_files(checkpoint.FOLDER, SUFFIXES)
    found: dict[str, Path] = {}
    for kind, stem in checkpoint.FILES.items():
        named = next((file for file in files if Path(file).stem == stem), None)
        if named is not None:
            found[kind] = here.model_path(checkpoint.FOLDER, named)
    others = [file for file in files if Path(file).stem not in checkpoint.FILES.values()]
    if len(found) < len(checkpoint.FILES):
        for file in others:
            path = here.model_path(checkpoint.FOLDER, file)
            other_kind = checkpoint.kind_of(key_names(path))
            if other_kind is not None:
                found.setdefault(other_kind, path)
    missing = [f"{checkpoint.FILES[kind]}.pth" for kind in checkpoint.FILES if kind not in found]
    if missing:
        raise host.ModelNotFound(
            f"Deep Exemplar needs {', '.join(missing)} in {here.model_folders(checkpoint.FOLDER)[0]}. They are in "
            f"colorization_checkpoint.zip at {checkpoint.SOURCE}; unpack it, move the files there and press R; the panel "
            "Hotpath in the sidebar, or `hotpath models download deep-exemplar`, does it for you."
        )
    return found
