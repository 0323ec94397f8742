"""What Windows, macOS, Intel's cards and older ones of NVIDIA do otherwise, told to the pack where none of them is."""

from __future__ import annotations

import getpass
import io
import os
import sys
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hotpath.colorization import file_names, manifest, playable_part
from hotpath.colorization.stage_times import StageTimes
from hotpath.commands import backends, console, doctor
from hotpath.distributed import ray_cluster, results
from hotpath.distributed.items import Item
from hotpath.distributed.jobs import Job
from hotpath.distributed.manifest import Manifest
from hotpath.distributed.results import ResultStore
from hotpath.headless import files, launcher, locate
from hotpath.host import capturing, cards, cores, device_work, errors, name_limits, user
from hotpath.host.headless import HeadlessHost, best_device
from hotpath.patches.compilation import settings
from hotpath.vision_language.caption_job import CaptionJob
from hotpath.vision_language.timing import Timing


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (name_limits, console):
        monkeypatch.setattr(module, "os", SimpleNamespace(name="nt", environ=os.environ, fsencode=os.fsencode))


@pytest.mark.parametrize("name", ["at 12:30", "a/what?", "NUL.png", "com1", "aux /x.png"])
def test_windows_has_no_files_of_some_names(name: str, tmp_path: Path, windows: None) -> None:
    for inside in (files.inside, file_names.inside):
        with pytest.raises(ValueError, match="cannot be a file's name on Windows"):
            inside(tmp_path, name)


@pytest.mark.parametrize("name", ["console.png", "a/b.c.png", "communion 1"])
def test_windows_has_files_of_others(name: str, tmp_path: Path, windows: None) -> None:
    assert files.inside(tmp_path, name) == file_names.inside(tmp_path, name) == tmp_path / name


def test_other_systems_have_files_of_all_names(tmp_path: Path) -> None:
    assert files.inside(tmp_path, "at 12:30").name == file_names.inside(tmp_path, "at 12:30").name == "at 12:30"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_styles_are_for_terminals_that_know_them(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "WT_SESSION", "TERM", "ANSICON"):
        monkeypatch.delenv(name, raising=False)
    old, new = Terminal(), Terminal()
    console._write(old, "made", "green")
    monkeypatch.setenv("WT_SESSION", "1")
    console._write(new, "made", "green")
    assert old.getvalue() == "made\n" and new.getvalue() == "\033[32mmade\033[0m\n"


def test_a_file_that_another_program_holds_does_not_end_a_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = manifest.Manifest("key", [manifest.FinishedPart(0, 1, 0, False)])
    for number in (1, 2):
        film.part_file(tmp_path, number).touch()
        film.state_file(tmp_path, number).touch()
    output = tmp_path / "film.mp4"
    beside, folder = tmp_path / "film.partial.mp4", tmp_path / "film.mp4.parts"
    beside.touch()
    folder.mkdir()
    playable_part.note_left(output, beside, 1)

    def held(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "it is used by another process")

    monkeypatch.setattr(Path, "unlink", held)
    film.add(tmp_path, manifest.FinishedPart(1, 2, 0, True), 2)
    playable_part.drop_left(output)
    assert len(film.parts) == 2


def test_a_path_that_is_too_long_for_windows_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        error = OSError(2, "The system cannot find the path specified")
        error.winerror = 3  # type: ignore[misc,attr-defined,unused-ignore]
        raise error

    monkeypatch.setattr(results, "put_in_place", refuse)
    job = Job("j1", Item("a", "c"), {})
    with Manifest.open(ResultStore.manifest_path(tmp_path), "w") as record:
        store = ResultStore(tmp_path, record)
        made = store.staging(job, 1) / "output"
        made.mkdir(parents=True)
        (made / "1.png").touch()
        with pytest.raises(results.CannotKeep, match=r"The result a cannot be put into .*: its path is too long"):
            store.keep(job, store.staging(job, 1), [], 1.0, 1)


def test_a_folder_that_is_guarded_on_windows_is_told_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There Python's own temporary files take a refusal for a name that is taken, two thousand million times."""
    asked: list[object] = []

    def guarded(path: object, *_: object, **__: object) -> None:
        asked.append(path)
        assert len(asked) < 10
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tempfile, "_os", SimpleNamespace(**{**vars(os), "name": "nt", "open": guarded}))
    monkeypatch.setattr(tempfile, "TemporaryFile", tempfile.NamedTemporaryFile)
    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(ValueError, match="No caption can be written into"):
        CaptionJob(tmp_path, "Caption this picture.").check_target()


def test_what_windows_lacks_to_compile_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("Failed to find Python libs.")

    problem = settings.compiler_problem.__wrapped__
    monkeypatch.setattr("torch.utils._triton.has_triton", broken)
    assert problem("cuda").startswith("Triton cannot be used (RuntimeError: Failed to find Python libs.); install it")
    monkeypatch.delenv("CXX", raising=False)
    for module in (settings, errors):
        monkeypatch.setattr(module, "os", SimpleNamespace(name="nt", environ=os.environ))
    for there, told in (("clang++", True), ("cl", False)):
        monkeypatch.setattr(settings.shutil, "which", lambda name, there=there: name if name == there else None)
        assert ("no C++ compiler (cl) on the PATH: install the Build Tools" in (problem("cpu") or "")) == told


