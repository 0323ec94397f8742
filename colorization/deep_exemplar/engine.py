"""How Deep Exemplar's networks run: compiled or not, recorded or not; see `colormnet.engine`."""

from __future__ import annotations

from torch import Tensor

from ...attention.best_match import MeasuredMatch
from ..compilation import MaybeCompiled
from ..cuda_graph import GraphedStep
from .networks import DeepExemplar


class DeepExemplarFunctions:
    """Kept with the networks."""

    def __init__(self, networks: DeepExemplar, compile: bool = False) -> None:
        self.networks = networks
        self.vgg = MaybeCompiled(networks.vgg, compile, "VGG")
        self.color_net = MaybeCompiled(networks.color_net, compile, "colour network")


class DeepExemplarEngine:
    """For one film."""

    def __init__(self, functions: DeepExemplarFunctions) -> None:
        self.vgg = functions.vgg
        self.color_net = color_net = functions.color_net
        self.find_matches = MeasuredMatch()

        def step(known: Tensor) -> tuple[Tensor, ...]:
            return (color_net(known),)

        self.step = GraphedStep(step, functions.networks.compute_device)

    def report(self) -> dict[str, str]:
        """Which implementation of each kernel runs here, and why."""
        return {
            "match": self.find_matches.status,
            "torch.compile": f"VGG {self.vgg.status}; colour network {self.color_net.status}",
            "CUDA graph of the colour network": self.step.status,
        }
