"""Films on tiny networks: sizes, options, memory, precision, interrupt, bad input."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from film_files import frames
from hotpath import host
from hotpath.attention import local_window
from hotpath.colorization import clip_job, compatible, film, full_size, networks
from hotpath.colorization.colour_space import luminance_of
from hotpath.colorization.film_options import METHODS, FilmOptions, read_references
from hotpath.colorization.film_state import FilmState
from tiny_colorizers import TINY, save_models
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("colour_host")


def run(images: Tensor, reference: Tensor, state: Any = None, where: str = "", **options: Any) -> Any:
    chosen = FilmOptions(**options)
    loaded = clip_job.load_method(chosen)
    return clip_job.colorize_clip(loaded, images, read_references([*reference], where), chosen, state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(40, 54), (101, 33), (1, 1), (200, 40)])
def test_any_size_keeps_its_luminance(method: str, size: tuple[int, int]) -> None:
    images = frames(3, *size)
    done = run(images, frames(1, 30, 70, seed=1), method=method, colour_size=32)
    assert done.pictures.shape == (3, *size, 3) and done.confidence.shape == (3, *size)
    assert done.pictures.min() >= 0 and done.pictures.max() <= 1
    assert done.confidence.min() >= 0 and done.confidence.max() <= 1.0001
    wanted, found = (luminance_of(p.permute(0, 3, 1, 2))[:, 0] for p in (images, done.pictures))
    in_gamut = ((done.pictures > 0.002) & (done.pictures < 0.998)).all(-1)
    torch.testing.assert_close(found[in_gamut], wanted[in_gamut], atol=0.05, rtol=0)


def test_options_do_what_they_say() -> None:
    images, reference = frames(4), frames(1, seed=5)
    grey = run(images, reference, strength=0.0, colour_size=32).pictures
    assert (grey.amax(-1) - grey.amin(-1)).max() < 0.01
    plain = run(images, reference, colour_size=32).pictures
    assert (plain.amax(-1) - plain.amin(-1)).max() > 0.05
    for change in (
        {"strength": 0.5}, {"edge_filter": "guided"}, {"edge_filter": "fast_global_smoother"},
        {"temporal_smoothing": 0.9}, {"colour_size": 0}, {"memory_mode": "high_quality"},
    ):  # fmt: skip
        settings = {"colour_size": 32, **change}
        many = frames(12)
        assert (
            run(many, reference, **settings).pictures - run(many, reference, colour_size=32).pictures
        ).abs().max() > 1e-5, change
    deep = {"method": "Deep Exemplar", "colour_size": 64}
    fed, alone = (run(images, reference, propagate=p, **deep).pictures for p in (True, False))
    assert (fed - alone).abs().max() > 1e-5
    for wrong in (
        {"method": "DeOldify"}, {"edge_filter": "wls"}, {"shots": "all"}, {"temporal_smoothing": 1.0}, {"strength": -1.0},
        {"strength": math.nan}, {"strength": math.inf}, {"colour_size": -5}, {"shot_threshold": 0.0},
        {"shot_threshold": math.nan},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            FilmOptions(**wrong)


def test_attention_is_chosen_and_what_ran_is_told() -> None:
    images, reference = frames(4), frames(1, seed=5)
    plain = run(images, reference, colour_size=32)
    assert "DINOv2 attention: auto was asked for; " in plain.report and "sdpa" in plain.report
    sage = run(images, reference, colour_size=32, attention="sage", local_attention="spatial_correlation_sampler")
    assert (
        "DINOv2 attention: sage was asked for; " in sage.report and "sage2: it is for cuda, this is cpu" in sage.report
    )
    torch.testing.assert_close(sage.pictures, plain.pictures, atol=1e-4, rtol=0)
    banded = run(images, reference, colour_size=32, local_attention="banded")
    assert "local attention: banded: asked for" in banded.report and torch.equal(banded.pictures, plain.pictures)
    with pytest.MonkeyPatch.context() as patched:
        # As on a card: Triton is there, and its kernel cannot run.
        patched.setattr(local_window, "_failed", {})
        patched.setattr(local_window, "triton_unavailable", lambda device: None)
        unbuilt = run(images, reference, colour_size=32)
    assert "local attention: banded: the fused kernel failed on cpu" in unbuilt.report
    assert torch.equal(unbuilt.pictures, banded.pictures)
    for wrong in ({"attention": "flash9"}, {"local_attention": "unfold"}):
        with pytest.raises(ValueError, match=r"There is no (local )?attention"):
            FilmOptions(**wrong)


def test_an_attention_asked_for_reaches_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.colorization.colormnet import engine

    policies: list[str] = []

    def rounded(q: Tensor, k: Tensor, v: Tensor, *, policy: Any, record: Any) -> Tensor:
        policies.append(policy.backend)
        return F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()

    images, reference = frames(2), frames(1, seed=5)
    exact = run(images, reference, colour_size=32).pictures
    monkeypatch.setattr(engine, "attend", rounded)
    lossy = run(images, reference, colour_size=32, attention="sage2").pictures
    # One pass for the reference, one for each frame: the first stands alone.
    assert policies == ["sage2"] * (3 * TINY.encoder.vit_depth)
    assert 0 < (lossy - exact).abs().max() < 0.1


def test_strange_pictures_go_through_and_wrong_ones_are_named() -> None:
    images, reference = frames(2), frames(1, seed=3)
    rgba = torch.cat((images, torch.rand(2, 40, 54, 1)), dim=-1)
    expected = run(images, reference, colour_size=32).pictures
    torch.testing.assert_close(run(rgba, reference, colour_size=32).pictures, expected)
    torch.testing.assert_close(run(images, reference[0][None], colour_size=32).pictures, expected)
    broken = images.clone()
    broken[0, 3, 4] = float("nan")
    assert run(broken, reference, colour_size=32).pictures.isfinite().all()
    grey = run(images, reference.mean(-1, keepdim=True), colour_size=32)
    assert "Reference 1 has next to no colour" in grey.report
    with pytest.raises(ValueError, match="the frames must be pictures of shape"):
        run(torch.zeros(2, 3, 40, 54), reference)
    with pytest.raises(ValueError, match="nothing in the frames"):
        run(images[:0], reference)


class OnCard(torch.nn.Module):
    """A network that says it is on a card, with nothing to compute."""

    compute_device = torch.device("cuda")

    @contextmanager
    def resident(self, extra_bytes: int) -> Iterator[OnCard]:
        yield self


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> networks.LoadedNetwork:
    monkeypatch.setattr(networks, "on_device", lambda device: nullcontext())
    loaded = networks.LoadedNetwork(OnCard(), (), networks.Precision(torch.float32, "asked for"))
    loaded.managed = OnCard()
    return loaded


@pytest.mark.parametrize("as_set", [True, False])
def test_cudnn_stays_as_it_is_set(as_set: bool, on_card: networks.LoadedNetwork) -> None:
    cudnn = torch.backends.cudnn

    def now() -> tuple[bool, bool, bool]:
        return cudnn.enabled, cudnn.benchmark, cudnn.deterministic

    with cudnn.flags(enabled=as_set, benchmark=not as_set, deterministic=as_set, allow_tf32=True):
        with on_card.resident():
            assert now() == (as_set, not as_set, as_set) and not cudnn.allow_tf32
        assert now() == (as_set, not as_set, as_set) and cudnn.allow_tf32


@pytest.mark.parametrize("setting", ["as torch has it", "high", "medium", "convolutions", "products"])
def test_float32_is_float32_whatever_another_pack_has_set(setting: str, on_card: networks.LoadedNetwork) -> None:
    """By torch's older switches and by its newer ones, of which the older ones refuse to be read."""
    places = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    if not hasattr(places[0], "fp32_precision"):
        pytest.skip("torch has the older switches only")

    def now() -> list[str]:
        found = [place.fp32_precision for place in places]
        for read in (lambda: torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision):
            try:
                found.append(str(read()))
            except RuntimeError:
                found.append("not to be read")
        return found

    untouched = now()
    matmul = torch.get_float32_matmul_precision()
    kept = [place.fp32_precision for place in places]
    try:
        if setting in ("high", "medium"):
            torch.set_float32_matmul_precision(setting)
        elif setting == "convolutions":
            places[0].fp32_precision = "ieee"
        elif setting == "products":
            places[2].fp32_precision = "tf32"
        before = now()
        with pytest.raises(KeyError), on_card.resident():
            assert [place.fp32_precision for place in places] == ["ieee"] * 3
            raise KeyError
        assert now() == before
    finally:
        torch.set_float32_matmul_precision(matmul)
        for place, precision in zip(places, kept, strict=True):
            place.fp32_precision = precision
    assert now() == untouched


