"""ColorMNet's memory of frames alone: what it keeps, drops and takes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hotpath.colorization.colormnet.memory import FrameMemory
from hotpath.colorization.colormnet.settings import ColorMNetSettings


def test_a_memory_goes_on_from_its_state_as_the_one_it_came_from() -> None:
    """Whatever lies in rows that are free: full of references, of recent frames, of prototypes, and as those are forgotten."""
    settings = ColorMNetSettings(most_frames=4, fewest_frames=2, prototypes=4, long_term=8, top_k=3)

    def fresh(kept: ColorMNetSettings = settings) -> FrameMemory:
        return FrameMemory(kept, 4, 1, 3, 2, torch.float32, torch.device("cpu"))

    random, memory = torch.Generator().manual_seed(0), fresh()
    for _ in range(21):
        other = fresh()
        if memory.work:
            other.load(memory.state())
        key, selection, query, asked = torch.rand(4, 3, 2, 2, generator=random)
        shrinkage, value = torch.rand(1, 2, 2, generator=random) + 1, torch.rand(2, 2, 2, 2, generator=random)
        before = memory.work
        for each in (memory, other):
            each.add(key, shrinkage, selection, value)
        if memory.work < before:  # compressed: nobody has read the prototypes yet
            assert not memory.state()["used"][: settings.prototypes].any()
        assert torch.equal(*(each.read(query[None], asked[None]).readout for each in (memory, other)))
        for name, column in memory.state().items():
            assert torch.equal(column, other.state()[name]), name
    assert (memory.long, memory.work) == (settings.long_term, 3 * 4)
    for smaller in (replace(settings, long_term=4), replace(settings, most_frames=2, fewest_frames=1)):
        with pytest.raises(ValueError, match="remembers more than these memory settings hold"):
            fresh(smaller).load(memory.state())
