"""Films on the card: streams, pinned copies and graphs give the CPU's colours, and no frame waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath import host
from hotpath.attention.best_match import MeasuredMatch, best_match
from hotpath.colorization import clip_job, film
from hotpath.colorization.cuda_graph import GraphedStep
from hotpath.colorization.film_options import FilmOptions, read_references
from hotpath.colorization.stage_times import StageTimes
from hotpath.host.capturing import GraphMemory
from hotpath.host.headless import HeadlessHost
from tiny_colorizers import save_models

HEIGHT, WIDTH = 112, 128


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Path]:
    before = host.current()
    yield save_models(tmp_path)
    host.use(before)


def moving(count: int, seed: int = 0) -> torch.Tensor:
    ends = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    blend = torch.linspace(0, 1, count)[:, None, None, None]
    coarse = ends[:1] * (1 - blend) + ends[1:] * blend
    large = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
    return large.permute(0, 2, 3, 1).clamp(0, 1)


@pytest.mark.parametrize(
    ("method", "edge_filter"), [("ColorMNet", "guided"), ("Deep Exemplar", "fast_global_smoother")]
)
def test_a_film(method: str, edge_filter: str, card: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From frames to pictures, and from frames on the device to pictures on it, once the film has begun."""
    # Measuring which search is faster waits, once per size.
    monkeypatch.setattr(MeasuredMatch, "__call__", lambda self, theta, phi: best_match(theta, phi))
    options = FilmOptions(method=method, colour_size=112, edge_filter=edge_filter, temporal_smoothing=0.5)
    references, pictures = read_references([*moving(2, seed=3)], "0,-"), moving(5)
    host.use(HeadlessHost(models=models, device="cpu", show_progress=False))
    expected = clip_job.colorize_clip(clip_job.load_method(options), pictures, references, options).pictures
    host.use(HeadlessHost(models=models, device="cuda", show_progress=False))
    loaded = clip_job.load_method(options, precision="float32")
    done = clip_job.colorize_clip(loaded, pictures, references, options)
    assert "captured, equal to the plain run" in done.report and card.replays >= 4
    # The weights are random, and Deep Exemplar's next frame is coloured after the last one: differences grow tenfold.
    alike = len(pictures) if method == "ColorMNet" else 2
    assert (done.pictures - expected)[:alike].abs().max() < 1e-3
    with loaded.resident() as network:
        session = film.FilmSession(network, loaded, options, references, HEIGHT, WIDTH)
        eight_bits = (pictures * 255).to(torch.uint8)
        session.colorize(eight_bits[:2])
        prepared = session.prepare(eight_bits[2:])
        torch.cuda.set_sync_debug_mode("error")
        queued = session.colour(prepared, prepared.segments[0])
        session.snapshot()
        assert queued.wait().pictures.shape == (3, HEIGHT, WIDTH, 3)


def test_on_another_card_than_the_current_one(card: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are recorded there, and jobs make their streams and events there."""
    monkeypatch.setattr(card, "count", 2)
    second = torch.device("cuda:1")
    for memory in (None, GraphMemory(second)):
        step = GraphedStep(lambda x: (x * 2,), second, memory=memory)
        for number in (1.0, 2.0, 3.0):
            assert torch.equal(step(torch.full((3,), number, device=second))[0].cpu(), torch.full((3,), 2 * number))
        assert step.status == "captured, equal to the plain run"
    host.use(HeadlessHost(models=models, device=second, show_progress=False))
    with clip_job.load_method(FilmOptions(), precision="float32").resident() as network:
        assert network.compute_device == second and torch.cuda.current_device() == 1
        times = StageTimes(second)
    with times.stage("there"):
        torch.ones(3, device=second).mul(2)
    assert set(times.seconds()) == {"there"} and torch.cuda.current_device() == 0
