"""A network of the library with the weights of GGUF files, made layer by layer: never more than one of them is unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ... import host
from ...host.errors import first_line
from .. import decoding
from ..quantization import AS_STORED, PACKED, pack_head
from ..unusable import UnusableModel
from .layers import fill_layer
from .linears import BlockLinear, GroupedLinear, PackedEmbedding
from .packing import ANEW, BLOCKS, GROUPED, KERNEL, PLAIN, ROWS, Packer
from .source import Source
from .taking import Taken, fitting, put
from .tower import fill_tower

HOW = {
    GROUPED: "as stored",
    BLOCKS: "as stored",
    KERNEL: "as stored, by torch's int4 kernel",
    ROWS: "as int8 with one scale a row",
    PLAIN: "as stored",
}


class WeightsToCome(TorchFunctionMode):
    """While inside, layers are made without memory for their weights; what a network computes for itself is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(source: Source, settings: Path, chosen: Any, auto: Any) -> tuple[Any, str, list[str]]:
    """(network, what its quantisation is called, notes for the report).

    settings: the folder that `settings.write` filled. chosen: the `Choices` of loading. auto: the library's class for it.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(settings, local_files_only=True, trust_remote_code=False)
    try:
        with WeightsToCome():
            network = auto.from_config(config, dtype=chosen.dtype, attn_implementation=chosen.attention)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnusableModel(
            f"The sizes that {source.text.path} tells make no network ({first_line(error, 200)}): fetch it again, or take "
            "another GGUF of the model."
        ) from error
    network.config._name_or_path = str(source.text.path)
    network.generation_config = GenerationConfig.from_pretrained(settings)
    packer = Packer(chosen.packing.method, chosen.device, chosen.dtype)
    # Where the library adds one to the weights of norms, the converter did.
    text = Taken(source.text, chosen.dtype, raised=1.0 if source.hybrid else 0.0)
    decoder = decoding.text_decoder(network)
    put(decoder.norm, "weight", text.norm("output_norm.weight"), "output_norm.weight")
    layers = list(enumerate(decoder.layers))
    for number, layer in host.each(layers, source.text.path.name):
        fill_layer(layer, text, f"blk.{number}.", packer)
    for number in range(len(layers), len(layers) + source.guessing_layers):
        text.pass_over(f"blk.{number}.")
    fill_ends(network, decoder, text, packer, chosen)
    text.close()
    if source.tower is not None:
        tower = Taken(source.tower, chosen.dtype)
        fill_tower(network.model.visual, tower, source.projector)
        tower.close()
    if left := [name for name, part in (*network.named_parameters(), *network.named_buffers()) if part.is_meta]:
        raise UnusableModel(f"{source.text.path} has no weights for {left[0]}: it is not whole, or of another kind.")
    method = chosen.packing.method
    if method not in PACKED and packer.packs:
        method = AS_STORED
        pack_head(network, "int8", chosen.device)
    return network, method, notes(source, network, packer)


def fill_ends(network: Any, decoder: Any, text: Taken, packer: Packer, chosen: Any) -> None:
    """The embedding and the output head, which may be one matrix. Packed anew, of all layers these would harm answers most.

    packer: what packed the other layers. Where those are plain, a matrix of both is too: kernels of our own read plain ones.
    """
    ends = Packer("none", chosen.device, chosen.dtype)
    words = fitting(decoder.embed_tokens, text.matrix("token_embd.weight"), "token_embd.weight")
    tied = "output.weight" not in text.file
    if not tied:
        network.lm_head = ends.layer([fitting(network.lm_head, text.matrix("output.weight"), "output.weight")])
    if ends.plain([words]) or (tied and not packer.packs):
        put(decoder.embed_tokens, "weight", words.dense(chosen.dtype), "token_embd.weight")
        if tied:
            network.lm_head.weight = decoder.embed_tokens.weight
    else:
        if tied:
            network.lm_head = ends.layer([words])
        shared = tied and isinstance(network.lm_head, GroupedLinear | BlockLinear)
        rows = network.lm_head if shared else BlockLinear([words], None)
        decoder.embed_tokens = PackedEmbedding(rows, chosen.dtype, shared)
    packer.add(ends)


def notes(source: Source, network: Any, packer: Packer) -> list[str]:
    """What became of the file's weights, for the report; nothing for those that are kept as they are and plain."""
    if not packer.packs:
        return []
    ways: dict[str, list[str]] = {}
    for kind, kept in sorted(packer.kinds):
        ways.setdefault(f"anew as {packer.method}" if kept == ANEW else HOW[kept], []).append(kind)
    told = "; ".join(f"{', '.join(kinds)} {way}" for way, kinds in ways.items())
    files = source.text.nbytes + (source.tower.nbytes if source.tower is not None else 0)
    held = {part.data_ptr(): part.nbytes for part in (*network.parameters(), *network.buffers())}
    off = f", {packer.deviation.share:.2%} off the file's numbers (rms)" if packer.deviation.whole else ""
    return [f"weights: {told}{off}; {files / 1e9:.2f} GB in the file, {sum(held.values()) / 1e9:.2f} GB here"]
