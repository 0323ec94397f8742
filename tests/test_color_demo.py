"""The demo's small colorizer, on a photograph its training never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MODELS = Path(__file__).resolve().parent.parent / "demo" / "models"


@pytest.mark.parametrize(("method", "least"), [("Deep Exemplar", 19.5), ("ColorMNet", 27.0)])
def test_held_out_clip_is_coloured_right(method: str, least: float) -> None:
    from hotpath.demo import colorize_demo

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = colorize_demo.colour_held_out(method, 12)
    finally:
        torch.set_num_threads(threads)
    assert result.psnr > result.uncoloured + 4, f"{result.psnr:.1f} dB, without colours {result.uncoloured:.1f} dB"
    assert result.psnr > least


def test_the_demo_shows_it(tmp_path: Path) -> None:
    """A strip and a film of grey, coloured and truth, on the page beside the workflows."""
    import av
    from hotpath.headless.demo import DemoFiles, run_demo
    from PIL import Image

    workflows = tmp_path / "workflows"
    workflows.mkdir()
    (workflows / "mask.api.json").write_text(
        '{"1": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 8, "height": 8}},'
        ' "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}'
    )
    files = DemoFiles(workflows, held_out_film=True)
    results = run_demo(tmp_path / "out", files, None, lambda _: None)
    film = next(r for r in results if r.name == "colorize_held_out_film")
    assert film.state == "done", film.reason
    picture, video = (file.path for file in film.outcome.files)
    assert Image.open(picture).size == (6 * 224, 4 * 224)
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 24
    for method in ("Deep Exemplar", "ColorMNet"):
        assert f"{method}: chroma PSNR" in film.outcome.texts[0][1]
    assert picture.name in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize("folder", ["deep_exemplar", "colormnet"])
def test_files_are_small(folder: str) -> None:
    assert 0 < sum(path.stat().st_size for path in (MODELS / folder).iterdir()) < 3 << 20


def test_colours_follow_what_moves() -> None:
    """A film of two squares that pass each other over a plain ground: each keeps its colour, which no place has."""
    from hotpath.demo import colorize_demo

    y, x = torch.meshgrid(torch.arange(112), torch.arange(112), indexing="ij")
    truth = torch.full((16, 112, 112, 3), 0.45)
    for index in range(16):
        for start, top, step, colour in ((8, 16, 4, (0.9, 0.35, 0.2)), (72, 64, -4, (0.1, 0.25, 0.75))):
            inside = ((x - start - step * index).clamp(0, 31) == x - start - step * index) & (
                (y - top).clamp(0, 31) == y - top
            )
            truth[index][inside] = torch.tensor(colour)
    result = colorize_demo.colour_clip("ColorMNet", truth)
    assert result.psnr > result.uncoloured + 5, f"{result.psnr:.1f} dB, without colours {result.uncoloured:.1f} dB"


def test_scenes_are_the_same_every_time() -> None:
    from hotpath.demo.colorize_scenes import HELD_OUT_PHOTO, TRAINING_PHOTOS, held_out_clip

    pytest.importorskip("skimage")
    assert torch.equal(held_out_clip(3), held_out_clip(3))
    assert HELD_OUT_PHOTO not in TRAINING_PHOTOS
