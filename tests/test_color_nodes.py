"""The colour nodes and the command line on tiny networks, headless and inside ComfyUI."""

from __future__ import annotations

import errno
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from film_files import frames, read_video, write_film
from hotpath import host
from hotpath.colorization import clip_job, compatible, file_job, film, full_size, networks, video_file
from hotpath.colorization.colour_space import luminance_of
from hotpath.colorization.film_options import METHODS, FilmOptions
from hotpath.colorization.film_part import Extent
from hotpath.colorization.shot_job import Shot

pytestmark = pytest.mark.usefixtures("colour_host")


def test_compatible_video_node(colour_host: Any) -> None:
    from hotpath.nodes.colormnet import ColorMNetImage, ColorMNetVideo

    images, reference = frames(7, 48, 64), frames(1, 30, 30, seed=3)
    same, report = ColorMNetVideo().colorize_video(images, reference, 64, 48)
    assert same.shape == images.shape and "feature_encoder does nothing" in report and "CC BY-NC-SA" in report
    assert colour_host.texts[-1] == ("7", report) or colour_host.texts[-1][1] == report
    smaller, _ = ColorMNetVideo().colorize_video(images, reference, 32, 24)
    sharp, _ = ColorMNetVideo().colorize_video(images, reference, 32, 24, original_luminance=True)
    assert smaller.shape == sharp.shape == images.shape
    grey = luminance_of(images.permute(0, 3, 1, 2))
    errors = [(luminance_of(p.permute(0, 3, 1, 2)) - grey).abs().mean() for p in (smaller, sharp)]
    assert errors[1] < errors[0]
    _, report = ColorMNetVideo().colorize_video(images, reference, 64, 48, text_guidance="warm")
    assert "text_guidance does nothing" in report
    stills, _ = ColorMNetImage().colorize_image(images, reference, 64, 48)
    torch.testing.assert_close(stills[:1], same[:1], atol=1e-3, rtol=0)
    alone, _ = ColorMNetImage().colorize_image(images[3:4], reference, 64, 48, use_fp16=False)
    torch.testing.assert_close(stills[3:4], alone, atol=1e-3, rtol=0)
    assert (same[3:4] - alone).abs().max() > 1e-3, "a frame of a film has seen those before it"


def test_compatible_deep_exemplar_nodes() -> None:
    from hotpath.nodes.deep_exemplar import DeepExColorImageNode, DeepExColorVideoNode

    images, reference = frames(3, 50, 70), frames(2, 30, 30, seed=3)
    out, report = DeepExColorVideoNode().colorize_video(images, reference, True, True, 96, 72, use_sage_attention=True)
    assert out.shape == (3, 72, 96, 3) and "use_sage_attention does nothing" in report
    assert "first of the batch is used" in report
    torch.testing.assert_close(out * 255, (out * 255).round(), atol=1e-3, rtol=0)
    full, _ = DeepExColorVideoNode().colorize_video(images, reference[:1], True, False, 96, 72)
    assert (full - out).abs().max() > 1e-3
    odd, report = DeepExColorImageNode().colorize_image(images, reference[:1], 71, 51)
    assert odd.shape == (3, 51, 71, 3) and "use_sage_attention" not in report
    _, report = DeepExColorImageNode().colorize_image(images[:1], reference[:1], 32, 32, use_sage_attention=True)
    assert "use_sage_attention does nothing" in report


