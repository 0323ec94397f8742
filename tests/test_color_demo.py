"""The demo's small colorizer, on a photograph its training never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MODELS = Path(__file__).resolve().parent.parent / "demo" / "models"


def test_held_out_clip_is_coloured_right(tmp_path: Path) -> None:
    from hotpath.demo import colorize_demo

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = colorize_demo.colour_held_out("Deep Exemplar", 12)
    finally:
        torch.set_num_threads(threads)
    assert result.psnr > result.uncoloured + 4, f"{result.psnr:.1f} dB, without colours {result.uncoloured:.1f} dB"
    assert result.psnr > 19.5


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
    assert Image.open(picture).size == (6 * 224, 3 * 224)
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 24
    assert "chroma PSNR" in film.outcome.texts[0][1]
    assert picture.name in (tmp_path / "out" / "index.html").read_text()


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in (MODELS / "deep_exemplar").iterdir()) < 3 << 20


def test_scenes_are_the_same_every_time() -> None:
    from hotpath.demo.colorize_scenes import HELD_OUT_PHOTO, TRAINING_PHOTOS, held_out_clip

    pytest.importorskip("skimage")
    assert torch.equal(held_out_clip(3), held_out_clip(3))
    assert HELD_OUT_PHOTO not in TRAINING_PHOTOS