@pytest.mark.parametrize("method", METHODS)
def test_room_is_asked_for_what_the_job_holds(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory, frames at full size, and the larger of what the networks and the conversion work in. Not more: the host
    puts other models out for it."""
    from hotpath.colorization import film_room, frame_budget

    asked: list[int] = []
    kept = networks.LoadedNetwork.resident
    monkeypatch.setattr(networks.LoadedNetwork, "resident", lambda self, room=0: asked.append(room) or kept(self, room))
    images, sessions = frames(1, 128, 256), []
    begun = film.FilmSession.__init__
    monkeypatch.setattr(
        film.FilmSession, "__init__", lambda self, *a, **k: (sessions.append(self), begun(self, *a, **k))[1]
    )
    run(images, frames(2), method=method, colour_size=64)
    pixels = 128 * 256
    held = 2 * images.nbytes + 4 * pixels
    if method == "Deep Exemplar":
        _, needed = frame_budget.deep_exemplar_batch(32, 64, torch.device("cpu"))
    else:
        _, needed = frame_budget.colormnet_batch(64, 128, torch.float32, torch.device("cpu"))
        held += sessions[0]._session.memory.nbytes
    assert asked == [held + max(needed, film_room.CONVERTED_BYTES * pixels)]
    job = compatible.ColorMNetJob(64, 128) if method == "ColorMNet" else compatible.DeepExemplarJob(64, 128)
    loaded = clip_job.load_method(FilmOptions(method=method))
    colour = compatible.run_colormnet if method == "ColorMNet" else compatible.run_deep_exemplar
    colour(loaded, images, frames(2), job)
    assert asked[1] == asked[0]


def test_one_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old shot's goes before the new one's is made."""
    from hotpath.colorization.colormnet.memory import FrameMemory

    chosen = FilmOptions(colour_size=32)
    loaded, left = clip_job.load_method(chosen), weakref.WeakSet[Any]()
    begun = FrameMemory.__init__

    def counted(self: Any, *sizes: Any) -> None:
        assert not left
        left.add(self)
        begun(self, *sizes)

    monkeypatch.setattr(FrameMemory, "__init__", counted)
    with loaded.resident() as network:
        session = film.FilmSession(network, loaded, chosen, read_references([*frames(1)]), 40, 54)
        state = session.state()
        session.begin_shot()
        session.start_at(4, 2)
        film.FilmSession.load(session, FilmState({**state.tensors}, session.description()))


def test_8k_width_goes_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "CPU_PIXELS_TOGETHER", 1 << 20)
    done = run(frames(1, 620, 7680), frames(1), method="Deep Exemplar", colour_size=64, edge_filter="none")
    assert done.pictures.shape == (1, 620, 7680, 3)


