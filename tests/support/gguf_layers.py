"""What llama.cpp's converter makes of the tensors of decoder layers: their names, and the numbers that it changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}  # fmt: skip


def layer_tensors(rest: str, part: str, tensor: Tensor, text: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, numbers) of what becomes of a layer's tensor `rest`.`part`. text: the settings of the language model."""
    hybrid = "linear_key_head_dim" in text
    if rest == "mlp.experts":
        if part == "gate_up_proj":
            for name, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                yield f"ffn_{name}_exps.weight", half.contiguous()
        else:
            yield "ffn_down_exps.weight", tensor
        return
    if rest.startswith("linear_attn"):
        tensor = tiled(rest, part, tensor, text)
        if part in ("A_log", "dt_bias"):
            yield ("ssm_a", -tensor.exp()) if part == "A_log" else ("ssm_dt.bias", tensor)
            return
    elif hybrid and rest.endswith("norm"):
        tensor = tensor + 1
    called = "post_attention_norm" if hybrid and rest == "post_attention_layernorm" else BLOCK[rest]
    yield f"{called}.{part}", tensor.flatten() if called == "ffn_gate_inp_shexp" else tensor


def tiled(rest: str, part: str, tensor: Tensor, text: dict[str, Any]) -> Tensor:
    """With the heads of the values in the order of llama.cpp: first the first one of every key head, then the second ones."""
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    heads = [key * (values // keys) + turn for turn in range(values // keys) for key in range(keys)]
    width, before = text["linear_value_head_dim"], 2 * keys * text["linear_key_head_dim"]

    def rows(whole: Tensor, each: int) -> Tensor:
        return whole.view(values, each, *whole.shape[1:])[heads].reshape(whole.shape)

    if rest.endswith("out_proj"):
        return rows(tensor.T.contiguous(), width).T.contiguous()
    if rest.endswith("in_proj_z"):
        return rows(tensor, width)
    if rest.endswith(("in_proj_qkv", "conv1d")):
        made = tensor.clone()
        made[before:] = rows(tensor[before:], width)
        return made.squeeze(1)
    return tensor if rest.endswith("norm") else rows(tensor, 1)
