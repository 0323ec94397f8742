"""InstantID weights: every layout is read, every other file refused, and tokens, keys and values are the formula's."""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotpath.cache import registry as registry_module
from hotpath.identity import (
    Identity,
    InstantIDAdapter,
    PreparedIdentity,
    adopt_adapter,
    combine_embeddings,
    load_adapter,
    load_identity,
    prepare,
    save_identity,
    unconditional_embedding,
)
from hotpath.identity.blocks import (
    INDEX,
    PATCH_MODES,
    SDXL_BLOCKS,
    describe,
    parse_blocks,
    select_blocks,
)
from hotpath.identity.checkpoint import UnsupportedCheckpoint
from hotpath.identity.prepared import COND, UNCOND
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

WIDTHS = (32, 48, 32)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_state(
    dim: int = 48,
    depth: int = 2,
    heads: int = 2,
    queries: int = 16,
    faces: int = 24,
    context: int = 64,
    inner: int = 96,
    widths: tuple[int, ...] = WIDTHS,
    seed: int = 0,
) -> dict[str, State]:
    """What an ip-adapter.bin holds, in any size."""
    generator = rng(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    def norm(prefix: str, width: int) -> State:
        return {f"{prefix}.weight": 1 + 0.2 * noise(width), f"{prefix}.bias": noise(width)}

    resampler: State = {
        "latents": noise(1, queries, dim),
        "proj_in.weight": noise(dim, faces),
        "proj_in.bias": noise(dim),
        "proj_out.weight": noise(context, dim),
        "proj_out.bias": noise(context),
        **norm("norm_out", context),
    }
    for layer in range(depth):
        resampler |= {
            **norm(f"layers.{layer}.0.norm1", dim),
            **norm(f"layers.{layer}.0.norm2", dim),
            f"layers.{layer}.0.to_q.weight": noise(heads * 64, dim),
            f"layers.{layer}.0.to_kv.weight": noise(heads * 128, dim),
            f"layers.{layer}.0.to_out.weight": noise(dim, heads * 64),
            **norm(f"layers.{layer}.1.0", dim),
            f"layers.{layer}.1.1.weight": noise(inner, dim),
            f"layers.{layer}.1.3.weight": noise(dim, inner),
        }
    blocks = {
        f"{2 * n + 1}.to_{kind}_ip.weight": noise(width, context) for n, width in enumerate(widths) for kind in "kv"
    }
    return {"image_proj": resampler, "ip_adapter": blocks}


def flat(state: dict[str, State]) -> State:
    return {f"{part}.{key}": value.clone() for part, weights in state.items() for key, value in weights.items()}


def make_adapter(fingerprint: str = "f", **sizes: Any) -> InstantIDAdapter:
    state = make_state(**sizes)
    return InstantIDAdapter(state["image_proj"], state["ip_adapter"], "tiny.bin", fingerprint)


def reference_tokens(state: State, embedding: Tensor, heads: int) -> Tensor:
    """The resampler written out plainly, in float64, one head at a time; embedding [B, N, D]."""
    w = {key: value.double() for key, value in state.items()}

    def layer_norm(x: Tensor, prefix: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    results = []
    for row in embedding.double():
        x = row @ w["proj_in.weight"].T + w["proj_in.bias"]
        latents = w["latents"][0]
        depth = sum(key.endswith(".0.to_q.weight") for key in w)
        for i in range(depth):
            p = f"layers.{i}.0"
            features, queries = layer_norm(x, f"{p}.norm1"), layer_norm(latents, f"{p}.norm2")
            q = queries @ w[f"{p}.to_q.weight"].T
            k, v = (torch.cat([features, queries]) @ w[f"{p}.to_kv.weight"].T).split(heads * 64, dim=1)
            attended = []
            for h in range(heads):
                part = slice(64 * h, 64 * h + 64)
                scores = q[:, part] @ k[:, part].T / 8  # sqrt(64)
                attended.append(torch.softmax(scores, dim=1) @ v[:, part])
            latents = latents + torch.cat(attended, dim=1) @ w[f"{p}.to_out.weight"].T
            p = f"layers.{i}.1"
            hidden = gelu(layer_norm(latents, f"{p}.0") @ w[f"{p}.1.weight"].T)
            latents = latents + hidden @ w[f"{p}.3.weight"].T
        results.append(layer_norm(latents @ w["proj_out.weight"].T + w["proj_out.bias"], "norm_out"))
    return torch.stack(results).float()


# ---------------------------------------------------------------- layouts


def nested_pickle(state: dict[str, State], path: Path) -> None:
    torch.save(state, path)


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


# ---------------------------------------------------------------- refusals


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
    said = " not a whole safetensors file" if layout == "flat safetensors" else " not "
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


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(("heads", "depth", "queries"), [(1, 1, 4), (2, 3, 16), (20, 4, 16)])
def test_resampler_gives_the_tokens_of_the_formula(heads: int, depth: int, queries: int) -> None:
    sizes = {"dim": 96, "depth": depth, "heads": heads, "queries": queries, "faces": 32, "context": 64, "inner": 200}
    state = make_state(**sizes, seed=3)["image_proj"]
    adapter = make_adapter(**sizes, seed=3)
    embedding = 2 * torch.randn(3, 1, 32, generator=rng(4))
    tokens = adapter.image_proj_model(embedding)
    expected = reference_tokens(state, embedding, heads)
    assert (tokens - expected).abs().max() < 2e-5
    several = torch.randn(2, 5, 32, generator=rng(5))  # more than one feature per person works as well
    assert (adapter.image_proj_model(several) - reference_tokens(state, several, heads)).abs().max() < 2e-5


def test_resampler_stays_finite_in_half_precision() -> None:
    adapter = make_adapter(heads=2, dim=96).half()
    tokens = adapter.image_proj_model(40 * torch.randn(1, 1, 24, generator=rng(1)).half())
    assert torch.isfinite(tokens).all()


def test_keys_and_values_belong_to_their_block() -> None:
    state, adapter = make_state(), make_adapter()
    tokens = torch.randn(1, 16, 64, generator=rng(2))
    for index in adapter.numbers:
        keys, values = adapter.project(index, tokens)
        assert torch.allclose(keys, tokens @ state["ip_adapter"][f"{2 * index + 1}.to_k_ip.weight"].T, atol=1e-6)
        assert torch.allclose(values, tokens @ state["ip_adapter"][f"{2 * index + 1}.to_v_ip.weight"].T, atol=1e-6)


# ---------------------------------------------------------------- adapters of other packs


class ForeignResampler(torch.nn.Module):
    """Parameters under the names of the published file, held as another pack's modules would hold them."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for key, value in state.items():
            *path, leaf = key.split(".")
            module: torch.nn.Module = self
            for name in path:
                if name not in module._modules:
                    module.add_module(name, torch.nn.Module())
                module = module._modules[name]  # type: ignore[assignment]
            module.register_parameter(leaf, torch.nn.Parameter(value.clone()))


class ForeignInstantID(torch.nn.Module):
    def __init__(self, state: dict[str, State]) -> None:
        super().__init__()
        self.image_proj_model = ForeignResampler(state["image_proj"])
        self.ip_layers = torch.nn.Module()
        self.ip_layers.to_kvs = torch.nn.ModuleDict()
        for key, value in state["ip_adapter"].items():
            linear = torch.nn.Linear(value.shape[1], value.shape[0], bias=False)
            linear.weight.data = value.clone()
            self.ip_layers.to_kvs[key.replace(".weight", "").replace(".", "_")] = linear


@pytest.mark.usefixtures("headless_host", "own_caches")
def test_an_adapter_of_another_pack_gives_the_same_tokens() -> None:
    state = make_state()
    foreign, ours = ForeignInstantID(state), make_adapter()
    adopted = adopt_adapter(foreign)
    embedding = torch.randn(1, 1, 24, generator=rng(1))
    for mine, theirs in zip(ours.get_image_embeds(embedding, 0 * embedding),
                            adopted.get_image_embeds(embedding, 0 * embedding), strict=True):  # fmt: skip
        assert torch.equal(mine, theirs)
    a = prepare(ours, ours.managed, embedding, noise=0.3)
    b = prepare(adopted, adopted.managed, embedding, noise=0.3)
    for index in ours.numbers:
        assert torch.equal(a.keys_values(index, CPU, torch.float32)[0], b.keys_values(index, CPU, torch.float32)[0])
    assert adopt_adapter(foreign) is adopted, "the second node of a graph must find the same one"
    assert adopt_adapter(ours) is ours
    another = adopt_adapter(ForeignInstantID(make_state(seed=1)))
    assert another.fingerprint != adopted.fingerprint
    assert all(p.requires_grad for p in foreign.parameters()), "the other pack's object stays as it was"


def test_an_adopted_adapter_goes_with_its_owner() -> None:
    import gc
    import weakref

    foreign = ForeignInstantID(make_state())
    adopted = weakref.ref(adopt_adapter(foreign))
    del foreign
    gc.collect()
    assert adopted() is None


def test_threads_share_one_handle(headless_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two, one thread sends the weights away while the other computes with them."""
    together, manage = threading.Barrier(4), headless_host.manage
    handles: list[Any] = []

    def slowly(module: torch.nn.Module) -> Any:
        time.sleep(0.05)
        return manage(module)

    monkeypatch.setattr(headless_host, "manage", slowly)
    adapter = make_adapter()

    def ask() -> None:
        together.wait()
        handles.append(adapter.managed)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(handle) for handle in handles}) == 1


