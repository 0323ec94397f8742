"""Tests of a process with a simulated card; `tests/test_on_simulated_card.py` starts one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

if not os.environ.get("HOTPATH_SIMULATED_CARD"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def card() -> Iterator[Any]:
    """The card, with nothing counted yet. Memory that was freed too early fails the test."""
    import simulated_card

    card = simulated_card.card()
    card.host_waits_for_all()
    for counted in (card.waits, card.hazards, card.compiled, card.launches):
        counted.clear()
    card.graphs = card.replays = 0
    yield card
    card.debug = 0
    assert not card.hazards
