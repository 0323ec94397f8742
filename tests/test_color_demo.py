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


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in (MODELS / "deep_exemplar").iterdir()) < 3 << 20


def test_scenes_are_the_same_every_time() -> None:
    from hotpath.demo.colorize_scenes import HELD_OUT_PHOTO, TRAINING_PHOTOS, held_out_clip

    pytest.importorskip("skimage")
    assert torch.equal(held_out_clip(3), held_out_clip(3))
    assert HELD_OUT_PHOTO not in TRAINING_PHOTOS
