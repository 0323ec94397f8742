"""The grid of a comparison: which inputs of a workflow are the seed, the identity's weight and the ControlNet's strength."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..headless.graph import Graph, Link, Node, WorkflowError

SEED, WEIGHT, STRENGTH = "seed", "weight", "controlnet_strength"
OPTIONS = {SEED: "--seed-input", WEIGHT: "--weight-input", STRENGTH: "--strength-input"}
WEIGHTS: dict[str, tuple[str, ...]] = {
    "HotpathInstantID": ("weight",),
    "HotpathIdentities": ("weight_1", "weight_2", "weight_3", "weight_4"),
    "ApplyInstantID": ("weight",),
    "ApplyInstantIDAdvanced": ("ip_weight",),
    "InstantIDAttentionPatch": ("weight",),
}
IDENTITY_NETS: dict[str, tuple[str, ...]] = {
    "HotpathInstantID": ("cn_strength",),
    "HotpathIdentities": ("cn_strength",),
    "ApplyInstantIDAdvanced": ("cn_strength",),
    "ApplyInstantIDControlNet": ("strength",),
}
OTHER_NETS: dict[str, tuple[str, ...]] = {
    "ControlNetApply": ("strength",),
    "ControlNetApplyAdvanced": ("strength",),
    "ControlNetApplySD3": ("strength",),
}


@dataclass(frozen=True)
class Point:
    """One place in the grid: values by axis. Empty for a workflow as it is."""

    values: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as "seed 1, weight 0.8"."""
        called = {SEED: "seed", WEIGHT: "weight", STRENGTH: "ControlNet"}
        return ", ".join(f"{called[axis]} {value}" for axis, value in self.values.items()) or "as it is"


@dataclass(frozen=True)
class Grid:
    """The values of each axis, and inputs ("node.input") to set where the workflow does not say which they are."""

    axes: dict[str, Sequence[float]]
    inputs: dict[str, Sequence[str]] = field(default_factory=dict)

    def points(self) -> Iterator[Point]:
        names = [axis for axis, values in self.axes.items() if values]
        for values in itertools.product(*(self.axes[name] for name in names)):
            yield Point(dict(zip(names, values, strict=True)))

    def at(self, graph: Graph, point: Point) -> Graph:
        """A copy of `graph` with the values of `point`. Raises WorkflowError when an axis has no input in it."""
        changed = copy.deepcopy(graph)
        for axis, value in point.values.items():
            if named := self.inputs.get(axis):
                for entry in named:
                    changed.set_input(f"{entry}={value}")
                continue
            for node, name in inputs_of(changed, axis):
                node.inputs[name] = value
        return changed


def inputs_of(graph: Graph, axis: str) -> list[tuple[Node, str]]:
    """The inputs of `graph` that are meant by an axis. Raises WorkflowError when there is none."""
    if axis == SEED:
        found = _seeds(graph)
    elif axis == WEIGHT:
        found = _named(graph, WEIGHTS)
    else:
        found = _named(graph, IDENTITY_NETS) or _named(graph, OTHER_NETS)
    if not found:
        raise WorkflowError(
            f"no node of this workflow has a {axis.replace('_', ' ')} that is known here; name its input with "
            f"{OPTIONS[axis]} NODE.INPUT."
        )
    return found


def _named(graph: Graph, inputs: dict[str, tuple[str, ...]]) -> list[tuple[Node, str]]:
    return [
        (node, name)
        for node in graph.nodes.values()
        for name in inputs.get(node.class_type, ())
        if name in node.inputs and not isinstance(node.inputs[name], Link)
    ]


def _seeds(graph: Graph) -> list[tuple[Node, str]]:
    """Seeds of noise: `noise_seed`, and `seed` beside steps; else the only `seed` there is."""
    plain: list[tuple[Node, str]] = [
        (node, name)
        for node in graph.nodes.values()
        for name in ("noise_seed", "seed")
        if name in node.inputs and not isinstance(node.inputs[name], Link)
    ]
    sure = [(node, name) for node, name in plain if name == "noise_seed" or "steps" in node.inputs]
    return sure or (plain if len(plain) == 1 else [])
