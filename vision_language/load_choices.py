"""What the options of a loading come to for a folder, on this machine: device, dtype, attention and packing of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import host
from ..cache import content_key
from ..host.cards import numbered
from . import stored_fp8
from .folders import ModelFolder
from .loaded_model import LoadOptions, compute_device
from .quantization import QuantizationPlan, plan, plan_for_gguf

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "eager")


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked in DTYPES:
        return DTYPES[asked]
    if asked not in ("auto", ""):
        raise ValueError(f"{asked!r} is no dtype: choose auto, {', '.join(DTYPES)}.")
    if device.type == "cpu":
        return torch.float32
    # Not float16: the activations of Qwen decoders run over its range.
    return host.current().compute_dtype(supported=(torch.bfloat16, torch.float32), device=device)


def choose_attention(asked: str) -> tuple[str, str]:
    """(implementation, note). Whatever cannot run here becomes sdpa, and the note says why."""
    if asked in ("auto", "sdpa", ""):
        return "sdpa", ""
    if asked == "eager":
        return "eager", "attention: eager"
    if asked == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            return asked, "attention: flash_attention_2"
        return "sdpa", "attention: sdpa, because the flash_attn package is not installed"
    if asked == "sage":
        return "sdpa", "attention: sdpa, because SageAttention has no kernel for one query and a cache"
    raise ValueError(f"{asked!r} is no attention: choose one of {', '.join(ATTENTIONS)}.")


@dataclass(frozen=True)
class Choices:
    """What `LoadOptions` come to for a folder, on this machine. notes: what was not done as asked, and why.

    Whatever words they are, options that come to the same share one model.
    """

    device: torch.device
    dtype: torch.dtype
    attention: str
    packing: QuantizationPlan
    stream_layers: int
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        return content_key(
            str(numbered(self.device)), str(self.dtype), self.attention, self.packing.method, self.stream_layers
        )


def choices(folder: ModelFolder, options: LoadOptions) -> Choices:
    """Raises ValueError for a word that is not known, UnusableModel for a device that is not there."""
    device = compute_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    attention, note = choose_attention(options.attention)
    packing = (plan if folder.gguf is None else plan_for_gguf)(options.quantization, device)
    stored = folder.stored_quantization
    if stored is not None and packing.method != "none" and not stored_fp8.unpacks(stored, packing.method):
        packing = QuantizationPlan("none", f"the folder is already quantised ({stored.get('quant_method')})")
    notes = [note] if note else []
    if packing.note and options.quantization.lower() not in ("none", "none (fp16)"):
        notes.append(f"quantization: {packing.note}")
    return Choices(device, dtype, attention, packing, options.stream_layers, tuple(notes))