def test_triton_has_another_name_for_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setattr(backends, "_installed", lambda names: dict.fromkeys(names, "3.5"))
    triton = backends._look(next(library for library in backends.LIBRARIES if library.module == "triton"))
    assert triton.detail.startswith("triton and triton-windows share one folder and overwrite each other")


def test_a_comfyui_prints_letters_that_the_code_page_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}

    def start(command: list[str], env: dict[str, str], **_: object) -> None:
        given.update(env)
        raise OSError("not in this test")

    monkeypatch.setattr(launcher, "python_for", lambda comfyui: (Path("python"), None))
    monkeypatch.setattr(launcher, "_has_accelerator", lambda python: False)
    monkeypatch.setattr(launcher.subprocess, "Popen", start)
    with pytest.raises(OSError, match="not in this test"), launcher.launched(tmp_path):
        pass
    assert given["PYTHONIOENCODING"] == "utf-8", "its log is read as UTF-8"


@pytest.mark.skipif(os.name != "posix", reason="Windows knows every user's home")
def test_a_user_without_a_home_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    names = ("HOME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    for name in (*names, "COMFYUI_PATH", "HOTPATH_MODELS", ray_cluster.TOKEN, ray_cluster.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "")  # so that it is as before in the end
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locate, "is_comfyui", lambda folder: False)
    assert locate.find_comfyui() is None
    assert ray_cluster.token_environment(ray_cluster.ClusterOptions(address="127.0.0.1:1"), tmp_path) == {}
    alone = HeadlessHost()
    assert alone.model_folders("vae") == [tmp_path / "models" / "vae"] and alone.cache_folder().is_absolute()
    user.give_a_name()
    assert getpass.getuser() == f"uid_{os.getuid()}", "torch's compiler and diffusers ask for one"


def test_a_folder_that_is_closed_is_no_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", closed)
    assert not locate.is_comfyui(tmp_path)


def test_model_paths_of_another_encoding_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "extra_model_paths.yaml").write_bytes("a:\n  loras: D:/模型\n".encode("gb18030"))
    _, kinds = locate.model_folders(tmp_path)
    assert "loras" not in kinds and "extra_model_paths.yaml cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("device", "card", "macos", "supported", "found"),
    [
        ("mps", "", 14, (torch.bfloat16, torch.float32), torch.bfloat16),
        ("mps", "", 13, (torch.bfloat16, torch.float32), torch.float32),
        ("mps", "", 13, (torch.float16, torch.float32), torch.float16),
        ("cuda", "NVIDIA GeForce GTX 1650", 0, (torch.float16, torch.float32), torch.float32),
        ("cuda", "NVIDIA GeForce RTX 2060", 0, (torch.float16, torch.float32), torch.float16),
        ("cuda", "NVIDIA GeForce GTX 1650", 0, (torch.bfloat16, torch.float32), torch.bfloat16),
        ("mps", "NVIDIA GeForce GTX 1650", 14, (torch.float16, torch.float32), torch.float16),
    ],
)
def test_networks_are_computed_in_what_the_device_can(
    device: str, card: str, macos: int, supported: tuple[torch.dtype, ...], found: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: card)
    assert HeadlessHost(device=device).compute_dtype(supported=supported) == found


def test_memory_of_intels_cards_is_not_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda device=None: SimpleNamespace(name="Arc", total_memory=16 << 30)
    )
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda device=None: 6 << 30)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    card = torch.device("xpu", 0)
    assert HeadlessHost(device="xpu").free_memory(card) == 10 << 30
    freed: list[torch.device] = []
    monkeypatch.setattr("hotpath.host.headless.give_back_cached", freed.append)
    HeadlessHost(device="xpu").make_room(10 << 30, card)
    assert freed == []
    HeadlessHost(device="xpu").make_room((10 << 30) + 1, card)
    assert freed == [card]
    monkeypatch.setattr(doctor, "best_device", lambda: card)
    assert doctor.devices()[0] == {"device": "xpu:0", "name": "Arc", "total_gb": 17.2}


def test_memory_that_torch_keeps_of_a_card_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert HeadlessHost(device="cuda").free_memory(torch.device("cuda", 0)) == 120