def test_half_precision_is_left_to_the_card_or_switched_off(colour_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.nodes import colormnet as nodes

    monkeypatch.setattr(nodes, "load_colormnet", lambda *asked: asked)
    monkeypatch.setattr(nodes, "run_colormnet", lambda network, *_: (torch.zeros(1, 2, 2, 3), str(network)))
    for node, name in ((nodes.ColorMNetVideo(), "colorize_video"), (nodes.ColorMNetImage(), "colorize_image")):
        for half, precision in ((True, "automatic"), (False, "float32")):
            _, asked = getattr(node, name)(None, None, 64, 48, use_fp16=half, checkpoint="mine.pth")
            assert asked == str(("mine.pth", precision))


def test_compatible_jobs_are_bounded_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large frames a few are on their way, and fewer are converted together; the pictures stay."""
    images, reference = frames(7, 50, 70), frames(1, 30, 30, seed=3)
    jobs = [compatible.ColorMNetJob(32, 48, original_luminance=own) for own in (True, False)]
    loaded, matched = networks.load_colormnet(), networks.load_deep_exemplar("float32")
    expected = [compatible.run_colormnet(loaded, images, reference, job)[0] for job in jobs]
    together: dict[str, list[int]] = {"upload": [], "to_channels_first": [], "with_luminance": []}

    def counted(name: str, place: int, function: Any) -> Any:
        return lambda *args: (together[name].append(len(args[place])), function(*args))[1]

    for name, place in (("upload", 1), ("to_channels_first", 0), ("with_luminance", 0)):
        monkeypatch.setattr(compatible, name, counted(name, place, getattr(compatible, name)))
    monkeypatch.setattr(full_size, "CPU_PIXELS_TOGETHER", 2 * 50 * 70)
    monkeypatch.setattr(clip_job, "PORTION_BYTES", 6 * 50 * 70 * 12)
    found = [compatible.run_colormnet(loaded, images, reference, job)[0] for job in jobs]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    done, _ = compatible.run_deep_exemplar(matched, images, reference, compatible.DeepExemplarJob(32, 48))
    assert done.shape == (7, 32, 48, 3) and done.std(0).max() > 0
    assert together["upload"] == [5, 2] * 3
    assert max(together["to_channels_first"]) == max(together["with_luminance"]) == 2


def test_our_nodes(colour_host: Any) -> None:
    from hotpath.nodes import color_states as states
    from hotpath.nodes import colorize as nodes

    colour_host.input_folder().mkdir()
    write_film(colour_host.input_folder() / "film.mp4", frames(5), sound=False)
    assert nodes.HotpathColorizeFile.INPUT_TYPES()["required"]["video"][0] == ["film.mp4"]
    made = nodes.HotpathColorizeFile().colorize("film.mp4", frames(1), "ColorMNet", "mine/o.mp4", colour_size=32)
    assert made["ui"] == {"images": [{"filename": "o.mp4", "subfolder": "mine", "type": "output"}], "animated": [True]}
    path, report = made["result"]
    assert Path(path).parent == colour_host.output_folder() / "mine" and "frames: 5" in report
    assert any("left" in text for _, text in colour_host.texts)
    (colour_host.output_folder() / "away").symlink_to(colour_host.output_folder().parent)
    for name in ("../o.mp4", "/tmp/o.mp4", "", "o.exe", "away/o.mp4", "a\0.mp4", "\ud800.mp4", "x" * 252 + ".mp4"):
        with pytest.raises(ValueError, match="must end in one of" if name == "o.exe" else "is not a file name inside"):
            nodes.HotpathColorizeFile().colorize("film.mp4", frames(1), "ColorMNet", name)
    with pytest.raises(ValueError, match="not a file name inside"):
        nodes.HotpathColorizeFile().colorize("../film.mp4", frames(1), "ColorMNet", "o.mp4")
    pictures, _ = nodes.HotpathColorizeImage().colorize(frames(3), frames(1), "Deep Exemplar", colour_size=32)
    assert pictures.shape == (3, 40, 54, 3)
    out, mask, state, _ = nodes.HotpathColorizeVideo().colorize(
        frames(3), frames(1), "ColorMNet", more_references=frames(1, 20, 20), reference_frames="0,-", colour_size=32
    )
    assert out.shape == (3, 40, 54, 3) and mask.shape == (3, 40, 54)
    states.HotpathSaveColorState().save(state, "reel")
    again, following = states.HotpathLoadColorState().load("reel")
    assert following == 3 and set(again.tensors) == set(state.tensors)
    changed = states.HotpathLoadColorState.IS_CHANGED
    assert changed("reel") == changed("reel") != changed("other") and math.isnan(changed(None))
    with pytest.raises(FileNotFoundError, match="no color state"):
        states.HotpathLoadColorState().load("other")
    (moved,) = nodes.HotpathColorTransfer().transfer(frames(2), frames(1, 10, 10))
    assert moved.shape == (2, 40, 54, 3)


def test_command_line_colours_a_film(
    tmp_path: Path, colorizer_files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotpath import cli
    from PIL import Image

    write_film(tmp_path / "film.mp4", frames(4))
    Image.fromarray((frames(1)[0] * 255).to(torch.uint8).numpy()).save(tmp_path / "r.png")
    film_options = ["--models", str(colorizer_files), "--device", "cpu", "--colour-size", "32", "-q"]
    call = ["colorize", str(tmp_path / "film.mp4"), "-r", str(tmp_path / "r.png"), "-o", str(tmp_path / "o.mp4")]
    for method in ("colormnet", "deep-exemplar"):
        assert cli.main([*call, *film_options, "--method", method]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "o.mp4")
        assert len(read_video(tmp_path / "o.mp4")[0]) == 4
    assert cli.main(["colorize", "none.mp4", *call[2:], *film_options]) == 2
    assert "There is no video" in capsys.readouterr().err

    (tmp_path / "o.mp4").unlink()
    monkeypatch.setattr(file_job, "PART_FRAMES", 1)
    monkeypatch.setattr(clip_job, "PORTIONS", (1,))
    colour, calls = film.FilmSession.colour, [0]

    def stops_with(error: BaseException, at: int = 3) -> tuple[int, str]:
        """The exit code and what is said, when the film stops at this portion from here on."""
        calls[0] = 0

        def stopped(self: Any, *parts: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise error
            return colour(self, *parts)

        monkeypatch.setattr(film.FilmSession, "colour", stopped)
        return cli.main([*call, *film_options]), capsys.readouterr().err

    goes_on = f"{tmp_path / 'o.mp4'} holds what is finished; the same command goes on from there."
    code, said = stops_with(host.Interrupted("stopped"))
    assert code == 130 and f"Stopped. {goes_on}" in said
    (tmp_path / "o.mp4").unlink()
    shutil.rmtree(tmp_path / "o.mp4.parts")
    code, said = stops_with(OSError(errno.ENOSPC, "No space left on device"))
    assert code == 1 and f"The disk with {tmp_path / 'o.mp4'} is full" in said and goes_on in said
    shutil.rmtree(tmp_path / "o.mp4.parts")
    code, said = stops_with(video_file.VideoError("film.mp4 is damaged"))
    assert code == 1 and "film.mp4 is damaged" in said and str(tmp_path / "o.partial.mp4") in said
    code, said = stops_with(RuntimeError("no such kernel"), at=1)
    assert code == 1 and "RuntimeError: no such kernel" in said and "the same command goes on" in said
    # Refused although parts are there: the same command would be refused again.
    assert cli.main([*call[:3], str(tmp_path / "no.png"), *call[4:], *film_options]) == 2
    assert "goes on" not in capsys.readouterr().err
    monkeypatch.setattr(film.FilmSession, "colour", colour)
    assert cli.main([*call, *film_options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "o.mp4", "r.png"]


def test_the_command_line_has_the_node_s_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hotpath import cli
    from hotpath.nodes.colorize import HotpathColorizeFile

    called: dict[str, Any] = {}

    def colorize(video: Path, output: Path, references: Any, options: FilmOptions, *_: Any, **settings: Any) -> str:
        called.update(vars(options), video=video, output=output, references=references, **settings)
        return ""

    monkeypatch.setattr(file_job, "colorize_file_by_path", colorize)
    given = {"checkpoint": "mine.pth", "shot_threshold": 40.0, "propagate": False, "compile": True}
    flags = ["--checkpoint", "mine.pth", "--shot-threshold", "40", "--no-propagate", "--compile"]
    others = {
        "method": "Deep Exemplar",
        "colour_size": 96,
        "memory_mode": "low_memory",
        "strength": 0.5,
        "edge_filter": "fast_global_smoother",
        "temporal_smoothing": 0.25,
        "shots": "reference per shot",
        "attention": "sdpa",
        "local_attention": "spatial_correlation_sampler",
        "quality": 20,
        "precision": "float32",
        "resume": False,
        "extent": Extent(60.5, 10.0),
        "video": Path("film.mp4"),
        "output": tmp_path / "o.60.5s-70.5s.mp4",
        "references": [Path("r.png")],
    }
    flags += ["--method", "deep-exemplar", "--colour-size", "96", "--memory", "low-memory", "--strength", "0.5"]
    flags += ["--edge-filter", "fast-global-smoother", "--smoothing", "0.25", "--shots", "reference-per-shot"]
    flags += ["--attention", "sdpa", "--local-attention", "spatial-correlation-sampler", "--quality", "20"]
    flags += ["--precision", "float32", "--restart", "--start-seconds", "60.5", "--seconds", "10"]
    before = host.current()
    call = ["colorize", "film.mp4", "-r", "r.png", "-o", str(tmp_path / "o.mp4"), "--models", str(tmp_path), "-q"]
    assert cli.main([*call, *flags]) == 0
    called.pop("begun")
    assert called == given | others and host.current() is before
    assert capsys.readouterr().out.strip() == str(others["output"])
    assert cli.main(call) == 0 and called["output"] == tmp_path / "o.mp4"
    node = HotpathColorizeFile.INPUT_TYPES()["optional"]
    widgets = {**dict.fromkeys(given, ""), "compile": "use_torch_compile"}
    assert {name: called[name] for name in given} == {
        name: node[widget or name][1]["default"] for name, widget in widgets.items()
    }
    capsys.readouterr()


@pytest.mark.parametrize(
    ("error", "begun", "code", "said"),
    [
        (None, True, 0, ("coloured well",)),
        (ValueError("no such method"), False, 2, ("hotpath: no such method",)),
        (ValueError("a broken frame"), True, 1, ("hotpath: a broken frame", "No part of the film was finished yet.")),
        (OSError(errno.ENOSPC, "no room", "x.nut"), True, 1, ("The disk with x.nut is full: free some", "No part")),
        (KeyboardInterrupt(), True, 130, ("Stopped. No part",)),
        (RuntimeError("a bug"), True, 1, ("No part", "RuntimeError: a bug")),
        (RuntimeError("a bug"), False, 1, ("RuntimeError: a bug",)),
    ],
)
def test_how_the_command_ends_says_what_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    error: Any,
    begun: bool,
    code: int,
    said: tuple[str, ...],
) -> None:
    from hotpath import cli

    def colorize(*_: Any, **settings: Any) -> str:
        if begun:
            settings["begun"]()
        if error is not None:
            raise error
        return "coloured well"

    monkeypatch.setattr(file_job, "colorize_file_by_path", colorize)
    before, made = host.current(), tmp_path / "o.mp4"
    assert cli.main(["colorize", "f.mp4", "-r", "r.png", "-o", str(made), "--models", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    assert host.current() is before and out == ("" if error else f"{made}\n")
    assert all(text in err for text in said) and ("No part" in err) == ("No part" in " ".join(said))


def test_what_is_set_at_the_node_reaches_the_film(colour_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.nodes import colorize as nodes

    jobs: list[file_job.FileJob] = []
    monkeypatch.setattr(nodes, "colorize_file", lambda job, *_: (jobs.append(job), "made")[1])
    monkeypatch.setattr(nodes, "_shown", lambda *_: {})
    colour_host.input_folder().mkdir()
    (colour_host.input_folder() / "f.mp4").write_bytes(b"a film")
    set_there = {"precision": "float32", "checkpoint": "mine.pth", "quality": 20, "resume": False}
    nodes.HotpathColorizeFile().colorize("f.mp4", frames(1), "ColorMNet", "o.mkv", unique_id="4", **set_there)
    assert {name: getattr(jobs[0], name) for name in set_there} == set_there
    assert (jobs[0].source.name, jobs[0].output.name) == ("f.mp4", "o.mkv") and colour_host.texts[-1] == ("4", "made")
    shots: list[Any] = []
    monkeypatch.setattr(nodes, "colorize_shot", lambda job, references, shot: (shots.append(shot), "a shot")[1])
    shot = Shot(1, 5, 9, 2)
    nodes.HotpathColorizeFile().colorize("f.mp4", frames(1), "ColorMNet", "o.mkv", shot_frames=str(shot))
    assert shots == [shot] and len(jobs) == 1
    part = {"start_seconds": 2.0, "seconds": 0.5}
    made = nodes.HotpathColorizeFile().colorize("f.mp4", frames(1), "ColorMNet", "o.mkv", **part)
    assert (jobs[1].output.name, jobs[1].extent) == ("o.2s-2.5s.mkv", Extent(2.0, 0.5))
    assert made["result"][0] == str(jobs[1].output)
    with pytest.raises(ValueError, match="shot_frames is a shot of the whole film: leave it empty"):
        nodes.HotpathColorizeFile().colorize("f.mp4", frames(1), "ColorMNet", "o.mkv", shot_frames="1:5", **part)


@pytest.mark.parametrize("linked", [False, True])
def test_the_same_workflow_does_not_colour_its_film_again(colour_host: Any, linked: bool) -> None:
    from hotpath.nodes.colorize import HotpathColorizeFile as Node

    colour_host.input_folder().mkdir()
    write_film(colour_host.input_folder() / "film.mp4", frames(3), sound=False)
    # ComfyUI asks with None for what another node gives.
    named = {"video": None, "output": None} if linked else {"video": "film.mp4", "output": "o.mp4"}

    def key(**part: Any) -> str:
        return Node.IS_CHANGED(**named, **part, method="ColorMNet", reference=None)

    def run() -> Path:
        return Path(Node().colorize("film.mp4", frames(1), "ColorMNet", "o.mp4", colour_size=32)["result"][0])

    first = key()
    made = run()
    assert key() == first
    trial = key(start_seconds=0.0, seconds=0.1)
    made.unlink()
    gone = key()
    assert gone != first and key() == gone and (linked or key(start_seconds=0.0, seconds=0.1) == trial)
    assert key(start_seconds=None, seconds=2.0) == key(start_seconds=None, seconds=None)
    run()
    assert key() == gone
    write_film(colour_host.input_folder() / "film.mp4", frames(4, seed=1), sound=False)
    another = key()
    assert another != gone
    run()
    assert key() == another


@pytest.mark.comfy
def test_nodes_inside_comfyui(colorizer_files: Path, tmp_path: Path) -> None:
    """The networks live in ComfyUI's memory management: loaded for a job, evicted when it wants the room."""
    import comfy.model_management as management
    import folder_paths
    from hotpath.host.comfyui import ComfyUIHost
    from hotpath.nodes.colorize import HotpathColorizeVideo
    from hotpath.nodes.deep_exemplar import DeepExColorVideoNode

    for kind in ("colormnet", "deep_exemplar"):
        folder_paths.add_model_folder_path(kind, str(colorizer_files / kind), is_default=True)
    before = host.use(ComfyUIHost())
    try:
        for method in METHODS:
            out, _, _, report = HotpathColorizeVideo().colorize(frames(3), frames(1), method, colour_size=32)
            assert out.shape == (3, 40, 54, 3) and out.isfinite().all() and "frames: 3" in report
        out, _ = DeepExColorVideoNode().colorize_video(frames(2), frames(1), True, True, 64, 64)
        assert out.shape == (2, 64, 64, 3)
        names = {type(model.model.model).__name__ for model in loaded_models()}
        assert names & {"ColorMNet", "DeepExemplar"}, names
        management.unload_all_models()
        again, *_ = HotpathColorizeVideo().colorize(frames(3), frames(1), "ColorMNet", colour_size=32)
        assert again.isfinite().all()
    finally:
        host.use(before)


def loaded_models() -> list[Any]:
    import comfy.model_management as management

    return [model for model in management.current_loaded_models if model.model is not None]
