"""Recorded steps of a colorizer: once per shape, compared with the plain run, and left with the reason where they fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from film_files import frames
from hotpath.colorization import clip_job
from hotpath.colorization.cuda_graph import MOST_SHAPES, GraphedStep
from hotpath.colorization.film_options import FilmOptions, read_references
from torch import Tensor

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("colour_host")


class Replayed:
    """What a CUDA graph does, without one: a replay computes from the recorded inputs into the recorded outputs."""

    def __init__(self, function: Any, tensors: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        self.outputs = function(*self.inputs)
        self.function, self.replays = function, 0

    def replay(self) -> None:
        self.replays += 1
        for held, new in zip(self.outputs, self.function(*self.inputs), strict=True):
            held.copy_(new)


def test_a_step_is_recorded_once_per_shape() -> None:
    made: list[Replayed] = []

    def record(function: Any, tensors: Sequence[Tensor]) -> Replayed:
        made.append(Replayed(function, tensors))
        return made[-1]

    step = GraphedStep(lambda x, y: (x + y, x * y), CPU, record)
    for shape in ((2, 3), (4, 3), (2, 3), (4, 3)):
        x, y = torch.rand(shape), torch.rand(shape)
        total, product = step(x, y)
        assert torch.equal(total, x + y) and torch.equal(product, x * y)
    assert len(made) == 2 and [r.replays for r in made] == [2, 2]
    assert step.status == "captured, equal to the plain run, 2 shapes"
    # Results outlive the next replay.
    first = step(torch.ones(2, 3), torch.ones(2, 3))[0]
    step(torch.zeros(2, 3), torch.zeros(2, 3))
    assert torch.equal(first, torch.full((2, 3), 2.0))
    for rows in range(10, 20):
        assert torch.equal(step(torch.ones(rows), torch.ones(rows))[0], torch.full((rows,), 2.0))
    assert len(made) == MOST_SHAPES and "others run plainly" in step.status


@pytest.mark.parametrize("fault", ["capture", "numbers", "no numbers", "nothing"])
def test_a_recording_that_fails_is_left_with_its_reason(fault: str) -> None:
    class Broken(Replayed):
        def __init__(self, function: Any, tensors: Sequence[Tensor]) -> None:
            if fault == "capture":
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            super().__init__(function, tensors)

        def replay(self) -> None:
            # What ran on a stream of another device is not in the recording, and its numbers stay.
            if fault == "numbers":
                self.outputs[0].zero_()
            if fault == "no numbers":
                self.outputs[0].fill_(torch.nan)

    step = GraphedStep(lambda x: (x + 1,), CPU, Broken)
    for _ in range(3):
        assert torch.equal(step(torch.ones(3))[0], torch.full((3,), 2.0))
    reasons = {
        "capture": "none: operation not permitted when stream is capturing",
        "numbers": "none: the replay differs",
        "no numbers": "none: the replay differs",
        "nothing": "none: the replay differs",
    }
    assert step.status.startswith(reasons[fault])


@pytest.mark.filterwarnings("error:get_frames:DeprecationWarning")
def test_one_recording_serves_all_shots(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scenedetect")
    made: list[Replayed] = []

    def record(function: Any, tensors: Sequence[Tensor]) -> Replayed:
        made.append(Replayed(function, tensors))
        return made[-1]

    original = GraphedStep.__init__
    monkeypatch.setattr(
        GraphedStep, "__init__", lambda self, function, device, **_: original(self, function, device, record)
    )
    options = FilmOptions(colour_size=32, shots="reset")
    images = torch.cat((frames(20) * 0.2, frames(20, seed=4) * 0.3 + 0.7, frames(20, seed=5) * 0.2))
    loaded = clip_job.load_method(options)
    done = clip_job.colorize_clip(loaded, images, read_references([*frames(1, seed=3)]), options)
    assert "shots: 3" in done.report and "captured, equal to the plain run" in done.report
    assert len(made) == 2, "one with and one without the update of the sensory memory"
    monkeypatch.setattr(GraphedStep, "__init__", original)
    plain = clip_job.colorize_clip(loaded, images, read_references([*frames(1, seed=3)]), options)
    assert torch.equal(done.pictures, plain.pictures)
