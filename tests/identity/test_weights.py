"""InstantID's files: every layout is read, every other file is refused with what was found."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath.identity import load_adapter
from hotpath.identity.checkpoint import UnsupportedCheckpoint
from safetensors.torch import save_file
from tiny_adapters import WIDTHS, State, flat, make_state, nested_pickle, rng


def legacy_pickle(state: dict[str, State], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def flat_pickle(state: dict[str, State], path: Path) -> None:
    torch.save(flat(state), path)


def flat_safetensors(state: dict[str, State], path: Path) -> None:
    save_file(flat(state), path)


LAYOUTS: dict[str, tuple[Callable[[dict[str, State], Path], None], str]] = {
    "nested pickle": (nested_pickle, "ip-adapter.bin"),
    "legacy pickle": (legacy_pickle, "ip-adapter.bin"),
    "flat pickle": (flat_pickle, "ip-adapter.bin"),
    "flat safetensors": (flat_safetensors, "ip-adapter.safetensors"),
    "upper case suffix": (flat_safetensors, "IP-ADAPTER.SAFETENSORS"),
    "safetensors by another name": (flat_safetensors, "ip-adapter.bin"),
    "pickle by another name": (nested_pickle, "ip-adapter.safetensors"),
    "legacy pickle by another name": (legacy_pickle, "ip-adapter.safetensors"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(layout: str, tmp_path: Path) -> None:
    write, name = LAYOUTS[layout]
    state = make_state()
    write(state, tmp_path / name)
    adapter = load_adapter(tmp_path / name)
    loaded = adapter.state_dict()
    for key, value in state["image_proj"].items():
        assert torch.equal(loaded[f"image_proj_model.{key}"], value), key
    for key, value in state["ip_adapter"].items():
        assert torch.equal(loaded[f"ip_layers.to_kvs.{key.replace('.', '_', 2).replace('_weight', '.weight')}"], value)
    assert len(loaded) == len(flat(state))
    assert adapter.name == name
    assert not any(p.requires_grad for p in adapter.parameters())


def test_same_content_has_the_same_fingerprint_whatever_its_name(tmp_path: Path) -> None:
    nested_pickle(make_state(), tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.bin").read_bytes())
    nested_pickle(make_state(seed=1), tmp_path / "c.bin")
    a, b, c = (load_adapter(tmp_path / f"{name}.bin").fingerprint for name in "abc")
    assert a == b != c


def test_weights_are_converted_when_asked(tmp_path: Path) -> None:
    nested_pickle(make_state(), tmp_path / "a.bin")
    assert {p.dtype for p in load_adapter(tmp_path / "a.bin").parameters()} == {torch.float32}
    assert {p.dtype for p in load_adapter(tmp_path / "a.bin", torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 48, "depth": 1, "heads": 1, "queries": 4, "faces": 24, "context": 64},
        {
            "dim": 80,
            "depth": 4,
            "heads": 20,
            "queries": 16,
            "faces": 512,
            "context": 2048,
            "inner": 320,
            "widths": (8, 16),
        },
        {"dim": 64, "depth": 3, "heads": 2, "queries": 16, "faces": 512, "context": 768, "inner": 64},
    ],
)
def test_widths_are_read_from_shapes(sizes: dict[str, Any], tmp_path: Path) -> None:
    nested_pickle(make_state(**sizes), tmp_path / "a.bin")
    adapter = load_adapter(tmp_path / "a.bin")
    assert (adapter.embedding_dim, adapter.context_dim) == (sizes["faces"], sizes["context"])
    widths = sizes.get("widths", WIDTHS)
    assert tuple(adapter.block_width(i) for i in adapter.numbers) == widths
    tokens = adapter.image_proj_model(torch.randn(3, 1, sizes["faces"], generator=rng(1)))
    assert tokens.shape == (3, sizes["queries"], sizes["context"])
    keys, values = adapter.project(1, tokens)
    assert keys.shape == values.shape == (3, sizes["queries"], widths[1])


def without(state: dict[str, State], *keys: str) -> State:
    weights = flat(state)
    for key in keys:
        del weights[key]
    return weights


def changed(state: dict[str, State], **values: Any) -> dict[str, Any]:
    return {**flat(state), **{key.replace("__", "."): value for key, value in values.items()}}


def gap() -> State:
    return {key.replace("ip_adapter.3.", "ip_adapter.7."): value for key, value in flat(make_state()).items()}


PLAIN = {f"{n}.to_{kind}_ip.weight": torch.zeros(8, 64) for n in (1, 3) for kind in "kv"}

REFUSED: dict[str, tuple[Any, str]] = {
    "controlnet": ({"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}, "belongs in models/controlnet"),
    "ldm controlnet": ({"input_hint_block.0.weight": torch.zeros(1)}, "belongs in models/controlnet"),
    "lora": ({"lora_unet_down.weight": torch.zeros(1)}, "lora_unet_down.weight.*expected InstantID's ip-adapter.bin"),
    "empty dict": ({}, "has the keys nothing"),
    "faceid": (
        {
            "image_proj": {"proj.0.weight": torch.zeros(4, 4), "proj.2.weight": torch.zeros(4, 4)},
            "ip_adapter": {"0.to_q_lora.down.weight": torch.zeros(4, 4), **PLAIN},
        },
        "FaceID or plain IP-Adapter",
    ),
    "plain": (
        {"image_proj": {"proj.weight": torch.zeros(4, 4), "norm.weight": torch.zeros(4)}, "ip_adapter": PLAIN},
        "FaceID or plain IP-Adapter",
    ),
    "no resampler": ({"image_proj": {}, "ip_adapter": PLAIN}, "different IP-Adapter"),
    "lora among the blocks": (
        changed(make_state(), ip_adapter__0__to_q_lora__down__weight=torch.zeros(4, 4)),
        r"unknown ip_adapter keys \(0.to_q_lora.down.weight\)",
    ),
    "no blocks": ({**make_state(), "ip_adapter": {}}, "numbered 1, 3, 5, ... without gaps"),
    "gap": (gap(), r"found blocks \[1, 5, 7\]"),
    "block 0": (
        {key.replace("ip_adapter.1.", "ip_adapter.0."): v for key, v in flat(make_state()).items()},
        r"unknown ip_adapter keys \(0.to_k_ip.weight",
    ),
    "number with a zero before it": (
        {key.replace("ip_adapter.1.", "ip_adapter.01."): v for key, v in flat(make_state()).items()},
        "unknown ip_adapter keys",
    ),
    "missing v": (without(make_state(), "ip_adapter.3.to_v_ip.weight"), "block 3 lacks one"),
    "context width": (
        changed(make_state(), ip_adapter__3__to_k_ip__weight=torch.zeros(48, 63)),
        r"ip_adapter.3.to_k_ip.weight has the shape \(48, 63\); expected \[width, 64\]",
    ),
    "three-dimensional": (changed(make_state(), ip_adapter__3__to_k_ip__weight=torch.zeros(48, 64, 1)), "the shape"),
    "values of another width than keys": (
        changed(make_state(), ip_adapter__3__to_v_ip__weight=torch.zeros(40, 64)),
        "block 3 has keys 48 wide and values 40 wide",
    ),
    "a number among the tensors": (changed(make_state(), image_proj__latents=3.5), "image_proj.latents is a float"),
    "a dict among the blocks": (
        {**make_state(), "ip_adapter": {"1.to_k_ip.weight": {}, "1.to_v_ip.weight": {}}},
        "ip_adapter.1.to_k_ip.weight is a dict, not a tensor",
    ),
    "quantised": (
        changed(make_state(), ip_adapter__1__to_k_ip__weight=torch.zeros(32, 64, dtype=torch.int8)),
        "torch.int8, not floating-point",
    ),
    "keys that are numbers": ({1: torch.zeros(1), 2: torch.zeros(1)}, "has the keys 1, 2"),
    "block keys that are numbers": (
        {**make_state(), "ip_adapter": {1: torch.zeros(1)}},
        r"unknown ip_adapter keys \(1\)",
    ),
    "a list": ([torch.zeros(1)], "holds a list, not weights"),
    "a tensor": (torch.zeros(3), "holds a Tensor, not weights"),
    "resampler key missing": (without(make_state(), "image_proj.proj_out.weight"), "resampler has no proj_out.weight"),
    "deep resampler key missing": (
        without(make_state(), "image_proj.layers.1.1.3.weight"),
        "Missing key.*layers.1.1.3",
    ),
    "resampler layer missing": (
        {k: v for k, v in flat(make_state()).items() if not k.startswith("image_proj.layers.0.")},
        "resampler has no layers.0.0.to_q.weight",
    ),
    "resampler key too many": (
        changed(make_state(), image_proj__layers__0__0__gate=torch.zeros(1)),
        "Unexpected key.*layers.0.0.gate",
    ),
    "a layer far away": (changed(make_state(), image_proj__layers__999999999__x=torch.zeros(1)), "do not fit together"),
    "a layer with no number": (
        changed(make_state(), image_proj__layers__last__x=torch.zeros(1)),
        "do not fit together",
    ),
    "resampler widths at odds": (
        changed(make_state(), image_proj__proj_in__bias=torch.zeros(7)),
        "do not fit together.*proj_in.bias",
    ),
    "latents without a batch": (
        changed(make_state(), image_proj__latents=torch.zeros(16, 48)),
        "do not fit together.*latents",
    ),
    "a scalar for a matrix": (
        changed(make_state(), image_proj__proj_out__weight=torch.tensor(1.0)),
        "do not fit together",
    ),
    "heads that are not 64 wide": (
        changed(make_state(), image_proj__layers__0__0__to_q__weight=torch.zeros(100, 48)),
        "do not fit together.*to_q",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_file_is_refused_with_what_was_found(case: str, tmp_path: Path) -> None:
    content, sentence = REFUSED[case]
    path = tmp_path / "ip-adapter.bin"
    torch.save(content, path)
    with pytest.raises(UnsupportedCheckpoint, match=sentence) as caught:
        load_adapter(path)
    message = str(caught.value)
    assert message.startswith("ip-adapter.bin"), "the file is named first"
    assert "\n" not in message


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "the code ran")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_not_executed(legacy: bool, tmp_path: Path) -> None:
    proof = tmp_path / "proof.txt"
    path = tmp_path / "ip-adapter.bin"
    content = {**make_state(), "extra": Malicious(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsupportedCheckpoint, match="was not opened: it is no plain weights file"):
        load_adapter(path)
    assert not proof.exists()
    # The object does run its code where pickles are trusted, or this test would prove nothing.
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists()


def test_a_bare_pickle_with_code_is_not_executed(tmp_path: Path) -> None:
    proof = tmp_path / "proof.txt"
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(UnsupportedCheckpoint):
        load_adapter(tmp_path / "a.bin")
    assert not proof.exists()


@pytest.mark.parametrize("layout", ["nested pickle", "legacy pickle", "flat safetensors"])
@pytest.mark.parametrize("part", [0, 1, 7, 100, 0.3, 0.5, 0.9, -1])
def test_a_file_that_was_cut_off_is_refused(layout: str, part: float, tmp_path: Path) -> None:
    write, name = LAYOUTS[layout]
    path = tmp_path / name
    write(make_state(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole)) if 0 < part < 1 else int(part)])
    said = " not a whole safetensors file" if layout == "flat safetensors" and part else " not "
    with pytest.raises(UnsupportedCheckpoint, match=f"ip-adapter.*{said}"):
        load_adapter(path)


@pytest.mark.parametrize(
    "content", [b"<!doctype html><html>404</html>", b"PK\x03\x04", b"\x80\x02", b"version https://git-lfs"]
)
def test_what_is_no_torch_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ip-adapter.bin"
    path.write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match=r"ip-adapter\.bin"):
        load_adapter(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_damage_anywhere_gives_a_sentence(legacy: bool, tmp_path: Path) -> None:
    """A flipped byte ends in any exception inside the unpickler; all of them are to become one sentence."""
    import random

    buffer = io.BytesIO()
    torch.save(make_state(dim=4, depth=1, heads=1, queries=1, faces=2, context=4, inner=4, widths=(2,)), buffer,
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    raw, path, chance = buffer.getvalue(), tmp_path / "a.bin", random.Random(5)
    refused = 0
    for _ in range(150):
        damaged = bytearray(raw)
        for _ in range(4):
            damaged[chance.randrange(min(len(raw), 3000))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            load_adapter(path)
        except UnsupportedCheckpoint:
            refused += 1
    assert refused > 50
