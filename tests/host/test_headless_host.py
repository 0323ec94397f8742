"""The host without ComfyUI, and the search for files that both hosts share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosted import Network, touch
from hotpath import host
from hotpath.host import Interrupted, ModelNotFound, errors
from hotpath.host.headless import HeadlessHost, best_device
from hotpath.host.model_paths import find_file, list_files
from hotpath.host.name_limits import can_be_a_name

CPU = torch.device("cpu")


def test_headless_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, by_kind = tmp_path / "extra", tmp_path / "by kind"
    here = HeadlessHost(
        models=tmp_path / "models",
        input_folder=tmp_path / "in",
        output_folder=tmp_path / "out",
        extra_models=[extra, tmp_path / "models"],
        kind_folders={"instantid": [by_kind, extra / "instantid"]},
    )
    assert here.model_folders("instantid") == [tmp_path / "models" / "instantid", extra / "instantid", by_kind]
    assert here.model_folders("other") == [tmp_path / "models" / "other", extra / "other"]
    assert (here.input_folder(), here.output_folder()) == (tmp_path / "in", tmp_path / "out")
    assert here.cache_folder() in here.temp_folder().parents
    monkeypatch.setenv("HOTPATH_MODELS", str(tmp_path / "configured"))
    assert HeadlessHost().model_folders("x") == [tmp_path / "configured" / "x"]


def test_headless_takes_the_first_folder_that_has_the_file(tmp_path: Path) -> None:
    here = HeadlessHost(models=tmp_path / "a", extra_models=[tmp_path / "b"])
    second = touch(tmp_path / "b" / "kind" / "x.bin")
    assert here.model_path("kind", "x.bin") == second
    first = touch(tmp_path / "a" / "kind" / "x.bin")
    assert here.model_path("kind", "x.bin") == first
    assert here.model_files("kind") == ["x.bin"], "listed once"


def test_headless_makes_no_folder(tmp_path: Path) -> None:
    here = HeadlessHost(models=tmp_path / "models", input_folder=tmp_path / "in", output_folder=tmp_path / "out")
    here.model_folders("instantid")
    here.announce_models("instantid")
    assert here.model_files("instantid") == []
    assert list(tmp_path.iterdir()) == []


def test_headless_device_is_what_was_asked_for() -> None:
    assert HeadlessHost(device="cpu").device() == CPU
    assert HeadlessHost(device=torch.device("meta")).device().type == "meta"
    assert HeadlessHost().device() == best_device()
    assert HeadlessHost(device="cpu").offload_device() == CPU


def test_headless_progress_is_a_bar_where_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    told: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            told.append(options)

        def update(self, steps: int) -> None:
            told.append(steps)

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    here = HeadlessHost(device="cpu")
    bar = here.progress(3, "frames")
    bar.update(preview="of nobody")
    here.on_preview = told.append
    bar.update(2, preview="a picture")
    bar.close()
    shown = {"total": 3, "desc": "frames", "leave": False, "disable": None}  # None: tqdm looks whether it is a terminal
    assert told == [shown, 1, 2, "a picture", "closed"]
    here.show_progress = False
    here.progress(3)
    assert told[-1] == {**shown, "desc": None, "disable": True}
    here.stop()
    with pytest.raises(Interrupted):
        bar.update()


def test_headless_folders_are_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = HeadlessHost(device="cpu")
    assert (here.input_folder(), here.output_folder()) == (tmp_path, tmp_path / "output")


@pytest.mark.parametrize(("name", "can"), [("a" * 255, True), ("a" * 256, False), ("a\0b", False), ("a\ud800", False)])
def test_names_that_a_file_can_have(name: str, can: bool) -> None:
    assert can_be_a_name(name) is can


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError(" \n"), "ValueError"),
        (ValueError("x" * 200), "ValueError: " + "x" * 160),
        (
            ValueError("Failed to trace\n  Explanation: not `open`.\n  Hint: none"),
            "ValueError: Failed to trace: not `open`.",
        ),
        (ValueError("CUDA error: bad launch\nFor debugging ..."), "ValueError: CUDA error: bad launch"),
        (
            ValueError(
                "C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\nIn file included from a.cpp:2:\n"
                "b.h:1:10: fatal error: Python.h: No such file\n   1 | #include\nb.h:2:1: error: and more\n"
            ),
            "ValueError: C++ compile error: Python.h: No such file",
        ),
        (
            ValueError("C++ compile error\n\nOutput:\nb.h(1): fatal error C1083: Cannot open 'omp.h'"),
            "ValueError: C++ compile error: Cannot open 'omp.h'",
        ),
        (
            ValueError("RuntimeError: Compiler: cl is not found.\n\nSet TORCHDYNAMO_VERBOSE=1"),
            "there is no C++ compiler (cl) on the PATH: install one, such as g++",
        ),
    ],
)
def test_what_is_told_of_an_error(error: Exception, told: str) -> None:
    assert errors.kind_and_line(error) == told
    outer = RuntimeError("backend raised")
    outer.inner_exception = error  # type: ignore[attr-defined]
    assert errors.kind_and_line(outer) == told


def test_what_a_compiler_has_no_room_for_is_told_with_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/compiled")
    outer = RuntimeError("backend raised")
    outer.inner_exception = OSError(28, "No space left on device")  # type: ignore[attr-defined]
    told = f"The disk with {Path('/compiled')} is full: free some space on it and run it again"
    assert errors.kind_and_line(outer) == told


def test_headless_halves_on_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    here = HeadlessHost(device=torch.device("cuda", 0))
    assert here.compute_dtype() == torch.float16
    assert here.compute_dtype(supported=(torch.bfloat16, torch.float32)) == torch.bfloat16
    assert here.compute_dtype(supported=(torch.float32,)) == torch.float32


def test_headless_stops_at_the_next_check_and_only_once() -> None:
    here = HeadlessHost(device="cpu", show_progress=False)
    here.check_interrupt()
    here.stop()
    with pytest.raises(Interrupted):
        here.check_interrupt()
    here.check_interrupt()
    bar = here.progress(3)
    bar.update()
    here.stop()
    with pytest.raises(Interrupted, match="Stopped on request"):
        bar.update()
    bar.close()
    here.stop()
    here.clear_stop()
    here.check_interrupt()


def test_an_interrupt_is_no_ordinary_error() -> None:
    """`except Exception` in somebody's loop must not swallow it."""
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception)


