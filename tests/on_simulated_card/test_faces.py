"""Faces on the card: the host waits once for what was found and once for the vectors, graphs replay both networks, and the
faces are the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath import face
from hotpath.face import graphs

MODELS = Path(__file__).resolve().parents[2] / "demo" / "models" / "insightface"
OPTIONS = face.DetectionOptions(sizes=(320,))
LARGEST = face.FaceChoice.largest()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    import skimage.data

    photo = torch.from_numpy(skimage.data.astronaut()).float() / 255
    return torch.stack([photo.roll(8 * i, 1) for i in range(3)])


@pytest.fixture(scope="module")
def expected(pictures: torch.Tensor) -> list[face.Faces]:
    here = face.load_analyser([MODELS], engine="torch", device=torch.device("cpu"), remember=False)
    return here.analyse(pictures, choose=LARGEST, options=OPTIONS)


@pytest.fixture
def there(card: Any) -> Iterator[Any]:
    with torch.inference_mode():  # as a node loads it
        analyser = face.load_analyser([MODELS], engine="torch", device=torch.device("cuda"), remember=False)
    yield analyser
    analyser.release()


def assert_same(found: list[face.Faces], expected: list[face.Faces]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert len(one) == 1 and torch.allclose(one.boxes, other.boxes, atol=1e-2)
        assert torch.cosine_similarity(one.embeddings, other.embeddings).min() > 0.99999


def test_a_batch_is_two_waits_and_the_cpus_result(
    card: Any, there: Any, pictures: torch.Tensor, expected: list[face.Faces]
) -> None:
    given = pictures.clone()
    assert_same(there.analyse(given, choose=LARGEST, options=OPTIONS), expected)
    card.launches.clear()
    assert_same(there.analyse(given, choose=LARGEST, options=OPTIONS), expected)
    assert card.graphs == 2 and card.launches["aten::convolution"]
    assert there.report().count("recorded, equal to the plain run.") == 2
    for rolled in (0, 1, 0):
        card.waits.clear()
        card.launches.clear()
        card.replays = 0
        found = there.analyse(given.roll(rolled, 0), choose=LARGEST, options=OPTIONS)
        assert_same(found, expected[-rolled:] + expected[:-rolled])
        assert card.waits == ["copy to the host"] * 2
        assert card.replays == card.graphs == 2 and not card.launches["aten::convolution"]
        assert sum(card.launches.values()) < 90
    assert torch.equal(given, pictures)


def test_pictures_on_the_card_for_a_cpu_are_waited_for(
    card: Any, pictures: torch.Tensor, expected: list[face.Faces]
) -> None:
    here = face.load_analyser([MODELS], engine="torch", device=torch.device("cpu"), remember=False)
    assert_same(here.analyse(pictures[:1].cuda(), choose=LARGEST, options=OPTIONS), expected[:1])


def test_graphs_go_with_the_weights(card: Any, there: Any, pictures: torch.Tensor, expected: list[face.Faces]) -> None:
    for _ in range(2):
        there.analyse(pictures, choose=LARGEST, options=OPTIONS)
    held, graphs = card.held, there.detector.runner.graphs
    assert len(graphs) == 1
    there.release()
    assert len(graphs) == 0
    weights = sum(part.nbytes for part in there.detector.runner.network.parameters())
    assert held - card.held > weights  # and what the graph worked in
    for recorded in (0, 1):  # weights that leave after every call are not worth a recording
        assert_same(there.analyse(pictures, choose=LARGEST, options=OPTIONS), expected)
        assert len(graphs) == recorded


def test_pictures_of_two_sizes_and_two_modes_share_graphs(card: Any, there: Any, pictures: torch.Tensor) -> None:
    small = torch.nn.functional.interpolate(pictures[:1].permute(0, 3, 1, 2), (400, 500)).permute(0, 2, 3, 1)[0]
    mixed = [pictures[0], small, (pictures[1] * 255).to(torch.uint8)]
    plain = there.analyse(mixed, choose=LARGEST, options=OPTIONS)
    with torch.inference_mode():
        assert_same(there.analyse(mixed, choose=LARGEST, options=OPTIONS), plain)
    found = there.analyse(mixed, choose=LARGEST, options=OPTIONS)
    assert card.graphs == 2 and card.replays >= 4
    found[0].embeddings.add_(1)  # nobody else's, and no inference tensor
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert_same(there.analyse(mixed, choose=LARGEST, options=OPTIONS), plain)


def test_a_network_that_cannot_be_recorded_runs_plainly_and_says_why(
    card: Any, there: Any, pictures: torch.Tensor, expected: list[face.Faces], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = type(there.detector.runner.network)
    forward = network.forward

    def waits(self: Any, x: torch.Tensor) -> Any:
        x.sum().item()
        return forward(self, x)

    monkeypatch.setattr(network, "forward", waits)
    for _ in range(3):
        assert_same(there.analyse(pictures, choose=LARGEST, options=OPTIONS), expected)
    assert not card.graphs and "CUDA graphs of the detector: none: " in there.report()
    assert "when stream is capturing" in there.report()


@pytest.mark.long
def test_shapes_that_keep_changing_are_not_recorded_without_end(card: Any, there: Any) -> None:
    from hotpath.face.graphs import MOST_GRAPHS

    graphs = there.detector.runner.graphs
    options = [face.DetectionOptions(sizes=(side,)) for side in range(64, 64 + 32 * (MOST_GRAPHS + 3), 32)]
    for _ in range(2):
        for one in options:
            there.analyse(torch.rand(1, 64, 64, 3), embed=False, options=one)
    assert len(graphs) == MOST_GRAPHS and f"{MOST_GRAPHS} shapes" in there.report()


def test_many_candidates_are_fetched_again(card: Any, there: Any, pictures: torch.Tensor) -> None:
    everything = face.DetectionOptions(threshold=0.0, sizes=(128,))
    here = face.load_analyser([MODELS], engine="torch", device=torch.device("cpu"), remember=False)
    wanted = here.analyse(pictures, embed=False, options=everything)
    for _ in range(3):
        found = there.analyse(pictures, embed=False, options=everything)
        assert [len(one) for one in found] == [len(one) for one in wanted]


def test_large_pictures_go_in_smaller_steps_which_are_recorded(
    card: Any, there: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotpath.face import analyser, runner

    monkeypatch.setattr(analyser, "MOST_BYTES", 3 * 64 * 64 * runner.DETECTOR_BYTES_PER_PIXEL)
    small = face.DetectionOptions(sizes=(64,))
    pictures = torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    there.analyse(pictures, embed=False, options=small)  # two steps of three
    assert len(there.detector.runner.graphs) == 1
    card.replays = 0
    card.waits.clear()
    there.analyse(pictures, embed=False, options=small)
    assert card.replays == 2 and card.waits == ["copy to the host"]


class Asked:
    """Graphs of a network that doubles, asked under a key each."""

    def __init__(self) -> None:
        self.graphs = graphs.Graphs()
        self.runs = 0

    def __call__(self, keys: str, nbytes: int = 1, weights: tuple[int, ...] = (1,)) -> int:
        """How often the network itself ran."""
        before = self.runs
        for key in keys:
            given = torch.arange(3.0, device="cuda") + self.runs
            assert torch.equal(self.graphs(key, self._step, given, weights, nbytes), given * 2)
        return self.runs - before

    def _step(self, given: torch.Tensor) -> tuple[torch.Tensor]:
        self.runs += not torch.cuda.is_current_stream_capturing()
        return (given * 2,)


RECORDS = graphs.WARM_RUNS + 1


def test_graphs_are_recorded_the_second_time_and_kept_while_they_are_used(
    card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(graphs, "IDLE_CALLS", 4)
    ask = Asked()
    assert (ask("a"), ask("a"), ask("aaa"), len(ask.graphs)) == (1, RECORDS, 0, 1)
    assert ask.graphs.status == "recorded, equal to the plain run"
    assert ask("bba") == 1 + RECORDS and "2 shapes" in ask.graphs.status
    assert ask("cc") == 2, "b was used three calls ago, and a after it"
    assert ask("aa") == 0 and ask("c") == RECORDS, "b was not used for long enough"
    assert (ask("a"), ask("b"), len(ask.graphs)) == (0, 1, 2)
    assert ask("a", weights=(2,)) == 1 and len(ask.graphs) == 0, "the weights are elsewhere"
    assert ask("a", weights=(2,)) == RECORDS and ask("a", weights=(2,)) == 0


def test_graphs_need_room(card: Any, headless_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_BYTES", 10)
    monkeypatch.setattr(headless_host, "free_memory", lambda device: 19)
    ask = Asked()
    assert ask("aaa", 11) == 3 and ask.graphs.status == "not recorded, the pictures are too large"
    assert ask("aaa", 10) == 3 and ask.graphs.status == "not recorded, memory is short"
    assert ask("a", 9) == RECORDS and ask("a", 9) == 0
    assert ask("bb", 10) == 2 and ask("b", 11) == 1 and ask.graphs.status == "recorded, equal to the plain run"


def test_a_graph_that_differs_from_the_plain_run_is_the_last(card: Any) -> None:
    factors = iter(range(1, 99))
    kept = graphs.Graphs()
    given = torch.ones(3, device="cuda")
    for wanted in (1, 2):
        assert kept("a", lambda x: (x * next(factors),), given, (1,), 1).tolist() == [wanted] * 3
    assert kept.status == "none: the replay differs from the plain run" and len(kept) == 0
    ask = Asked()
    ask.graphs = kept
    assert ask("bbb") == 3
