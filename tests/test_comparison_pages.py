"""What a comparison writes and shows: its folder and page, how files are paired, the node."""

from __future__ import annotations

import html.parser
import json
import math
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hotpath.comparison import (
    ComparisonFolder,
    FolderError,
    Thresholds,
    compare_batches,
    compare_pair,
    describe,
    pair_files,
    read_picture,
    side_by_side,
    values,
)
from hotpath.comparison.measures import measure
from hotpath.nodes import NODE_CLASS_MAPPINGS
from PIL import Image
from plain_pictures import flat, noise


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.files += [unquote(value) for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


class TestFolder:
    def test_everything_is_written_and_escaped(self, tmp_path: Path) -> None:
        evil = '<script>alert("x")</script> & ../../up'
        writer = ComparisonFolder(tmp_path, evil, "b")
        a = noise(1)
        for number, b in enumerate((a, noise(2), flat(0.1))):
            writer.add(compare_pair(f"{evil}\n{number}", a, b, Thresholds()))  # a file's name may have two lines
        made = writer.finish(Thresholds(), [evil], {"Hotpath": "1", "from": evil})
        assert (made.count("passed"), made.count("failed"), made.count("not comparable")) == (
            1,
            1,
            1,
        ) and not made.passed
        page = Page()
        page.feed((tmp_path / "index.html").read_text("utf-8"))
        assert "script" not in page.tags and evil in page.text
        # A, B and the difference as a link and a picture, B once more behind A; of the last pair only A and B.
        assert len(page.files) == 2 * (1 + 2 + 2 + 2) + 2 * 2
        assert all((tmp_path / name).is_file() and ".." not in name for name in page.files)
        assert all(p.resolve().is_relative_to(tmp_path) for p in tmp_path.rglob("*"))
        data = json.loads((tmp_path / "results.json").read_text())
        assert data["passed"] is False and [p["state"] for p in data["pairs"]] == ["passed", "failed", "not comparable"]
        assert data["pairs"][0]["identical"] and data["pairs"][0]["psnr"] is None
        assert data["pairs"][1]["ssim"] == pytest.approx(measure(a, noise(2)).ssim) == data["least_ssim"]
        assert "sizes differ" in data["pairs"][2]["problem"]
        for pair in data["pairs"]:
            assert {*pair["files"]} >= {"a", "b"}
            assert read_picture(tmp_path / pair["files"]["a"]) == pytest.approx(a, abs=0.5 / 255 + 1e-6)
        assert Image.open(tmp_path / "side_by_side.png").height > 3 * 40
        # Only numbers are kept.
        assert all(pair.a.numel() == 0 for pair in made.pairs)

    def test_what_fails_before_a_pair_is_whole_costs_the_others_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer = ComparisonFolder(tmp_path, "a", "b")
        writer.add(compare_pair("1", noise(1), noise(1), Thresholds()))
        for step in ("side_by_side", "_write_pair"):
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(sys.modules[ComparisonFolder.__module__], step, lambda *_, **__: 1 / 0)
                writer.add(compare_pair("2", noise(1), noise(1), Thresholds()))
        assert len(writer.finish(Thresholds(), [], {}).pairs) == 1

    def test_a_grid_becomes_a_table(self, tmp_path: Path) -> None:
        writer = ComparisonFolder(tmp_path, "a", "b")
        for strength in (0.3, 0.6):
            for weight in (0.5, 1.0):
                for seed in (1, 2, 3):
                    at = {"seed": seed, "weight": weight, "controlnet_strength": strength}
                    writer.add(compare_pair(f"{seed} {weight} {strength}", noise(1), noise(1), Thresholds(), at=at))
        made = writer.finish(Thresholds(), [], {})
        page = Page()
        page.feed((tmp_path / "index.html").read_text("utf-8"))
        assert made.passed and page.tags.count("table") == 2 and page.tags.count("h2") == 2
        assert page.tags.count("article") == 12 and page.tags.count("tr") == 2 * (3 + 1)
        for text in ("seed 3", "weight 0.5", "ControlNet strength 0.6"):
            assert text in page.text

    def test_report(self) -> None:
        made = compare_batches(torch.stack([noise(1), noise(1)]), torch.stack([noise(1), noise(2)]), Thresholds())
        lines = describe(made).splitlines()
        assert lines[0].startswith("not passed: 2 pairs, 1 passed, 1 failed (SSIM at least 0.95")
        assert lines[2] == "picture 0: passed: identical"
        assert values(made.pairs[0])["psnr"] is None
        assert not compare_batches(noise(1)[None], noise(2)[None], Thresholds()).passed


class TestPairing:
    def make(self, folder: Path, *names: str) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 12), "teal").save(folder / name)
        return folder

    def test_by_name_whatever_the_ending(self, tmp_path: Path) -> None:
        a = self.make(tmp_path / "a", "x.png", "sub/y.png")
        b = self.make(tmp_path / "b", "x.jpg", "sub/y.webp")
        (a / "notes.txt").write_text("no picture")
        pairs, note = pair_files(a, b)
        assert [name for name, *_ in pairs] == ["sub/y", "x"] and not note
        assert [(f.name, s.name) for _, f, s in pairs] == [("y.png", "y.webp"), ("x.png", "x.jpg")]

    def test_by_order_only_when_no_name_fits(self, tmp_path: Path) -> None:
        a, b = self.make(tmp_path / "a", "1.png", "2.png"), self.make(tmp_path / "b", "u.png", "v.png")
        pairs, note = pair_files(a, b)
        assert [(f.name, s.name) for _, f, s in pairs] == [("1.png", "u.png"), ("2.png", "v.png")]
        assert "in the order of their names" in note

    @pytest.mark.parametrize(
        ("a", "b", "reason"),
        [
            (["1.png", "2.png"], ["1.png"], "A has 2 pictures and B has 1: 2 is only in A"),
            (["1.png", "2.png"], ["1.png", "3.png"], "2 is only in A, 3 is only in B"),
            (["1.png", "2.png"], ["3.png"], "1 is only in A, 2 is only in A, 3 is only in B. Each"),
            ([*["1.png", "2.png", "3.png", "4.png"]], ["5.png"], r"4 is only in A, 5 is only in B\. Each"),
            ([*["1.png", "2.png", "3.png", "4.png", "5.png"]], ["6.png"], r"5 is only in A and 1 more\. Each"),
            ([], ["1.png"], "There is no picture in"),
            (["1.png", "1.jpg"], ["1.png"], "only one can be compared"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, a: list[str], b: list[str], reason: str) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
        with pytest.raises(FolderError, match=reason):
            pair_files(self.make(tmp_path / "a", *a), self.make(tmp_path / "b", *b))

    def test_broken_and_missing(self, tmp_path: Path) -> None:
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
        with pytest.raises(FolderError, match=r"x\.png cannot be read as a picture"):
            read_picture(tmp_path / "x.png")
        with pytest.raises(FolderError, match="is no folder"):
            pair_files(tmp_path / "gone", tmp_path)


class TestNode:
    def call(self, **inputs: Any) -> Any:
        node = NODE_CLASS_MAPPINGS["HotpathCompare"]()
        return getattr(node, node.FUNCTION)(**{"min_ssim": 0.95, "min_cosine": 0.98, **inputs})

    def test_a_batch_pair_by_pair(self, headless_host: Any) -> None:
        a, b = torch.stack([noise(1), noise(2)]), torch.stack([noise(1), noise(3)])
        pictures, report, listed, ssim, cosine, passed = self.call(image_a=a, image_b=b)
        assert pictures.shape[0] == 2 and pictures.shape[3] == 3 and pictures.isfinite().all()
        assert ssim == measure(noise(2), noise(3)).ssim and cosine == 0 and passed is False
        assert [p["ssim"] for p in json.loads(listed)] == [1.0, ssim]
        assert "Faces are not compared: connect faceanalysis." in report
        for number in range(2):
            pair = compare_pair(f"picture {number}", a[number], b[number], Thresholds())
            assert torch.equal(pictures[number], side_by_side(pair))

    def test_pairs_are_drawn_as_they_come_and_not_kept(self, headless_host: Any, monkeypatch: Any) -> None:
        """Pictures of all pairs together would be several times what came in."""
        import weakref

        from hotpath.comparison import pair as pairs

        judge, kept, most = pairs.compare_pair, [], 0

        def judged(*arguments: Any) -> Any:
            nonlocal most
            most = max(most, sum(picture() is not None for picture in kept))
            made = judge(*arguments)
            kept.append(weakref.ref(made.a))
            return made

        monkeypatch.setattr(pairs, "compare_pair", judged)
        batch = torch.stack([noise(number) for number in range(6)])
        assert self.call(image_a=batch, image_b=batch * 0.99)[0].shape[0] == 6
        assert len(kept) == 6 and most <= 1

    def test_faces_of_the_demo_models(self, headless_host: Any) -> None:
        """The tiny trained face models tell two drawn people apart, and know one that was made a little darker."""
        from hotpath import face

        root = Path(__file__).resolve().parent.parent / "demo"
        analyser = face.load_analyser([root / "models" / "insightface"], "antelopev2", "torch", torch.device("cpu"))
        picture = read_picture(root / "inputs" / "faces_drawn_one.png")[None]
        *_, cosine, passed = self.call(image_a=picture, image_b=picture * 0.97, faceanalysis=analyser, min_ssim=0.9)
        found = [analyser.analyse(p, embed=True)[0].embeddings[0].numpy() for p in (picture, picture * 0.97)]
        expected = float(np.dot(*found) / math.prod(np.linalg.norm(f) for f in found))
        assert cosine == pytest.approx(expected, abs=1e-5) and cosine > 0.98 and passed
        _, report, *_, passed = self.call(image_a=picture, image_b=picture * 0, faceanalysis=analyser, min_ssim=-1.0)
        assert not passed and "There is a face in A and none in B." in report

    @pytest.mark.parametrize(
        ("a", "b", "reason"),
        [
            (torch.rand(1, 20, 20, 3), torch.rand(2, 20, 20, 3), "A has 1 pictures and B has 2"),
            (torch.rand(1, 20, 20, 3), torch.rand(1, 20, 24, 3), "The sizes differ: A is 20x20, B is 24x20"),
            (torch.rand(1, 20, 20, 3) * math.nan, torch.rand(1, 20, 20, 3), "not finite"),
        ],
    )
    def test_what_cannot_be_compared(self, headless_host: Any, a: Any, b: Any, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            self.call(image_a=a, image_b=b)
