"""Films on tiny networks: sizes, references, shots, state, memory, precision, interrupt, bad input."""

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
from hotpath.colorization import clip_job, compatible, film, film_references, networks
from hotpath.colorization.checkpoint_file import WrongCheckpoint
from hotpath.colorization.colormnet.network import ColorMNet
from hotpath.colorization.colour_space import luminance_of
from hotpath.colorization.film_options import METHODS, FilmOptions, read_references
from hotpath.colorization.film_state import MARK, FilmState, load_state, save_state
from safetensors.torch import save_file
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


@pytest.mark.parametrize("method", METHODS)
def test_film_in_portions_equals_film_at_once(method: str, tmp_path: Path) -> None:
    images, reference = frames(9), frames(1, seed=3)
    options: dict[str, Any] = {"method": method, "colour_size": 0, "temporal_smoothing": 0.5}
    whole = run(images, reference, **options).pictures
    first = run(images[:4], reference, **options)
    save_state(first.state, tmp_path / "film.safetensors")
    state = load_state(tmp_path / "film.safetensors")
    assert state.frame == 4
    # As a view of the file it would keep Windows from replacing it by the state of the next portion.
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path.resolve()) not in maps.read_text()
    second = run(images[4:], reference, state, **options)
    assert "continued: from frame 4" in second.report
    # Deep Exemplar's portions are other batches, and rounding may move its matches between near ties.
    torch.testing.assert_close(second.pictures, whole[4:], atol=1e-5 if method == "ColorMNet" else 0.2, rtol=0)


def test_state_of_another_film_is_refused(tmp_path: Path) -> None:
    state = run(frames(2), frames(1, seed=3), method="ColorMNet", colour_size=32).state
    with pytest.raises(ValueError, match="height 40 there, 41 here"):
        run(frames(2, 41), frames(1, seed=3), state, method="ColorMNet", colour_size=32)
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WrongCheckpoint, match="not a colour state"):
        load_state(tmp_path / "broken.safetensors")
    for place in (torch.tensor([math.nan] * 3), torch.tensor([-1, 0, 0]), torch.zeros(0, dtype=torch.int64), None):
        others = {name: tensor for name, tensor in state.tensors.items() if name != "film"}
        save_state(
            FilmState({**others, "film": place} if place is not None else others, state.description),
            tmp_path / "odd.st",
        )
        with pytest.raises(WrongCheckpoint, match="not a colour state"):
            load_state(tmp_path / "odd.st")
    save_file({"film": state.tensors["film"]}, tmp_path / "odd.st", metadata={MARK: "[]"})
    with pytest.raises(WrongCheckpoint, match="not a colour state"):
        load_state(tmp_path / "odd.st")
    exemplar = run(frames(2), frames(1, seed=3), method="Deep Exemplar", colour_size=32).state
    other = FilmState({**exemplar.tensors, "session.last": torch.zeros(3)}, exemplar.description)
    with pytest.raises(ValueError, match=r"or damaged \(its last frame is \[3\] and should be"):
        run(frames(2), frames(1, seed=3), other, method="Deep Exemplar", colour_size=32)


def test_state_of_another_network_or_other_references_is_refused(tmp_path: Path) -> None:
    state = run(frames(2), frames(1, seed=3), method="ColorMNet", colour_size=32).state
    with pytest.raises(ValueError, match="method 'ColorMNet' there, 'Deep Exemplar' here"):
        run(frames(2), frames(1, seed=3), state, method="Deep Exemplar", colour_size=32)
    with pytest.raises(ValueError, match="references 1 there, 2 here"):
        run(frames(2), frames(2, seed=3), state, method="ColorMNet", colour_size=32)
    wider = {**state.tensors, "session.memory.key": state.tensors["session.memory.key"].repeat(1, 2)}
    lacking = {name: tensor for name, tensor in state.tensors.items() if name != "session.memory.value"}
    for tensors in (wider, lacking):
        with pytest.raises(ValueError, match=r"network of other widths, or damaged .*start the film anew"):
            run(frames(2), frames(1, seed=3), FilmState(tensors, state.description), colour_size=32)


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
    for wrong in ({"method": "DeOldify"}, {"edge_filter": "wls"}, {"shots": "all"}, {"temporal_smoothing": 1.0}):
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


