"""Model folders as people have them: every fault told apart, in one sentence, with the cure."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hotpath import cache, demo, face
from hotpath.comparison import read_picture
from hotpath.face import FaceError
from hotpath.face.foreign import ForeignAnalyser
from hotpath.face.model_folder import find_model_folder

DEMO = Path(demo.__file__).parent / "models" / "insightface" / "models" / "antelopev2"
ROOT = DEMO.parent.parent
DETECTOR, RECOGNISER = DEMO / "scrfd_10g_bnkps.onnx", DEMO / "glintr100.onnx"
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "models" / "antelopev2").mkdir(parents=True)
    return tmp_path


def put(root, source, name=None, folder="antelopev2"):
    target = root / "models" / folder / (name or source.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return target


def refused(root, name="antelopev2"):
    with pytest.raises(FaceError) as error:
        find_model_folder([root], name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_folder_is_named_with_the_files_it_needs(tmp_path):
    said = refused(tmp_path)
    assert str(tmp_path / "models" / "antelopev2") in said
    assert "scrfd_10g_bnkps.onnx and glintr100.onnx" in said and "was not found" in said


def test_an_empty_folder_is_told_from_a_missing_one(root):
    assert "holds no .onnx file: put scrfd_10g_bnkps.onnx and glintr100.onnx there" in refused(root)


def test_a_zip_that_was_not_unpacked_is_recognised(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "antelopev2.zip").write_bytes(b"PK")
    assert "antelopev2.zip is there but not unpacked" in refused(tmp_path)
    folder = tmp_path / "models" / "antelopev2"
    folder.mkdir()
    beside, inside = folder.with_name("antelopev2.zip"), folder / "antelopev2.zip"
    assert f"holds no .onnx file: unpack {beside} so that scrfd_10g_bnkps.onnx and" in refused(tmp_path)
    beside.rename(inside)
    assert f"holds no .onnx file: unpack {inside} so that" in refused(tmp_path)


def test_a_folder_nested_by_unpacking_works_and_is_mentioned(root):
    put(root, DETECTOR, folder="antelopev2/antelopev2")
    put(root, RECOGNISER, folder="antelopev2/antelopev2")
    analyser = face.load_analyser([root], device=CPU)
    assert "one folder too deep" in analyser.report()
    assert len(analyser.recogniser.embed(torch.zeros(1, 112, 112, 3))[0]) == 512


def test_without_a_detector_what_is_there_is_listed(root):
    put(root, RECOGNISER)
    said = refused(root)
    assert "no face detector with key points: put scrfd_10g_bnkps.onnx there (glintr100.onnx is a recogniser)" in said


def test_without_a_recogniser_faces_are_found_but_not_identified(root):
    put(root, DETECTOR)
    analyser = face.load_analyser([root], device=CPU, remember=False)
    assert "No recogniser file" in analyser.report()
    picture = torch.full((64, 64, 3), 0.5)
    assert analyser.analyse([picture], embed=False)[0].embeddings is None
    with pytest.raises(FaceError, match=r"no recogniser, .* put glintr100\.onnx of antelopev2 there"):
        analyser.analyse([picture])
    assert list(analyser.models) == ["detection"]


@pytest.mark.parametrize("victim", [DETECTOR, RECOGNISER])
def test_a_truncated_file_is_named(root, victim):
    put(root, DETECTOR)
    put(root, RECOGNISER)
    path = root / "models" / "antelopev2" / victim.name
    path.write_bytes(victim.read_bytes()[:500_000])
    if victim is DETECTOR:
        assert f"{path} is no whole ONNX file (500,000 bytes)" in refused(root)
        return
    analyser = face.load_analyser([root], device=CPU, remember=False)
    with pytest.raises(FaceError, match=r"glintr100\.onnx is no whole ONNX file \(500,000 bytes\)"):
        analyser.analyse([torch.full((64, 64, 3), 0.5)])


def test_a_wrong_model_under_the_right_name_is_no_matter_of_names(root):
    put(root, DETECTOR, "glintr100.onnx")
    put(root, RECOGNISER, "scrfd_10g_bnkps.onnx")
    found = find_model_folder([root], "antelopev2")
    assert found.detector.path.name == "glintr100.onnx" and found.recogniser.path.name == "scrfd_10g_bnkps.onnx"


def test_a_network_with_a_detectors_outline_but_not_its_rows_is_refused(root):
    import onnx

    path = put(root, DETECTOR)
    model = onnx.load(str(path))
    outputs = list(model.graph.output)
    # Boxes before scores: nine outputs still, and none of them what it should be.
    del model.graph.output[:]
    model.graph.output.extend(outputs[3:6] + outputs[:3] + outputs[6:])
    onnx.save(model, str(path))
    with pytest.raises(FaceError, match="is no SCRFD detector with key points"):
        face.load_analyser([root], engine="torch", device=CPU)


def test_a_complete_folder_further_down_the_list_is_preferred(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    put(first, DETECTOR)
    put(second, DETECTOR)
    put(second, RECOGNISER)
    assert find_model_folder([first, second], "antelopev2").path == second / "models" / "antelopev2"
    assert find_model_folder([first, tmp_path / "c"], "antelopev2").recogniser is None
    assert face.model_names([first, second, tmp_path / "c"]) == ["antelopev2"]


@pytest.mark.parametrize("name", ["", "..", "../models", "a/b", "a\\b", "C:x", " antelopev2"])
def test_names_that_are_no_folder_names_are_refused(root, name):
    with pytest.raises(FaceError, match="not the name of a face model"):
        find_model_folder([root], name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "tensorflow"}, "no face engine"),
        ({"precision": "int4"}, "no precision"),
        ({"provider": "ROCM"}, "no onnxruntime provider"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, words):
    with pytest.raises(FaceError, match=words):
        face.load_analyser([DEMO.parent.parent], device=CPU, **settings)


def test_every_engine_has_a_line_in_the_diagnosis():
    lines = face.diagnose()
    assert lines[0] == "torch: ready" and len(lines) == 2 + len(face.PROVIDERS)
    words = ("pip", "GPU", "verified", "only")
    assert all(line.endswith("ready") or any(word in line for word in words) for line in lines)


def test_the_diagnosis_names_no_cure_for_what_this_system_cannot_have(monkeypatch):
    pytest.importorskip("onnxruntime")
    from hotpath.face import engine_diagnosis as diagnosis

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(diagnosis, "installed_flavours", lambda: {"onnxruntime": "1.32.0"})
    said = {}
    for system in ("linux", "darwin", "win32"):
        monkeypatch.setattr("sys.platform", system)
        said[system] = dict(line.removeprefix("onnxruntime ").split(": ", 1) for line in face.diagnose())
    assert said["linux"]["CPU"] == "ready" and said["linux"]["CoreML"] == "CoreML exists on macOS only"
    assert said["linux"]["CUDA"] == said["linux"]["MIGraphX"] == "not for this machine: torch sees no GPU"
    assert said["linux"]["OpenVINO"].startswith("not installed, optional; ")
    assert said["darwin"]["CUDA"] == "CUDA exists on Linux and Windows only" and "optional" in said["darwin"]["CoreML"]
    assert said["win32"]["MIGraphX"] == "MIGraphX exists on Linux only" and "optional" in said["win32"]["DirectML"]


@pytest.mark.parametrize("library", ["onnxruntime", "insightface"])
def test_a_library_that_is_installed_and_does_not_import_leaves_torch_and_the_reason(monkeypatch, library):
    if importlib.util.find_spec("insightface") is None:
        pytest.skip("insightface is not installed")
    real = importlib.import_module

    def broken(name, *rest):
        if name.split(".")[0] == library:
            raise ImportError("DLL load failed while importing native part\nand where")
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", broken)
    if library == "onnxruntime":  # also for who imports it by a statement
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    reason = (
        "its import fails (ImportError: DLL load failed while importing native part): pip install --force-reinstall"
    )
    lines = face.diagnose()
    assert any(line.startswith(f"{library}") and reason in line for line in lines) and lines[0] == "torch: ready"
    engines = ("insightface", "onnxruntime", "auto") if library == "onnxruntime" else ("insightface",)
    for engine in engines:
        report = face.load_analyser([ROOT], engine=engine, device=CPU, remember=False).report()
        assert "by torch" in report and reason in report


def test_a_recogniser_that_its_provider_cannot_run_runs_on_torch(monkeypatch):
    """It is loaded when a node first asks for an embedding; the node must not stop there."""
    pytest.importorskip("onnxruntime")
    from hotpath.face import loading
    from hotpath.face.onnxruntime_engine import OnnxRuntimeRunner, UnverifiedProvider

    class Refuses(OnnxRuntimeRunner):
        def __init__(self, file, provider, device):
            if file.kind == "recognition":
                raise UnverifiedProvider("the provider runs only 98% of the convolutions")
            super().__init__(file, provider, device)

    cache.clear_all("faces")
    monkeypatch.setattr(loading, "OnnxRuntimeRunner", Refuses)
    picture = read_picture(Path(demo.__file__).parent / "inputs" / "faces_drawn_one.png")
    analyser = face.load_analyser([ROOT], engine="onnxruntime", device=CPU)
    before = analyser.fingerprint
    found = analyser.analyse([picture])[0]
    assert (analyser.detector.runner.engine, analyser.recogniser.runner.engine) == ("onnxruntime", "torch")
    assert "The recogniser runs on torch: " in analyser.report() and "only 98%" in analyser.report()
    assert analyser.fingerprint != before, "what onnxruntime remembers is not taken for it"
    wanted = face.load_analyser([ROOT], engine="torch", device=CPU, remember=False).analyse([picture])[0]
    assert torch.cosine_similarity(found.embeddings, wanted.embeddings).min() > 0.999


class ThreePeople:
    """A face analysis of another pack."""

    def get(self, picture):
        places = np.array([[10, 10, 40, 50], [60, 20, 120, 90], [150, 30, 180, 70]], np.float32)
        return [{"bbox": b, "kps": b[:2] + np.eye(5, 2), "embedding": np.eye(3)[i]} for i, b in enumerate(places)]


@pytest.mark.parametrize("engine", ["torch", "of another pack"])
def test_what_was_found_serves_every_choice_and_who_needs_no_embeddings(monkeypatch, engine):
    three = read_picture(Path(demo.__file__).parent / "inputs" / "faces_drawn_three.png")[None]
    ours = engine == "torch"
    analyser = (
        face.load_analyser([ROOT], engine="torch", device=CPU)
        if ours
        else ForeignAnalyser(ThreePeople(), fingerprint="three people")
    )
    looks = []
    target, name = (analyser.detector, "find") if ours else (analyser.analysis, "get")
    original = getattr(target, name)
    monkeypatch.setattr(target, name, lambda *a: (looks.append(a), original(*a))[1])

    def ask(**asked):
        looks.clear()
        (found,) = analyser.analyse(three, **asked)
        return found, len(looks)

    largest, first = face.FaceChoice.largest(), face.FaceChoice.left_to_right(0)
    cache.clear_all("faces")
    one, looked = ask(choose=largest)
    assert looked and len(one) == 1 and one.embeddings is not None
    if ours:  # the others embed every face in one go
        plain, looked = ask(choose=largest, embed=False)
        assert not looked and torch.equal(plain.keypoints, one.keypoints) and plain.embeddings is None
        assert len(ask(choose=first)[0].embeddings) == 1 and not ask(choose=first)[1]
    everyone, _ = ask()
    assert len(everyone) == 3
    for choose in (largest, first, face.FaceChoice.best_match(everyone.embeddings[1]), face.FaceChoice.index(2)):
        again, looked = ask(choose=choose)
        assert not looked and torch.equal(again.boxes, choose.apply(everyone).boxes)
        assert torch.allclose(again.embeddings, choose.apply(everyone).embeddings, atol=1e-4)
    plain, looked = ask(embed=False)
    assert not looked and torch.equal(plain.boxes, everyone.boxes) and plain.embeddings is None
    assert "1 remembered" in analyser.report()
    assert ask(options=face.DetectionOptions(0.3))[1], "another threshold may find more"
    cache.clear_all("faces")


def test_room_is_made_before_a_session_takes_memory_of_the_card(monkeypatch, headless_host):
    pytest.importorskip("onnxruntime")
    from hotpath.face.onnxruntime_engine import PROVIDERS, OnnxRuntimeRunner, UnverifiedProvider

    steps = []

    def session(*arguments, **settings):
        steps.append("session")
        raise RuntimeError("enough")

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(headless_host, "make_room", lambda *asked: steps.append(asked), raising=False)
    detector = find_model_folder([ROOT], "antelopev2").detector
    with pytest.raises(UnverifiedProvider, match="enough"):
        OnnxRuntimeRunner(detector, PROVIDERS["CUDA"], torch.device("cuda:1"))
    monkeypatch.setattr("hotpath.face.loading.why_no_insightface", lambda: None)
    monkeypatch.setitem(sys.modules, "insightface", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "insightface.app", SimpleNamespace(FaceAnalysis=session))
    monkeypatch.setattr("hotpath.face.loading.can_be_tried", lambda provider: True)
    monkeypatch.setattr("hotpath.face.loading._load_torch", lambda folder, device, *rest: rest[-1])
    why = face.load_analyser([ROOT], engine="insightface", provider="CUDA", device=torch.device("cuda:1"))
    assert why.startswith("insightface was asked for, but it cannot be loaded with ") and "RuntimeError: enough" in why
    for (nbytes, device), last in (steps[:2], steps[2:]):
        assert last == "session" and device == torch.device("cuda:1")
        assert nbytes >= detector.path.stat().st_size + 640 * 640 * 100


def test_a_stop_while_a_library_loads_is_no_reason_for_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of ComfyUI raise it as an ordinary exception."""
    stop = type("InterruptProcessingException", (Exception,), {})

    def stopped(*_: object) -> None:
        raise stop

    monkeypatch.setattr("hotpath.face.loading.why_no_insightface", lambda: None)
    monkeypatch.setattr("hotpath.face.loading._load_insightface", stopped)
    with pytest.raises(stop):
        face.load_analyser([ROOT], engine="insightface", device=CPU)