def test_headless_previews_reach_their_listener() -> None:
    here = HeadlessHost(device="cpu", show_progress=False)
    seen: list[Any] = []
    here.on_preview = seen.append
    picture = object()
    bar = here.progress(2)
    bar.update(preview=picture)
    bar.update()
    assert seen == [picture]


def test_headless_texts_go_to_the_running_node() -> None:
    here = HeadlessHost(device="cpu")
    here.show_text("nobody runs")
    here.node_id = "7"
    here.show_text("mine")
    here.show_text("another's", "9")
    assert here.texts == [(None, "nobody runs"), ("7", "mine"), ("9", "another's")]


def test_headless_moves_the_network_to_its_device_and_back() -> None:
    here = HeadlessHost(device="meta")
    managed = here.manage(Network())
    with managed.resident() as network:
        assert {t.device.type for t in network.state_dict().values()} == {"meta"}
    assert managed.device.type == "meta"


def test_a_bar_is_closed_whatever_happens() -> None:
    closed: list[bool] = []
    here: Any = SimpleNamespace(progress=lambda total, label: SimpleNamespace(close=lambda: closed.append(True)))
    with pytest.raises(RuntimeError), host.tracked(here, 3):
        raise RuntimeError
    assert closed == [True]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    touch(folder / "real" / "a.bin")
    try:
        (folder / "real" / "up").symlink_to(folder, target_is_directory=True)
        (folder / "linked").symlink_to(folder / "real", target_is_directory=True)
        (folder / "gone.bin").symlink_to(tmp_path / "nowhere.bin")
        (folder / "itself.bin").symlink_to(folder / "itself.bin")
    except OSError:
        pytest.skip("links cannot be made here")
    return folder


def test_links_are_followed_without_going_round(linked: Path) -> None:
    assert list_files([linked], (".bin",)) == ["linked/a.bin", "real/a.bin"]


def test_a_folder_outside_that_is_linked_in_is_found(tmp_path: Path, linked: Path) -> None:
    touch(tmp_path / "disk" / "big.bin")
    (linked / "disk").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert "disk/big.bin" in list_files([linked], ())
    assert find_file("kind", [linked], "disk/big.bin").read_bytes() == b"x"
    for name in ("x" * 300, "\ud800", "a\0b"):  # no name that a file can have
        with pytest.raises(ModelNotFound, match="was not found"):
            find_file("kind", [linked], name)


@pytest.mark.parametrize("name", ["SDXL\\a.bin", "SDXL/A.bin"])
def test_a_file_in_another_folder_is_named(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "mine" / "a.bin")
    with pytest.raises(ModelNotFound, match=r"'mine/a\.bin' is there: choose that one"):
        find_file("kind", [tmp_path], name)
    with pytest.raises(ModelNotFound, match="Looked in"):
        find_file("kind", [tmp_path], ".")


def test_names_that_differ_in_case_only_have_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.bin", "a.bin", "C.bin"):
        touch(tmp_path / name)
    assert list_files([tmp_path], (".bin",)) == ["a.bin", "b.bin", "C.bin"]
    touch(tmp_path / "other" / "B.bin")
    listed = list_files([tmp_path, tmp_path / "other"], (".bin",))
    assert listed == list_files([tmp_path / "other", tmp_path], (".bin",))
