"""`hotpath doctor` and what it asks: libraries that are missing or broken, which ComfyUI there is, and its models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hotpath import cli
from hotpath.commands import backends, doctor
from hotpath.headless import locate
from hotpath.host.library_parts import parts

ROOT = Path(__file__).resolve().parents[2]


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_doctor_shows_everything(place, capsys, monkeypatch):
    monkeypatch.setenv("HOTPATH_MODELS", str(place / "models"))
    code = run("doctor", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert code == (1 if facts["failed_families"] or facts["unmet_requirements"] else 0)
    assert facts["comfyui"] is None and facts["model_folders"] == [str(place / "models")]
    assert {"triton", "onnxruntime", "insightface", "cv2", "transformers"} <= {b["name"] for b in facts["backends"]}
    for backend in facts["backends"]:
        assert backend["available"] or backend["detail"], backend
    adapter = next(m for m in facts["models"] if m["name"] == "instantid-adapter")
    assert adapter["found"] is None and adapter["belongs"] == str(place / "models" / "instantid" / "ip-adapter.bin")
    assert "ApplyInstantID" in facts["families"]["instantid"]
    monkeypatch.setattr(doctor, "examine", lambda host: facts)
    run("doctor")
    out = capsys.readouterr().out
    for text in ("Backends", "Nodes", "Model files", "none found", str(adapter["belongs"]), adapter["source"]):
        assert text in out


def test_doctor_fails_when_a_family_does(place, capsys, monkeypatch):
    from hotpath import nodes

    monkeypatch.setattr(backends, "LIBRARIES", ())
    monkeypatch.setitem(nodes.FAILED_FAMILIES, "instantid", "RuntimeError: a bug")
    assert run("doctor") == 1
    assert "instantid: failed, RuntimeError: a bug" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "told"), [("cachetools.keys", True), ("ray", False)])
def test_a_required_library_that_is_not_installed_is_named_with_the_command_that_installs_it(
    place, capsys, monkeypatch, name, told
):
    def examine(host):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(doctor, "examine", examine)
    assert run("doctor") == 1
    said = capsys.readouterr().err
    command = f'cachetools is not installed: "{sys.executable}" -m pip install -r "{ROOT / "requirements.txt"}"'
    assert (command in said) == told and ("ModuleNotFoundError" in said) != told


def test_a_library_that_is_missing_and_one_that_is_broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "library_that_raises.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    (tmp_path / "library_that_needs.py").write_text("import something_else_entirely")
    missing, broken, needs = (
        backends._look(backends._Library(name, "tests", "pip install it"))
        for name in ("library_that_is_not", "library_that_raises", "library_that_needs")
    )
    assert not missing.available and missing.detail == "not installed; pip install it"
    assert not broken.available and "libcudart.so.12" in broken.detail
    assert not needs.available and "something_else_entirely" in needs.detail
    assert backends._bring("packaging.no_such") == "pip install --upgrade packaging"


def test_a_library_that_another_one_breaks_is_told_with_that_one(tmp_path, monkeypatch):
    """As transformers with a torchao for another torch: it can be imported, and none of its parts can."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_for_another_torch.py").write_text("import torch\ntorch.int99")
    (tmp_path / "library_of_parts.py").write_text(
        "def __getattr__(name):\n"
        "    if name == 'Part':\n"
        "        try:\n"
        "            import made_for_another_torch\n"
        "        except Exception as error:\n"
        "            raise ModuleNotFoundError('Could not import Part') from error\n"
        "    raise AttributeError(name)\n"
    )
    found = backends._look(backends._Library("library_of_parts", "tests", "", parts=("Part",)))
    assert not found.available and "made_for_another_torch, which it imports, breaks off" in found.detail
    cure = f"install the made_for_another_torch that is made for torch {torch.__version__}"
    assert "int99" in found.detail and f"{cure}, or uninstall it" in found.detail
    alone = backends._look(backends._Library("made_for_another_torch", "tests", ""))
    assert "int99" in alone.detail and alone.detail.endswith(f"; {cure}")
    with pytest.raises(ImportError, match="library_of_parts: AttributeError: Old"):
        parts("library_of_parts", "Old")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        parts("no_such_library", "Part")