def test_an_adapter_that_is_no_module_is_adopted_too() -> None:
    inside = ForeignInstantID(make_state())
    holder = SimpleNamespace(image_proj_model=inside.image_proj_model, ip_layers=inside.ip_layers)
    assert adopt_adapter(holder).numbers == (0, 1, 2)


@pytest.mark.parametrize("wrong", [None, {}, {"ipadapter": {}}, torch.nn.Linear(1, 1), "ip-adapter.bin", object()])
def test_another_object_is_refused(wrong: Any) -> None:
    with pytest.raises(
        UnsupportedCheckpoint, match=f"got a {type(wrong).__name__}; connect the output of Load InstantID"
    ):
        adopt_adapter(wrong)


def test_a_foreign_adapter_of_another_kind_is_refused() -> None:
    plain = torch.nn.Module()
    plain.image_proj_model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    plain.ip_layers = torch.nn.Module()
    plain.ip_layers.to_kvs = torch.nn.ModuleDict({"oddly": torch.nn.Linear(4, 4)})
    with pytest.raises(UnsupportedCheckpoint, match="IP-Adapter"):
        adopt_adapter(plain)


# ---------------------------------------------------------------- combining and noise


def test_average_is_the_mean() -> None:
    embeddings = torch.randn(3, 1, 24, generator=rng(1))
    assert torch.allclose(combine_embeddings(embeddings, "average"), embeddings.sum(0, keepdim=True) / 3)