@pytest.mark.parametrize(
    ("card", "cuda", "words"),
    [
        (True, "13.0", "ComfyUI was started for it (--cpu), so start it without"),
        (False, "13.0", "install the driver, or unset CUDA_VISIBLE_DEVICES"),
        (False, None, "install the build for your GPU"),
    ],
)
def test_the_loader_of_shared_workflows_says_why_it_is_on_the_cpu(monkeypatch, headless_host, card, cuda, words):
    from hotpath.nodes.instantid import InstantIDFaceAnalysis

    said = []
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(headless_host, "device", lambda: CPU)
    monkeypatch.setattr(headless_host, "model_folders", lambda folder: [ROOT])
    monkeypatch.setattr(headless_host, "warn", lambda text, node: said.append(text))
    for provider in ("CUDA", "CPU"):
        InstantIDFaceAnalysis().load_insight_face(provider)
    assert len(said) == 1 and said[0].startswith("CUDA was asked for, but the CPU is used: ") and words in said[0]


@pytest.mark.parametrize("provider", [name for name in face.PROVIDERS if name != "CPU"])
def test_insightface_runs_on_the_cpu_where_its_provider_cannot_be_had(monkeypatch, provider):
    """By itself it stops for CoreML, and torch did for room on a card that is not there."""
    pytest.importorskip("insightface")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    report = face.load_analyser([ROOT], engine="insightface", precision="fp16", provider=provider, device=CPU).report()
    assert (
        "sessions on CPUExecutionProvider" in report and f"{provider} was asked for, but it runs on the CPU: " in report
    )
    assert "fp16 is for the torch engine" in report


