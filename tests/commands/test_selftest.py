"""`hotpath selftest`: the demo's models pass; what computes something else, or is a wrong file, fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hotpath import cli
from hotpath.headless.selftest import Absent, Finding, run_checks

ROOT = Path(__file__).resolve().parents[2]


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_selftest_without_models(place, capsys):
    assert run("selftest", "--models", place / "models", "--device", "cpu") == 3
    out = capsys.readouterr().out
    assert "skipped  faces" in out and "skipped  instantid" in out


def test_selftest_with_an_unknown_name(place, capsys):
    assert run("selftest", "nonsense", "--models", place) == 2
    assert "faces" in capsys.readouterr().err


def test_checks_stand_alone(headless_host):
    def good(host):
        yield Finding("a", 0.1, 0.2, seconds=0.001, reference_seconds=0.002)

    def bad(host):
        yield Finding("b", float("nan"), 0.2)

    def broken(host):
        yield Finding("c", 0, 0)
        raise RuntimeError("a bug")

    def absent(host):
        raise Absent("no files")
        yield

    results = run_checks(headless_host, [("good", good), ("bad", bad), ("broken", broken), ("absent", absent)])
    assert [r.passed for r in results] == [True, False, False, True]
    assert results[2].failure == "RuntimeError: a bug" and len(results[2].findings) == 1
    assert results[3].absent == "no files"
    assert "1.0 ms (reference 2.0 ms)" in str(results[0].findings[0])


@pytest.mark.skipif(not (ROOT / "demo" / "models" / "insightface").is_dir(), reason="no demo models")
def test_the_demo_models_pass_the_selftest(place, capsys):
    assert run("selftest", "--models", ROOT / "demo" / "models", "--device", "cpu", "--json") == 0
    results = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
    assert all(results[name]["findings"] for name in ("faces", "instantid", "colorization", "vision-language"))
    assert [finding["what"].split(" (")[0] for finding in results["colorization"]["findings"]] == [
        "ColorMNet",
        "Deep Exemplar",
    ]


def test_a_colorizer_that_computes_something_else_fails_the_selftest(place, capsys, monkeypatch):
    from hotpath.colorization import networks

    def slightly_off(network):
        for parameter in network.parameters():
            parameter.data *= 1.05
        return network

    monkeypatch.setattr(networks, "laid_out", slightly_off)
    monkeypatch.setattr(networks, "_networks", lambda: FreshCache())
    assert run("selftest", "color", "--models", ROOT / "demo" / "models", "--device", "cpu") == 1
    assert capsys.readouterr().out.count("FAILED") == 2


class FreshCache:
    def get_or_compute(self, key, make):
        return make()


def test_a_batch_read_in_the_wrong_layout_fails_the_selftest_and_every_folder_is_looked_at(place, capsys, monkeypatch):
    """Faces of interleaved rows would be other pictures'."""
    from hotpath.face.detection import Detector

    models = place / "models" / "insightface" / "models"
    demo_models = ROOT / "demo" / "models" / "insightface" / "models" / "antelopev2"
    for folder, name in (("a_recogniser", "glintr100.onnx"), ("detector", "scrfd_10g_bnkps.onnx")):
        (models / folder).mkdir(parents=True)
        (models / folder / name).write_bytes((demo_models / name).read_bytes())
    right = Detector._probe
    other = {"batch inside": "batch outside", "batch outside": "batch inside"}
    monkeypatch.setattr(Detector, "_probe", lambda self: other[right(self)])
    assert run("selftest", "faces", "--models", place / "models", "--device", "cpu", "--json") == 1
    (result,) = json.loads(capsys.readouterr().out)
    assert "a_recogniser holds no face detector" in result["failure"]
    (wrong,) = [f for f in result["findings"] if not f["passed"]]
    assert wrong["what"] == "detector: two pictures at once (batch outside) against one by one" and wrong["error"] > 0.1
    assert len(result["findings"]) >= 2 and all(f["what"].startswith("detector") for f in result["findings"])


def test_a_wrong_file_fails_the_selftest(place, capsys):
    import torch

    folder = place / "models" / "instantid"
    folder.mkdir(parents=True)
    torch.save({"something": torch.zeros(1)}, folder / "wrong.bin")
    assert run("selftest", "instantid", "--models", place / "models", "--device", "cpu") == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "wrong.bin" in out
