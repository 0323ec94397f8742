"""The nodes that make, save and load identities: what a person sees and what lands on the disk."""

from __future__ import annotations

import math
import os
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_faces import ForeignFaceAnalysis
from hotpath.cache import registry as registry_module
from hotpath.face import Faces, adapt
from hotpath.host import ModelNotFound
from hotpath.host.headless import HeadlessHost
from hotpath.identity import Identity
from hotpath.nodes import NODE_CLASS_MAPPINGS
from safetensors.torch import save_file


def picture(seed: int, count: int = 1, height: int = 96, width: int = 80) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


GREY = torch.full((1, 96, 80, 3), 0.5)


def run(node: str, **inputs: Any) -> Any:
    instance = NODE_CLASS_MAPPINGS[node]()
    return getattr(instance, instance.FUNCTION)(**inputs)


def someone(name: str = "ann", pictures: int = 1, recogniser: str = "antelopev2") -> Identity:
    embeddings = torch.randn(pictures, 1, 512, generator=torch.Generator().manual_seed(len(name)))
    return Identity(embeddings, name, recogniser)


@pytest.fixture(autouse=True)
def folders(headless_host: HeadlessHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The identities folder of an empty host, and no caches but those a test makes."""
    monkeypatch.setattr(registry_module, "_caches", {})
    monkeypatch.setattr(registry_module, "_held", weakref.WeakSet())
    monkeypatch.setattr(registry_module, "_limit", None)
    return tmp_path / "models" / "identities"


# ---------------------------------------------------------------- Identity from Faces


def test_an_identity_of_pictures(headless_host: HeadlessHost) -> None:
    faces = ForeignFaceAnalysis()
    images = picture(1, count=3)
    identity, report = run("HotpathIdentity", insightface=faces, image=images, name="ann", unique_id="5")
    assert identity.embeddings.shape == (3, 1, 512)
    found = adapt(ForeignFaceAnalysis()).analyse(images)
    for n in range(3):
        assert torch.equal(identity.embeddings[n, 0], found[n].embeddings[1]), "the largest face of each picture"
    assert torch.equal(identity.keypoints, found[0].keypoints[1])
    assert (identity.name, identity.size) == ("ann", (96, 80))
    assert report.startswith("ann: 3 pictures; 3 faces, the first ")
    assert headless_host.texts == [("5", report)]


def test_pictures_without_a_face_are_left_out_and_counted() -> None:
    images = torch.cat((GREY, picture(1), GREY))
    identity, report = run("HotpathIdentity", insightface=ForeignFaceAnalysis(), image=images)
    alone, _ = run("HotpathIdentity", insightface=ForeignFaceAnalysis(), image=picture(1))
    assert torch.equal(identity.embeddings, alone.embeddings)
    assert "2 of 3 pictures had no face and were left out" in report


def test_which_face() -> None:
    image = picture(2)
    chosen = {
        choice: run("HotpathIdentity", insightface=ForeignFaceAnalysis(), image=image, which_face=choice)[0]
        for choice in NODE_CLASS_MAPPINGS["HotpathIdentity"].INPUT_TYPES()["optional"]["which_face"][0]
    }
    small, large = chosen["left to right"].embeddings, chosen["largest"].embeddings
    assert torch.equal(small, -large), "the small face stands to the left"
    assert torch.equal(chosen["centre"].embeddings, large)


def test_an_identity_of_faces_found_before() -> None:
    found = adapt(ForeignFaceAnalysis()).analyse(picture(1, count=2))
    none = Faces.none((96, 80), 640, 512)
    identity, report = run("HotpathIdentity", faces=[none, *found], name="bob")
    assert identity.embeddings.shape == (2, 1, 512)
    assert torch.equal(identity.embeddings[0, 0], found[0].embeddings[0]), "the first face of each picture"
    assert report == "bob: 2 pictures; faces found before: 2"


def test_several_sources_are_joined() -> None:
    found = adapt(ForeignFaceAnalysis()).analyse(picture(3))
    more = someone("older", pictures=2, recogniser="unknown")
    identity, report = run(
        "HotpathIdentity", insightface=ForeignFaceAnalysis(), image=picture(1), faces=found, identity=more, name="ann"
    )
    assert identity.embeddings.shape == (4, 1, 512)
    assert torch.equal(identity.embeddings[2:], more.embeddings)
    assert identity.name == "ann"
    assert "joined with older (pictures: 2)" in report
    for unnamed in ("identity", "", " "):
        kept, _ = run("HotpathIdentity", faces=found, identity=more, name=unnamed)
        assert kept.name == "older"
    assert more.embeddings.shape[0] == 2


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, r"Nothing to make an identity of: connect image \(with insightface\), faces or identity"),
        ({"insightface": ForeignFaceAnalysis()}, "Nothing to make an identity of"),
        ({"image": picture(1)}, "A picture is connected but no face model: connect insightface"),
        ({"image": GREY, "insightface": ForeignFaceAnalysis()}, "No face was found in the reference picture"),
        ({"image": torch.zeros(0, 8, 8, 3), "insightface": ForeignFaceAnalysis()}, "empty batch"),
        ({"faces": [Faces.none((8, 8), 640, 512)]}, "The faces input holds no face"),
        ({"faces": []}, "The faces input holds no face"),
        (
            {"faces": adapt(ForeignFaceAnalysis()).analyse(picture(1), embed=False)},
            "The faces carry no embeddings: find them with embeddings switched on",
        ),
        ({"image": picture(1), "insightface": {"model": 1}}, "A dict is no face analysis"),
        (
            {"faces": adapt(ForeignFaceAnalysis(width=128)).analyse(picture(1)), "identity": someone()},
            "different recognisers cannot be averaged",
        ),
    ],
)
def test_missing_and_wrong_inputs_have_their_sentence(inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        run("HotpathIdentity", **inputs)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- saving and loading


def test_an_identity_travels_without_its_photo(folders: Path, headless_host: HeadlessHost) -> None:
    ann, _ = run("HotpathIdentity", insightface=ForeignFaceAnalysis(), image=picture(1, count=2), name="ann")
    (file,) = run("HotpathIdentitySave", identity=ann, filename="", unique_id="3")
    assert Path(file) == folders / "ann.safetensors"
    assert headless_host.texts[-1] == ("3", "Saved as ann.safetensors in models/identities.")
    inputs = NODE_CLASS_MAPPINGS["HotpathIdentityLoad"].INPUT_TYPES()
    assert inputs["required"]["file"][0] == ["ann.safetensors"]
    (back,) = run("HotpathIdentityLoad", file="ann.safetensors")
    assert torch.equal(back.embeddings, ann.embeddings)
    assert torch.equal(back.keypoints, ann.keypoints)
    assert (back.name, back.size, back.recogniser) == (ann.name, ann.size, ann.recogniser)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ann", "ann.safetensors"),
        ("ann.safetensors", "ann.safetensors"),
        ("Ann Müller-2", "Ann Müller-2.safetensors"),
        ("", "someone.safetensors"),
        ("   ", "someone.safetensors"),
        ("../../ann", "_.._ann.safetensors"),
        ("..", "identity.safetensors"),
        ("...", "identity.safetensors"),
        ("/etc/passwd", "_etc_passwd.safetensors"),
        ("C:\\Users\\ann", "C__Users_ann.safetensors"),
        ("..\\ann", "_ann.safetensors"),
        ("a/b", "a_b.safetensors"),
        ("a\0b\nc", "a_b_c.safetensors"),
        (".hidden", "hidden.safetensors"),
        ("ann. . ", "ann.safetensors"),
        ("who?*<>|\"'", "who_______.safetensors"),
        ("\ud800", "_.safetensors"),
        ("x" * 300, "x" * 200 + ".safetensors"),
        ("ü" * 150, "ü" * 100 + ".safetensors"),
    ],
)
def test_file_names_stay_inside_the_folder(name: str, file: str, folders: Path, tmp_path: Path) -> None:
    (saved,) = run("HotpathIdentitySave", identity=someone("someone"), filename=name)
    assert Path(saved) == folders / file
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [folders / file], "one file, and nothing elsewhere"
    (back,) = run("HotpathIdentityLoad", file=file)
    assert back.name == "someone"


def test_an_identitys_own_name_is_no_path_either(folders: Path) -> None:
    (saved,) = run("HotpathIdentitySave", identity=someone("../evil"), filename="")
    assert Path(saved) == folders / "_evil.safetensors"


def test_an_older_file_is_replaced(folders: Path) -> None:
    for pictures in (1, 3):
        run("HotpathIdentitySave", identity=someone("ann", pictures), filename="")
    assert len(list(folders.iterdir())) == 1
    assert run("HotpathIdentityLoad", file="ann.safetensors")[0].embeddings.shape[0] == 3


def test_a_full_disk_is_reported_and_the_older_file_stays(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    run("HotpathIdentitySave", identity=someone("ann"), filename="")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="is full"):
        patch.setattr(Path, "write_bytes", full)
        run("HotpathIdentitySave", identity=someone("ann", 2), filename="")
    assert run("HotpathIdentityLoad", file="ann.safetensors")[0].embeddings.shape[0] == 1


@pytest.mark.parametrize("name", ["../ann.safetensors", "/etc/passwd", "C:\\ann.safetensors", "..\\ann.safetensors"])
def test_loading_does_not_leave_the_folder(name: str, folders: Path) -> None:
    run("HotpathIdentitySave", identity=someone("ann"), filename="")
    (folders.parent / "ann.safetensors").write_bytes((folders / "ann.safetensors").read_bytes())
    with pytest.raises(ModelNotFound, match="is not a file name inside"):
        run("HotpathIdentityLoad", file=name)


@pytest.mark.parametrize("name", ["", None])
def test_no_file_chosen(name: Any) -> None:
    with pytest.raises(ModelNotFound, match="No identities model is chosen"):
        run("HotpathIdentityLoad", file=name)


def test_a_missing_and_a_foreign_file(folders: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"'ann\.safetensors' was not found"):
        run("HotpathIdentityLoad", file="ann.safetensors")
    folders.mkdir(parents=True)
    save_file({"lora_up": torch.zeros(1)}, folders / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors is no saved identity: it holds lora_up"):
        run("HotpathIdentityLoad", file="lora.safetensors")


def test_only_safetensors_are_offered(folders: Path) -> None:
    run("HotpathIdentitySave", identity=someone("ann"), filename="")
    (folders / "pickle.bin").write_bytes(b"x")
    (folders / "half-written.part").write_bytes(b"x")
    assert NODE_CLASS_MAPPINGS["HotpathIdentityLoad"].INPUT_TYPES()["required"]["file"][0] == ["ann.safetensors"]


def test_a_file_of_the_same_run_is_allowed() -> None:
    assert NODE_CLASS_MAPPINGS["HotpathIdentityLoad"].VALIDATE_INPUTS(file="not there yet.safetensors") is True


def test_loading_runs_again_when_the_file_changed(folders: Path) -> None:
    changed = NODE_CLASS_MAPPINGS["HotpathIdentityLoad"].IS_CHANGED
    assert changed(file="ann.safetensors") == "missing"
    run("HotpathIdentitySave", identity=someone("ann"), filename="")
    first = changed(file="ann.safetensors")
    assert first == changed(file="ann.safetensors") != "missing"
    time.sleep(0.02)
    run("HotpathIdentitySave", identity=someone("ann"), filename="")
    assert changed(file="ann.safetensors") != first
    assert changed(file="../ann.safetensors") == changed(file="") == "missing"
    assert math.isnan(changed(file=None)), "a name from another node, which ComfyUI does not tell here"


@pytest.mark.comfy
def test_inside_comfyui_identities_lie_in_its_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from hotpath import host
    from hotpath.host.comfyui import ComfyUIHost

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "comfy models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop("identities", None)
    before = host.use(ComfyUIHost())
    try:
        (saved,) = run("HotpathIdentitySave", identity=someone("ann"), filename="")
        assert Path(saved) == tmp_path / "comfy models" / "identities" / "ann.safetensors"
        folder_paths.add_model_folder_path("identities", str(tmp_path / "shared"))
        run("HotpathIdentitySave", identity=someone("bob"), filename="")
        offered = NODE_CLASS_MAPPINGS["HotpathIdentityLoad"].INPUT_TYPES()["required"]["file"][0]
        assert offered == ["ann.safetensors", "bob.safetensors"]
        assert run("HotpathIdentityLoad", file="bob.safetensors")[0].name == "bob"
    finally:
        host.use(before)


# ---------------------------------------------------------------- what leaves the cache


def test_face_embeds_changed_by_another_pack_stay_whole_in_the_cache() -> None:
    from hotpath.identity import InstantIDAdapter

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    dim, width = 8, 16
    layer = {"0.to_q.weight": noise(64, dim), "0.to_kv.weight": noise(128, dim), "0.to_out.weight": noise(dim, 64)}
    layer |= {"1.1.weight": noise(dim, dim), "1.3.weight": noise(dim, dim)}
    norms = {"layers.0.0.norm1": dim, "layers.0.0.norm2": dim, "layers.0.1.0": dim, "norm_out": width}
    resampler = {
        "latents": noise(1, 16, dim),
        "proj_in.weight": noise(dim, 512),
        "proj_in.bias": noise(dim),
        "proj_out.weight": noise(width, dim),
        "proj_out.bias": noise(width),
        **{f"layers.0.{key}": value for key, value in layer.items()},
        **{f"{name}.{part}": noise(size) for name, size in norms.items() for part in ("weight", "bias")},
    }
    blocks = {"1.to_k_ip.weight": noise(4, width), "1.to_v_ip.weight": noise(4, width)}
    adapter = InstantIDAdapter(resampler, blocks, "tiny.bin", "face embeds")

    def embeds() -> dict[str, torch.Tensor]:
        inputs = {"instantid": adapter, "insightface": ForeignFaceAnalysis(), "image": picture(1), "model": "a model"}
        model, found = run("InstantIDAttentionPatch", **inputs, weight=0.0, start_at=0.0, end_at=1.0, noise=0.35)
        assert model == "a model", "weight 0 gives the model back"
        return found

    first = embeds()
    assert first["cond"].shape == first["uncond"].shape == (1, 16, width)
    kept = {role: tokens.clone() for role, tokens in first.items()}
    for tokens in first.values():
        tokens.mul_(0)
    again = embeds()
    assert all(torch.equal(again[role], kept[role]) for role in kept)


# ---------------------------------------------------------------- what is declared


@pytest.mark.parametrize("node_id", ["HotpathInstantID", "HotpathIdentities"])
def test_bypassed_it_passes_each_input_to_its_own_output(node_id):
    """The front end takes the input in the output's place when it has its type, else the first one of that type."""
    node = NODE_CLASS_MAPPINGS[node_id]
    sockets = {
        name: spec[0] for section in ("required", "optional") for name, spec in node.INPUT_TYPES()[section].items()
    }
    for place, (kind, name) in enumerate(zip(node.RETURN_TYPES[:3], node.RETURN_NAMES, strict=False)):
        first = next(given for given in sockets if sockets[given] == kind)
        there = list(sockets)[place]
        assert (there if sockets[there] == kind else first) == name
