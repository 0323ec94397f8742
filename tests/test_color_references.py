"""What a film goes on with: references, the state between portions, shots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from film_files import frames
from hotpath.colorization import clip_job, film, film_references, full_size
from hotpath.colorization.checkpoint_file import WrongCheckpoint
from hotpath.colorization.colormnet.network import ColorMNet
from hotpath.colorization.film_options import METHODS, FilmOptions, read_references
from hotpath.colorization.film_state import MARK, FilmState, load_state, save_state
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("colour_host")


def run(images: Tensor, reference: Tensor, state: Any = None, where: str = "", **options: Any) -> Any:
    chosen = FilmOptions(**options)
    loaded = clip_job.load_method(chosen)
    return clip_job.colorize_clip(loaded, images, read_references([*reference], where), chosen, state)


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
    foreign = {"propagate": False} if method == "ColorMNet" else {"memory_mode": "low_memory"}
    second = run(images[4:], reference, state, **options, **foreign)  # an option of the other method changes nothing
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
        patched.setattr(
            full_size, "CPU_PIXELS_TOGETHER", 2 * 40 * 54
        )  # the frames 2 and 3 are put together at full size
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
    report = run(images, three, **deep).report
    assert "references 2, 3 were not used" in report and ", of which the networks see half, luminance at" in report
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
    more = run(bright[:1], references, state=done.state, **options)
    assert "shots: 2, no cut in these frames" in more.report
    alone = run(bright, references[1:], colour_size=32)
    torch.testing.assert_close(done.pictures[16:], alone.pictures, atol=2e-3, rtol=0)
    never = run(images, references[:1], shots="off", colour_size=32)
    assert (never.pictures[16:] - done.pictures[16:]).abs().max() > 1e-3


def test_of_a_state_that_is_not_whole_nothing_has_a_name_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors' own writer makes one up, and leaves it when it is killed."""
    monkeypatch.setattr("safetensors.torch.save_file", None)
    save_state(FilmState({"film": torch.tensor([3, 0, 0])}, {}), tmp_path / "a.safetensors")
    assert load_state(tmp_path / "a.safetensors").frame == 3
