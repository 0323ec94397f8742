"""The demo's trained models, scored on drawn faces they never saw and on the demo photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hotpath import demo, face
from hotpath.demo.face_drawings import Person, draw_face, drawn_scene, plain_background
from hotpath.demo.face_networks import IResNet, Scrfd
from hotpath.face import DetectionOptions, FaceChoice
from PIL import Image

pytestmark = pytest.mark.xdist_group("face_demo")
ROOT = Path(demo.__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def analyser():
    return face.load_analyser([ROOT / "models" / "insightface"], engine="torch", device=CPU, remember=False)


def picture(name):
    return torch.from_numpy(np.array(Image.open(ROOT / "inputs" / name).convert("RGB"))).float() / 255


def overlap(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def test_held_out_drawn_faces_are_found_with_their_key_points(analyser):
    rng = np.random.default_rng(31337)
    scenes = [drawn_scene(rng, plain_background(rng, (384, 384)), 2, 24, 0.4) for _ in range(24)]
    batch = torch.from_numpy(np.stack([np.array(s[0]) for s in scenes]))
    results = analyser.analyse(batch, embed=False, options=DetectionOptions(sizes=(384,)))
    hits = invented = drawn = 0
    errors = []
    for (_, faces), found in zip(scenes, results, strict=True):
        drawn += len(faces)
        free = list(faces)
        for box, points in zip(found.boxes.tolist(), found.keypoints.numpy(), strict=True):
            match = next((f for f in free if overlap(box, f.box) > 0.5), None)
            if match is None:
                invented += 1
                continue
            free.remove(match)
            hits += 1
            errors.append(np.abs(points - match.keypoints).mean() / (match.box[2] - match.box[0]))
    assert drawn > 30
    assert hits / drawn >= 0.9, (hits, drawn)
    assert invented / drawn <= 0.1, (invented, drawn)
    assert np.mean(errors) < 0.04


def test_the_photo_has_one_face_with_its_key_points_where_they_are(analyser):
    found = analyser.analyse([picture("astronaut.png")], choose=None)[0]
    assert len(found) == 1 and found.detector_size == 640 and found.scores[0] > 0.9
    by_eye = torch.tensor([[203.0, 101], [246.6, 103.6], [223.6, 127], [204.4, 140], [244.4, 140.4]])
    assert (found.keypoints[0] - by_eye).abs().max() < 4
    assert found.embeddings.shape == (1, 512)


def test_insightface_reads_the_same_files_to_the_same_faces(analyser):
    app = pytest.importorskip("insightface.app").FaceAnalysis(
        "antelopev2", root=str(ROOT / "models" / "insightface"), providers=["CPUExecutionProvider"]
    )
    app.prepare(0, det_size=(640, 640))
    for name in ("astronaut.png", "faces_drawn_three.png"):
        pixels = np.array(Image.open(ROOT / "inputs" / name).convert("RGB"))
        wanted = app.get(np.ascontiguousarray(pixels[..., ::-1]))
        found = analyser.analyse([torch.from_numpy(pixels)], options=DetectionOptions(sizes=(640,)))[0]
        assert len(found) == len(wanted) > 0
        for i, one in enumerate(wanted):
            assert np.abs(found.boxes[i].numpy() - one.bbox).max() < 0.5
            assert np.abs(found.keypoints[i].numpy() - one.kps).max() < 0.5
            assert torch.cosine_similarity(found.embeddings[i], torch.from_numpy(one.embedding), dim=0) > 0.999


def test_a_drawn_person_is_recognised_among_others(analyser):
    rng = np.random.default_rng(11)
    people = [Person.random(rng) for _ in range(12)]

    def portrait(person):
        scene = plain_background(rng, (256, 256))
        draw_face(scene, person, (128.0, 128.0), float(rng.uniform(70, 110)), float(rng.normal() * 0.15))
        return torch.from_numpy(np.array(scene))

    options = DetectionOptions(sizes=(256,))
    first, second = (
        analyser.analyse(torch.stack([portrait(p) for p in people]), choose=FaceChoice.highest_score(), options=options)
        for _ in range(2)
    )
    both = [i for i in range(12) if len(first[i]) and len(second[i])]
    assert len(both) >= 10
    a = torch.nn.functional.normalize(torch.cat([first[i].embeddings for i in both]))
    b = torch.nn.functional.normalize(torch.cat([second[i].embeddings for i in both]))
    cosine = a @ b.t()
    assert (cosine.argmax(1) == torch.arange(len(both))).float().mean() >= 0.8
    assert cosine.diag().mean() > cosine.mean() + 0.4


def test_the_files_are_small_and_keep_the_published_contract():
    folder = ROOT / "models" / "insightface" / "models" / "antelopev2"
    for name, shape, outputs in (
        ("scrfd_10g_bnkps.onnx", (1, 3, None, None), ["448", "471", "494", "451", "474", "497", "454", "477", "500"]),
        ("glintr100.onnx", (None, 3, 112, 112), ["1333"]),
    ):
        found = face.onnx_outline.outline(folder / name)
        assert (folder / name).stat().st_size < 1_500_000
        assert found.inputs == (("input.1", shape),)
        assert [o[0] for o in found.outputs] == outputs


def test_the_true_size_networks_have_the_published_number_of_weights():
    assert abs(sum(p.numel() for p in Scrfd(1.0).parameters()) - 4.23e6) < 2e4
    assert abs(sum(p.numel() for p in IResNet(100, 1.0).parameters()) - 65.2e6) < 3e5
