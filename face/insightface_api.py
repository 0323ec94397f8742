"""Our analysers as other packs expect a FACEANALYSIS: insightface's FaceAnalysis, method by method.

Other node packs take the object from the loader node and call `get`, `prepare`, `det_model` and `models` on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .analyser import PictureAnalyser
from .faces import DetectionOptions, FaceError, Faces
from .linear_resize import resize

DEFAULT_SIZE = (640, 640)  # width, height


class Face(dict[str, Any]):
    """One face: a dict whose keys are attributes too. An attribute that is not there is None, as in insightface."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    @property
    def embedding_norm(self) -> Any:
        return None if self.get("embedding") is None else np.linalg.norm(self["embedding"])

    @property
    def normed_embedding(self) -> Any:
        return None if self.get("embedding") is None else self["embedding"] / self.embedding_norm


class DetectionModel:
    """What other packs touch as `det_model`: its sizes and thresholds, and `detect`."""

    taskname = "detection"

    def __init__(self, find: Callable[[NDArray[np.uint8], DetectionOptions], Faces]) -> None:
        self._find = find
        self.input_size: tuple[int, int] = DEFAULT_SIZE
        self.det_thresh = 0.5
        self.nms_thresh = 0.4

    def options(self, size: Any = None) -> DetectionOptions:
        """`size` is (width, height), also as a list of them, of which the largest side of the last counts."""
        given = np.asarray(self.input_size if size is None else size).reshape(-1, 2)[-1]
        return DetectionOptions(float(self.det_thresh), float(self.nms_thresh), (_side(given),))

    def prepare(self, ctx_id: int = 0, **settings: Any) -> None:
        if settings.get("input_size") is not None:
            self.input_size = tuple(int(v) for v in np.asarray(settings["input_size"]).reshape(-1, 2)[-1])  # type: ignore[assignment]
        for name in ("det_thresh", "nms_thresh"):
            if settings.get(name) is not None:
                setattr(self, name, settings[name])

    def detect(
        self, img: NDArray[np.uint8], input_size: Any = None, max_num: int = 0, metric: str = "default"
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Boxes with scores [N, 5] and key points [N, 5, 2] of a BGR picture [H, W, 3]."""
        faces = self._find(img, self.options(input_size))
        kept = faces.select(foremost(faces, max_num, metric))
        return torch.cat([kept.boxes, kept.scores[:, None]], 1).numpy(), kept.keypoints.numpy()


class RecognitionModel:
    """What other packs touch as `models["recognition"]`."""

    taskname = "recognition"

    def __init__(self, analyser: PictureAnalyser) -> None:
        self._analyser = analyser

    @property
    def input_size(self) -> tuple[int, int]:
        return self._analyser.recogniser.size, self._analyser.recogniser.size

    def prepare(self, ctx_id: int = 0, **settings: Any) -> None:
        """Nothing to prepare: the device was chosen when the analyser was loaded."""

    def get(self, img: NDArray[np.uint8], face: Any) -> Any:
        """The embedding [D] of `face` (with `kps`) in a BGR picture; also stored as `face.embedding`."""
        keypoints = torch.from_numpy(np.asarray(face["kps"], np.float32))[None]
        pixels = torch.from_numpy(np.ascontiguousarray(img[None, :, :, ::-1]))
        crop = self._analyser.aligned(pixels, torch.zeros(1, dtype=torch.long), keypoints)
        face["embedding"] = self._analyser.recogniser.embed(crop.to(self._analyser.device)).cpu().numpy()[0]
        return face["embedding"]

    def get_feat(self, imgs: Any) -> NDArray[np.float32]:
        """[N, D] of aligned BGR crops [H, W, 3] uint8, resized to what the recogniser takes."""
        size = self._analyser.recogniser.size
        crops = [np.asarray(i) for i in (imgs if isinstance(imgs, list) else [imgs])]
        rgb = [torch.from_numpy(np.ascontiguousarray(crop[None, ..., ::-1])) for crop in crops]
        fitting = [
            one if one.shape[1:3] == (size, size) else resize(one.round().clamp(0, 255).to(torch.uint8), size, size)
            for one in rgb
        ]
        batch = torch.cat([one.float() for one in fitting])
        return self._analyser.recogniser.embed(batch.to(self._analyser.device)).cpu().numpy()

    def compute_sim(self, feat1: Any, feat2: Any) -> float:
        a, b = np.ravel(feat1), np.ravel(feat2)
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


class CompatibleAnalyser(PictureAnalyser):
    """A PictureAnalyser that other packs can use as insightface's FaceAnalysis."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.det_model = DetectionModel(lambda bgr, options: self._look(bgr, options, embed=False))
        self.models: dict[str, Any] = {"detection": self.det_model}
        if self.folder.recogniser is not None:
            self.models["recognition"] = RecognitionModel(self)

    @property
    def det_thresh(self) -> float:
        return self.det_model.det_thresh

    @property
    def det_size(self) -> tuple[int, int]:
        return self.det_model.input_size

    @property
    def model_dir(self) -> str:
        return str(self.folder.path)

    def prepare(self, ctx_id: int = 0, det_thresh: float = 0.5, det_size: Any = DEFAULT_SIZE) -> None:
        """Set what `get` uses. The device stays the one the analyser was loaded for."""
        self.det_model.prepare(ctx_id, det_thresh=det_thresh, input_size=DEFAULT_SIZE if det_size is None else det_size)

    def get(self, img: NDArray[np.uint8], max_num: int = 0, det_metric: str = "default") -> list[Face]:
        """The faces of a BGR picture [H, W, 3] uint8, the best score first, embedded where the folder can."""
        embed = self.folder.recogniser is not None
        faces = self._look(img, self.det_model.options(), embed)
        found = []
        for i in foremost(faces, max_num, det_metric):
            face = Face(
                bbox=faces.boxes[i].numpy(), kps=faces.keypoints[i].numpy(), det_score=faces.scores[i].numpy()[()]
            )
            if faces.embeddings is not None:
                face["embedding"] = faces.embeddings[i].numpy()
            found.append(face)
        return found

    def _look(self, bgr: NDArray[np.uint8], options: DetectionOptions, embed: bool) -> Faces:
        if bgr.ndim != 3 or bgr.shape[2] != 3:
            raise FaceError(f"get() takes one BGR picture of [H, W, 3] bytes, not {list(bgr.shape)}.")
        rgb = torch.from_numpy(np.ascontiguousarray(bgr[:, :, ::-1], dtype=np.uint8))
        return self.analyse([rgb], embed=embed, options=options)[0]


def _side(size: Sequence[int] | NDArray[np.int64]) -> int:
    """A square side that holds (width, height), on the grid of the coarsest stride."""
    return max(32, -(-int(max(size)) // 32) * 32)


def foremost(faces: Faces, count: int, metric: str) -> list[int]:
    """All faces in order, or the `count` first by insightface's measure: area, less for being off centre."""
    if count <= 0 or len(faces) <= count:
        return list(range(len(faces)))
    centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
    middle = torch.tensor([faces.size[1] // 2, faces.size[0] // 2])
    values = faces.areas if metric == "max" else faces.areas - ((centres - middle) ** 2).sum(1) * 2.0
    return values.argsort(descending=True)[:count].tolist()
