"""Pictures, workflows and requests for the tests of `hotpath map`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hotpath.distributed.items import FolderItems
from hotpath.distributed.mapping import MapOptions, MapRequest
from hotpath.distributed.ray_cluster import ClusterOptions, connected
from hotpath.headless.graph import Graph
from map_workflows import COPY, picture


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of this machine's own, as `hotpath map --executor ray` starts it. Runs use the connection that stands."""
    with connected(ClusterOptions(cpus=2, gpus=0), tmp_path_factory.mktemp("token")) as module:
        yield module


@pytest.fixture
def pictures(headless_host: Any) -> Path:
    """Five pictures in input/in."""
    folder = headless_host.input_folder() / "in"
    for i in range(5):
        picture(folder / f"p{i}.png", i)
    return folder


@pytest.fixture
def request_for(headless_host: Any, tmp_path: Path) -> Callable[..., MapRequest]:
    """A request over a folder in the input folder; options of the map by name."""

    def make(
        source: Any,
        output: str = "out",
        graph: Any = None,
        target: str | None = None,
        shots: bool = False,
        **options: Any,
    ) -> MapRequest:
        inputs = headless_host.input_folder()
        chosen = FolderItems(source, inputs) if isinstance(source, Path) else source
        settings = {"gpus": "none", "threads": 1, **options}
        models, kinds = headless_host.all_model_folders()
        return MapRequest(
            Graph.parse(json.loads(json.dumps(graph or COPY))),
            chosen,
            inputs,
            tmp_path / output,
            tmp_path / "cache",
            target,
            shots,
            models,
            kinds,
            MapOptions(**settings),
        )

    return make
