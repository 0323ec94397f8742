"""Films shot by shot: the same colours as in one go, the shots in order, the sound beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hotpath.colorization.film import FilmOptions
from hotpath.colorization.shot_job import Shot, find_shots
from hotpath.distributed.film import Merged, merge_films
from hotpath.distributed.items import VIDEOS, FolderItems, Item, OneFile
from hotpath.distributed.jobs import BadMap, Job
from hotpath.distributed.manifest import Manifest
from hotpath.distributed.mapping import run_map
from hotpath.distributed.results import ResultStore
from hotpath.headless.executor import Executor
from hotpath.headless.graph import Graph
from hotpath.host import Interrupted
from map_workflows import listed, made, picture

MODELS = Path(__file__).resolve().parents[2] / "demo" / "models"
SHOTS = (16, 14, 18)
FILM = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "reference.png"}},
    "2": {
        "class_type": "HotpathColorizeFile",
        "inputs": {
            "reference": ["1", 0], "video": "film.mp4", "method": "Deep Exemplar", "output": "coloured.mp4",
            "colour_size": 48, "shots": "reset", "edge_filter": "none", "quality": 0,
        },
    },
}  # fmt: skip


def write_film(path: Path) -> Path:
    """Three shots of drifting blocks, 64x48 at 25 a second, with a tone."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        video: Any = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound: Any = out.add_stream("aac", rate=8000)
        sound.layout = "mono"
        for shot, count in enumerate(SHOTS):
            blocks = random.integers(0, 90, (6, 8)).repeat(8, 0).repeat(8, 1) + (20 if shot % 2 else 140)
            for i in range(count):
                grey = np.roll(blocks, i, 1).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, 2), format="rgb24")
                for packet in video.encode(frame):
                    out.mux(packet)
        for packet in video.encode():
            out.mux(packet)
        tone = (0.3 * np.sin(np.arange(8000 * sum(SHOTS) // 25) * 0.35)).astype(np.float32)[None]
        for start in range(0, tone.shape[1], 1024):
            block = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(tone[:, start : start + 1024]), format="fltp", layout="mono"
            )
            block.sample_rate, block.pts = 8000, start
            for packet in sound.encode(block):
                out.mux(packet)
        for packet in sound.encode():
            out.mux(packet)
    return path


def read(path: Path) -> tuple[np.ndarray, list[int], list[bytes]]:
    """Frames, their times, and the packets of the sound."""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    with av.open(str(path)) as file:
        sound = [bytes(packet) for packet in file.demux(audio=0) if packet.size]
    return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [f.pts for f in frames], sound


@pytest.fixture
def film(headless_host: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(headless_host, "_models", [MODELS])
    inputs = headless_host.input_folder()
    inputs.mkdir(parents=True)
    picture(inputs / "reference.png", 3, 6)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield write_film(inputs / "film.mp4")
    torch.set_num_threads(threads)


def test_shots_are_found_in_order(film):
    shots = list(find_shots(film, FilmOptions().shot_threshold))
    assert [(shot.first, shot.stop, shot.number) for shot in shots] == [(0, 16, 0), (16, 30, 1), (30, 48, 2)]
    assert [Shot.parse(str(shot)) for shot in shots] == shots
    assert Shot.parse("3:9") == Shot(3, 9)
    for wrong in ("", "9:3", "3:3", "5", "a:b", "-1:4"):
        with pytest.raises(ValueError, match="no range of frames"):
            Shot.parse(wrong)


def test_shot_by_shot_is_the_film_in_one_go(film, request_for, headless_host):
    source = OneFile(film, headless_host.input_folder())
    outcome = run_map(request_for(source, graph=FILM, shots=True))
    assert outcome.whole and [merged.path.name for merged in outcome.films] == ["film.mp4"]
    assert list(made(outcome.folder)) == ["film.mp4"]
    assert [line["name"] for line in listed(outcome.folder)] == ["film/00001", "film/00002", "film/00003"]
    Executor(headless_host).run(Graph.parse(FILM))
    ours, times, sound = read(outcome.folder / "film.mp4")
    whole, whole_times, whole_sound = read(headless_host.output_folder() / "coloured.mp4")
    _, source_times, source_sound = read(film)
    assert times == whole_times and len(times) == len(source_times) == sum(SHOTS)
    assert sound == whole_sound == source_sound
    for folder, name in ((outcome.folder, "film.mp4"), (headless_host.output_folder(), "coloured.mp4")):
        with av.open(str(folder / name)) as opened:
            assert json.loads(opened.metadata["prompt"])["2"]["inputs"] == FILM["2"]["inputs"]
    # Batches of other sizes are rounded differently; one level of the 255 may turn.
    assert np.abs(ours.astype(int) - whole.astype(int)).max() <= 2
    again = run_map(request_for(source, graph=FILM, shots=True))
    assert again.status.over == 0 and again.films[0].path == outcome.films[0].path


@pytest.mark.long
def test_a_film_goes_on_after_a_shot_that_failed(film, request_for, headless_host, monkeypatch):
    from hotpath.nodes import colorize

    real = colorize.colorize_shot

    def fails(job, references, shot):
        if shot.number == 1:
            raise ValueError("the second shot cannot be done.")
        return real(job, references, shot)

    monkeypatch.setattr(colorize, "colorize_shot", fails)
    source = OneFile(film, headless_host.input_folder())
    first = run_map(request_for(source, graph=FILM, shots=True))
    assert not first.whole and "1 of 3 shots are missing" in first.report()
    assert not list(first.folder.glob("*.mp4"))
    monkeypatch.setattr(colorize, "colorize_shot", real)
    second = run_map(request_for(source, graph=FILM, shots=True))
    assert (second.status.done, second.status.skipped) == (1, 2) and second.whole
    assert (second.folder / "film.mp4").read_bytes() == (
        run_map(request_for(source, "at once", graph=FILM, shots=True)).folder / "film.mp4"
    ).read_bytes()
    assert not (second.folder / ".hotpath-map" / "parts" / "film").exists()


def test_a_film_that_cannot_be_put_together_leaves_the_others(film, request_for, headless_host, monkeypatch):
    from hotpath.distributed import film as films

    inputs, real = headless_host.input_folder(), films.merge_shots
    (inputs / "films").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (inputs / "films" / name).write_bytes(film.read_bytes())

    def merge(parts, source, output, workflow):
        if source.name == "a.mp4":
            raise OSError("the disk is full")
        return [*real(parts, source, output, workflow), "its sound is left out."]

    monkeypatch.setattr(films, "merge_shots", merge)
    source = FolderItems(inputs / "films", inputs, VIDEOS)
    outcome = run_map(request_for(source, graph=FILM, shots=True))
    assert not outcome.whole and "a: its shots could not be put together (the disk is full)" in outcome.report()
    assert list(made(outcome.folder)) == ["b.mp4"] and "b: b.mp4 its sound is left out." in outcome.report()
    monkeypatch.setattr(films, "merge_shots", real)
    again = run_map(request_for(source, graph=FILM, shots=True))
    assert again.whole and list(made(again.folder)) == ["a.mp4", "b.mp4"] and again.status.done == 0


def test_a_container_that_cannot_hold_the_film_is_found_out_first(film, request_for, headless_host, monkeypatch):
    """And not after hours of colouring; a film of another kind beside it is done."""
    from hotpath.nodes import colorize

    coloured: list[int] = []
    real = colorize.colorize_shot
    monkeypatch.setattr(colorize, "colorize_shot", lambda job, refs, shot: coloured.append(1) or real(job, refs, shot))
    source = OneFile(film, headless_host.input_folder())
    graph = {**FILM, "2": {**FILM["2"], "inputs": {**FILM["2"]["inputs"], "output": "coloured.webm"}}}
    outcome = run_map(request_for(source, graph=graph, shots=True))
    assert not outcome.whole and not coloured
    assert "A .webm file cannot hold this film as libx264" in outcome.report() and "missing" not in outcome.report()
    assert not list((outcome.folder / ".hotpath-map").glob("trial*"))


def test_a_film_that_breaks_off_is_not_taken_for_whole(film, request_for, headless_host, monkeypatch):
    """The shots before the place where it cannot be decoded are no film; mended, it goes on after them."""
    from hotpath.distributed import film as films

    def breaks(path, threshold):
        yield from list(find_shots(path, threshold))[:2]
        raise ValueError("film.mp4 cannot be decoded after frame 30.")

    source = OneFile(film, headless_host.input_folder())
    monkeypatch.setattr(films, "find_shots", breaks)
    for _ in range(2):
        outcome = run_map(request_for(source, graph=FILM, shots=True))
        assert not outcome.whole and "cannot be decoded after frame 30" in outcome.report()
        assert not made(outcome.folder)
    monkeypatch.setattr(films, "find_shots", find_shots)
    outcome = run_map(request_for(source, graph=FILM, shots=True))
    assert outcome.whole and (outcome.status.done, outcome.status.skipped) == (1, 2)

    # And the folder of results may be moved.
    moved = outcome.folder.rename(outcome.folder.with_name("moved"))
    again = run_map(request_for(source, "moved", graph=FILM, shots=True))
    assert again.status.over == 0 and list(made(moved)) == ["film.mp4"]


def test_ctrl_c_between_two_films_that_are_put_together(film, headless_host, tmp_path):
    def stop() -> None:
        raise Interrupted("Stopped on request.")

    with Manifest.open(ResultStore.manifest_path(tmp_path / "out"), "w") as manifest:
        store = ResultStore(tmp_path / "out", manifest)
        with pytest.raises(Interrupted):
            list(merge_films(OneFile(film, headless_host.input_folder()), store, manifest, ".mp4", stop))


def test_a_file_of_the_films_name_that_this_did_not_make_is_left_alone(headless_host, tmp_path, monkeypatch):
    from hotpath.distributed import film as films

    merges: list[Path] = []

    def merge(parts, source, output, workflow):
        merges.append(output)
        output.write_bytes(b"ours")
        return []

    monkeypatch.setattr(films, "merge_shots", merge)
    out, source = tmp_path / "out", Item("film", "content", file=tmp_path / "in" / "film.mp4")
    out.mkdir()
    (out / "film.mp4").write_bytes(b"theirs")
    with Manifest.open(ResultStore.manifest_path(out), "w") as manifest:
        store = ResultStore(out, manifest)

        def merged() -> Merged:
            (found,) = merge_films([source], store, manifest, ".mp4", lambda: None)
            return found

        for number in range(2):
            job = Job(f"job{number}", Item(f"film/{number}", str(number), group="film"), {})
            manifest.list_item(number, job.item.label, str(number), job.id, "film")
            if number:
                assert merged().failed.startswith("film: 1 of 2 shots are missing")
            store.keep(job, store.staging(job, 1), [(True, "a text")], 1.0, 1)
        for times, then in ((1, b"ours"), (1, b"cut off"), (2, b"ours")):
            parts = store.work / "parts" / "film"
            parts.mkdir(parents=True, exist_ok=True)  # of a run that was killed when the film was whole
            assert merged() == Merged("film", out / "film-2.mp4") and merges == [out / "film-2.mp4"] * times
            assert not parts.exists()
            (out / "film-2.mp4").write_bytes(then)
    assert (out / "film.mp4").read_bytes() == b"theirs"


def test_a_workflow_that_cannot_do_shots(film, request_for, headless_host):
    source = OneFile(film, headless_host.input_folder())
    whole = {**FILM, "2": {**FILM["2"], "inputs": {**FILM["2"]["inputs"], "shots": "off"}}}
    with pytest.raises(BadMap, match="colours a film as one shot: set shots to reset"):
        run_map(request_for(source, graph=whole, shots=True))
    other = {
        "1": {"class_type": "LoadVideo", "inputs": {"file": "film.mp4"}},
        "2": {"class_type": "SaveVideo", "inputs": {"video": ["1", 0], "filename_prefix": "x", "format": "auto"}},
    }
    part = {**FILM, "2": {**FILM["2"], "inputs": {**FILM["2"]["inputs"], "seconds": 10.0}}}
    with pytest.raises(BadMap, match="colours a part of the film: for its shots set start_seconds and seconds to 0"):
        run_map(request_for(source, graph=part, shots=True))
    with pytest.raises(BadMap, match="cannot colour single shots"):
        run_map(request_for(source, graph=other, shots=True))


def test_shots_without_the_library_that_finds_them(film, request_for, headless_host, monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)  # as where it is not installed
    with pytest.raises(BadMap, match="needs PySceneDetect, which is not installed"):
        run_map(request_for(OneFile(film, headless_host.input_folder()), graph=FILM, shots=True))


def test_a_range_that_the_film_does_not_have(film, headless_host):
    graph = {**FILM, "2": {**FILM["2"], "inputs": {**FILM["2"]["inputs"], "shot_frames": "40:99", "output": "x.nut"}}}
    with pytest.raises(Exception, match=r"ends at frame 48, before frame 99"):
        Executor(headless_host).run(Graph.parse(graph))
    assert not list(headless_host.output_folder().glob("*"))
    graph["2"]["inputs"]["output"] = "x.mp4"
    with pytest.raises(Exception, match=r"must end in \.nut"):
        Executor(headless_host).run(Graph.parse(graph))
