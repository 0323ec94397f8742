"""The families' checks of their model files, for `hotpath selftest`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from .. import face, identity
from ..face.engine_diagnosis import why_not
from ..face.model_folder import find_model_folder
from ..face.onnx_graph import OnnxNetwork
from ..face.onnxruntime_engine import session_options
from ..host import Host
from ..host.errors import kind_and_line
from ..products.metal import order_on
from .colorization_check import check_colorization
from .selftest import Absent, Check, Finding, relative_difference, timed
from .vision_language_check import check_vision_language

ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def check_instantid(host: Host) -> Iterator[Finding]:
    """Every adapter: tokens, keys and values on the device against the same on the CPU in float32."""
    names = host.model_files("instantid", (".bin", ".safetensors"))
    if not names:
        raise Absent(f"there is no adapter in {host.model_folders('instantid')[0]}")
    dtype, device = host.compute_dtype(), host.device()
    for name in names:
        path = host.model_path("instantid", name)
        exact = identity.load_adapter(path, torch.float32)
        embedding = torch.randn(1, 1, exact.embedding_dim, generator=torch.Generator().manual_seed(0)) * 20
        last = len(exact.numbers) - 1
        with torch.no_grad():
            reference = exact.image_proj_model(embedding)
            keys = exact.project(last, reference)[0]
        adapter = identity.load_adapter(path, dtype)
        started = time.perf_counter()
        prepared = identity.prepare(adapter, host.manage(adapter), embedding, dtype=dtype)
        seconds = time.perf_counter() - started
        label = f"{name} on {device} as {str(dtype).removeprefix('torch.')}"
        difference = relative_difference(prepared.cond, reference)
        yield Finding(f"{label}: tokens", difference, ROUNDING[dtype])
        fast, _ = prepared.keys_values(last, torch.device("cpu"), dtype)
        # Row 0 is the face's, row 1 the unconditional one.
        difference = relative_difference(fast[0], keys[0])
        what = f"{label}: keys of block {last + 1}; all {last + 1} blocks prepared"
        yield Finding(what, difference, ROUNDING[dtype], seconds=seconds)


def check_faces(host: Host) -> Iterator[Finding]:
    """Detector and recogniser in torch against onnxruntime where it is installed, and batches against single runs.

    Each model folder for itself: one that cannot be used fails the check when the others have been looked at.
    """
    folders = host.model_folders("insightface")
    names = face.model_names(folders)
    if not names:
        raise Absent(f"there is no face model in {folders[0] / 'models'}")
    unusable = []
    for name in names:
        try:
            yield from _check_face_model(folders, name, host.device())
        except Exception as error:
            unusable.append(f"{name}: {error if isinstance(error, face.FaceError) else kind_and_line(error)}")
    if unusable:
        raise face.FaceError(" ".join(unusable))


def _check_face_model(folders: Sequence[Path], name: str, device: torch.device) -> Iterator[Finding]:
    folder = find_model_folder(folders, name)
    for file in filter(None, (folder.detector, folder.recogniser)):
        height, width = (side or 320 for side in file.size)
        noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        network = OnnxNetwork(file.path, order_on(device))
        with torch.no_grad():
            plain = [output.float() for output in network(noise)]
            network.to(device)
            on_device = noise.to(device)
            outputs, seconds = timed(partial(network, on_device), device)
        label = f"{name}/{file.path.name}"
        difference = max(relative_difference(a, b) for a, b in zip(outputs, plain, strict=True))
        what = "the same twice" if device.type == "cpu" else f"{device} against cpu"
        yield Finding(f"{label}: {what}", difference, 1e-2, seconds=seconds)
        yield from _against_onnxruntime(label, file.path, noise, plain)
    detector = face.load_analyser(folders, name=name, device=device, remember=False).detector
    height, width = detector.fixed_size or (320, 320)
    # Numbers and not faces: noise has hardly any, and rows of the wrong picture would go unseen.
    canvas = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(detector.runner.device)
    together = detector.predict(canvas)
    single = [torch.cat(parts) for parts in zip(*(detector.predict(one[None]) for one in canvas), strict=True)]
    difference = max(relative_difference(a, b) for a, b in zip(together, single, strict=True))
    yield Finding(f"{name}: two pictures at once ({detector.layout}) against one by one", difference, 1e-2)


def _against_onnxruntime(label: str, path: Path, noise: torch.Tensor, ours: list[torch.Tensor]) -> Iterator[Finding]:
    if why_not(face.PROVIDERS["CPU"]) is not None:
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {session.get_inputs()[0].name: noise.numpy()})
    difference = max(relative_difference(a, torch.from_numpy(b)) for a, b in zip(ours, theirs, strict=True))
    yield Finding(f"{label}: torch against onnxruntime, cpu", difference, 1e-3)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("faces", check_faces),
    ("instantid", check_instantid),
    ("colorization", check_colorization),
    ("vision-language", check_vision_language),
)
