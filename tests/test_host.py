"""The door to the program around us, both of its implementations: files, devices, memory, progress, interrupt."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotpath import host
from hotpath.host import Host, Interrupted, ModelNotFound, errors
from hotpath.host.headless import HeadlessHost, best_device
from hotpath.host.letters import can_be_a_name
from hotpath.host.model_paths import find_file, list_files
from torch import nn

CPU = torch.device("cpu")
KIND = "hotpath_test_kind"


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Network(nn.Module):
    """A parameter of its own beside sub-modules, and a buffer: what memory management likes to leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.ones(1, 3), requires_grad=False)
        self.linear = nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("mean", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + self.latents) - self.mean


@pytest.fixture
def comfy_host() -> Any:
    from hotpath.host.comfyui import ComfyUIHost

    return ComfyUIHost()


@pytest.fixture
def comfy_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's folder_paths over an empty models folder, with nothing known of our kind."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop(KIND, None)
    return folder_paths


@pytest.fixture(params=["headless", pytest.param("comfyui", marks=pytest.mark.comfy)])
def either_host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    if request.param == "headless":
        return HeadlessHost(models=tmp_path / "models", device="cpu", show_progress=False)
    request.getfixturevalue("comfy_folders")
    return request.getfixturevalue("comfy_host")


# ---------------------------------------------------------------- both hosts


def test_both_answer_the_whole_interface(either_host: Host) -> None:
    assert isinstance(either_host, Host)
    assert either_host.name


