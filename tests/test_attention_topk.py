"""The highest of rows where torch's own kernels give others, as its 2.13 does on Intel's cards: emulated on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout_files import files
from hotpath import demo, face
from hotpath.attention import topk as module
from hotpath.attention.topk import topk
from hotpath.attention.topk_memory import read_top_k
from hotpath.colorization.colormnet.memory import FrameMemory
from hotpath.colorization.colormnet.settings import ColorMNetSettings
from hotpath.face import DetectionOptions
from hotpath.vision_language.sampling import Sampling, filtered, likeliest
from PIL import Image
from torch import Tensor

ROOT = Path(demo.__file__).parent


def memory_reads() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    query, selection, keys = (torch.randn(count, 16, generator=random) for count in (7, 7, 5000))
    values = torch.randn(5000, 10, generator=random)
    read = [read_top_k(query, selection.abs(), some, torch.ones(len(some)), values, 30) for some in (keys, keys[:70])]
    return [part for each in read for part in (each.readout, each.usage, each.nearest)]


def memory_that_was_full() -> list[Tensor]:
    settings = ColorMNetSettings(most_frames=4, fewest_frames=2, prototypes=4, long_term=8, top_k=3)
    random, memory = (
        torch.Generator().manual_seed(0),
        FrameMemory(settings, 4, 1, 3, 2, torch.float32, torch.device("cpu")),
    )
    for _ in range(9):
        key, selection, query, asked = torch.rand(4, 3, 2, 2, generator=random)
        memory.add(key, torch.rand(1, 2, 2, generator=random) + 1, selection, torch.rand(2, 2, 2, 2, generator=random))
        memory.read(query[None], asked[None])
    assert memory.long
    return list(memory.state().values())


def found_faces() -> list[Tensor]:
    analyser = face.load_analyser(
        [ROOT / "models" / "insightface"], engine="torch", device=torch.device("cpu"), remember=False
    )
    picture = np.array(Image.open(ROOT / "inputs" / "faces_drawn_three.png").convert("RGB"))
    found = analyser.analyse([torch.from_numpy(picture)], embed=False, options=DetectionOptions(sizes=(384,)))[0]
    return [found.boxes, found.keypoints, found.scores]


def chosen_tokens() -> list[Tensor]:
    logits = torch.randn(5, 900, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(top_k=20, top_p=1.0)
    return [*likeliest(logits, sampling), filtered(logits, sampling)]


@pytest.mark.parametrize("work", [memory_reads, memory_that_was_full, found_faces, chosen_tokens])
def test_what_is_chosen_is_the_highest(work: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = work()

    def wrong(rows: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor]:
        return rows[..., :k], torch.arange(k).expand(*rows.shape[:-1], k)

    monkeypatch.setattr(Tensor, "topk", wrong)
    assert any(not torch.equal(made, other) for made, other in zip(work(), wanted, strict=True))
    monkeypatch.setattr(module, "SORTED", ("cpu",))
    for made, other in zip(work(), wanted, strict=True):
        torch.testing.assert_close(made, other)


def test_intels_cards_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(3, 4, 50)
    wanted = rows.topk(6)

    class OnIntel(Tensor):
        device = torch.device("xpu")  # type: ignore[assignment]

    monkeypatch.setattr(Tensor, "topk", None)
    values, places = topk(rows.as_subclass(OnIntel), 6)
    assert torch.equal(values.as_subclass(Tensor), wanted.values)
    assert torch.equal(places.as_subclass(Tensor), wanted.indices)


def test_nobody_asks_torch_itself() -> None:
    parts = ("attention", "colorization", "comparison", "face", "identity", "text_to_image", "vision_language")
    asking = [
        path.relative_to(ROOT.parent).as_posix()
        for path in files("*.py")
        if path.relative_to(ROOT.parent).parts[0] in parts and ".topk(" in path.read_text(encoding="utf-8")
    ]
    assert asking == ["attention/topk.py"]
