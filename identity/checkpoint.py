"""Reading InstantID adapter files in every layout they are shared in, and refusing the others by what they hold.

Layouts: a torch pickle with two dicts, `image_proj` and `ip_adapter` (as published); safetensors, or a pickle, with the
prefixes `image_proj.` and `ip_adapter.` on every key, whatever the file is called. Pickles are read with weights_only=True.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..host.interruption import read_ahead
from ..host.model_files import holds_safetensors, impostor
from ..host.torch_files import read_torch_file

PARTS = ("image_proj", "ip_adapter")
KV_KEY = re.compile(r"([1-9][0-9]*)\.to_([kv])_ip\.weight")
EXPECTED = (
    "expected InstantID's ip-adapter.bin: a resampler (image_proj.latents, image_proj.layers.*) and "
    "ip_adapter.1.to_k_ip.weight, ip_adapter.1.to_v_ip.weight and so on"
)

State = dict[str, Tensor]


class UnsupportedCheckpoint(ValueError):
    """The file is not what its loader reads; the message names the file, what was found and what was expected."""


def read_adapter(path: Path) -> tuple[State, State]:
    """The two state dicts (image_proj, ip_adapter) of an adapter file, on the CPU, in the file's dtype."""
    return split_adapter(_read(path), path.name)


def _read(path: Path) -> Mapping[str, Any]:
    read_ahead(path)
    if (problem := impostor(path)) is not None:
        raise UnsupportedCheckpoint(f"{path.name} was not opened: {problem}")
    if holds_safetensors(path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UnsupportedCheckpoint(
                f"{path.name} is not a whole safetensors file ({error}); download it again."
            ) from error
    try:
        loaded = read_torch_file(path, mapped=True)
    except OSError:
        raise
    except pickle.UnpicklingError as refused:
        raise UnsupportedCheckpoint(
            f"{path.name} was not opened: it is no plain weights file (it holds code, or is not a torch file). "
            "Download it again from a source you trust, or use a .safetensors file."
        ) from refused
    except Exception as damaged:  # a damaged pickle ends in any exception, depending on where the damage is
        raise UnsupportedCheckpoint(
            f"{path.name} is not a whole torch file ({type(damaged).__name__}); download it again."
        ) from damaged
    if not isinstance(loaded, Mapping):
        raise UnsupportedCheckpoint(f"{path.name} holds a {type(loaded).__name__}, not weights; {EXPECTED}.")
    return loaded


def split_adapter(loaded: Mapping[str, Any], name: str) -> tuple[State, State]:
    """Separate and check the two parts of a loaded adapter. `name` is the file's, for messages."""
    if set(PARTS) <= loaded.keys() and all(isinstance(loaded[part], Mapping) for part in PARTS):
        parts = {part: {str(key): value for key, value in loaded[part].items()} for part in PARTS}
    else:
        parts = {
            part: {key[len(part) + 1 :]: v for key, v in loaded.items() if str(key).startswith(part + ".")}
            for part in PARTS
        }
    image_proj, ip_adapter = parts["image_proj"], parts["ip_adapter"]
    if not image_proj and not ip_adapter:
        some = ", ".join(sorted(map(str, loaded))[:3]) or "nothing"
        hint = " This looks like a ControlNet: it belongs in models/controlnet." if _is_controlnet(loaded) else ""
        raise UnsupportedCheckpoint(f"{name} has the keys {some}, ...; {EXPECTED}.{hint}")
    if "latents" not in image_proj:
        what = "FaceID or plain" if "proj.weight" in image_proj or "proj.0.weight" in image_proj else "different"
        raise UnsupportedCheckpoint(f"{name} is a {what} IP-Adapter, without a resampler; {EXPECTED}.")
    wrong = sorted(key for key in ip_adapter if not KV_KEY.fullmatch(key))
    if wrong:
        raise UnsupportedCheckpoint(f"{name} has unknown ip_adapter keys ({', '.join(wrong[:3])}); {EXPECTED}.")
    for part, state in parts.items():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise UnsupportedCheckpoint(f"{name}: {part}.{key} is a {type(value).__name__}, not a tensor.")
            if not value.is_floating_point():
                raise UnsupportedCheckpoint(
                    f"{name}: {part}.{key} holds {value.dtype}, not floating-point weights; quantised adapters are not read."
                )
    return image_proj, ip_adapter


def _is_controlnet(loaded: Mapping[str, Any]) -> bool:
    return any(str(k).startswith(("controlnet_", "control_model.", "input_hint_block.")) for k in loaded)