ESCAPES = [
    "../secret.bin",
    "a/../../secret.bin",
    "..",
    "/etc/passwd",
    "//server/share/secret.bin",
    "C:\\secret.bin",
    "C:secret.bin",
    "c:/secret.bin",
    "\\secret.bin",
    "..\\secret.bin",
    "a\\..\\..\\secret.bin",
    "a/..\\../secret.bin",
    "\\\\server\\share\\secret.bin",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leaves_the_folder_is_refused(name: str, either_host: Host, tmp_path: Path) -> None:
    touch(tmp_path / "models" / "secret.bin")
    touch(tmp_path / "models" / KIND / "a" / "b.bin")
    with pytest.raises(ModelNotFound, match="is not a file name inside") as caught:
        either_host.model_path(KIND, name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["sub/model.bin", "sub\\model.bin", "./sub/model.bin", "sub//model.bin"])
def test_names_are_taken_from_either_system(name: str, either_host: Host, tmp_path: Path) -> None:
    file = touch(tmp_path / "models" / KIND / "sub" / "model.bin")
    assert either_host.model_path(KIND, name) == file


def test_odd_but_honest_names_are_taken(either_host: Host, tmp_path: Path) -> None:
    for name in ("a..b.bin", "... .bin", "ü ñ.bin", "sub.dir/..x.bin"):
        file = touch(tmp_path / "models" / KIND / name)
        assert either_host.model_path(KIND, name) == file


@pytest.mark.parametrize("name", ["", "   "])
def test_no_name_says_where_a_file_belongs(name: str, either_host: Host, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"No {KIND} model is chosen") as caught:
        either_host.model_path(KIND, name)
    assert str(tmp_path / "models" / KIND) in str(caught.value)


@pytest.mark.parametrize("name", ["none.bin", "sub", ".", "nul\0l.bin"])
def test_a_missing_file_names_the_folders_that_were_searched(name: str, either_host: Host, tmp_path: Path) -> None:
    (tmp_path / "models" / KIND / "sub").mkdir(parents=True)
    with pytest.raises(ModelNotFound, match=f"The {KIND} model .* was not found") as caught:
        either_host.model_path(KIND, name)
    assert str(tmp_path / "models" / KIND) in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    assert "hotpath models" not in str(caught.value), "which knows no file of this kind"
    with pytest.raises(ModelNotFound, match="`hotpath models`, says where each file comes from"):
        either_host.model_path("instantid", name)


def test_files_are_listed_with_forward_slashes_sorted_and_by_suffix(either_host: Host, tmp_path: Path) -> None:
    for name in ("B.safetensors", "a.BIN", "sub/deep/c.bin", "note.txt", ".hidden.bin", ".git/d.bin", "sub/.e.bin"):
        touch(tmp_path / "models" / KIND / name)
    assert either_host.model_files(KIND) == ["a.BIN", "B.safetensors", "sub/deep/c.bin"]
    assert either_host.model_files(KIND, (".txt",)) == ["note.txt"]
    assert either_host.model_files("nothing_of_the_kind") == []
    for name in either_host.model_files(KIND):
        assert either_host.model_path(KIND, name).is_file()


def test_a_managed_network_runs_and_goes(either_host: Host) -> None:
    managed = either_host.manage(Network())
    x = torch.ones(1, 3)
    expected = Network.forward(managed.module, x)
    with managed.resident() as network:
        assert network is managed.module
        assert {t.device for t in network.state_dict().values()} == {managed.device}
        assert torch.equal(network(x.to(managed.device)).cpu(), expected)
    managed.release()
    managed.release()
    assert {t.device for t in managed.module.state_dict().values()} == {either_host.offload_device()}
    with managed.resident(extra_bytes=1 << 20, keep=False) as network:
        assert torch.equal(network(x.to(managed.device)).cpu(), expected)
    assert {t.device for t in managed.module.state_dict().values()} == {either_host.offload_device()}


def test_a_managed_network_can_be_used_inside_its_own_use(either_host: Host) -> None:
    managed = either_host.manage(Network())
    with managed.resident(), managed.resident() as network:
        assert network(torch.ones(1, 3).to(managed.device)).shape == (1, 2)


def test_an_error_inside_leaves_nothing_resident(either_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    managed = either_host.manage(Network())
    released: list[bool] = []
    release = managed.release
    monkeypatch.setattr(managed, "release", lambda: (released.append(True), release()))
    with pytest.raises(RuntimeError, match="stop"), managed.resident(keep=False):
        raise RuntimeError("stop")
    assert released == [True]


def test_compute_dtype_on_a_cpu_is_float32(either_host: Host) -> None:
    if either_host.device().type == "cpu":
        assert either_host.compute_dtype() == torch.float32
        assert either_host.compute_dtype(1_000_000_000, (torch.bfloat16, torch.float32)) == torch.float32


def test_free_memory_is_a_number_of_bytes(either_host: Host) -> None:
    assert either_host.free_memory(CPU) > 1 << 20
    either_host.make_room(1, CPU)


@pytest.mark.comfy
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_comfyui_counts_weights_that_have_no_storage(comfy_host: Any) -> None:
    network = Network()
    network.register_buffer("order", torch.ones(2, 3).to_mkldnn())
    found = comfy_host.manage(network).patcher.model_mmap_residency(free=True)  # as ComfyUI 0.18 to 0.22 asks
    assert found == (0, sum(tensor.nbytes for tensor in network.state_dict().values()))


@pytest.mark.comfy
def test_room_is_never_made_of_what_computes(comfy_host: Any, comfy_folders: Any) -> None:
    import comfy.model_management as management

    at_work, idle = comfy_host.manage(Network()), comfy_host.manage(Network())

    def listed(managed: Any) -> bool:
        return any(entry.model is managed.patcher for entry in management.current_loaded_models)

    for managed in (at_work, idle):
        # As beside a GPU, where weights that were sent away lie elsewhere.
        managed.patcher.offload_device = torch.device("meta")
    with idle.resident():
        pass
    with at_work.resident() as network:
        with at_work.resident():
            pass  # a use within a use ends, and the first one goes on
        comfy_host.make_room(1 << 60, comfy_host.device())
        assert (listed(at_work), listed(idle)) == (True, False)
        assert network(torch.ones(1, 3)).isfinite().all()
    comfy_host.make_room(1 << 60, comfy_host.device())
    assert not listed(at_work)


def test_progress_counts_and_closes(either_host: Host) -> None:
    with host.tracked(either_host, 3, "frames") as bar:
        for _ in range(3):
            bar.update()


# ---------------------------------------------------------------- headless


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
    ],
)
def test_what_is_told_of_an_error(error: Exception, told: str) -> None:
    assert errors.kind_and_line(error) == told
    outer = RuntimeError("backend raised")
    outer.inner_exception = error  # type: ignore[attr-defined]
    assert errors.kind_and_line(outer) == told


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("half", "bfloat", "supported", "found"),
    [
        (True, True, (torch.float16, torch.bfloat16), torch.float16),
        (True, True, (torch.bfloat16,), torch.bfloat16),
        (False, True, (torch.float16, torch.bfloat16), torch.bfloat16),
        (False, True, (torch.float16,), torch.float32),
        (True, False, (torch.bfloat16,), torch.float32),
    ],
)
def test_comfyui_is_asked_for_the_dtype_with_the_size_of_the_network(
    half: bool, bfloat: bool, supported: Any, found: torch.dtype, comfy_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    monkeypatch.setattr(management, "should_use_fp16", lambda device, model_params: half and model_params == 7)
    monkeypatch.setattr(management, "should_use_bf16", lambda device, model_params: bfloat and model_params == 7)
    assert comfy_host.compute_dtype(7, supported) == found


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


# ---------------------------------------------------------------- the shared search


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


# ---------------------------------------------------------------- which host


def test_current_can_be_replaced_and_put_back() -> None:
    mine = HeadlessHost(device="cpu")
    before = host.use(mine)
    try:
        assert host.current() is mine
        assert host.use(None) is mine
        assert host.current() is host.current()
    finally:
        host.use(before)


@pytest.mark.comfy
def test_inside_comfyui_the_host_is_comfyuis() -> None:
    import comfy.model_management  # noqa: F401
    from hotpath.host.comfyui import ComfyUIHost

    before = host.use(None)
    try:
        assert isinstance(host.current(), ComfyUIHost)
        assert host.current().name.startswith("ComfyUI ")
    finally:
        host.use(before)


def test_without_comfyui_the_host_is_headless_and_imports_nothing_of_it() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import conftest\n"
        "from hotpath import host\n"
        "print(type(host.current()).__name__, [m for m in sys.modules if m.split('.')[0] in ('comfy', 'folder_paths')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env={**os.environ, "COMFYUI_PATH": os.devnull},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "HeadlessHost []"


# ---------------------------------------------------------------- ComfyUI's folders


@pytest.mark.comfy
def test_extra_model_paths_are_searched_and_listed_once(comfy_host: Any, comfy_folders: Any, tmp_path: Path) -> None:
    default, extra = tmp_path / "models" / KIND, tmp_path / "shared disk" / KIND
    comfy_folders.folder_names_and_paths[KIND] = ([str(default)], {".bin"})
    comfy_folders.add_model_folder_path(KIND, str(extra))
    comfy_folders.add_model_folder_path(KIND, str(extra))
    touch(default / "both.bin", b"default")
    touch(extra / "both.bin", b"extra")
    only = touch(extra / "only.bin")
    assert comfy_host.model_folders(KIND) == [default, extra]
    assert comfy_host.model_files(KIND) == ["both.bin", "only.bin"]
    assert comfy_host.model_path(KIND, "both.bin").read_bytes() == b"default"
    assert comfy_host.model_path(KIND, "only.bin") == only
    # is_default in extra_model_paths.yaml puts a folder first: that is where downloads go, too.
    comfy_folders.add_model_folder_path(KIND, str(extra), is_default=True)
    assert comfy_host.model_folders(KIND) == [extra, default]
    assert comfy_host.model_path(KIND, "both.bin").read_bytes() == b"extra"


@pytest.mark.comfy
def test_extra_model_paths_alone_do_not_hide_the_models_folder(
    comfy_host: Any, comfy_folders: Any, tmp_path: Path
) -> None:
    """extra_model_paths.yaml is read before any pack has named the kind; ComfyUI then knows only the extra folder."""
    default, extra = tmp_path / "models" / KIND, tmp_path / "extra"
    comfy_folders.add_model_folder_path(KIND, str(extra))
    touch(default / "a.bin")
    touch(extra / "b.bin")
    assert comfy_host.model_folders(KIND) == [extra, default]
    assert comfy_host.model_files(KIND) == ["a.bin", "b.bin"]
    comfy_host.announce_models(KIND)
    assert comfy_folders.get_folder_paths(KIND) == [str(extra), str(default)]
    assert sorted(comfy_folders.get_filename_list(KIND)) == ["a.bin", "b.bin"]


@pytest.mark.comfy
def test_announced_models_are_known_to_other_packs(comfy_host: Any, comfy_folders: Any, tmp_path: Path) -> None:
    default = tmp_path / "models" / KIND
    touch(default / "a.bin")
    touch(default / "read me.md")
    comfy_host.announce_models(KIND)
    comfy_host.announce_models(KIND)
    assert comfy_folders.get_folder_paths(KIND) == [str(default)]
    assert comfy_folders.get_filename_list(KIND) == ["a.bin"]
    comfy_folders.folder_names_and_paths[KIND][1].add(".md")
    comfy_host.announce_models(KIND)
    assert ".md" in comfy_folders.folder_names_and_paths[KIND][1], "what another pack registered stays"
    assert ".md" not in comfy_folders.supported_pt_extensions


@pytest.mark.comfy
def test_comfyuis_other_folders(comfy_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    for getter in ("input", "output", "temp", "user"):
        monkeypatch.setattr(folder_paths, f"get_{getter}_directory", lambda getter=getter: str(tmp_path / getter))
    assert comfy_host.input_folder() == tmp_path / "input"
    assert comfy_host.output_folder() == tmp_path / "output"
    assert comfy_host.temp_folder() == tmp_path / "temp"
    assert comfy_host.cache_folder() == tmp_path / "user" / "__hotpath"


# ---------------------------------------------------------------- ComfyUI's memory management


@pytest.fixture
def loaded() -> Iterator[Any]:
    """How often a network is among ComfyUI's loaded models."""
    import comfy.model_management as management

    management.unload_all_models()

    def count(managed: Any) -> int:
        return sum(entry.model is managed.patcher for entry in management.current_loaded_models)

    yield count
    management.unload_all_models()


@pytest.mark.comfy
def test_a_resident_network_is_one_of_comfyuis_loaded_models(
    comfy_host: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    monkeypatch.delattr(management, "unload_model_and_clones", raising=False)  # an older ComfyUI has none
    managed = comfy_host.manage(Network())
    other = comfy_host.manage(Network())
    assert loaded(managed) == 0, "it starts on the offload device"
    with other.resident(), managed.resident() as network:
        assert loaded(managed) == 1
        assert network(torch.ones(1, 3).to(managed.device)).shape == (1, 2)
    assert loaded(managed) == 1, "it stays until the room is needed"
    managed.release()
    assert loaded(managed) == 0
    assert loaded(other) == 1, "only its own"
    with managed.resident(keep=False):
        assert loaded(managed) == 1
    assert loaded(managed) == 0


@pytest.mark.comfy
def test_comfyui_may_evict_a_network_and_it_comes_back(comfy_host: Any, loaded: Any) -> None:
    import comfy.model_management as management

    managed = comfy_host.manage(Network())
    x = torch.ones(1, 3)
    with managed.resident() as network:
        before = network(x.to(managed.device)).cpu()
    management.unload_all_models()
    assert loaded(managed) == 0
    with managed.resident() as network:
        assert loaded(managed) == 1
        assert torch.equal(network(x.to(managed.device)).cpu(), before)


@pytest.mark.comfy
def test_an_interrupt_inside_leaves_nothing_resident(comfy_host: Any, loaded: Any) -> None:
    import comfy.model_management as management

    managed = comfy_host.manage(Network())
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException), managed.resident(keep=False):
        comfy_host.check_interrupt()
    assert loaded(managed) == 0


@pytest.mark.comfy
def test_what_a_low_memory_mode_leaves_behind_is_brought_along(
    comfy_host: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --lowvram or --novram ComfyUI moves its own layers only; ours would compute on two devices at once."""
    import comfy.model_management as management

    managed = comfy_host.manage(Network())
    asked: dict[str, Any] = {}
    monkeypatch.setattr(management, "load_models_gpu", lambda models, **options: asked.update(options))
    managed.device = torch.device("meta")
    with managed.resident(extra_bytes=123) as network:
        assert {t.device.type for t in network.state_dict().values()} == {"meta"}
    assert asked == {"memory_required": 123, "force_full_load": True}


@pytest.mark.comfy
def test_weights_are_moved_once_and_not_on_every_use(
    comfy_host: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI's dynamic patcher, the default on NVIDIA cards, copies plain modules anew on every load."""
    import comfy.model_patcher

    def dynamic(*_: Any, **__: Any) -> None:
        raise AssertionError("the patcher of the day was taken")

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", dynamic, raising=False)
    managed = comfy_host.manage(Network())
    assert type(managed.patcher).__mro__[1] is comfy.model_patcher.ModelPatcher
    with managed.resident() as network:
        places = [p.data_ptr() for p in network.parameters()]
    with managed.resident() as network:
        assert [p.data_ptr() for p in network.parameters()] == places


@pytest.mark.comfy
def test_a_network_nobody_holds_is_forgotten_by_comfyui(comfy_host: Any, loaded: Any) -> None:
    import gc
    import weakref

    managed = comfy_host.manage(Network())
    with managed.resident():
        pass
    network = weakref.ref(managed.module)
    del managed
    gc.collect()
    assert network() is None


@pytest.mark.comfy
def test_an_adapter_leaves_no_weights_behind_when_a_face_was_prepared(
    comfy_host: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotpath.cache import registry
    from hotpath.identity import InstantIDAdapter, prepare
    from hotpath_demo import tiny_sdxl

    monkeypatch.setattr(registry, "_caches", {})
    before = host.use(comfy_host)
    try:
        state = tiny_sdxl.make_adapter_state()
        adapter = InstantIDAdapter(state["image_proj"], state["ip_adapter"], "tiny.bin", "host test")
        resident: list[int] = []
        adapter.image_proj_model.register_forward_hook(lambda *_: resident.append(loaded(adapter.managed)))
        prepared = prepare(adapter, adapter.managed, torch.randn(1, 1, 512), noise=0.35)
        assert resident == [1, 1]
        assert loaded(adapter.managed) == 0
        assert len(prepared) == 70
    finally:
        host.use(before)


# ---------------------------------------------------------------- ComfyUI's interrupt, progress and texts


@pytest.mark.comfy
def test_an_interrupt_is_comfyuis_own_exception(comfy_host: Any) -> None:
    import comfy.model_management as management

    comfy_host.check_interrupt()
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        comfy_host.check_interrupt()
    comfy_host.check_interrupt()
    bar = comfy_host.progress(2)
    bar.update()
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        bar.update()


@pytest.mark.comfy
def test_progress_reaches_comfyuis_hook_with_the_preview(comfy_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    seen: list[tuple[int, int, Any]] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total, preview))
    )
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)
    picture = object()
    bar = comfy_host.progress(5)
    bar.update(2)
    bar.update(3, preview=picture)
    bar.close()
    assert [(value, total) for value, total, _ in seen] == [(2, 5), (5, 5)]
    assert seen[0][2] is None
    assert seen[1][2] == ("JPEG", picture, 512)


class RecordingServer:
    client_id: str | None = "me"

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        self.sent.append((text, node_id, sid))


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("listen", "named", "open_folders"),
    [
        ("127.0.0.1", None, None),
        ("localhost,::1", None, None),
        ("0.0.0.0,::", None, []),
        ("127.0.0.1, 192.168.0.5", None, []),
        ("0.0.0.0", f"/data{os.pathsep} ", [Path("/data")]),
        ("127.0.0.1", "", []),
    ],
)
def test_whole_paths_lead_less_far_where_others_reach_the_server(
    comfy_host: Any, monkeypatch: pytest.MonkeyPatch, listen: str, named: str | None, open_folders: Any
) -> None:
    from comfy.cli_args import args

    monkeypatch.setattr(args, "listen", listen)
    if named is not None:
        monkeypatch.setenv("HOTPATH_FOLDERS", named)
    assert comfy_host.open_folders() == open_folders


