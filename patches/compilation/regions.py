"""Which parts of a diffusion model are compiled: the blocks that repeat.

A transformer is the same block many times, a UNet a few kinds of blocks many times. A kind is compiled once and the
graph serves all its blocks, because weights are inputs of the graph. Blocks are found in the module tree, so that a new
architecture needs no line here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ...host.letters import counted

ENOUGH_INSIDE = 0.5  # a module whose inner blocks hold this part of its weights is their frame, not a block itself


@dataclass(frozen=True)
class Region:
    """One block; `name` is its path in the diffusion model."""

    name: str
    module: nn.Module

    @property
    def title(self) -> str:
        return type(self.module).__name__


def _frames(module: nn.Module) -> bool:
    """Whether `module` only holds a sequence of others."""
    return isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))


def _listed(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules below `root` that stand in a list and are made of parts themselves, outer ones first."""
    for name, child in root.named_children():
        path = f"{prefix}{name}"
        # A plain Sequential is a chain of layers; a model's own kind of Sequential, as in UNets, holds blocks.
        in_list = isinstance(root, nn.ModuleList) or (_frames(root) and type(root) is not nn.Sequential)
        if in_list and not _frames(child) and next(child.children(), None) is not None:
            yield path, child
        yield from _listed(child, f"{path}.")


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _worth_compiling(module: nn.Module) -> bool:
    """At least two layers with weights; around a single one there is nothing to fuse."""
    return sum(1 for part in module.modules() if part._parameters) > 1


def is_transformer(module: nn.Module) -> bool:
    """Blocks on tokens are linear layers and norms; what convolves works on pictures."""
    return not any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())


def find_regions(diffusion_model: nn.Module, regions: str) -> list[Region]:
    """The repeated blocks of `diffusion_model`, in the order of the module tree, none inside another."""
    listed = [(name, module) for name, module in _listed(diffusion_model) if _worth_compiling(module)]
    times = Counter(type(module) for _, module in listed)
    repeated = [(name, module) for name, module in listed if times[type(module)] > 1]
    chosen: list[Region] = []
    for name, module in repeated:
        if any(name.startswith(f"{region.name}.") for region in chosen):
            continue
        inner = [part for path, part in repeated if path.startswith(f"{name}.")]
        if inner and sum(map(_weights, _outermost(inner))) >= ENOUGH_INSIDE * _weights(module):
            continue
        if regions == "transformer blocks" and not is_transformer(module):
            continue
        chosen.append(Region(name, module))
    return chosen


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    """`modules` without those that lie in another of them."""
    inside = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inside]


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, parameter.shape) for name, parameter in module.named_parameters())


def describe_regions(found: list[Region]) -> str:
    """ "70 BasicTransformerBlock in 2 kinds, 17 ResBlock in 12 kinds": as many as weights have shapes. What else blocks must
    have in common to share a graph is for `blocks` to say, when they are run."""
    blocks = Counter(region.title for region in found)
    kinds = Counter(kind.__name__ for kind, _ in {(type(region.module), _shapes(region.module)) for region in found})
    return ", ".join(f"{count} {title} in {counted(kinds[title], 'kind')}" for title, count in blocks.items())