def test_insightface_leaves_a_folder_with_a_broken_file_to_torch(tmp_path):
    pytest.importorskip("insightface")
    folder = tmp_path / "models" / "broken"
    shutil.copytree(DEMO, folder)
    (folder / "a_landmark_model.onnx").write_bytes(b"<!DOCTYPE html>")
    report = face.load_analyser([tmp_path], "broken", engine="insightface", device=CPU).report()
    assert "by torch" in report and "insightface was asked for, but it cannot be loaded with " in report
    assert "a_landmark_model.onnx is no whole ONNX file" in report


def test_two_onnxruntime_packages_and_a_cuda_mismatch_have_their_cures(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    from hotpath.face import engine_diagnosis as diagnosis
    from hotpath.face.onnxruntime_engine import PROVIDERS

    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(diagnosis, "installed_flavours", lambda: both)
    said = diagnosis.why_not(PROVIDERS["CUDA"])
    assert "overwrite each other" in said
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in said
    monkeypatch.setattr(diagnosis, "installed_flavours", lambda: {"onnxruntime-gpu": "1.31.1"})
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "install the driver" in diagnosis.why_not(PROVIDERS["CUDA"])
    # Another build alone is no cure there.
    assert diagnosis.why_not(PROVIDERS["MIGraphX"]).startswith("torch sees no GPU")
    assert diagnosis.why_not(PROVIDERS["MIGraphX"]).endswith("pip install onnxruntime-migraphx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(diagnosis, "cuda_of_onnxruntime", lambda: 13)
    assert "needs CUDA 13 and this torch has CUDA 12.8: pip install 'onnxruntime-gpu<1.27'" in diagnosis.why_not(
        PROVIDERS["CUDA"]
    )
