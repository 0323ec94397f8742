"""What both hosts do alike: files, networks, memory, progress; and which of them is the current one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hosted import KIND, Network, touch
from hotpath import host
from hotpath.host import Host, Interrupted, ModelNotFound, cgroup_memory
from hotpath.host.headless import HeadlessHost

CPU = torch.device("cpu")


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


def test_free_memory_is_a_number_of_bytes(either_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert either_host.free_memory(CPU) > 1 << 20
    monkeypatch.setattr(cgroup_memory, "at_most", lambda free: min(free, 12345))
    assert either_host.free_memory(CPU) == 12345, "what a container may take"
    either_host.make_room(1, CPU)


def test_progress_counts_and_closes(either_host: Host) -> None:
    with host.tracked(either_host, 3, "frames") as bar:
        for _ in range(3):
            bar.update()


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
        [sys.executable, "-c", code, str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        env={**os.environ, "COMFYUI_PATH": os.devnull},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "HeadlessHost []"


def test_each_item_moves_a_bar_and_a_stop_is_heard_between_two(headless_host) -> None:
    seen: list[int] = []
    with pytest.raises(Interrupted):
        for item in host.each([1, 2, 3]):
            seen.append(item)
            if item == 2:
                headless_host.stop()
    assert seen == [1, 2]
    assert list(host.each(range(3), "label")) == [0, 1, 2]
