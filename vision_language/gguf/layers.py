"""The decoder layers of GGUF files: attention, linear attention, and what stands between, experts or not.

Names and shapes are those of llama.cpp's converter. It writes Qwen's matrices as they are, but for the linear attention of
Qwen3.5: there the heads of the values that share a key head lie apart, each as many heads behind the last as there are key
heads, and not side by side as the library has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...host.errors import install
from ..experts import PackedExperts, packable
from ..projections import share
from ..unusable import UnusableModel
from .matrix import Matrix
from .packing import Packer
from .taking import Taken, fitting, put


def fill_layer(layer: Any, text: Taken, prefix: str, packer: Packer) -> None:
    """The weights of one decoder layer, its projections merged."""
    after = "post_attention_norm" if f"{prefix}post_attention_norm.weight" in text.file else "ffn_norm"
    put(layer.input_layernorm, "weight", text.norm(f"{prefix}attn_norm.weight"), f"{prefix}attn_norm")
    put(layer.post_attention_layernorm, "weight", text.norm(f"{prefix}{after}.weight"), f"{prefix}{after}")
    if hasattr(layer, "linear_attn"):
        fill_linear_attention(layer.linear_attn, text, prefix, packer)
    else:
        fill_attention(layer.self_attn, text, prefix, packer)
    if hasattr(layer.mlp, "experts"):
        fill_mixture(layer.mlp, text, prefix, packer)
    else:
        fill_mlp(layer.mlp, text, prefix, "", packer)


def fill_attention(attention: Any, text: Taken, prefix: str, packer: Packer) -> None:
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name, None) is not None:
            put(getattr(attention, name), "weight", text.norm(f"{prefix}attn_{name}.weight"), f"{prefix}attn_{name}")
    whole = f"{prefix}attn_qkv" if f"{prefix}attn_qkv.weight" in text.file else ""
    merge(
        attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", text, packer,
        [whole] if whole else [f"{prefix}attn_{letter}" for letter in "qkv"],
    )  # fmt: skip
    fill(attention, "o_proj", text, f"{prefix}attn_output", packer)


def fill_linear_attention(linear: Any, text: Taken, prefix: str, packer: Packer) -> None:
    """The gated delta rule of Qwen3.5, the heads of its values put in the library's order."""
    keys, values, width = int(linear.num_k_heads), int(linear.num_v_heads), int(linear.head_v_dim)
    if values % keys:
        raise UnusableModel(f"{text.file.path} has {values} value heads for {keys} key heads, which does not fit.")
    heads = torch.arange(values).view(-1, keys).t().flatten()
    outputs = (heads.unsqueeze(1) * width + torch.arange(width)).flatten()
    unchanged = 2 * int(linear.key_dim)
    channels = torch.cat((torch.arange(unchanged), unchanged + outputs))

    def matrix(name: str, called: str) -> Matrix:
        return fitting(getattr(linear, name), text.matrix(f"{prefix}{called}.weight"), f"{prefix}{called}")

    made = {
        "in_proj_qkv": matrix("in_proj_qkv", "attn_qkv"),
        "in_proj_z": matrix("in_proj_z", "attn_gate"),
        "out_proj": matrix("out_proj", "ssm_out"),
    }
    if values != keys:
        made["in_proj_qkv"] = made["in_proj_qkv"].rows(channels)
        made["in_proj_z"] = made["in_proj_z"].rows(outputs)
        made["out_proj"] = made["out_proj"].columns(heads)
    for name, stored in made.items():
        setattr(linear, name, packer.layer([stored]))
    # A row for each head: they are small, and what they say decays or stays.
    for name, called in (("in_proj_b", "ssm_beta"), ("in_proj_a", "ssm_alpha")):
        put(getattr(linear, name), "weight", text.tensor(f"{prefix}{called}.weight", heads), f"{prefix}{called}")
    kernel = text.tensor(f"{prefix}ssm_conv1d.weight", channels)
    put(linear.conv1d, "weight", kernel.unsqueeze(1), f"{prefix}ssm_conv1d")
    put(linear, "dt_bias", text.tensor(f"{prefix}ssm_dt.bias", heads), f"{prefix}ssm_dt")
    # Stored as the rate itself, which is negative.
    rate = text.numbers(f"{prefix}ssm_a")
    if len(rate) != values:
        raise UnusableModel(f"{prefix}ssm_a has {len(rate)} numbers for {values} value heads, which does not fit.")
    put(linear, "A_log", (-rate).log()[heads].to(text.dtype), f"{prefix}ssm_a")
    put(linear.norm, "weight", text.tensor(f"{prefix}ssm_norm.weight"), f"{prefix}ssm_norm")


def fill_mlp(mlp: Any, text: Taken, prefix: str, whose: str, packer: Packer) -> None:
    """whose: "" for a layer's own, "_shexp" for that of an expert which serves every token."""
    merge(
        mlp, ("gate_proj", "up_proj"), "gate_up_proj", text, packer,
        [f"{prefix}ffn_gate{whose}", f"{prefix}ffn_up{whose}"],
    )  # fmt: skip
    fill(mlp, "down_proj", text, f"{prefix}ffn_down{whose}", packer)


def fill_mixture(mlp: Any, text: Taken, prefix: str, packer: Packer) -> None:
    """A router, its experts, and the one beside them where there is one. Experts stay packed; few of them serve a token."""
    put(mlp.gate, "weight", text.tensor(f"{prefix}ffn_gate_inp.weight"), f"{prefix}ffn_gate_inp")
    if hasattr(mlp, "shared_expert"):
        fill_mlp(mlp.shared_expert, text, prefix, "_shexp", packer)
        gate = text.tensor(f"{prefix}ffn_gate_inp_shexp.weight").view(1, -1)
        put(mlp.shared_expert_gate, "weight", gate, f"{prefix}ffn_gate_inp_shexp")
    experts = mlp.experts
    if not packable(experts):
        raise UnusableModel(
            f"{text.file.path} is of a model with experts, which the transformers that is installed keeps in another way: "
            f"update it with {install('--upgrade transformers')}."
        )
    count, hidden, inner = experts.down_proj.shape
    shapes = {"gate_up": (count, 2 * inner, hidden), "gate": (count, inner, hidden), "up": (count, inner, hidden)}
    names = ("gate_up",) if f"{prefix}ffn_gate_up_exps.weight" in text.file else ("gate", "up")
    gate_up = [text.experts(f"{prefix}ffn_{name}_exps.weight", shapes[name]) for name in names]
    down = text.experts(f"{prefix}ffn_down_exps.weight", (count, hidden, inner))
    if packer.plain([*gate_up, down]):
        parts = [part.dense(text.dtype).view(count, -1, hidden) for part in gate_up]
        put(experts, "gate_up_proj", parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), f"{prefix}ffn_gate_exps")
        put(experts, "down_proj", down.dense(text.dtype).view(count, hidden, inner), f"{prefix}ffn_down_exps")
        return
    layers = [packer.layer([part]) for part in gate_up]
    mlp.experts = PackedExperts((count, hidden, inner), experts.act_fn, layers, packer.layer([down]))


def fill(owner: Any, name: str, text: Taken, called: str, packer: Packer) -> None:
    """One layer of `owner`."""
    setattr(owner, name, packer.layer([fitting(getattr(owner, name), text.matrix(f"{called}.weight"), called)]))


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
    if biases is not None and (any(bias.ndim != 1 for bias in biases) or sum(map(len, biases)) != sum(outputs)):
        raise UnusableModel(f"The biases of {stored[0]} and its neighbours do not fit their matrices.")
    share(owner, names, outputs, merged_name, packer.layer(matrices, biases))
