"""Teaches the demo's InstantID resampler to read a face embedding, before the portrait model is trained with it.

    python -m hotpath.demo.train_portrait_resampler --work FOLDER [--people 2500]

From noise alone the whole of it learns place and words first and passes the face over: sixty layers away, it helps too
little. So each of the sixteen tokens is first made to hold all that a drawn person varies, as a linear function.
Writes FOLDER/resampler.pt.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import face
from ..identity.resampler import Resampler
from .comfy_nodes.hotpath_demo.portraits import CONTEXT
from .face_drawings import Person
from .muon import Muon
from .portrait_drawings import reference_crop

MODELS = Path(__file__).resolve().parent / "models"
BATCH, STEPS, RATE = 128, 1200, 0.02


def looks(person: Person) -> list[float]:
    """Everything that tells drawn people apart, colours in 0..1."""
    values: list[float] = []
    for value in dataclasses.astuple(person):
        values += [v / 255 for v in value] if isinstance(value, tuple) else [value]
    return values


def draw(count: int, seed: int = 77) -> tuple[Tensor, Tensor]:
    """Embeddings [N, 512] and looks [N, 20], the latter with mean 0 and deviation 1."""
    rng = np.random.default_rng(seed)
    analyser = face.load_analyser([MODELS / "insightface"], engine="torch", device=torch.device("cpu"), remember=False)
    people = [Person.random(rng) for _ in range(count)]
    embeddings = []
    with torch.inference_mode():
        for start in range(0, count, 64):
            crops = torch.stack([reference_crop(p, rng) for p in people[start : start + 64]])
            embeddings.append(analyser.recogniser.embed(crops))
    found = torch.tensor([looks(p) for p in people])
    return torch.cat(embeddings).clone(), (found - found.mean(0)) / found.std(0)


def train(resampler: Resampler, embeddings: Tensor, wanted: Tensor, held_out: int = 200) -> float:
    """How much of the looks of `held_out` people, the last ones, the mean token tells: 1 is all, 0 nothing."""
    torch.manual_seed(0)
    head = nn.Linear(CONTEXT, wanted.shape[1])
    both = nn.ModuleList([resampler, head])
    optimiser = Muon(both)
    for step in range(STEPS):
        rows = torch.randint(len(embeddings) - held_out, (BATCH,))
        given = embeddings[rows] + 0.15 * embeddings.std() * torch.randn(BATCH, embeddings.shape[1])
        loss = F.mse_loss(head(resampler(given[:, None])), wanted[rows, None].expand(-1, 16, -1))
        both.zero_grad()
        loss.backward()
        optimiser.step(RATE * min(1, (step + 1) / 20) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))))
        if step % 200 == 199:
            print(f"step {step + 1}, loss {float(loss.detach()):.3f}", flush=True)
    with torch.inference_mode():
        told = head(resampler(embeddings[-held_out:, None])).mean(1)
        return 1 - float(F.mse_loss(told, wanted[-held_out:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--people", type=int, default=2500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    resampler = Resampler(64, 2, 1, 16, 512, CONTEXT, 128)
    told = train(resampler, *draw(options.people))
    print(f"of people it never saw, the tokens tell {told:.0%} of the looks")
    torch.save(resampler.state_dict(), options.work / "resampler.pt")


if __name__ == "__main__":
    main()