def test_norm_average_divides_by_the_norm_over_the_pictures() -> None:
    embeddings = torch.randn(3, 1, 24, generator=rng(1))
    combined = combine_embeddings(embeddings, "norm average")
    assert combined.shape == (1, 1, 24)
    for feature in range(24):
        column = [float(embeddings[n, 0, feature]) for n in range(3)]
        norm = math.sqrt(sum(value**2 for value in column))
        assert float(combined[0, 0, feature]) == pytest.approx(sum(column) / norm / 3, rel=1e-5)
    per_picture = torch.nn.functional.normalize(embeddings, dim=-1).mean(0, keepdim=True)
    assert not torch.allclose(combined, per_picture, atol=1e-2), "not the norm one would expect"


def test_norm_average_of_a_feature_that_is_zero_everywhere() -> None:
    embeddings = torch.randn(2, 1, 8, generator=rng(1))
    embeddings[:, 0, 3] = 0
    combined = combine_embeddings(embeddings, "norm average")
    assert torch.isfinite(combined).all()
    assert combined[0, 0, 3] == 0


def test_concat_and_single_pictures_stay_as_they_are() -> None:
    embeddings = torch.randn(3, 1, 24, generator=rng(1))
    assert torch.equal(combine_embeddings(embeddings, "concat"), embeddings)
    for mode in ("average", "norm average", "concat"):
        assert torch.equal(combine_embeddings(embeddings[:1], mode), embeddings[:1])


@pytest.mark.parametrize("mode", ["", "mean", "norm_average", "AVERAGE"])
def test_another_mode_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="choose one of average, norm average, concat"):
        combine_embeddings(torch.zeros(1, 1, 4), mode)


