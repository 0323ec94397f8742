"""An identity: the face embeddings of one person, which travel without the photo they came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..host.whole_files import whole_file

FORMAT = "hotpath.identity.1"
MAX_PIXELS = 1 << 28  # a file from elsewhere must not ask for a drawing that fills the memory


@dataclass(frozen=True, eq=False)
class Identity:
    """Raw ArcFace embeddings of one person. Equal to itself only; `key` compares content.

    embeddings: [N, 1, D] float32 on the CPU, one per picture, not normalised.
    keypoints: [5, 2] pixels of the first face in a picture of `size` (height, width); None when unknown.
    recogniser: the network that made the embeddings, such as "antelopev2"; two recognisers do not mix.
    """

    embeddings: Tensor
    name: str = "identity"
    recogniser: str = "unknown"
    keypoints: Tensor | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.embeddings.shape)
        if len(shape) != 3 or shape[0] < 1 or shape[1] != 1:
            raise ValueError(f"an identity needs embeddings [N, 1, D] with N >= 1, not {shape}")
        if not torch.isfinite(self.embeddings).all():
            raise ValueError(f"the embeddings of {self.name!r} are not finite; use another picture of the face")
        if self.keypoints is not None and tuple(self.keypoints.shape) != (5, 2):
            raise ValueError(f"an identity needs key points [5, 2], not {tuple(self.keypoints.shape)}")
        if self.size is not None and not 0 < self.size[0] * self.size[1] <= MAX_PIXELS:
            raise ValueError(f"an identity's picture has 1 to {MAX_PIXELS} pixels, not {self.size[0]} x {self.size[1]}")

    def merged(self, other: Identity) -> Identity:
        """Both people's pictures as one identity. Raises ValueError when the recognisers differ."""
        if other.embeddings.shape[-1] != self.embeddings.shape[-1] or (
            "unknown" not in (self.recogniser, other.recogniser) and self.recogniser != other.recogniser
        ):
            raise ValueError(
                f"{self.name!r} was made with {self.recogniser} and {other.name!r} with {other.recogniser}: embeddings "
                "of different recognisers cannot be averaged. Make both with the same face model."
            )
        recogniser = self.recogniser if self.recogniser != "unknown" else other.recogniser
        return replace(self, embeddings=torch.cat((self.embeddings, other.embeddings)), recogniser=recogniser)

    def similarity(self, embeddings: Tensor) -> Tensor:
        """Cosine of each embedding [M, D] with the mean of this identity's, [M]."""
        mean = torch.nn.functional.normalize(self.embeddings[:, 0], dim=-1).mean(dim=0)
        return torch.nn.functional.cosine_similarity(embeddings.float(), mean[None], dim=-1)


def save_identity(identity: Identity, path: Path) -> Path:
    """Write `identity` as safetensors, whole or not at all. Raises OSError when the disk is full."""
    from safetensors.torch import save

    tensors = {"embeddings": identity.embeddings.float().contiguous()}
    if identity.keypoints is not None:
        tensors["keypoints"] = identity.keypoints.float().contiguous()
    metadata = {"format": FORMAT, "name": identity.name, "recogniser": identity.recogniser}
    if identity.size is not None:
        metadata["size"] = f"{identity.size[0]}x{identity.size[1]}"
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(tensors, metadata))
    return path


def load_identity(path: Path) -> Identity:
    """Read what `save_identity` wrote. Raises ValueError for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: as long as a tensor lies in the file, Windows lets nobody replace it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file ({error}); save the identity again.") from error
    if metadata.get("format") != FORMAT or "embeddings" not in tensors:
        raise ValueError(f"{path.name} is no saved identity: it holds {', '.join(sorted(tensors)[:3]) or 'nothing'}.")
    height, _, width = metadata.get("size", "").partition("x")
    keypoints = tensors.get("keypoints")
    try:
        return Identity(
            tensors["embeddings"].float(),
            metadata.get("name", path.stem),
            metadata.get("recogniser", "unknown"),
            keypoints.float() if keypoints is not None else None,
            (int(height), int(width)) if height.isdecimal() and width.isdecimal() else None,
        )
    except ValueError as error:
        raise ValueError(f"{path.name} is no usable identity: {error}.") from error
