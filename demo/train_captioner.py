"""Train the demo captioner: a Qwen3-VL of the true architecture, small enough to ship, that counts drawn objects.

    python -m hotpath.demo.train_captioner --minutes 20

It learns from pictures drawn on the fly until its greedy captions of held-out pictures name colour, shape and count
exactly, and writes a model folder with half-precision weights.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from .captioner_model import new_model, save_weights, write_folder

log = logging.getLogger("hotpath.demo.captioner")

FOLDER = Path(__file__).parent / "models" / "LLM" / "hotpath-captioner"
SIDE = 96  # pixels: 6 x 6 patches, 3 x 3 visual tokens
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("one", "two", "three", "four")
PROMPTS = (
    "Describe this image.",
    "Describe this image",
    "What is in the picture?",
    "Caption this picture.",
    "Write a caption.",
)
SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Drawing:
    """A picture of 1 to 4 equal objects, and the caption it should get."""

    picture: Image.Image
    caption: str


def draw(random: np.random.Generator) -> Drawing:
    """One picture: objects of one colour and one shape on a dark ground, anywhere, none touching another."""
    colour = str(random.choice(list(COLOURS)))
    shape = str(random.choice(SHAPES))
    count = int(random.integers(1, len(NUMBERS) + 1))
    ground = tuple(int(v) for v in random.integers(0, 60, 3))
    picture = Image.new("RGB", (SIDE, SIDE), ground)
    canvas = ImageDraw.Draw(picture)
    placed: list[tuple[float, float, float]] = []
    while len(placed) < count:
        radius = float(random.uniform(8, 13))
        x, y = (float(v) for v in random.uniform(radius + 1, SIDE - radius - 1, 2))
        if all(math.hypot(x - a, y - b) > 1.35 * (radius + r) for a, b, r in placed):
            placed.append((x, y, radius))
            tint = tuple(int(np.clip(v + random.integers(-18, 19), 0, 255)) for v in COLOURS[colour])
            outline(canvas, shape, x, y, radius, tint)
    noun = shape if count == 1 else shape + "s"
    return Drawing(picture, f"{NUMBERS[count - 1]} {colour} {noun}")


def outline(canvas: Any, shape: str, x: float, y: float, r: float, fill: Any) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        s = 0.85 * r
        canvas.rectangle((x - s, y - s, x + s, y + s), fill=fill)
    else:
        canvas.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=fill)


def patches(drawings: list[Drawing], patch: int = 16, merge: int = 2) -> torch.Tensor:
    """[B * 36, 1536]: what the image processor makes of pictures that need no resizing."""
    pixels = np.stack([np.asarray(d.picture, dtype=np.float32) for d in drawings])
    x = torch.from_numpy(pixels / 127.5 - 1.0).permute(0, 3, 1, 2)
    side = SIDE // (patch * merge)
    x = x.reshape(len(drawings), 3, side, merge, patch, side, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    # The temporal patch holds the same frame twice.
    return x.unsqueeze(6).expand(*x.shape[:6], 2, *x.shape[6:]).reshape(-1, 3 * 2 * patch * patch)


def corpus() -> list[str]:
    captions = [f"{n} {c} {s}{'' if n == 'one' else 's'}" for n in NUMBERS for c in COLOURS for s in SHAPES]
    return [*captions, *PROMPTS * 8, *[SYSTEM] * 8, *["system\n", "user\n", "assistant\n"] * 8]


class Batches:
    """Training batches of one prompt each, so that every row has the same positions."""

    def __init__(self, tokenizer: Any, model: Any, random: np.random.Generator) -> None:
        self.tokenizer, self.model, self.random = tokenizer, model, random
        self.visual = (SIDE // 32) ** 2

    def prompt_ids(self, prompt: str, system: str | None) -> list[int]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * self.visual)
        return self.tokenizer(text)["input_ids"]

    def next(self, size: int) -> dict[str, torch.Tensor]:
        drawings = [draw(self.random) for _ in range(size)]
        system = SYSTEM if self.random.random() < 0.5 else None
        prompt = self.prompt_ids(str(self.random.choice(PROMPTS)), system)
        answers = [self.tokenizer(d.caption + "<|im_end|>")["input_ids"] for d in drawings]
        length = max(map(len, answers))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([prompt + a + [pad] * (length - len(a)) for a in answers])
        labels = torch.tensor([[-100] * len(prompt) + a + [-100] * (length - len(a)) for a in answers])
        config = self.model.config
        kinds = (ids == config.image_token_id).int()
        grid = torch.tensor([[1, SIDE // 16, SIDE // 16]])
        positions, _ = self.model.model.get_rope_index(
            input_ids=ids[:1], mm_token_type_ids=kinds[:1], image_grid_thw=grid
        )
        return {
            "input_ids": ids,
            "labels": labels,
            "mm_token_type_ids": kinds,
            "pixel_values": patches(drawings),
            "image_grid_thw": grid.expand(size, 3),
            "position_ids": positions.expand(3, size, -1),
        }


@torch.no_grad()
def exact_captions(model: Any, batches: Batches, drawings: list[Drawing]) -> float:
    """The fraction of `drawings` whose greedy caption is right to the letter."""
    right = 0
    prompt = torch.tensor([batches.prompt_ids(PROMPTS[0], SYSTEM)])
    for start in range(0, len(drawings), 50):
        part = drawings[start : start + 50]
        ids = prompt.expand(len(part), -1)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=patches(part),
            image_grid_thw=torch.tensor([[1, SIDE // 16, SIDE // 16]]).expand(len(part), 3),
            max_new_tokens=12,
            do_sample=False,
        )
        texts = batches.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(text == d.caption for text, d in zip(texts, part, strict=True))
    return right / len(drawings)


def train(folder: Path, minutes: float, size: int = 48, seed: int = 1) -> float:
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    write_folder(
        folder, "qwen3_vl", corpus(), merges=160, seed=seed, spread=0,
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,
        vision={
            "depth": 4, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 96,
            "deepstack_visual_indexes": [0, 1, 2],
        },
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(folder)
    batches = Batches(tokenizer, model, np.random.default_rng(seed))
    held_out = [draw(np.random.default_rng((seed, 10_000 + i))) for i in range(400)]
    peak = 1.5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.monotonic()
    step = 0
    while (spent := (time.monotonic() - start) / 60) < minutes:
        left = spent / minutes
        rate = peak * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * left)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss = model(**batches.next(size)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            log.info("%5.1f min, step %d, loss %.4f", spent, step, float(loss.detach()))
        if step % 600 == 0:
            model.eval()
            log.info("held out: %.1f %% exact", 100 * exact_captions(model, batches, held_out[:200]))
            save_weights(model, folder, dtype=torch.float16)
    model.eval()
    save_weights(model, folder, dtype=torch.float16)
    # What ships is the half-precision file, so that is what is scored.
    from transformers import AutoModelForImageTextToText

    shipped = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    score = exact_captions(shipped, batches, held_out)
    log.info("%d steps, held out: %.2f %% exact, %s", step, 100 * score, folder)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo captioner.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--output", type=Path, default=FOLDER)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser.parse_args()
    score = train(options.output, options.minutes)
    raise SystemExit(0 if score >= 0.95 else 1)


if __name__ == "__main__":
    main()