@pytest.mark.parametrize("total", [-3000.7, -1.5, -0.3, 0.0, 0.9, 12.3, 5e9])
@pytest.mark.parametrize("pictures", [1, 3])
def test_noise_is_what_the_global_generator_would_give(total: float, pictures: int) -> None:
    embedding = torch.randn(pictures, 1, 24, generator=rng(7))
    embedding += (total - embedding.sum()) / embedding.numel()
    for noise in (0.1, 0.35, 1.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.sum(embedding).item()) % 1000000007)
            expected = noise * torch.rand_like(embedding)
        before = torch.get_rng_state()
        assert torch.equal(unconditional_embedding(embedding, noise), expected)
        assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"


@pytest.mark.parametrize("noise", [0.0, -0.5])
def test_without_noise_the_unconditional_embedding_is_zero(noise: float) -> None:
    embedding = torch.randn(2, 1, 24, generator=rng(7))
    assert torch.equal(unconditional_embedding(embedding, noise), torch.zeros(2, 1, 24))


# ---------------------------------------------------------------- prepare

CPU = torch.device("cpu")
META = torch.device("meta")  # a device that is not the CPU, on every machine


@pytest.fixture
def own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_caches", {})
    monkeypatch.setattr(registry_module, "_limit", None)


class RecordingManaged:
    """Memory management that notes who asked for the network, and refuses its use outside."""

    def __init__(self, module: InstantIDAdapter) -> None:
        self.module = module
        self.device = CPU
        self.stays: list[bool] = []
        self.inside = False
        self.forwards = 0
        module.image_proj_model.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        assert self.inside, "used while not resident"
        self.forwards += 1

    @contextmanager
    def resident(self, extra_bytes: int = 0, keep: bool = True) -> Iterator[InstantIDAdapter]:
        self.stays.append(keep)
        self.inside = True
        try:
            yield self.module
        finally:
            self.inside = False

    def release(self) -> None: ...


def recording(adapter: InstantIDAdapter) -> RecordingManaged:
    """The memory management of `adapter`, one for each."""
    return adapter.__dict__.get("recording") or adapter.__dict__.setdefault("recording", RecordingManaged(adapter))


