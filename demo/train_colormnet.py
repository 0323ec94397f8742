"""Trains the demo's small ColorMNet on camera moves over photographs and drawn scenes, on one CPU core.

    python -m hotpath.demo.train_colormnet --minutes 26
    python -m hotpath.demo.train_colormnet --minutes 13 --continue --seed 2 --rate 0.0008

The published architecture at a fraction of its widths. From random weights it never learns to carry colours: between a
remembered colour and the picture lie thirty layers, and until they pass it on nothing tells the keys where to look. So
it starts with two lanes of channels that pass colours through all of them, and the memory's attention has a loss of its
own. What is left to learn is where to look, and edges.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.topk_memory import similarity
from ..colorization.checkpoint_file import read_tensors
from ..colorization.colormnet.decoder import DecoderWidths
from ..colorization.colormnet.feature_fusion import PLANES, FeatureFusion
from ..colorization.colormnet.key_encoder import CrossChannelAttention, EncoderWidths
from ..colorization.colormnet.network import ColorMNet, ColorMNetWidths, FrameKeys
from ..colorization.colormnet.value_encoder import ValueWidths
from ..colorization.colour_space import CHROMA_SCALE, normalise_luminance
from .train_colorizers import MODELS, SIDE, Scenes, save, train

FILE = MODELS / "colormnet" / "demo_colormnet.safetensors"
CLIPS = 4  # in a step
FRAMES = 4  # of a clip: the reference, then three frames to colour
WIDTHS = ColorMNetWidths(
    EncoderWidths(
        stem=16, planes=(12, 16, 24), outputs=(32, 48, 64), depths=(1, 1, 1), vit_width=48, vit_depth=4, vit_hidden=96,
        vit_grid=8, vit_levels=2, heads=16, fused=(32, 32, 32),
    ),
    ValueWidths(stem=12, outputs=(12, 16, 24), depths=(1, 1, 1), value=24, reduced=8, hidden=12),
    DecoderWidths(fused=48, reduced=8, up8=32, up4=24, middle=16),
    key=24,
)  # fmt: skip
LANES = 2  # channels 0 and 1 carry what is above and what is below zero of a plane's own colour


def frames_of(keys: FrameKeys, chosen: slice) -> FrameKeys:
    """Those of some frames alone."""
    rows = (part[chosen] for part in (keys.key, keys.shrinkage, keys.selection, keys.f16))
    return FrameKeys(*rows, keys.context.frames(chosen))


def loss_of(network: ColorMNet, lab: Tensor, deep: bool) -> Tensor:
    """lab: [frames, clips, 3, H, W], the first frame the exemplar. deep: the third is remembered too, with the update of
    the sensory state that goes with it."""
    count, clips = lab.shape[:2]
    luminance, truth = normalise_luminance(lab[:, :, :1]), lab[:, :, 1:] / CHROMA_SCALE
    encoded = network.encode_keys(luminance.flatten(0, 1))
    keys = [frames_of(encoded, slice(i * clips, (i + 1) * clips)) for i in range(count)]
    rows, columns = encoded.key.shape[-2:]
    cell = truth.shape[-1] // columns
    hidden = torch.zeros(clips * PLANES, network.widths.values.hidden, rows, columns)
    remembered = [0]
    values = [network.encode_value(luminance[0], truth[0], keys[0].f16)]
    loss = torch.zeros(())
    for index in range(1, count):
        affinity = torch.stack([_affinity(keys, remembered, index, clip) for clip in range(clips)])
        memory = torch.cat([value.unflatten(0, (clips, -1)).flatten(3) for value in values], dim=3)
        readout = torch.einsum("cqn,cpvn->cpvq", affinity, memory).reshape(clips * PLANES, -1, rows, columns)
        if index > 1:
            last = values[-1].unflatten(0, (clips, -1)).flatten(1, 2)
            near = [
                network.short_term_attn(
                    keys[index].key[c : c + 1], keys[remembered[-1]].key[c : c + 1], last[c : c + 1]
                )
                for c in range(clips)
            ]
            readout = readout + torch.cat(near).reshape(readout.shape)
        context = network.decoder.add_readout(keys[index].context, readout)
        closing = index == 2 and deep
        logits, hidden = network.decoder(context, hidden, index > 1 and not closing)
        chroma = logits.view(clips, PLANES, *logits.shape[-2:]).tanh()
        loss = loss + F.smooth_l1_loss(chroma, truth[index], beta=0.1)
        # The mean colour of where the memory looks: the exemplar's true colours, before any other layer.
        known = F.avg_pool2d(truth[0], cell).flatten(2)
        looked_at = torch.einsum("cqn,cpn->cpq", affinity[..., : rows * columns], known)
        share = affinity[..., : rows * columns].sum(-1)[:, None].clamp_min(1e-3)
        loss = loss + F.smooth_l1_loss(looked_at / share, F.avg_pool2d(truth[index], cell).flatten(2), beta=0.1)
        if index == 1 or closing:
            remembered.append(index)
            values.append(network.encode_value(luminance[index], chroma.detach(), keys[index].f16))
            if closing:
                hidden = network.reinforce(values[-1], hidden)
    return loss / (count - 1)


def _affinity(keys: list[FrameKeys], remembered: list[int], index: int, clip: int) -> Tensor:
    query, selection = (part[clip].flatten(1).T for part in (keys[index].key, keys[index].selection))
    memory = torch.cat([keys[i].key[clip].flatten(1).T for i in remembered])
    shrinkage = torch.cat([keys[i].shrinkage[clip].flatten() for i in remembered])
    return similarity(query, selection, memory, shrinkage).softmax(1)


@torch.no_grad()
def prepare(network: ColorMNet) -> None:
    """Weights that keep the size of signals, and the lanes."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if name.endswith((".conv3", "layer3.0.conv2", "block1.conv2", "block2.conv2", "out_conv.conv2")):
                module.weight *= 0.3
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, CrossChannelAttention):
            # At 1 the attention starts as the mean of all channels, and takes thousands of steps to leave it.
            nn.init.constant_(module.temperature, 8.0)
    nn.init.normal_(network.key_encoder.network2.backbone.pos_embed, std=0.02)
    nn.init.zeros_(network.short_term_attn.relative_emb_k.weight)
    nn.init.zeros_(network.short_term_attn.projection.weight)
    nn.init.zeros_(network.short_term_attn.projection.bias)
    network.key_proj.d_proj.weight.mul_(0.1)
    lay_lanes(network)