@pytest.mark.parametrize(
    ("device", "allocator", "hip", "trimmed"),
    [
        ("cuda:1", "cudaMallocAsync", None, [1, "trimmed"]),
        ("cuda", "cudaMallocAsync", None, [3, "trimmed"]),
        ("cuda:7", "cudaMallocAsync", None, [7]),  # the driver does not know it
        ("cuda:1", "native", None, []),
        ("cuda:1", "cudaMallocAsync", "6.4", []),
        ("cpu", "cudaMallocAsync", None, []),
    ],
)
def test_memory_of_graphs_is_given_back_where_the_driver_keeps_it(
    device: str, allocator: str, hip: str | None, trimmed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Driver:
        def cuDeviceGet(self, handle: object, index: int) -> int:
            asked.append(index)
            return int(index == 7)

        def cuDeviceGraphMemTrim(self, handle: object) -> None:
            asked.append("trimmed")

    monkeypatch.setattr(capturing.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.version, "hip", hip)
    capturing.trim(torch.device(device))
    assert asked == trimmed


def test_an_older_driver_that_keeps_no_memory_of_graphs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.version, "hip", None)
    for driver in (lambda name: SimpleNamespace(), lambda name: (_ for _ in ()).throw(OSError("no driver"))):
        monkeypatch.setattr(capturing.ctypes, "CDLL", driver)
        capturing.trim(torch.device("cuda", 0))


def test_memory_of_the_machine_is_told_without_psutil_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    here = HeadlessHost(device="cpu")
    assert here.free_memory(torch.device("cpu")) > 1 << 20
    monkeypatch.setattr(os, "sysconf_names", {})
    assert here.free_memory(torch.device("cpu")) == 4 << 30


def test_the_best_device_is_the_first_that_torch_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cuda", "xpu", "mps"}
    for each in (torch.cuda, torch.xpu, torch.backends.mps):
        name = each.__name__.rpartition(".")[2]
        monkeypatch.setattr(each, "is_available", lambda name=name: name in there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert best_device() == torch.device("cuda", 1)
    for gone, found in (("cuda", "xpu"), ("xpu", "mps"), ("mps", "cpu")):
        there.remove(gone)
        assert best_device() == torch.device(found)
    there.add("xpu")
    monkeypatch.delattr(torch, "xpu")
    assert best_device() == torch.device("cpu")


def test_work_goes_to_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_threads", None)
    for usable, found in ((1, 1), (3, 3), (64, cores.MOST_THREADS)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, usable=usable: set(range(usable)), raising=False)
        assert cores.cores() == found
    ran = cores.on_cores(lambda piece: (piece, threading.current_thread()), range(50))
    assert [piece for piece, _ in ran] == list(range(50)) and all(
        thread.name.startswith("hotpath-cores") for _, thread in ran
    )
    assert threading.main_thread() not in {thread for _, thread in ran}
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores.cores() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.cores() == 1
    assert {thread for _, thread in cores.on_cores(lambda piece: (piece, threading.current_thread()), range(2))} == {
        threading.current_thread()
    }
    cores._threads.shutdown()


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_what_torch_keeps_is_given_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    for each in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, each), "empty_cache", lambda each=each: given.append(each))
    device_work.give_back_cached(torch.device(kind))
    device_work.give_back_cached(torch.device("cpu"))
    assert given == [kind]


def test_every_card_has_done_what_it_was_given_before_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch unmaps what another card than the current one may still write to."""
    busy, waited, unmapped = {0, 1}, [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: int(index < 2))  # the third one was never used
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: (waited.append(index), busy.discard(index)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: unmapped.append(set(busy)))
    device_work.give_back_cached(torch.device("cuda", 1))
    assert unmapped == [set()] and waited == [0, 1]


def test_a_stage_lasts_until_the_device_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    queued = [0.2]  # seconds of what came before

    def synchronize() -> None:
        now[0] += sum(queued)
        queued.clear()

    now = [0.0]
    monkeypatch.setattr(torch.mps, "synchronize", synchronize)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    times, timing = StageTimes(torch.device("mps")), Timing(torch.device("mps"))
    with times.stage("match"):
        queued.append(1.0)
    queued.append(0.4)
    with timing.stage("tower", on_device=True):
        queued.append(2.0)
    with timing.stage("processor"):
        queued.append(4.0)
    assert times.seconds() == {"match": 1.0} and timing.seconds() == {"tower": 2.0, "processor": 0.0}


def test_a_torch_for_the_cpu_beside_a_card_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.unused_gpu() is None
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/{name}")
    monkeypatch.setattr(cards.torch.version, "cuda", None)
    monkeypatch.setattr(cards.torch.version, "hip", None)
    assert "is built without CUDA and ROCm: install the build for your GPU" in (doctor.unused_gpu() or "")
    monkeypatch.setattr(cards.torch.version, "cuda", "12.8")
    assert "install the driver" in (doctor.unused_gpu() or "")
    monkeypatch.setattr(doctor, "best_device", lambda: torch.device("cuda"))
    assert doctor.unused_gpu() is None


def test_a_demo_does_not_fail_over_copies_that_windows_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotpath.headless import demo

    def held(*_: object, **__: object) -> None:
        raise PermissionError(13, "it is used by another process")

    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "launched", lambda *_: nullcontext())
    monkeypatch.setattr(demo, "_run_one", lambda name, *_: demo.DemoResult(name, "done", demo.Outcome("ComfyUI")))
    monkeypatch.setattr(os, "rmdir", held)
    made = demo.run_demo(tmp_path / "out", demo.DemoFiles(), tmp_path, lambda line: None, ["faces"])
    assert made and (tmp_path / "out" / "index.html").is_file()
