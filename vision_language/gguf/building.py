"""A network of the library with the weights of GGUF files, made layer by layer: never more than one of them is unpacked.

Names and shapes are those of llama.cpp's converter. It writes Qwen's matrices as they are; it cuts the first layer of the
tower by its two frames, and its query, key and value in older files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ... import host
from .. import decoding
from ..projections import share
from ..quantization import AS_STORED, PACKED, pack_head
from ..unusable import UnusableModel
from .file import Gguf
from .packing import ANEW, GROUPED, KERNEL, PLAIN, ROWS, Matrix, Packer
from .settings import Source
from .types import dense

HOW = {
    GROUPED: "as stored",
    KERNEL: "as stored, by torch's int4 kernel",
    ROWS: "as int8 with one scale a row",
    PLAIN: "as stored",
}
BLOCK = (("norm1", "ln1"), ("norm2", "ln2"), ("attn.proj", "attn_out"))
MLP = {
    "qwen2_vl": (("mlp.fc1", "ffn_up"), ("mlp.fc2", "ffn_down")),
    "qwen2_5_vl": (("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")),
    "qwen3_vl": (("mlp.linear_fc1", "ffn_up"), ("mlp.linear_fc2", "ffn_down")),
}
MERGER = {
    "qwen2_vl": (("ln_q", "v.post_ln"), ("mlp.0", "mm.0"), ("mlp.2", "mm.2")),
    "qwen2_5_vl": (("ln_q", "v.post_ln"), ("mlp.0", "mm.0"), ("mlp.2", "mm.2")),
    "qwen3_vl": (("norm", "v.post_ln"), ("linear_fc1", "mm.0"), ("linear_fc2", "mm.2")),
}
DEEP = (("norm", "norm"), ("linear_fc1", "fc1"), ("linear_fc2", "fc2"))


class WeightsToCome(TorchFunctionMode):
    """While inside, layers are made without memory for their weights; what a network computes for itself is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class Taken:
    """A file's tensors, and which of them were used."""

    def __init__(self, file: Gguf, dtype: torch.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.used: set[str] = set()

    def matrix(self, name: str) -> Matrix:
        stored = self.file.stored(name)
        self.used.add(name)
        if not stored.kind.known:
            raise UnusableModel(
                f"{self.file.path} is quantised as {stored.kind.name} ({name}), which is not read here: take another file of "
                "the model, such as Q4_K_M, Q5_K_M or Q8_0."
            )
        if len(stored.shape) != 2:
            raise UnusableModel(f"{self.file.path}: {name} has the shape {stored.shape} and should be a matrix.")
        return Matrix(stored.kind, self.file.blocks(name), *stored.shape)

    def tensor(self, name: str) -> Tensor:
        """The numbers of `name` in the dtype of the network."""
        stored = self.file.stored(name)
        if len(stored.shape) == 2:
            return self.matrix(name).dense(self.dtype)
        self.used.add(name)
        if not stored.kind.known:
            raise UnusableModel(f"{self.file.path}: {name} is stored as {stored.kind.name}, which is not read here.")
        return dense(stored.kind, self.file.blocks(name)).view(stored.shape).to(self.dtype)

    def close(self) -> None:
        """Raises UnusableModel when something was left over: the file is of another kind of model."""
        if others := sorted(set(self.file.tensors) - self.used):
            raise UnusableModel(
                f"{self.file.path} has {len(others)} tensors that a model of its kind has not, such as {others[0]}: take "
                "another GGUF of the model."
            )


def build(source: Source, settings: Path, chosen: Any, auto: Any) -> tuple[Any, str, list[str]]:
    """(network, what its quantisation is called, notes for the report).

    settings: the folder that `settings.write` filled. chosen: the `Choices` of loading. auto: the library's class for it.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(settings, local_files_only=True, trust_remote_code=False)
    with WeightsToCome():
        network = auto.from_config(config, dtype=chosen.dtype, attn_implementation=chosen.attention)
    network.config._name_or_path = str(source.text.path)
    network.generation_config = GenerationConfig.from_pretrained(settings)
    packer = Packer(chosen.packing.method, chosen.device, chosen.dtype)
    text, decoder = Taken(source.text, chosen.dtype), decoding.text_decoder(network)
    put(decoder.embed_tokens, "weight", text.tensor("token_embd.weight"), "token_embd.weight")
    put(decoder.norm, "weight", text.tensor("output_norm.weight"), "output_norm.weight")
    layers = list(enumerate(decoder.layers))
    for number, layer in host.each(layers, source.text.path.name):
        fill_layer(layer, text, f"blk.{number}.", packer)
    if "output.weight" in source.text:
        # Of what the last matrix is packed anew to, answers would suffer most.
        head = Packer("none", chosen.device, chosen.dtype)
        network.lm_head = head.layer([fitting(network.lm_head, text.matrix("output.weight"), "output.weight")])
        packer.add(head)
    else:
        network.lm_head.weight = decoder.embed_tokens.weight
    text.close()
    if source.tower is not None:
        tower = Taken(source.tower, chosen.dtype)
        fill_tower(network.model.visual, tower, source.model_type)
        tower.close()
    if left := [name for name, part in (*network.named_parameters(), *network.named_buffers()) if part.is_meta]:
        raise UnusableModel(f"{source.text.path} has no weights for {left[0]}: it is not whole, or of another kind.")
    method = chosen.packing.method
    if method not in PACKED and packer.packs:
        method = AS_STORED
        pack_head(network, "int8", chosen.device)
    return network, method, notes(source, network, packer)


def put(owner: Any, name: str, tensor: Tensor, called: str) -> None:
    """Make `tensor` the parameter `name` of `owner`. Raises UnusableModel for another shape."""
    wanted = getattr(owner, name).shape
    if tensor.shape != wanted:
        raise UnusableModel(f"{called} has the shape {tuple(tensor.shape)} and should have {tuple(wanted)}.")
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False))


def fitting(layer: Any, matrix: Matrix, called: str) -> Matrix:
    wanted = tuple(layer.weight.shape)
    if (matrix.outputs, matrix.inputs) != wanted:
        raise UnusableModel(f"{called} has the shape {(matrix.outputs, matrix.inputs)} and should have {wanted}.")
    return matrix


def fill_layer(layer: Any, text: Taken, prefix: str, packer: Packer) -> None:
    """The weights of one decoder layer, its projections merged."""
    attention, mlp = layer.self_attn, layer.mlp
    put(layer.input_layernorm, "weight", text.tensor(f"{prefix}attn_norm.weight"), f"{prefix}attn_norm")
    put(layer.post_attention_layernorm, "weight", text.tensor(f"{prefix}ffn_norm.weight"), f"{prefix}ffn_norm")
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name, None) is not None:
            put(getattr(attention, name), "weight", text.tensor(f"{prefix}attn_{name}.weight"), f"{prefix}attn_{name}")
    whole = f"{prefix}attn_qkv" if f"{prefix}attn_qkv.weight" in text.file else ""
    merge(
        attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", text, packer,
        [whole] if whole else [f"{prefix}attn_{letter}" for letter in "qkv"],
    )  # fmt: skip
    merge(mlp, ("gate_proj", "up_proj"), "gate_up_proj", text, packer, [f"{prefix}ffn_gate", f"{prefix}ffn_up"])
    for owner, name, called in ((attention, "o_proj", "attn_output"), (mlp, "down_proj", "ffn_down")):
        matrix = fitting(getattr(owner, name), text.matrix(f"{prefix}{called}.weight"), f"{prefix}{called}")
        setattr(owner, name, packer.layer([matrix]))


def merge(
    owner: Any, names: Sequence[str], merged_name: str, text: Taken, packer: Packer, stored: Sequence[str]
) -> None:
    """One layer of several projections. stored: their names in the file, or the one of all of them together."""
    layers = [getattr(owner, name) for name in names]
    outputs = [int(layer.out_features) for layer in layers]
    matrices = [text.matrix(f"{name}.weight") for name in stored]
    if len(matrices) == len(layers):
        for layer, matrix, name in zip(layers, matrices, stored, strict=True):
            fitting(layer, matrix, name)
    elif (matrices[0].outputs, matrices[0].inputs) != (sum(outputs), layers[0].in_features):
        raise UnusableModel(
            f"{stored[0]} has the shape {(matrices[0].outputs, matrices[0].inputs)}, which does not fit."
        )
    biases = None if layers[0].bias is None else [text.tensor(f"{name}.bias") for name in stored]
    if biases is not None and sum(len(bias) for bias in biases) != sum(outputs):
        raise UnusableModel(f"The biases of {stored[0]} and its neighbours do not fit their matrices.")
    share(owner, names, outputs, merged_name, packer.layer(matrices, biases))


def fill_tower(visual: Any, tower: Taken, kind: str) -> None:
    """The weights of the vision tower, all in the dtype of the network."""
    state: dict[str, Tensor] = {}

    def both(target: str, name: str) -> None:
        for part in ("weight", "bias"):
            if f"{name}.{part}" in tower.file:
                state[f"{target}.{part}"] = tower.tensor(f"{name}.{part}")

    frames = [tower.tensor("v.patch_embd.weight"), tower.tensor("v.patch_embd.weight.1")]
    state["patch_embed.proj.weight"] = torch.stack(frames, dim=2)
    if "v.patch_embd.bias" in tower.file:
        state["patch_embed.proj.bias"] = tower.tensor("v.patch_embd.bias")
    if "v.position_embd.weight" in tower.file:
        state["pos_embed.weight"] = tower.tensor("v.position_embd.weight")
    for number in range(len(visual.blocks)):
        mine, theirs = f"blocks.{number}.", f"v.blk.{number}."
        names = dict(MLP[kind])
        up, down = (f"{theirs}ffn_{word}.weight" for word in ("up", "down"))
        if kind != "qwen3_vl" and (up in tower.file and down in tower.file):
            width = int(visual.blocks[number].attn.proj.in_features)
            if tower.file.stored(down).shape[-1] == width != tower.file.stored(up).shape[-1]:
                # The first converters called each by the other's name.
                swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
                names = {target: swapped.get(name, name) for target, name in names.items()}
        for target, name in (*BLOCK, *names.items()):
            both(mine + target, theirs + name)
        for part in ("weight", "bias"):
            if f"{theirs}attn_qkv.{part}" in tower.file:
                state[f"{mine}attn.qkv.{part}"] = tower.tensor(f"{theirs}attn_qkv.{part}")
            elif f"{theirs}attn_q.{part}" in tower.file:
                cut = [tower.tensor(f"{theirs}attn_{letter}.{part}") for letter in "qkv"]
                state[f"{mine}attn.qkv.{part}"] = torch.cat(cut)
    for target, name in MERGER[kind]:
        both(f"merger.{target}", name)
    levels = sorted({int(name.split(".")[2]) for name in tower.file.tensors if name.startswith("v.deepstack.")})
    for index, level in enumerate(levels):
        for target, name in DEEP:
            both(f"deepstack_merger_list.{index}.{target}", f"v.deepstack.{level}.{name}")
    try:
        visual.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise UnusableModel(f"{tower.file.path} does not fit a {kind} tower: {reason}") from None


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