def test_two_wheels_in_one_folder_are_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "twice_over.py").write_text("")
    for name in ("twice-over", "twice-over-gpu"):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    found = backends._look(backends._Library("twice_over", "tests", "", ("twice-over", "twice-over-gpu")))
    assert "twice-over and twice-over-gpu share one folder" in found.detail
    assert found.version == "twice-over 1.0, twice-over-gpu 1.0"


def test_requirements_that_are_not_met():
    unmet = backends.unmet_requirements(["# a comment", "numpy>=1", "torch>=99", "no-such-thing-here>=1"])
    assert [line.partition(" ")[0] for line in unmet] == ["torch>=99", "no-such-thing-here>=1"]


def test_a_comfyui_is_found_in_order(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "comfy_api").mkdir(parents=True)
        (folder / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(second))
    assert locate.find_comfyui() == second
    assert locate.find_comfyui(first) == first
    monkeypatch.setenv("COMFYUI_PATH", "none")
    assert locate.find_comfyui() is None
    assert locate.find_comfyui(first) == first
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="not a ComfyUI folder"):
        locate.find_comfyui()
    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setattr(locate, "PACK", first / "custom_nodes" / "pack")
    assert locate.find_comfyui() == first
    # A wheel lies in no ComfyUI: the one whose folder this is.
    monkeypatch.setattr(locate, "PACK", tmp_path / "site-packages" / "hotpath")
    monkeypatch.setattr(locate, "__file__", str(tmp_path / "site-packages" / "hotpath" / "headless" / "locate.py"))
    for here in (second, second / "custom_nodes"):
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        assert locate.find_comfyui() == second


def test_models_of_a_comfyui(tmp_path, monkeypatch):
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "comfy_api").mkdir(parents=True)
    (comfyui / "main.py").touch()
    (comfyui / "extra_model_paths.yaml").write_text(
        f"big:\n  base_path: {tmp_path}/big\n  is_default: true\n  insightface: face\n  LLM: |\n    a\n    b\n"
        "other:\n  instantid: models/elsewhere\n  unet: old\n  clip: text\nempty:\n"
        "again:\n  base_path: ~nobody-of-that-name\n  instantid: ./x/../y\n"
        "twice:\n  clip: ./models/text_encoders\n"
    )
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.delenv("HOTPATH_MODELS", raising=False)
    from hotpath.commands.models_folder import headless_host

    host = headless_host(device="cpu")
    models, big = comfyui / "models", tmp_path / "big"
    # In ComfyUI's order: what is default comes before the models folder, and the last of it first.
    assert host.model_folders("insightface") == [big / "face", models / "insightface"]
    assert host.model_folders("LLM") == [big / "b", big / "a", models / "LLM"]
    unknown = comfyui / "~nobody-of-that-name" / "y"
    assert host.model_folders("instantid") == [models / "instantid", models / "elsewhere", unknown]
    # Under the names that the kinds have now.
    assert host.model_folders("diffusion_models") == [models / "unet", models / "diffusion_models", comfyui / "old"]
    assert host.model_folders("text_encoders") == [models / "text_encoders", models / "clip", comfyui / "text"]
    monkeypatch.setenv("HOTPATH_MODELS", str(tmp_path / "mine"))
    first = headless_host(device="cpu").model_folders("insightface")
    assert first == [tmp_path / "mine" / "insightface", models / "insightface", big / "face"]
    assert headless_host(tmp_path, device="cpu").model_folders("LLM") == [tmp_path / "LLM"]


def test_a_ray_that_is_not_used_says_why() -> None:
    assert "no token authentication" in backends._ray(SimpleNamespace(__version__="2.51.3"))
    assert backends._ray(SimpleNamespace(__version__="2.52.0")) == ""
