"""The network gives the tokens, keys and values of the formula; adapters of other packs give the same."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotpath.identity import adopt_adapter, prepare
from hotpath.identity.checkpoint import UnsupportedCheckpoint
from tiny_adapters import CPU, State, make_adapter, make_state, reference_tokens, rng


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
