"""InstantID on the tiny SDXL in a real ComfyUI: the same graphs for our nodes and, when goldens are made, the original's.

`nodes` is a NODE_CLASS_MAPPINGS. Everything is called by keyword, as ComfyUI does.
"""

from __future__ import annotations

from typing import Any

import torch
from foreign_faces import ForeignFaceAnalysis

STEPS, CFG, SIZE = 3, 4.0, 16


def photo(seed: int, height: int = 96, width: int = 80, count: int = 1) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def mask(seed: int, height: int = 96, width: int = 64, count: int = 1) -> torch.Tensor:
    return (torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) > 0.4).float()


def sample(
    model: Any,
    positive: Any,
    negative: Any,
    batch: int = 1,
    size: tuple[int, int] = (SIZE, SIZE),
    steps: int = STEPS,
) -> torch.Tensor:
    import comfy.sample

    latent = torch.zeros(batch, 4, *size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(11))
    return comfy.sample.sample(
        model, noise, steps, CFG, "euler", "normal", positive, negative, latent, disable_pbar=True, seed=11
    )


class Bench:
    """The tiny models and one set of node classes."""

    def __init__(self, nodes: dict[str, type], instantid: Any, tiny: Any, model: Any, control_net: Any) -> None:
        self.nodes, self.instantid, self.model, self.control_net = nodes, instantid, model, control_net
        self.faces = ForeignFaceAnalysis()
        self.positive, self.negative = tiny.encode_text("a portrait"), tiny.encode_text("blurry")

    def call(self, node: str, **inputs: Any) -> Any:
        instance = self.nodes[node]()
        return getattr(instance, instance.FUNCTION)(**inputs)

    def common(self, **changes: Any) -> dict[str, Any]:
        return {
            "instantid": self.instantid,
            "insightface": self.faces,
            "control_net": self.control_net,
            "image": photo(1),
            "model": self.model,
            "positive": self.positive,
            "negative": self.negative,
            "start_at": 0.0,
            "end_at": 1.0,
            **changes,
        }

    def apply(self, **changes: Any) -> Any:
        return self.call("ApplyInstantID", **self.common(**{"weight": 0.8, **changes}))

    def advanced(self, **changes: Any) -> Any:
        defaults = {"ip_weight": 0.7, "cn_strength": 0.5, "noise": 0.2, "combine_embeds": "average"}
        return self.call("ApplyInstantIDAdvanced", **self.common(**{**defaults, **changes}))

    def patch(self, **changes: Any) -> Any:
        inputs = {"weight": 1.0, "start_at": 0.0, "end_at": 1.0, "noise": 0.0, "image": photo(1), "model": self.model}
        return self.call(
            "InstantIDAttentionPatch", instantid=self.instantid, insightface=self.faces, **{**inputs, **changes}
        )


def stacked(bench: Bench) -> torch.Tensor:
    left, right = mask(3), 1 - mask(3)
    model, pos1, neg1 = bench.apply(mask=left)
    model, pos2, neg2 = bench.apply(image=photo(2), model=model, mask=right)
    return sample(model, pos1 + pos2, neg1 + neg2)


def patch_and_control(bench: Bench) -> torch.Tensor:
    model, embeds = bench.patch(weight=0.9, noise=0.35, mask=mask(7))
    drawing = bench.call("FaceKeypointsPreprocessor", faceanalysis=bench.faces, image=photo(5))[0]
    positive, negative = bench.call(
        "ApplyInstantIDControlNet",
        face_embeds=embeds,
        control_net=bench.control_net,
        image_kps=drawing,
        positive=bench.positive,
        negative=bench.negative,
        strength=0.6,
        start_at=0.1,
        end_at=0.9,
        mask=mask(8),
    )
    return sample(model, positive, negative)


SCENARIOS = {
    "apply": lambda b: sample(*b.apply()),
    "advanced": lambda b: sample(*b.advanced()),
    "attention_patch": lambda b: sample(b.patch()[0], b.positive, b.negative),
    "negative_weight": lambda b: sample(b.patch(weight=-0.7)[0], b.positive, b.negative),
    "patch_and_control": patch_and_control,
    "mask": lambda b: sample(*b.advanced(mask=mask(4))),
    "mask_batch": lambda b: sample(*b.advanced(mask=mask(4, count=3)), batch=2),
    "range": lambda b: sample(*b.advanced(start_at=0.3, end_at=0.8)),
    "noise": lambda b: sample(*b.advanced(noise=1.0)),
    "average": lambda b: sample(*b.advanced(image=photo(9, count=3))),
    "norm_average": lambda b: sample(*b.advanced(image=photo(9, count=3), combine_embeds="norm average")),
    "concat": lambda b: sample(*b.advanced(image=photo(9, count=2), combine_embeds="concat")),
    "batch": lambda b: sample(*b.apply(), batch=2),
    "wide": lambda b: sample(*b.apply(mask=mask(6)), size=(10, 26)),
    "own_pose": lambda b: sample(*b.apply(image_kps=photo(12, 120, 104))),
    "pose_batch": lambda b: sample(*b.apply(image_kps=photo(13, 96, 96, count=2)), batch=2),
    "drawn_pose": lambda b: sample(*b.apply(image_kps=torch.full((1, 64, 64, 3), 0.25))),
    "stacked": stacked,
}
