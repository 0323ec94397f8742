"""ArcFace (arXiv:1801.07698): aligned crops to identity embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from .faces import FaceError
from .onnx_outline import Outline
from .runner import Run, Runner, joined, replayed

BATCH = 16


class Recogniser:
    """A recognition network. `size` is the side of the crops it takes, `width` the length of its embeddings."""

    def __init__(self, runner: Runner, file: Outline) -> None:
        """Runs the network once on two crops. Raises FaceError when it does not give one vector per crop."""
        self.runner = runner
        self.file = file
        self.size = file.size[0] or 112
        # MXNet exports carry their own normalisation as the first nodes, by name.
        subtracts = any(name.startswith(("Sub", "_minus")) for name in file.first_nodes)
        multiplies = any(name.startswith(("Mul", "_mul")) for name in file.first_nodes)
        self.mean, self.deviation = (0.0, 1.0) if subtracts and multiplies else (127.5, 127.5)
        blank = torch.zeros(2, 3, self.size, self.size, device=runner.device)
        self.batches = True
        try:
            vectors = runner.run(blank)[0]
        except Exception:  # a file exported for a batch of one; every engine raises its own error
            self.batches = False
            vectors = torch.cat([runner.run(blank[:1])[0]] * 2)
        if vectors.dim() != 2 or vectors.shape[0] != 2:
            raise FaceError(
                f"{file.path} is no face recogniser (its output is {list(vectors.shape)} for two crops): put the right "
                "file there."
            )
        self.width = int(vectors.shape[1])

    def embed(self, crops: Tensor) -> Tensor:
        """[F, D] raw embeddings on the device, of crops [F, size, size, 3] float RGB in 0..255."""
        step = BATCH if self.batches else 1
        vectors = [replayed(self.runner, "embed", self._embed, part) for part in torch.split(crops, step)]
        return joined(vectors)

    def _embed(self, run: Run, crops: Tensor) -> list[Tensor]:
        return run(crops.permute(0, 3, 1, 2).sub(self.mean).mul(1.0 / self.deviation))
