"""From embeddings to prepared keys and values: pictures combined, noise, what is computed once, copies for sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hotpath.cache import registry as registry_module
from hotpath.identity import InstantIDAdapter, PreparedIdentity, combine_embeddings, prepare, unconditional_embedding
from hotpath.identity.prepared import COND, UNCOND
from tiny_adapters import CPU, WIDTHS, make_adapter, make_state, reference_tokens, rng
from torch import Tensor


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


META = torch.device("meta")  # a device that is not the CPU, on every machine


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

    def copied() -> int:
        return sum(part.nbytes for pairs in prepared._copies.values() for pair in pairs for part in pair)

    assert copied() == 0
    keys, _ = prepared.keys_values(1, META, torch.float16)
    assert (keys.device.type, keys.dtype, keys.shape) == ("meta", torch.float16, (2, 16, 48))
    assert prepared.keys_values(1, META, torch.float16)[0] is keys, "copied once"
    everything = 2 * 2 * 16 * sum(WIDTHS)  # keys and values, two roles, sixteen tokens
    assert copied() == everything * 2
    prepared.keys_values(0, META, torch.float32)
    assert copied() == everything * 2 + everything * 4
    assert prepared.nbytes == held, "copies are not part of what the cache counts"
    prepared.drop_copies()
    assert copied() == 0
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
