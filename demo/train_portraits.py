"""Trains the demo's InstantID: a portrait model in SDXL's layout, its adapter and its IdentityNet, together.

    python -m hotpath.demo.train_portrait_pixels --work FOLDER
    python -m hotpath.demo.train_portraits --work FOLDER [--minutes 60]

Noise prediction as velocity on SDXL's schedule. Text, face and pose are left out of some samples each.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..identity.resampler import Resampler
from .comfy_nodes.hotpath_demo import portraits
from .comfy_nodes.hotpath_demo.portraits import CONTEXT, POOLED, POSE_ONLY, SHALLOW, PixelCoder, hint_features
from .muon import Muon

BATCH, RATE = 40, 0.02
HELD_OUT = 100
ADAPTER = Path(__file__).resolve().parent / "models" / "instantid" / "demo_adapter.safetensors"
Block = tuple[str, int, int]


class HintLayer(nn.Module):
    """The only layer of IdentityNet's hint block that learns; the others come with `hint_features`."""

    def __init__(self, last: nn.Conv2d) -> None:
        super().__init__()
        self.last = nn.Conv2d(48, last.out_channels, 3, padding=1)

    def forward(self, features: Tensor, *_: Any) -> Tensor:
        return self.last(features)


class Row(nn.Module):
    """A row of one transformer that stands there `times` times over, each time with its part of the output."""

    def __init__(self, transformer: nn.Module, deep: int) -> None:
        super().__init__()
        self.deep, self.times = deep, 1
        self.add_module("0", transformer)
        for output in (transformer.attn1.to_out[0], transformer.attn2.to_out[0], transformer.ff.net[2]):
            output.register_forward_hook(lambda _module, _given, result: result / self.times)

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Any:
        return iter([self.get_submodule("0")] * self.times)


