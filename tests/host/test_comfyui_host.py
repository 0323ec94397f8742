"""ComfyUI as host: its folders, memory management, interrupt, progress and texts."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosted import KIND, Network, touch
from hotpath import host


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


@pytest.mark.comfy
def test_comfyui_says_what_it_has_locked(comfy_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management
    from comfy.cli_args import args

    assert comfy_host.locked_memory() == 0
    monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", 5 << 20)
    assert comfy_host.locked_memory() == 5 << 20
    monkeypatch.setattr(args, "disable_pinned_memory", True)
    assert comfy_host.locked_memory() is None


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
@pytest.mark.parametrize("kept", [True, False])
def test_comfyui_is_asked_whether_files_may_hold_their_workflow(
    comfy_host: Any, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_metadata", not kept)
    assert comfy_host.keeps_workflows() is kept


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
