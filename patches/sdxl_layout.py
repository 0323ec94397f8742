"""Which cross-attention blocks a MODEL has, and whether an InstantID adapter fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import host
from ..identity.adapter import InstantIDAdapter
from ..identity.blocks import ADAPTIVE, INDEX, SDXL_BLOCKS, Block, describe, select_blocks
from ..identity.contribution_profile import ContributionProfile

ONLY_SDXL = "InstantID has published weights for SDXL only"
CHOOSE_IDENTITY_NET = "choose InstantID's diffusion_pytorch_model.safetensors in the ControlNet loader"


class UnsupportedModel(ValueError):
    """The MODEL is not one the adapter can be attached to."""


def transformer_blocks(model: Any) -> dict[Block, Any]:
    """The transformers with cross-attention of a ComfyUI UNet, by the name that patches use; empty for another network."""
    unet: Any = getattr(model.model, "diffusion_model", None)
    if not all(hasattr(unet, part) for part in ("input_blocks", "middle_block", "output_blocks")):
        return {}
    found: dict[Block, Any] = {}
    groups = [("input", i, block) for i, block in enumerate(unet.input_blocks)]
    groups += [("middle", 0, unet.middle_block)] if unet.middle_block is not None else []
    groups += [("output", i, block) for i, block in enumerate(unet.output_blocks)]
    for kind, number, group in groups:
        index = 0  # counts on over several transformers in one group, as ComfyUI does
        for layer in group:
            for transformer in getattr(layer, "transformer_blocks", ()):
                if getattr(transformer, "attn2", None) is not None:
                    found[(kind, number, index)] = transformer
                index += 1
    return found


def cross_attention_blocks(model: Any) -> dict[Block, Any]:
    """The cross-attention modules of `transformer_blocks`."""
    return {block: transformer.attn2 for block, transformer in transformer_blocks(model).items()}


def patchable_blocks(model: Any, adapter: InstantIDAdapter) -> tuple[Block, ...]:
    """The blocks of `model` the adapter has keys and values for, in the adapter's order.

    Raises UnsupportedModel, saying what the model is, when it is no SDXL UNet or the widths differ.
    """
    name = type(model.model).__name__
    found = cross_attention_blocks(model)
    if not found:
        raise UnsupportedModel(f"{ONLY_SDXL}, and this model ({name}) is no UNet. Load an SDXL checkpoint.")
    strange = [block for block in found if block not in INDEX]
    if strange:
        raise UnsupportedModel(
            f"{ONLY_SDXL}, and this model ({name}) has cross-attention at {strange[0]}, where SDXL has none. "
            "Load an SDXL checkpoint."
        )
    blocks = tuple(block for block in SDXL_BLOCKS if block in found)
    for block in blocks:
        attention = found[block]
        if INDEX[block] >= len(adapter.numbers):
            raise UnsupportedModel(
                f"{adapter.name} has keys and values for {len(adapter.numbers)} blocks; this model needs number "
                f"{INDEX[block] + 1} for {block}. Use InstantID's ip-adapter.bin with an SDXL checkpoint."
            )
        context, width = attention.to_k.in_features, attention.to_k.out_features
        if (context, width) != (adapter.context_dim, adapter.block_width(INDEX[block])):
            raise UnsupportedModel(
                f"{ONLY_SDXL}: block {block} of this model ({name}) is {width} wide with a context of {context}, "
                f"{adapter.name} is made for {adapter.block_width(INDEX[block])} and {adapter.context_dim}."
            )
    return blocks


def check_identity_net(control_net: Any, width: int) -> None:
    """Raises UnsupportedModel when face tokens of `width` do not fit a ControlNet; warns of one that knows no faces.

    Most ControlNets are published under the same file name, and the sampler would tell of sizes of matrices.
    """
    network = getattr(control_net, "control_model", None)
    if network is None:  # a Control-LoRA, which is made of the MODEL when that is sampled
        return
    attentions = [module.attn2 for module in network.modules() if hasattr(module, "attn2")]
    contexts = {getattr(getattr(attention, "to_k", None), "in_features", width) for attention in attentions} - {width}
    # One with neither attention nor weights only stands in front of another.
    if contexts or (not attentions and any(True for _ in network.parameters())):
        text = f", text {min(contexts)} wide" if contexts else ""
        raise UnsupportedModel(
            f"control_net ({type(network).__name__}{text}) is not for SDXL, whose text is {width} wide: {CHOOSE_IDENTITY_NET}."
        )
    if getattr(network, "num_control_type", None):
        host.current().warn(f"control_net is a union ControlNet, which knows no faces: {CHOOSE_IDENTITY_NET}.")


@dataclass(frozen=True)
class AdaptiveChoice:
    """What patch mode "adaptive" goes by. share: part of the measured contribution to keep, in 0..1."""

    profile: ContributionProfile | None = None
    share: float = 0.95


def choose_blocks(
    available: tuple[Block, ...], mode: str, custom: str = "", adaptive: AdaptiveChoice | None = None
) -> tuple[tuple[Block, ...], str]:
    """The blocks of patch mode `mode` among `available`, and a line that says what was chosen and why.

    A layout other than SDXL's 70 blocks is patched in full, because the selections are names of SDXL's blocks.
    """
    if mode == ADAPTIVE:
        return _choose_adaptive(available, adaptive or AdaptiveChoice())
    wanted = select_blocks(mode, custom)
    if len(available) != len(SDXL_BLOCKS) and mode not in ("full", "custom"):
        return available, (
            f"this UNet has {len(available)} of SDXL's {len(SDXL_BLOCKS)} cross-attention blocks, so patch_mode {mode} is "
            f"not defined for it: all {len(available)} are patched"
        )
    chosen = tuple(block for block in available if block in wanted)
    return chosen, f"{len(chosen)} of {len(available)} blocks patched ({describe(chosen)})"


def _choose_adaptive(available: tuple[Block, ...], choice: AdaptiveChoice) -> tuple[tuple[Block, ...], str]:
    """The fewest blocks that carry the share; all of them where there is nothing to go by."""
    everything = f"so all {len(available)} blocks are patched"
    if choice.profile is None:
        return available, f"patch_mode adaptive needs a profile, and none is connected, {everything}"
    if len(available) != len(SDXL_BLOCKS):
        return available, f"this UNet has {len(available)} of SDXL's {len(SDXL_BLOCKS)} blocks, {everything}"
    chosen, carried = choice.profile.fewest_blocks(choice.share, available)
    if not chosen:
        return available, f"the share to keep is {choice.share:g}, which no blocks carry, {everything}"
    line = (
        f"{len(chosen)} of {len(available)} blocks patched ({describe(chosen)}): the fewest that carry {choice.share:.1%} of "
        f"the contribution measured in {choice.profile.describe()}; they carry {carried:.1%}"
    )
    unknown = len(available) - len(choice.profile.size)
    if unknown:
        line += f"; {unknown} blocks were not measured there and are left out"
    return chosen, line