def lay_lanes(network: ColorMNet) -> None:
    """Identities for colours from the value encoder's first convolution to the prediction, with nothing else coming in."""
    values, decoder = network.value_encoder, network.decoder
    first = values.conv1.weight
    first[:LANES] = 0
    first[0, 3], first[1, 3] = 1 / first[0, 3].numel(), -1 / first[0, 3].numel()
    for layer in (values.layer1, values.layer2, values.layer3):
        block = layer[0]
        block.get_submodule("conv2").get_parameter("weight")[:LANES] = 0
        if block.downsample is not None:
            _pass(block.downsample[0])
    _pass_fusion(values.fuser, values.fuser.picture)
    _pass_fusion(decoder.fuser, decoder.fuser.picture)
    for up in (decoder.up_16_8, decoder.up_8_4):
        up.skip_conv.weight[:LANES] = 0
        up.out_conv.conv2.weight[:LANES] = 0
        if up.out_conv.downsample is not None:
            _pass(up.out_conv.downsample)
    decoder.pred.weight.zero_()
    # Each fusion's gates add a quarter.
    decoder.pred.weight[0, 0, 1, 1], decoder.pred.weight[0, 1, 1, 1] = 0.64, -0.64


def _pass(conv: nn.Module, offset: int = 0) -> None:
    """Make the first output channels the input channels from `offset` on."""
    weight = conv.get_parameter("weight")
    middle = weight.shape[-1] // 2
    weight[:LANES] = 0
    for lane in range(LANES):
        weight[lane, offset + lane, middle, middle] = 1


def _pass_fusion(fusion: FeatureFusion, offset: int) -> None:
    assert fusion.block1.downsample is not None
    _pass(fusion.block1.downsample, offset)
    fusion.block1.conv2.weight[:LANES] = 0
    fusion.block2.conv2.weight[:LANES] = 0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=30)
    arguments.add_argument("--rate", type=float, default=1.5e-3, help="of learning, at the start")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--continue", dest="more", action="store_true", help="from the file that is there")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(chosen.seed)
    network = ColorMNet(WIDTHS)
    if chosen.more:
        network.load_state_dict(read_tensors(FILE))
    else:
        prepare(network)
    # Batch norms are mere scales here: they stay at the statistics they start with.
    network.eval()
    scenes = Scenes(chosen.seed)

    def step(number: int) -> Tensor:
        lab = torch.stack([scenes.clip(FRAMES, SIDE) for _ in range(CLIPS)], dim=1)
        return loss_of(network, lab, deep=number % 2 == 0)

    train(network, step, chosen.minutes, chosen.rate)
    save(network, FILE)


if __name__ == "__main__":
    main()