def faces(pictures: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(pictures, 1, 24, generator=rng(seed))


@pytest.mark.usefixtures("own_caches")
def test_prepared_holds_what_the_network_gives() -> None:
    adapter = make_adapter()
    prepared = prepare(adapter, recording(adapter), faces(3), "average", 0.35)
    embedding = faces(3).mean(0, keepdim=True)
    reference = [reference_tokens(make_state()["image_proj"], e, 2) for e in
                 (embedding, unconditional_embedding(embedding, 0.35))]  # fmt: skip
    assert (prepared.cond - reference[COND]).abs().max() < 2e-5
    assert (prepared.uncond - reference[UNCOND]).abs().max() < 2e-5
    assert len(prepared) == 3
    for index, width in enumerate(WIDTHS):
        keys, values = prepared.keys_values(index, CPU, torch.float32)
        assert keys.shape == values.shape == (2, 16, width)
        for role in (COND, UNCOND):
            for found, kind in ((keys, "k"), (values, "v")):
                weight = make_state()["ip_adapter"][f"{2 * index + 1}.to_{kind}_ip.weight"]
                assert (found[role] - reference[role][0] @ weight.T).abs().max() < 2e-5


@pytest.mark.usefixtures("own_caches")
def test_without_noise_the_unconditional_tokens_come_from_the_resampler_too() -> None:
    adapter = make_adapter()
    prepared = prepare(adapter, recording(adapter), faces())
    assert prepared.uncond.abs().max() > 0.1
    assert torch.equal(prepared.uncond, adapter.image_proj_model.forward(torch.zeros(1, 1, 24)))


@pytest.mark.usefixtures("own_caches")
def test_the_same_person_is_computed_once() -> None:
    adapter = make_adapter()
    managed = recording(adapter)
    first = prepare(adapter, managed, faces(2), "average", 0.35)
    assert managed.stays == [False], "the adapter does not stay on the device"
    assert managed.forwards == 2
    assert prepare(adapter, managed, faces(2).clone(), "average", 0.35) is first
    again = make_adapter()
    assert prepare(again, recording(again), faces(2), "average", 0.35) is first, "same file, loaded again"
    assert (managed.stays, managed.forwards) == ([False], 2)


@pytest.mark.usefixtures("own_caches")
def test_whatever_changes_the_result_is_computed_anew() -> None:
    adapter = make_adapter()
    half = make_adapter().half()
    other = make_adapter(fingerprint="g", seed=1)
    made = [
        prepare(a, recording(a), e, combine, noise, dtype)
        for a, e, combine, noise, dtype in (
            (adapter, faces(2), "average", 0.35, torch.float32),
            (adapter, faces(2), "average", 0.4, torch.float32),
            (adapter, faces(2), "norm average", 0.35, torch.float32),
            (adapter, faces(2), "concat", 0.35, torch.float32),
            (adapter, faces(2), "average", 0.35, torch.bfloat16),
            (adapter, faces(2).flip(0) * 2, "average", 0.35, torch.float32),
            (other, faces(2), "average", 0.35, torch.float32),
            (half, faces(2), "average", 0.35, torch.float32),
        )
    ]
    assert len({id(p) for p in made}) == len(made)

    def tokens(p: PreparedIdentity) -> Tensor:
        return torch.cat((p.cond, p.uncond)).float()

    for different in made[1:]:
        assert tokens(different).shape != tokens(made[0]).shape or not torch.equal(tokens(different), tokens(made[0]))
    assert made[4].cond.dtype == torch.bfloat16


@pytest.mark.usefixtures("own_caches")
def test_concat_has_the_tokens_of_every_picture() -> None:
    adapter = make_adapter()
    prepared = prepare(adapter, recording(adapter), faces(3), "concat")
    assert prepared.cond.shape == prepared.uncond.shape == (3, 16, 64)
    keys, _ = prepared.keys_values(0, CPU, torch.float32)
    assert keys.shape == (2, 48, 32)
    alone = prepare(adapter, recording(adapter), faces(3)[2:], "average")
    assert torch.allclose(keys[COND, 32:], alone.keys_values(0, CPU, torch.float32)[0][COND], atol=1e-5)


@pytest.mark.usefixtures("own_caches")
def test_copies_for_sampling_come_and_go() -> None:
    adapter = make_adapter()
    prepared = prepare(adapter, recording(adapter), faces())
    held = prepared.nbytes
    assert prepared.device_bytes == 0
    keys, _ = prepared.keys_values(1, META, torch.float16)
    assert (keys.device.type, keys.dtype, keys.shape) == ("meta", torch.float16, (2, 16, 48))
    assert prepared.keys_values(1, META, torch.float16)[0] is keys, "copied once"
    everything = 2 * 2 * 16 * sum(WIDTHS)  # keys and values, two roles, sixteen tokens
    assert prepared.device_bytes == everything * 2
    prepared.keys_values(0, META, torch.float32)
    assert prepared.device_bytes == everything * 2 + everything * 4
    assert prepared.nbytes == held, "copies are not part of what the cache counts"
    prepared.drop_copies()
    assert prepared.device_bytes == 0
    assert prepared.keys_values(0, CPU, torch.float32)[0].device == CPU


@pytest.mark.usefixtures("own_caches")
def test_a_copy_in_another_dtype_is_the_rounded_master() -> None:
    adapter = make_adapter()
    prepared = prepare(adapter, recording(adapter), faces())
    exact, _ = prepared.keys_values(2, CPU, torch.float32)
    rounded, _ = prepared.keys_values(2, CPU, torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())
    prepared.drop_copies()
    assert torch.equal(prepared.keys_values(2, CPU, torch.float32)[0], exact)


@pytest.mark.usefixtures("own_caches")
def test_people_do_not_fill_the_memory() -> None:
    from hotpath.cache import named_cache

    adapter = make_adapter()
    one = prepare(adapter, recording(adapter), faces(seed=0))
    cache = named_cache("InstantID identities", 0)
    assert cache.statistics().nbytes == one.nbytes
    cache.resize(3 * one.nbytes + 1)
    for seed in range(10):
        prepare(adapter, recording(adapter), faces(seed=seed))
    assert cache.statistics().entries == 3
    assert cache.statistics().nbytes <= cache.limit


@pytest.mark.usefixtures("own_caches")
def test_prepared_while_a_prompt_runs_and_used_outside() -> None:
    """ComfyUI runs nodes in inference mode; what they remember must also serve code that does not."""
    with torch.inference_mode():
        adapter = make_adapter()
        prepared = prepare(adapter, recording(adapter), faces(), noise=0.2)
    q = torch.randn(1, 4, 32, generator=rng(1), requires_grad=True)
    keys, _ = prepared.keys_values(0, CPU, torch.float64)
    assert torch.isfinite(q.double().detach() @ keys[COND].T).all()
    registry_module._caches.clear()
    again = make_adapter()
    plain = prepare(again, recording(again), faces(), noise=0.2)
    assert torch.equal(plain.uncond, prepared.uncond)
    assert not plain.cond.requires_grad


@pytest.mark.usefixtures("own_caches")
def test_many_threads_get_the_same_copy() -> None:
    from concurrent.futures import ThreadPoolExecutor

    adapter = make_adapter()
    prepared = prepare(adapter, recording(adapter), faces())
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda _: prepared.keys_values(0, CPU, torch.float16)[0], range(64)))
    assert len({id(c) for c in copies}) == 1


