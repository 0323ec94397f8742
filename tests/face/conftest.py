"""Face models, pictures and what insightface makes of them, for all tests of faces."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from found_faces import CPU
from hotpath import demo, face
from hotpath.demo.face_networks import random_model_folder
from hotpath.host.headless import HeadlessHost
from hotpath.nodes import faces as nodes
from PIL import Image

ROOT = Path(demo.__file__).parent


@pytest.fixture
def loaded(tmp_path):
    from hotpath import host

    mine = HeadlessHost(models=ROOT / "models", input_folder=tmp_path, device="cpu", show_progress=False)
    before = host.use(mine)
    yield nodes.HotpathFaceLoader().load("antelopev2", "torch", "fp32")[0]
    host.use(before)


@pytest.fixture(scope="session")
def three():
    return torch.from_numpy(np.array(Image.open(ROOT / "inputs" / "faces_drawn_three.png"))).float()[None] / 255


@pytest.fixture(scope="session")
def pictures():
    skimage_data = pytest.importorskip("skimage.data")
    return [skimage_data.astronaut(), skimage_data.chelsea(), skimage_data.coffee()]


@pytest.fixture(scope="session")
def roots(tmp_path_factory, pictures):
    """Model folders with random weights: batch inside (the published layout) and outside (newer exports)."""
    cv2 = pytest.importorskip("cv2")
    shown = torch.from_numpy(cv2.resize(pictures[0], (640, 640)).astype(np.float32)).permute(2, 0, 1)[None]
    found = {}
    for layout in ("inside", "outside"):
        found[layout] = tmp_path_factory.mktemp(layout)
        # r18 at a quarter of the width: the contract counts here, not the size.
        random_model_folder(found[layout], (shown - 127.5) / 128, batch_outside=layout == "outside")
    return found


@pytest.fixture(scope="session")
def reference(roots):
    from insightface.app import FaceAnalysis

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = FaceAnalysis("antelopev2", root=str(roots["inside"]), providers=["CPUExecutionProvider"])
    app.prepare(0, det_size=(640, 640))
    known: dict = {}

    def once(picture):
        """Every engine is compared on the same pictures."""
        key = picture.shape, picture.tobytes()
        if key not in known:
            known[key] = app.get(picture)
        return known[key]

    app.get_once = once
    return app


@pytest.fixture(scope="session")
def analysers(roots):
    return {
        (engine, layout): face.load_analyser([root], engine=engine, device=CPU, remember=False)
        for layout, root in roots.items()
        for engine in ("torch", "onnxruntime")
    }
