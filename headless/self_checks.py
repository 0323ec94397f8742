"""The families' checks of their model files, for `hotpath selftest`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from .. import face, identity
from ..face.model_folder import find_model_folder
from ..face.onnx_graph import OnnxNetwork
from ..host import Host
from .selftest import Absent, Check, Finding, relative_difference, timed

ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EMBEDDING = 512


def check_instantid(host: Host) -> Iterator[Finding]:
    """Every adapter: tokens, keys and values on the device against the same on the CPU in float32."""
    names = host.model_files("instantid", (".bin", ".safetensors"))
    if not names:
        raise Absent(f"there is no adapter in {host.model_folders('instantid')[0]}")
    for name in names:
        adapter = identity.load_adapter(host.model_path("instantid", name))
        embedding = torch.randn(1, 1, adapter.embedding_dim, generator=torch.Generator().manual_seed(0)) * 20
        last = len(adapter.numbers) - 1
        with torch.no_grad():
            reference = adapter.image_proj_model.float()(embedding)
            keys = adapter.project(last, reference)[0]
        dtype = host.compute_dtype()
        managed = host.manage(adapter)
        prepared = identity.prepare(adapter, managed, embedding, dtype=dtype)
        yield Finding(f"{name}: tokens as {dtype}", relative_difference(prepared.cond, reference), ROUNDING[dtype])
        fast, _ = prepared.keys_values(last, torch.device("cpu"), dtype)
        # [0] is the conditional half.
        yield Finding(
            f"{name}: keys of block {last + 1} of {last + 1}", relative_difference(fast[0], keys[0]), ROUNDING[dtype]
        )


def check_faces(host: Host) -> Iterator[Finding]:
    """Detector and recogniser in torch against onnxruntime where it is installed, and batches against single runs."""
    folders = host.model_folders("insightface")
    if not face.model_names(folders):
        raise Absent(f"there is no face model in {folders[0] / 'models'}")
    device = host.device()
    for name in face.model_names(folders):
        folder = find_model_folder(folders, name)
        for file in filter(None, (folder.detector, folder.recogniser)):
            height, width = (side or 320 for side in file.inputs[0][1][2:])
            noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
            network = OnnxNetwork(file.path)
            with torch.no_grad():
                plain = [output.float() for output in network(noise)]
                network.to(device)
                on_device = noise.to(device)
                outputs, seconds = timed(partial(network, on_device), device)
            label = f"{name}/{file.path.name}"
            difference = max(relative_difference(a, b) for a, b in zip(outputs, plain, strict=True))
            yield Finding(f"{label}: {device} against cpu", difference, 1e-2, seconds=seconds)
            yield from _against_onnxruntime(label, file.path, noise, plain)
        analyser = face.load_analyser(folders, name=name, device=device, remember=False)
        pictures = torch.rand(2, 320, 320, 3, generator=torch.Generator().manual_seed(1))
        together = analyser.analyse(pictures, embed=False)
        single = [analyser.analyse(picture[None], embed=False)[0] for picture in pictures]
        counts = [abs(len(a) - len(b)) for a, b in zip(together, single, strict=True)]
        yield Finding(f"{name}: faces in a batch against one by one", max(counts), 0, "difference in number")


def _against_onnxruntime(label: str, path: Path, noise: torch.Tensor, ours: list[torch.Tensor]) -> Iterator[Finding]:
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {session.get_inputs()[0].name: noise.numpy()})
    difference = max(relative_difference(a, torch.from_numpy(b)) for a, b in zip(ours, theirs, strict=True))
    yield Finding(f"{label}: torch against onnxruntime, cpu", difference, 1e-3)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("faces", check_faces),
    ("instantid", check_instantid),
)
