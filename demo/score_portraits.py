"""How alike the people are whom the demo's portrait model draws: cosine of the demo's recogniser, by weight.

    python -m hotpath.demo.score_portraits --work FOLDER

Of the portraits that `train_portraits` held out, those of one person: the face given is another drawing of that person,
pose and words are the portrait's, the seed is the same for every weight.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import face
from ..face import DetectionOptions, FaceChoice
from .comfy_nodes.hotpath_demo import portraits
from .comfy_nodes.hotpath_demo.portraits import PixelCoder
from .train_portraits import HELD_OUT, Portraits, Samples, schedule

MODELS = Path(__file__).resolve().parent / "models"
WEIGHTS = (0.0, 0.4, 0.8, 1.2)


class _Everything:
    """In place of a random generator: no portrait is mirrored, no word left out."""

    def random(self, count: int | None = None) -> Any:
        return 0.999 if count is None else np.full(count, 0.999)


@torch.no_grad()
def sample(
    model: Portraits, batch: dict[str, Any], power: Tensor, count: int = 12, cfg: float = 2.0, **changes: Any
) -> Tensor:
    """Latents by deterministic steps, for a look while it trains."""
    n = len(batch["latents"])
    x = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    given = batch["embeddings"].transpose(0, 1)
    tokens = torch.cat(
        [model.adapter.resampler(e.reshape(2 * n, 1, 512)).unflatten(0, (2, n)) for e in (given, 0 * given)], 1
    )
    empty, nothing = portraits.embed_text("")
    text = torch.cat([batch["text"], empty.expand(n, -1, -1)])
    pooled = torch.cat([batch["pooled"], nothing.expand(n, -1)])
    hint, left = (torch.cat([batch[k]] * 2) for k in ("hint", "left"))
    weight, strength = (torch.full((2 * n,), changes.get(k, 0.9)) for k in ("weight", "strength"))
    times = torch.linspace(999, 0, count + 1).long()
    for now, later in pairwise(times):
        steps = now.expand(2 * n).float()
        v = model(torch.cat([x, x]), steps, text, pooled, tokens, hint, weight, strength, left)
        v = v[n:] + cfg * (v[:n] - v[n:])
        a, s = power[now].sqrt(), (1 - power[now]).sqrt()
        x0, noise = a * x - s * v, s * x + a * v
        x = power[later].sqrt() * x0 + (1 - power[later]).sqrt() * noise if later > 0 else x0
    return x


def likeness(analyser: Any, pictures: Tensor, given: Tensor) -> tuple[int, float]:
    """Faces found in [N, 3, H, W], and the mean cosine to the embeddings [N, 512]; a face that is not found counts as 0."""
    options = DetectionOptions(sizes=(256,))
    found = analyser.analyse(pictures.movedim(1, -1), choose=FaceChoice.largest(), options=options, embed=True)
    cosines = [
        float(normalize(one.embeddings) @ normalize(who[None]).t()) if len(one) else 0.0
        for one, who in zip(found, given, strict=True)
    ]
    return sum(len(one) > 0 for one in found), float(np.mean(cosines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--cfg", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    coder = PixelCoder()
    coder.load_state_dict(torch.load(options.work / "pixels.pt", weights_only=True))
    drawn = torch.load(options.work / "portraits.pt", weights_only=True)
    alone = [i for i in range(len(drawn["texts"]) - HELD_OUT, len(drawn["texts"])) if not drawn["two"][i]][
        : options.people
    ]
    chosen = {k: [v[i] for i in alone] if k == "texts" else v[alone] for k, v in drawn.items()}
    model = Portraits()
    model.load_state_dict(torch.load(options.work / "portraits_model.pt", weights_only=True))
    model.stand(10)
    batch = Samples(chosen, coder).batch(torch.arange(len(alone)), _Everything())  # type: ignore[arg-type]
    analyser = face.load_analyser([MODELS / "insightface"], engine="torch", device=torch.device("cpu"), remember=False)
    given = chosen["embeddings"][:, 0].float()
    with torch.inference_mode():
        truth = coder.decode(batch["latents"]).clamp(0, 1)
        rows = [("the portrait through the coder", truth)]
        for weight in WEIGHTS:
            latents = sample(model, batch, schedule(), cfg=options.cfg, weight=weight)
            rows.append((f"weight {weight:g}", coder.decode(latents).clamp(0, 1)))
        for name, pictures in rows:
            count, cosine = likeness(analyser, pictures, given)
            print(f"{name}: {count} of {len(alone)} faces found, mean cosine {cosine:.3f}", flush=True)


if __name__ == "__main__":
    main()