@pytest.mark.usefixtures("own_caches")
def test_embeddings_of_another_face_model_are_refused() -> None:
    adapter = make_adapter()
    managed = recording(adapter)
    with pytest.raises(ValueError, match=r"are 512 wide, tiny.bin takes 24: use the face model .*antelopev2"):
        prepare(adapter, managed, torch.zeros(1, 1, 512))
    with pytest.raises(ValueError, match="not finite"):
        prepare(adapter, managed, torch.full((1, 1, 24), math.nan), noise=0.35)
    assert managed.stays == [], "nothing was loaded for it"


def test_a_prepared_identity_counts_its_bytes() -> None:
    block = (torch.zeros(2, 16, 8, dtype=torch.float16), torch.zeros(2, 16, 8, dtype=torch.float16))
    prepared = PreparedIdentity(torch.zeros(1, 16, 4), torch.zeros(1, 16, 4), [block] * 5)
    assert prepared.nbytes == 5 * 2 * 2 * 16 * 8 * 2 + 2 * 16 * 4 * 4


# ---------------------------------------------------------------- blocks


def test_the_seventy_blocks_in_the_order_of_the_file() -> None:
    expected = {}
    number = 1
    for kind, groups in (
        ("input", ((4, 2), (5, 2), (7, 10), (8, 10))),
        ("output", ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2))),
        ("middle", ((0, 10),)),
    ):
        for block, depth in groups:
            for i in range(depth):
                expected[(kind, block, i)] = number
                number += 2
    assert {block: 2 * index + 1 for block, index in INDEX.items()} == expected
    assert len(SDXL_BLOCKS) == 70
    keys = {name: 2 * INDEX[name] + 1 for name in SDXL_BLOCKS}
    assert (keys["input", 4, 0], keys["input", 8, 9]) == (1, 47)
    assert (keys["output", 0, 0], keys["output", 5, 1]) == (49, 119)
    assert (keys["middle", 0, 0], keys["middle", 0, 9]) == (121, 139)


@pytest.mark.parametrize(
    ("mode", "count", "described"),
    [
        ("full", 70, "24 input, 36 output, 10 middle"),
        ("balanced", 55, "20 input, 30 output, 5 middle"),
        ("fast", 20, "20 output"),
        ("output_only", 36, "36 output"),
    ],
)
def test_patch_modes_have_the_counts_they_name(mode: str, count: int, described: str) -> None:
    blocks = select_blocks(mode)
    assert mode in PATCH_MODES
    assert len(blocks) == count
    assert describe(blocks) == described
    assert blocks <= set(SDXL_BLOCKS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("middle", {("middle", 0, i) for i in range(10)}),
        ("output.3", {("output", 3, 0), ("output", 3, 1)}),
        ("input.7.0-4", {("input", 7, i) for i in range(5)}),
        ("input.7.3", {("input", 7, 3)}),
        ("0", {("input", 4, 0)}),
        ("69", {("middle", 0, 9)}),
        ("0-3", {("input", 4, 0), ("input", 4, 1), ("input", 5, 0), ("input", 5, 1)}),
        ("24;  60\n69", {("output", 0, 0), ("middle", 0, 0), ("middle", 0, 9)}),
        (" Output.5 ,output.5, 59", {("output", 5, 0), ("output", 5, 1)}),
        ("0-69", set(SDXL_BLOCKS)),
        ("input, output middle", set(SDXL_BLOCKS)),
    ],
)
def test_lists_of_blocks(text: str, expected: set[Any]) -> None:
    assert parse_blocks(text) == expected
    assert select_blocks("custom", text) == expected


