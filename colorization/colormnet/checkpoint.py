"""ColorMNet checkpoints: the widths are read from the tensors' shapes, loading is strict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor

from ..checkpoint_file import WrongCheckpoint, folded_batch_norms
from .decoder import DecoderWidths
from .dinov2 import grid_side
from .key_encoder import EncoderWidths
from .network import ColorMNet, ColorMNetWidths
from .value_encoder import ValueWidths

FOLDER = "colormnet"
FILE = "DINOv2FeatureV6_LocalAtten_s2_154000"
SOURCE = "https://github.com/yyang181/colormnet/releases/tag/v0.1"
# One key of each part; a checkpoint of something else lacks most of them.
SIGNATURE = (
    "key_encoder.conv1.weight",
    "key_encoder.network2.backbone.pos_embed",
    "key_proj.d_proj.weight",
    "value_encoder.hidden_reinforce.transform.weight",
    "short_term_attn.relative_emb_k.weight",
    "decoder.pred.weight",
)


def matches(keys: Mapping[str, object] | Set[str]) -> bool:
    return all(key in keys for key in SIGNATURE)


def widths_of(state: Mapping[str, Tensor]) -> ColorMNetWidths:
    """The widths of the network that `state` belongs to. Raises WrongCheckpoint when a part is missing."""

    def rows(key: str, axis: int = 0) -> int:
        if key not in state:
            raise WrongCheckpoint(f"it has no {key!r}, which every ColorMNet checkpoint has")
        return int(state[key].shape[axis])

    def depth(prefix: str) -> int:
        found = {key[len(prefix) + 1 :].split(".")[0] for key in state if key.startswith(f"{prefix}.")}
        if not found:
            raise WrongCheckpoint(f"it has no {prefix!r} blocks, which every ColorMNet checkpoint has")
        return len(found)

    vit = "key_encoder.network2.backbone"
    vit_width = rows(f"{vit}.cls_token", 2)
    trunk = ("key_encoder.res2", "key_encoder.layer2", "key_encoder.layer3")
    small = ("value_encoder.layer1", "value_encoder.layer2", "value_encoder.layer3")
    fuses = ("key_encoder.fuse1", "key_encoder.fuse2", "key_encoder.fuse3")
    encoder = EncoderWidths(
        stem=rows("key_encoder.conv1.weight"),
        planes=_three(rows(f"{name}.0.conv1.weight") for name in trunk),
        outputs=_three(rows(f"{name}.0.conv3.weight") for name in trunk),
        depths=_three(depth(name) for name in trunk),
        vit_width=vit_width,
        vit_depth=depth(f"{vit}.blocks"),
        vit_hidden=rows(f"{vit}.blocks.0.mlp.fc1.weight"),
        vit_patch=rows(f"{vit}.patch_embed.proj.weight", 2),
        vit_grid=grid_side(rows(f"{vit}.pos_embed", 1)),
        vit_levels=rows("key_encoder.network2.conv3.weight") // vit_width,
        heads=rows(f"{fuses[0]}.crossattn.temperature"),
        fused=_three(rows(f"{name}.crossattn.to_q.weight") for name in fuses),
    )
    values = ValueWidths(
        stem=rows("value_encoder.conv1.weight"),
        outputs=_three(rows(f"{name}.0.conv1.weight") for name in small),
        depths=_three(depth(name) for name in small),
        value=rows("value_encoder.fuser.block2.conv2.weight"),
        reduced=rows("value_encoder.fuser.attention.ChannelGate.mlp.1.weight"),
        hidden=rows("value_encoder.hidden_reinforce.transform.weight") // 3,
    )
    decoder = DecoderWidths(
        fused=rows("decoder.fuser.block2.conv2.weight"),
        reduced=rows("decoder.fuser.attention.ChannelGate.mlp.1.weight"),
        up8=rows("decoder.up_16_8.out_conv.conv1.weight"),
        up4=rows("decoder.up_8_4.out_conv.conv1.weight"),
        middle=rows("decoder.hidden_update.g16_conv.weight"),
    )
    window = round(rows("short_term_attn.relative_emb_k.weight") ** 0.5)
    return ColorMNetWidths(encoder, values, decoder, rows("key_proj.key_proj.weight"), window)


def _three(values: Iterable[int]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third


def build(state: Mapping[str, Tensor], fold: bool = True) -> ColorMNet:
    """The network with `state` loaded strictly, ready for inference; `fold` merges batch norms into convolutions."""
    state = dict(state)
    stem = state.get("value_encoder.conv1.weight")
    if stem is not None and stem.shape[1] == 4:
        # Files trained with one colour plane lack the input for the other.
        state["value_encoder.conv1.weight"] = torch.cat((stem, torch.zeros_like(stem[:, :1])), dim=1)
    widths = widths_of(state)
    with torch.device("meta"):
        network = ColorMNet(widths)
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise WrongCheckpoint(str(error).replace("\n\t", " ")[:600]) from None
    network.eval().requires_grad_(False)
    return folded_batch_norms(network) if fold else network