@pytest.mark.comfy
def test_a_text_goes_under_its_node(comfy_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_execution.utils import CurrentNodeContext

    server = RecordingServer()
    module = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", module)
    comfy_host.show_text("found \ud83d", "12")  # half of a letter, which the server cannot send
    with CurrentNodeContext("prompt", "34"):
        comfy_host.show_text("running")
        comfy_host.show_text("for another", "56")
    comfy_host.show_text("nobody runs")
    server.client_id = None  # a program queued the prompt: other people's graphs have another node under that id
    comfy_host.show_text("for nobody", "12")
    assert server.sent == [("found \ufffd", "12", "me"), ("running", "34", "me"), ("for another", "56", "me")]


@pytest.mark.comfy
@pytest.mark.parametrize("server", [None, SimpleNamespace(), SimpleNamespace(PromptServer=SimpleNamespace())])
def test_without_a_server_a_text_goes_nowhere(server: Any, comfy_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server", server)
    comfy_host.show_text("found", "12")


@pytest.mark.comfy
def test_our_text_fits_the_real_servers_signature(comfyui_path: Path) -> None:
    """Read, not imported: the import would start half of ComfyUI."""
    tree = ast.parse((comfyui_path / "server.py").read_text(encoding="utf-8"))
    found = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "send_progress_text"]
    assert [a.arg for a in found[0].args.args][:4] == ["self", "text", "node_id", "sid"]


def test_each_item_moves_a_bar_and_a_stop_is_heard_between_two(headless_host) -> None:
    seen: list[int] = []
    with pytest.raises(Interrupted):
        for item in host.each([1, 2, 3]):
            seen.append(item)
            if item == 2:
                headless_host.stop()
    assert seen == [1, 2]
    assert list(host.each(range(3), "label")) == [0, 1, 2]