@pytest.mark.parametrize(
    "part",
    [
        "70",
        "0-70",
        "9-3",
        "-1",
        "input.4.5",
        "input.6",
        "output.6",
        "middle.1",
        "up.0",
        "input.",
        "1.5",
        "*",
        "input.7.4-2",
    ],
)
def test_a_part_that_names_no_block_is_quoted(part: str) -> None:
    with pytest.raises(ValueError, match="names no SDXL block") as caught:
        parse_blocks(f"output.0, {part}")
    assert repr(part) in str(caught.value)


@pytest.mark.parametrize("text", ["", "  ", ",;,"])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="list of blocks is empty"):
        select_blocks("custom", text)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'turbo'; choose one of full, balanced, fast, output_only, custom"):
        select_blocks("turbo")


# ---------------------------------------------------------------- identities


def person(**changes: Any) -> Identity:
    embeddings = torch.randn(2, 1, 24, generator=rng(3))
    keypoints = torch.rand(5, 2, generator=rng(4)) * 100
    return Identity(**{"embeddings": embeddings, "name": "Ann Ö", "recogniser": "antelopev2", "keypoints": keypoints,
                       "size": (120, 80), **changes})  # fmt: skip


def test_an_identity_survives_saving(tmp_path: Path) -> None:
    ann = person()
    path = save_identity(ann, tmp_path / "new folder" / "ann.safetensors")
    back = load_identity(path)
    assert torch.equal(back.embeddings, ann.embeddings)
    assert back.keypoints is not None
    assert torch.equal(back.keypoints, ann.keypoints)
    assert (back.name, back.recogniser, back.size) == ("Ann Ö", "antelopev2", (120, 80))
    assert [p.name for p in path.parent.iterdir()] == ["ann.safetensors"]
    assert not lies_in_memory(path)


def lies_in_memory(path: Path) -> bool:
    """Whether a tensor is a view of the file, which Windows then lets nobody replace."""
    maps = Path("/proc/self/maps")
    return maps.exists() and str(path.resolve()) in maps.read_text()


def test_an_identity_without_a_pose_survives_saving(tmp_path: Path) -> None:
    back = load_identity(save_identity(person(keypoints=None, size=None), tmp_path / "ann.safetensors"))
    assert back.keypoints is None
    assert back.size is None


