"""Films hold the workflow they were made with, where ComfyUI's front end and other programs find it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import av
import pytest
from film_files import frames, write_film
from hotpath.colorization import file_job, video_assembly, video_parts
from hotpath.colorization.film_options import FilmOptions, read_references
from hotpath.colorization.video_file import read_facts
from hotpath.colorization.video_frames import read_portions

TEXTS = {"workflow": json.dumps({"nodes": ["ä"] * 999}), "prompt": '{"1": {"class_type": "HotpathColorizeFile"}}'}


def tags(path: Path) -> dict[str, str]:
    """By name in small letters, as the front end takes them."""
    with av.open(str(path)) as film:
        return {name.lower(): value for name, value in film.metadata.items()}


@pytest.mark.parametrize("ending", ["mp4", "mov", "m4v", "mkv", "nut"])
def test_a_film_holds_its_workflow_in_place_of_the_grey_ones(tmp_path: Path, ending: str) -> None:
    grey, part, output = tmp_path / "in.mkv", tmp_path / "1.nut", tmp_path / f"out.{ending}"
    with av.open(str(grey), "w") as film:
        film.metadata.update({"title": "Metropolis", "workflow": '{"nodes": []}', "prompt": "{}"})
        stream: Any = film.add_stream("libx264", rate=12)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        film.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        film.mux(stream.encode())
    facts = read_facts(grey)
    writer = video_parts.PartWriter(part, facts, "libx264", 4)
    for portion in read_portions(grey, facts, 4):
        writer.write(portion.frames, portion.times)
    writer.close()
    lost = video_assembly.assemble([part], grey, output, workflow=TEXTS)
    found = tags(output)
    if ending == "nut":
        assert lost == [".nut cannot hold the workflow, which is left out; choose another ending, such as .mp4."]
        assert not {"prompt", "workflow"} & set(found)
        return
    assert lost == [] and found["title"] == "Metropolis"
    assert {name: found[name] for name in TEXTS} == TEXTS
    if ending != "mkv":
        # The front end reads the first 64 MiB, and stops at a box that ends behind them, such as a long film's pictures.
        content = output.read_bytes()
        assert 0 < content.index(b"moov") < content.index(b"mdat")
    video_assembly.assemble([part], grey, output)
    assert ending != "mkv" or tags(output)["workflow"] == '{"nodes": []}', "not told one, the tags are the film's"


def test_another_workflow_goes_on_with_a_film(
    tmp_path: Path, colour_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And both the part that was finished and the whole film hold the one that made them last."""
    write_film(tmp_path / "in.mp4", frames(4), sound=False)
    references, begun = read_references([*frames(1)]), {**TEXTS, "prompt": '{"9": {}}'}
    job = file_job.FileJob(
        tmp_path / "in.mp4", tmp_path / "out.mp4", FilmOptions("Deep Exemplar", colour_size=16), workflow=begun
    )
    with monkeypatch.context() as broken:
        broken.setattr(file_job, "assemble", lambda *given, complete=True, **kept: fails(complete, given, kept))

        def fails(complete: bool, given: Any, kept: Any) -> list[str]:
            if complete:
                raise OSError(28, "No space left on device")
            return video_assembly.assemble(*given, complete=complete, **kept)

        with pytest.raises(OSError, match="No space"):
            file_job.colorize_file(job, references)
    assert not job.output.exists()
    again = dataclasses.replace(job, workflow=TEXTS)
    assert "continued: after 4 frames" in file_job.colorize_file(again, references)
    assert {name: tags(job.output)[name] for name in TEXTS} == TEXTS


@pytest.mark.parametrize("kept", [True, False])
def test_the_node_keeps_what_it_was_run_with(colour_host: Any, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    from hotpath.nodes.colorize import HotpathColorizeFile
    from hotpath.nodes.kept_workflow import WORKFLOW

    assert HotpathColorizeFile.INPUT_TYPES()["hidden"].items() >= WORKFLOW.items()
    monkeypatch.setattr(colour_host, "keeps_workflows", lambda: kept)
    colour_host.input_folder().mkdir()
    write_film(colour_host.input_folder() / "film.mp4", frames(2), sound=False)
    sent = {"workflow": {"nodes": [float("nan")]}, "from_another_pack": "as it is"}
    made = HotpathColorizeFile().colorize(
        "film.mp4", frames(1), "Deep Exemplar", "o.mp4", colour_size=16, prompt={"1": {}}, extra_pnginfo=sent
    )
    found = tags(Path(made["result"][0]))
    expected = {"prompt": '{"1": {}}', "workflow": '{"nodes": [NaN]}', "from_another_pack": "as it is"}
    assert {name: found.get(name) for name in expected} == (expected if kept else dict.fromkeys(expected))