def test_deep_exemplar_goes_on_with_the_reference_it_had_changed_to() -> None:
    images = frames(9)
    two = torch.stack((frames(1, seed=9)[0], images[2]))
    deep: dict[str, Any] = {"method": "Deep Exemplar", "colour_size": 64, "where": "-,3"}
    whole = run(images, two, **deep).pictures
    first = run(images[:6], two, **deep)
    second = run(images[6:], two, first.state, **deep)
    torch.testing.assert_close(second.pictures, whole[6:], atol=0.05, rtol=0)
    never = run(images, two[:1], method="Deep Exemplar", colour_size=64).pictures
    assert (never[6:] - whole[6:]).abs().max() > 0.05


def test_reference_that_is_a_frame_comes_back_as_it_is() -> None:
    images = frames(6)
    done = run(images, torch.stack((images[2], frames(1, seed=9)[0])), where="2,-", colour_size=0)
    torch.testing.assert_close(done.pictures[2], images[2], atol=0.02, rtol=0)
    assert (done.pictures[4] - images[4]).abs().max() > 0.02
    # Neither shrunk to the networks' size nor filtered nor smoothed; what follows is smoothed after it.
    options: dict[str, Any] = {"colour_size": 16, "edge_filter": "guided", "temporal_smoothing": 0.9}
    sharp = (images + 0.2 * torch.rand(6, 40, 54, 3, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for where, known in (("2,-", 2), ("0", 0)):
        done = run(
            sharp, torch.stack((sharp[known], frames(1, seed=9)[0]))[: 1 + ("," in where)], where=where, **options
        )
        torch.testing.assert_close(done.pictures[known], sharp[known], atol=2e-3, rtol=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(film, "FULL_SIZE_PIXELS", 2 * 40 * 54)  # the frames 2 and 3 are put together at full size
        done = run(sharp, sharp[3:4], where="3", **options)
        torch.testing.assert_close(done.pictures[3], sharp[3], atol=2e-3, rtol=0)
        assert (done.pictures[2] - sharp[2]).abs().max() > 0.02
    grey = run(sharp, sharp[:1], where="0", strength=0.0, **options).pictures[0]
    assert (grey.amax(-1) - grey.amin(-1)).max() < 0.01
    # Deep Exemplar changes to the reference there.
    deep: dict[str, Any] = {"method": "Deep Exemplar", "colour_size": 64, "propagate": False}
    two = torch.stack((frames(1, seed=9)[0], images[2]))
    switched, first = run(images, two, where="-,3", **deep), run(images, two[:1], **deep)
    torch.testing.assert_close(switched.pictures[:3], first.pictures[:3], atol=0.2, rtol=0)
    assert (switched.pictures[3:] - first.pictures[3:]).abs().max() > 1e-3


def test_references_are_remembered_for_the_whole_film_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is a shot's first frame is one, too; what the network made of one serves all shots."""
    images, chosen = frames(6), FilmOptions(colour_size=32)
    loaded = clip_job.load_method(chosen)
    references = read_references([images[0], images[4], *frames(1, 64, 96, seed=9)], "0,4,-")
    made = {"values": 0, "sizes": 0}
    encode, resize = ColorMNet.encode_value, film_references.resized

    def counting(name: str, function: Any) -> Any:
        return lambda *args: (made.__setitem__(name, made[name] + 1), function(*args))[1]

    monkeypatch.setattr(ColorMNet, "encode_value", counting("values", encode))
    monkeypatch.setattr(film_references, "resized", counting("sizes", resize))
    with loaded.resident() as network:
        session = film.FilmSession(network, loaded, chosen, references, 40, 54)
        whole = []
        for first, stop in ((0, 2), (2, 4), (4, 6)):
            if first:
                session.begin_shot()
            assert session._session.memory.permanent == 3 * session._session.memory.places
            whole.append(session.colorize(images[first:stop]).pictures)
        # A frame of each shot; the first shot does without the first reference, the second has all, the third no second.
        assert made == {"values": 3 + 3, "sizes": 3 + 2}
        last = film.FilmSession(network, loaded, chosen, references, 40, 54)
        last.start_at(4, 2)
        assert torch.equal(last.colorize(images[4:]).pictures, whole[2])


@pytest.mark.parametrize("method", METHODS)
def test_a_state_goes_on_with_the_references_that_are_connected(method: str, colorizer_files: Path) -> None:
    images, first, other = frames(8), frames(1, seed=3), frames(1, seed=77)
    options: dict[str, Any] = {"method": method, "colour_size": 32}
    state = run(images[:4], first, where="0", **options).state
    same, changed = (run(images[4:], picture, state, where="0", **options) for picture in (first, other))
    assert "references, or the frames they are, differ" not in same.report
    assert "references, or the frames they are, differ" in changed.report
    assert (changed.pictures - same.pictures).abs().max() > 0.01
    before = {k: v for k, v in state.description.items() if not k.startswith(("checkpoint", "reference pictures"))}
    assert torch.equal(
        run(images[4:], first, FilmState(state.tensors, before), where="0", **options).pictures, same.pictures
    )
    foreign = {**state.description, "checkpoint": "another"}
    with pytest.raises(ValueError, match="checkpoint other weights under the name "):
        run(images[4:], first, FilmState(state.tensors, foreign), where="0", **options)
    with pytest.raises(ValueError, match=r"checkpoint yours.pth there, (mine|[abc])\."):
        run(
            images[4:],
            first,
            FilmState(state.tensors, {**foreign, "checkpoint files": "yours.pth"}),
            where="0",
            **options,
        )


def test_deep_exemplar_names_the_references_it_does_not_use() -> None:
    images, three = frames(4), torch.cat((frames(1, seed=3), frames(1, seed=5), frames(1, seed=6)))
    deep: dict[str, Any] = {"method": "Deep Exemplar", "colour_size": 64}
    assert "references 2, 3 were not used" in run(images, three, **deep).report
    assert "reference 1 was not used" in run(images, three[:2], where="-,0", **deep).report
    for used in ({"where": "-,2"}, {"where": "0,2"}):
        assert "not used" not in run(images, three[:2], **used, **deep).report
    assert "not used" not in run(images, three[:2], colour_size=32).report


def test_references_out_of_order_count_by_their_frames() -> None:
    images = frames(9)
    early, late = frames(1, seed=9)[0], frames(1, seed=8)[0]
    deep: dict[str, Any] = {"method": "Deep Exemplar", "colour_size": 64}
    chosen = FilmOptions(**deep)
    loaded = clip_job.load_method(chosen)

    def shot_from_6(pictures: list[Tensor], where: str) -> Tensor:
        with loaded.resident() as network:
            session = film.FilmSession(network, loaded, chosen, read_references(pictures, where), 40, 54)
            session.start_at(6, 1)
            return session.colorize(images[6:]).pictures

    assert torch.equal(shot_from_6([early, late], "0,4"), shot_from_6([late, early], "4,0"))
    assert not torch.equal(shot_from_6([early, late], "0,4"), shot_from_6([early, late], "4,0"))


@pytest.mark.parametrize("wrong", ["1,2,3", "x", "-1", "1.5", "4,4", "²"])
def test_wrong_reference_frames_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="reference_frames"):
        read_references([*frames(2)], wrong)


def test_shots_reset_and_take_the_next_reference() -> None:
    pytest.importorskip("scenedetect")
    dark, bright = frames(16) * 0.2, frames(16, seed=4) * 0.3 + 0.7
    images = torch.cat((dark, bright))
    references = torch.cat((frames(1, seed=6), frames(1, seed=8)))
    options: dict[str, Any] = {"shots": "reference per shot", "colour_size": 32}
    done = run(images, references, **options)
    assert "shots: 2; cuts at 16" in done.report
    alone = run(bright, references[1:], colour_size=32)
    torch.testing.assert_close(done.pictures[16:], alone.pictures, atol=2e-3, rtol=0)
    never = run(images, references[:1], shots="off", colour_size=32)
    assert (never.pictures[16:] - done.pictures[16:]).abs().max() > 1e-3


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
    monkeypatch.setattr(film, "FULL_SIZE_PIXELS", 1 << 20)
    done = run(frames(1, 620, 7680), frames(1), method="Deep Exemplar", colour_size=64, edge_filter="none")
    assert done.pictures.shape == (1, 620, 7680, 3)


@pytest.mark.long
def test_full_size_conversion_halves_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    original = film.with_luminance

    def scarce(luminance: Tensor, chroma: Tensor) -> Tensor:
        if len(luminance) > 2:
            raise RuntimeError("CUDA out of memory.")
        return original(luminance, chroma)

    images, reference = frames(9), frames(1, seed=2)
    expected = run(images, reference, colour_size=32).pictures
    monkeypatch.setattr(film, "with_luminance", scarce)
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