def test_a_saved_identity_holds_no_picture(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(save_identity(person(), tmp_path / "ann.safetensors"), "pt") as file:
        assert set(file.keys()) == {"embeddings", "keypoints"}
        assert file.metadata() == {
            "format": "hotpath.identity.1",
            "name": "Ann Ö",
            "recogniser": "antelopev2",
            "size": "120x80",
        }


def test_half_precision_and_views_are_saved_whole(tmp_path: Path) -> None:
    wide = torch.randn(24, 2, 1, generator=rng(1)).half()
    ann = person(embeddings=wide.permute(1, 2, 0))
    back = load_identity(save_identity(ann, tmp_path / "ann.safetensors"))
    assert back.embeddings.dtype == torch.float32
    assert torch.equal(back.embeddings, ann.embeddings.float())


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_identity(person(), tmp_path / "ann.safetensors")
    older = path.read_bytes()

    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="is full"):
        save_identity(person(name="Bob"), path)
    monkeypatch.undo()
    assert path.read_bytes() == older
    assert [p.name for p in tmp_path.iterdir()] == ["ann.safetensors"], "nothing half-written stays"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_a_face_is_for_the_umask_to_say(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        path = save_identity(person(), tmp_path / "ann.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_failing_rename_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_identity(person(), tmp_path / "ann.safetensors")
    older = path.read_bytes()

    def refuses(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "in use by another program")

    monkeypatch.setattr(Path, "replace", refuses)
    with pytest.raises(PermissionError):
        save_identity(person(name="Bob"), path)
    monkeypatch.undo()
    assert path.read_bytes() == older
    assert [p.name for p in tmp_path.iterdir()] == ["ann.safetensors"]


def write_identity(path: Path, **changes: Any) -> Path:
    metadata = {"format": "hotpath.identity.1", "name": "x", "size": "120x80", **changes.pop("metadata", {})}
    tensors = {"embeddings": torch.ones(1, 1, 24), "keypoints": torch.ones(5, 2), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metadata": {"format": "pt"}}, "is no saved identity: it holds embeddings, keypoints"),
        ({"metadata": {"format": "hotpath.identity.2"}}, "is no saved identity"),
        ({"embeddings": None}, "is no saved identity: it holds keypoints"),
        ({"embeddings": torch.full((1, 1, 24), math.nan)}, "not finite"),
        ({"embeddings": torch.full((1, 1, 24), math.inf)}, "not finite"),
        ({"embeddings": torch.ones(24)}, r"needs embeddings \[N, 1, D\]"),
        ({"embeddings": torch.ones(0, 1, 24)}, r"needs embeddings \[N, 1, D\]"),
        ({"embeddings": torch.ones(1, 2, 24)}, r"needs embeddings \[N, 1, D\]"),
        ({"keypoints": torch.ones(3, 2)}, r"needs key points \[5, 2\], not \(3, 2\)"),
        ({"metadata": {"size": "900000x900000"}}, "900000 x 900000"),
        ({"metadata": {"size": "0x80"}}, "0 x 80"),
    ],
)
def test_a_foreign_or_broken_identity_file_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = write_identity(tmp_path / "who.safetensors", **changes)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_identity(path)
    assert str(caught.value).startswith("who.safetensors")


def test_a_good_file_made_the_same_way_is_read(tmp_path: Path) -> None:
    assert load_identity(write_identity(tmp_path / "who.safetensors")).size == (120, 80)
    for size in ("large", "120x", "x80", "120x-80"):
        odd = write_identity(tmp_path / "odd.safetensors", metadata={"size": size})
        assert load_identity(odd).size is None


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "who.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"who.safetensors is not a whole safetensors file"):
        load_identity(tmp_path / "who.safetensors")


def test_a_cut_off_identity_is_refused(tmp_path: Path) -> None:
    path = save_identity(person(), tmp_path / "who.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"who.safetensors is not a whole safetensors file"):
        load_identity(path)


def test_a_missing_identity_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_identity(tmp_path / "none.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_embeddings_that_are_not_finite_are_refused(value: float) -> None:
    embeddings = torch.ones(2, 1, 24)
    embeddings[1, 0, 5] = value
    with pytest.raises(ValueError, match="'Ann Ö' are not finite"):
        person(embeddings=embeddings)


def test_merging_keeps_all_pictures_and_the_first_pose() -> None:
    ann, more = person(), person(embeddings=torch.ones(3, 1, 24), name="more", keypoints=None, size=None)
    both = ann.merged(more)
    assert torch.equal(both.embeddings, torch.cat((ann.embeddings, more.embeddings)))
    assert (both.name, both.size, both.recogniser) == ("Ann Ö", (120, 80), "antelopev2")
    assert both.keypoints is ann.keypoints
    assert ann.embeddings.shape[0] == 2, "what came in stays as it was"


def test_recognisers_do_not_mix() -> None:
    with pytest.raises(ValueError, match="made with antelopev2 and 'Bob' with buffalo_l"):
        person().merged(person(name="Bob", recogniser="buffalo_l"))
    with pytest.raises(ValueError, match="cannot be averaged"):
        person(recogniser="unknown").merged(person(embeddings=torch.ones(1, 1, 512)))


def test_an_unknown_recogniser_does_not_hide_a_known_one() -> None:
    both = person(recogniser="unknown").merged(person())
    assert both.recogniser == "antelopev2"
    with pytest.raises(ValueError, match="cannot be averaged"):
        both.merged(person(recogniser="buffalo_l"))


def test_similarity_is_the_cosine_with_the_mean_direction() -> None:
    ann = person(embeddings=torch.tensor([[[2.0, 0, 0]], [[0, 5.0, 0]]]))
    found = ann.similarity(torch.tensor([[3.0, 3, 0], [0, 0, 1], [-1, -1, 0], [1, 0, 0]]))
    assert torch.allclose(found, torch.tensor([1, 0, -1, math.sqrt(0.5)]), atol=1e-6)