@pytest.mark.long
def test_full_size_conversion_halves_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    original = film.frames_of

    def scarce(luminance: Tensor, chroma: Tensor, dtype: torch.dtype) -> Tensor:
        if len(luminance) > 2:
            raise RuntimeError("CUDA out of memory.")
        return original(luminance, chroma, dtype)

    images, reference = frames(9), frames(1, seed=2)
    expected = run(images, reference, colour_size=32).pictures
    monkeypatch.setattr(film, "frames_of", scarce)
    done = run(images, reference, colour_size=32)
    torch.testing.assert_close(done.pictures, expected)
    assert "full-size frames at a time halved" in done.report


def test_interrupt_stops_a_clip(colour_host: Any) -> None:
    colour_host.stop()
    with pytest.raises(host.Interrupted):
        run(frames(30), frames(1), colour_size=32)


def test_missing_models_say_where_they_come_from(
    colour_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(colour_host, "_models", [tmp_path])
    with pytest.raises(host.ModelNotFound, match=r"DINOv2FeatureV6_LocalAtten_s2_154000.pth from https://github.com"):
        networks.load_colormnet()
    with pytest.raises(host.ModelNotFound, match=r"colornet_iter_76000.pth, nonlocal_net_iter_76000.pth, vgg19_conv"):
        networks.load_deep_exemplar()


def test_networks_are_loaded_once() -> None:
    assert networks.load_colormnet() is networks.load_colormnet("mine.safetensors")
    assert networks.load_deep_exemplar("float32") is networks.load_deep_exemplar("float32")
    assert "instead of float16" in networks.choose_precision("float16").reason


def test_a_folder_is_looked_through_once(colour_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files under names of their own are told apart by what is in them; not at every run, and not by reading the weights."""
    models = save_models(tmp_path)
    torch.save(torch.load(models / "deep_exemplar" / "a.pth", weights_only=True), models / "colormnet" / "another.pth")
    monkeypatch.setattr(colour_host, "_models", [models])
    opened: list[str] = []
    load = torch.load

    def counted(path: Path, **options: Any) -> Any:
        opened.append(f"{path.name} {'mapped' if options.get('mmap') else 'read'}")
        return load(path, **options)

    monkeypatch.setattr(torch, "load", counted)
    for _ in range(3):
        assert networks._colormnet_path(networks.AUTOMATIC).name == "mine.safetensors"
        found = networks.deep_exemplar_paths()
    assert {kind: path.name for kind, path in found.items()} == {
        "vgg": "a.pth",
        "nonlocal_net": "b.pth",
        "colornet": "c.pth",
    }
    assert opened == ["another.pth mapped", "a.pth mapped", "b.pth mapped", "c.pth mapped"]
    (models / "deep_exemplar" / "c.pth").write_bytes(b"nonsense")
    with pytest.raises(host.ModelNotFound, match="colornet_iter_76000"):
        networks.deep_exemplar_paths()