class Adapter(nn.Module):
    """Face embeddings to tokens, and tokens to keys and values of each cross-attention of the shallow UNet."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.resampler = Resampler(64, 2, 1, 16, 512, CONTEXT, 128)
        self.blocks = [
            (row, number, attention.to_k.out_features) for row, number, attention in portraits.cross_attentions(unet)
        ]
        self.keys_values = nn.ModuleList(nn.Linear(CONTEXT, 2 * width, bias=False) for _, _, width in self.blocks)


class Portraits(nn.Module):
    """Everything that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = portraits.make_unet(**SHALLOW)
        self.control = portraits.make_control_net(**POSE_ONLY)
        self.control.input_hint_block = HintLayer(self.control.input_hint_block[-1])
        self.adapter = Adapter(self.unet)
        for network in (self.unet, self.control):
            initialise(network)
        deep = portraits.UNET_CONFIG["transformer_depth_middle"]
        self.rows = []
        for module in self.unet.modules():
            if hasattr(module, "transformer_blocks"):
                count = deep if module.in_channels == 72 else 2
                module.transformer_blocks = Row(module.transformer_blocks[0], count)
                self.rows.append(module.transformer_blocks)
        self.requires_grad_(True)

    def stand(self, times: int) -> None:
        """Each transformer `times` times in its row, or as often as SDXL has it where that is less."""
        for row in self.rows:
            row.times = min(times, row.deep)

    def forward(
        self,
        x: Tensor,
        steps: Tensor,
        text: Tensor,
        pooled: Tensor,
        tokens: Tensor,
        hint: Tensor,
        weight: Tensor,
        strength: Tensor,
        left: Tensor,
    ) -> Tensor:
        """Velocity [B, 4, H, W] of x at `steps` [B].

        tokens: [2, B, 16, 64] of the person on the left and on the right; left: [B] 1 where there are two. weight, strength: [B]
        of attention and of IdentityNet.
        """
        y = F.pad(pooled, (0, 2816 - POOLED))
        control = self.control(x, hint, steps, tokens[0], y)
        outputs = [c * strength.view(-1, 1, 1, 1) for c in control["output"]]
        middle = control["middle"][0] * strength.view(-1, 1, 1, 1)
        crossed = self.attention(tokens, weight, left)
        options = {"patches_replace": {"attn1": dict.fromkeys(crossed, attend_itself), "attn2": crossed}}
        return unet_forward(self.unet, x, steps, text, y, outputs, middle, options)

    def attention(self, tokens: Tensor, weight: Tensor, left: Tensor) -> dict[Block, Any]:
        two = bool(left.any())

        def of(layer: nn.Module) -> Any:
            def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
                heads = extra["n_heads"]
                out = _attend(q, k, v, heads)
                found = [_attend(q, *layer(t).chunk(2, -1), heads) for t in (tokens if two else tokens[:1])]
                person = found[0]
                if two:
                    side = math.isqrt(q.shape[1])
                    on_right = (torch.arange(q.shape[1]) % side >= side / 2).float() * left[:, None]
                    person = found[0] + (found[1] - found[0]) * on_right[..., None]
                return out + weight[:, None, None] * person

            return attend

        patches: dict[Block, Any] = {}
        for (row, number, _), layer in zip(self.adapter.blocks, self.adapter.keys_values, strict=True):
            part, block = row.split("_")[0], row.split(".")[1]
            attend = of(layer)
            for n in range(10):
                patches[(part, int(block) if part != "middle" else 0, number + n)] = attend
        return patches


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attend_itself(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    """ComfyUI's own attention on a CPU saves memory and cannot be differentiated as fast."""
    return _attend(q, k, v, extra["n_heads"])


def unet_forward(
    unet: nn.Module,
    x: Tensor,
    steps: Tensor,
    text: Tensor,
    y: Tensor,
    outputs: list[Tensor],
    middle: Tensor,
    options: Any,
) -> Tensor:
    """ComfyUI's forward pass, which adds control in place and so cannot be differentiated."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding

    emb = unet.time_embed(timestep_embedding(steps, unet.model_channels)) + unet.label_emb(y)
    skips, h = [], x
    for number, block in enumerate(unet.input_blocks):
        h = forward_timestep_embed(block, h, emb, text, {**options, "block": ("input", number), "transformer_index": 0})
        skips.append(h)
    h = forward_timestep_embed(
        unet.middle_block, h, emb, text, {**options, "block": ("middle", 0), "transformer_index": 0}
    )
    h = h + middle
    for number, block in enumerate(unet.output_blocks):
        h = torch.cat([h, skips.pop() + outputs.pop()], dim=1)
        shape = skips[-1].shape if skips else None
        given = {**options, "block": ("output", number), "transformer_index": 0}
        h = forward_timestep_embed(block, h, emb, text, given, shape)
    return unet.out(h)


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Fan-in noise; what is added to a stream starts small, and the velocity at zero."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            gain = 0.1 if name.endswith(("out_layers.3", "proj_out", "to_out.0", "net.2")) else 1.0
            module.weight.normal_(0, gain / module.weight[0].numel() ** 0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.fill_(1)
            module.bias.zero_()
    network.label_emb[0][0].weight[:, POOLED:] = 0  # sizes of the picture: always given as zero
    if hasattr(network, "out"):
        network.out[2].weight.zero_()
    else:
        for layer in [*network.zero_convs, network.middle_block_out]:
            layer[0].weight.mul_(0.5)


class Samples:
    """The drawn portraits as latents, with everything that goes in."""

    def __init__(self, drawn: dict[str, Any], coder: PixelCoder) -> None:
        with torch.inference_mode():
            pictures = drawn["pictures"]
            pairs = [
                torch.cat([coder.encode(part.float() / 255) for part in p.split(100)])
                for p in (pictures, pictures.flip(-1))
            ]
        self.latents = torch.stack(pairs).clone()  # [2, N, 4, 16, 16], the second mirrored
        self.poses = drawn["poses"]
        self.embeddings = drawn["embeddings"].float()
        self.two = drawn["two"].float()
        self.texts = drawn["texts"]
        self.count = len(self.texts) - HELD_OUT

    def batch(self, rows: Tensor, rng: np.random.Generator) -> dict[str, Any]:
        n = len(rows)
        mirrored = torch.from_numpy(rng.random(n) < 0.5)
        hint = self.poses[rows].float() / 255
        if mirrored.any():
            flipped = hint[mirrored].flip(-1)
            # The left eye stays the left one: red and green, yellow and pink change places.
            hint[mirrored] = swap_colours(flipped)
        embeddings = self.embeddings[rows]
        embeddings = torch.where((mirrored & (self.two[rows] > 0))[:, None, None], embeddings.flip(1), embeddings)
        said = [portraits.embed_text(_leave_out(self.texts[int(r)], rng)) for r in rows]
        return {
            "latents": self.latents[mirrored.long(), rows],
            "hint": hint_features(F.interpolate(hint, scale_factor=2.0, mode="nearest")),
            "embeddings": embeddings,
            "text": torch.stack([t for t, _ in said]),
            "pooled": torch.stack([p for _, p in said]),
            "left": self.two[rows],
        }


def swap_colours(hint: Tensor) -> Tensor:
    """Key point drawings [B, 3, H, W] with the colours of the two eyes, and of the two corners of the mouth, exchanged."""
    r, g, b = hint.unbind(1)
    # Red is (1,0,0), green (0,1,0), yellow (1,1,0), pink (1,0,1), blue (0,0,1).
    yellow, pink = torch.minimum(r, g), torch.minimum(r, b)
    red, green, blue = r - yellow - pink, g - yellow, b - pink
    return torch.stack([green + yellow + pink, red + pink, blue + yellow], 1)


def _leave_out(text: str, rng: np.random.Generator) -> str:
    """Without any words sometimes, and without some of them more often."""
    if rng.random() < 0.12:
        return ""
    return ", ".join(part for part in text.split(", ") if rng.random() > 0.12)


def schedule() -> Tensor:
    """The part of the signal's power left at each of SDXL's 1000 steps."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def loss_of(model: Portraits, batch: dict[str, Any], power: Tensor, rng: np.random.Generator) -> Tensor:
    x0 = batch["latents"]
    n = len(x0)
    lot = torch.from_numpy(rng.random((3, n)).astype(np.float32))
    steps = (torch.from_numpy(rng.random(n)) * 1000).long().clamp_max(999)
    noise = torch.randn_like(x0)
    signal, blur = (v.view(-1, 1, 1, 1) for v in (power[steps].sqrt(), (1 - power[steps]).sqrt()))
    embeddings = batch["embeddings"].clone()
    nobody = lot[0] < 0.1
    uniform = torch.rand_like(embeddings) * 0.35 * (lot[0] < 0.06).view(-1, 1, 1)
    embeddings[nobody] = uniform[nobody]
    tokens = model.adapter.resampler(embeddings.transpose(0, 1).reshape(2 * n, 1, 512)).unflatten(0, (2, n))
    none = lot[1] < 0.08
    weight = torch.where(none, 0.0, 0.7 + 0.4 * lot[2])
    strength = torch.where((lot[2] < 0.5) & none | (lot[1] > 0.97), 0.0, 0.7 + 0.4 * torch.rand(n))
    found = model(
        signal * x0 + blur * noise, steps.float(), batch["text"], batch["pooled"], tokens, batch["hint"], weight,
        strength, batch["left"],
    )  # fmt: skip
    return (found - (signal * noise - blur * x0)).square().mean()


def train(model: Portraits, samples: Samples, seconds: float, work: Path, seed: int = 0) -> dict[str, Tensor]:
    """The mean of late weights. Keeps work/portraits_model.pt up to date."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    power = schedule()
    optimiser = Muon(model)
    mean = {k: v.detach().clone() for k, v in model.state_dict().items()}
    began, step, losses, kept = time.time(), 0, [], time.time()
    while (done := (time.time() - began) / seconds) < 1:
        rate = RATE * min(1, (step + 1) / 30) * (0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * done)))
        rows = torch.from_numpy(rng.integers(0, samples.count, BATCH))
        # Several times over now and then, and at the end as often as SDXL has them.
        model.stand(10 if done > 0.9 else int(rng.choice([1, 1, 1, 1, 2, 3])))
        loss = loss_of(model, samples.batch(rows, rng), power, rng)
        model.zero_grad()
        loss.backward()
        optimiser.step(rate)
        step += 1
        keep = min(0.99, step / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                mean[key].lerp_(value, 1 - keep)
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            print(f"step {step}, {time.time() - began:.0f} s, loss {np.mean(losses[-20:]):.4f}", flush=True)
        if time.time() - kept > 120 or (time.time() - began) / seconds >= 1:
            torch.save(mean, work / "portraits_model.pt")
            kept = time.time()
    return mean


@torch.no_grad()
def files(state: dict[str, Tensor], coder: PixelCoder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `portraits.load_sdxl` and its relatives read, and the adapter as InstantID's is kept.

    Matrices of the former are 8-bit with a scale for each row.
    """
    kept: dict[str, Tensor] = {f"pixels.{k}": v for k, v in coder.state_dict().items()}
    adapter: dict[str, Tensor] = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "adapter":
            if rest.startswith("resampler."):
                adapter[f"image_proj.{rest.removeprefix('resampler.')}"] = value.half().contiguous()
        elif rest.startswith("input_hint_block.last."):
            kind = rest.rpartition(".")[2]
            wide = F.pad(value, (0, 0, 0, 0, 0, 256 - 48)) if kind == "weight" else value
            kept[f"control.input_hint_block.14.{kind}"] = wide
        else:
            kept[key] = value
    stored: dict[str, Tensor] = {}
    for key, value in kept.items():
        if value.ndim < 2 or value.numel() < 1024:
            stored[key] = value.half().contiguous()
            continue
        scale = value.flatten(1).abs().amax(1).clamp_min(1e-8) / 127
        shaped = scale.view(-1, *[1] * (value.ndim - 1))
        stored[key], stored[f"{key}.scale"] = (value / shaped).round().to(torch.int8), shaped.contiguous()
    number = 0
    blocks = Portraits().adapter.blocks
    for index, (_, _, width) in enumerate(blocks):
        for _copy in range(2 if width == 48 else 10):
            for kind, half in zip("kv", state[f"adapter.keys_values.{index}.weight"].split(width), strict=True):
                adapter[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = half.half().clone()
            number += 1
    return stored, adapter


def save(state: dict[str, Tensor], coder: PixelCoder) -> None:
    from safetensors.torch import save_file

    stored, adapter = files(state, coder)
    for path, tensors in ((portraits.WEIGHTS, stored), (ADAPTER, adapter)):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        print(f"wrote {path.name} ({path.stat().st_size:,} bytes)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--resume", action="store_true", help="go on with FOLDER/portraits_model.pt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    coder = PixelCoder()
    coder.load_state_dict(torch.load(options.work / "pixels.pt", weights_only=True))
    samples = Samples(torch.load(options.work / "portraits.pt", weights_only=True), coder)
    torch.manual_seed(0)
    model = Portraits()
    if options.resume:
        model.load_state_dict(torch.load(options.work / "portraits_model.pt", weights_only=True))
    model.adapter.resampler.load_state_dict(torch.load(options.work / "resampler.pt", weights_only=True))
    save(train(model, samples, 60 * options.minutes, options.work, int(options.resume)), coder)


if __name__ == "__main__":
    main()
