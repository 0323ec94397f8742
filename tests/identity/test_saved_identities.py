"""Identities as files: they survive saving, hold no picture, and broken ones are refused; how they merge."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath.identity import Identity, load_identity, save_identity
from safetensors.torch import save_file
from tiny_adapters import rng


def person(**changes: Any) -> Identity:
    embeddings = torch.randn(2, 1, 24, generator=rng(3))
    keypoints = torch.rand(5, 2, generator=rng(4)) * 100
    return Identity(**{"embeddings": embeddings, "name": "Ann Ö", "recogniser": "antelopev2", "keypoints": keypoints,
                       "size": (120, 80), **changes})  # fmt: skip


def test_an_identity_survives_saving(tmp_path: Path) -> None:
    ann = person()
    path = save_identity(ann, tmp_path / "new folder" / "ann.safetensors")
    back = load_identity(path)
    assert torch.equal(back.embeddings, ann.embeddings)
    assert back.keypoints is not None
    assert torch.equal(back.keypoints, ann.keypoints)
    assert (back.name, back.recogniser, back.size) == ("Ann Ö", "antelopev2", (120, 80))
    assert [p.name for p in path.parent.iterdir()] == ["ann.safetensors"]
    assert not lies_in_memory(path)


def lies_in_memory(path: Path) -> bool:
    """Whether a tensor is a view of the file, which Windows then lets nobody replace."""
    maps = Path("/proc/self/maps")
    return maps.exists() and str(path.resolve()) in maps.read_text()


def test_an_identity_without_a_pose_survives_saving(tmp_path: Path) -> None:
    back = load_identity(save_identity(person(keypoints=None, size=None), tmp_path / "ann.safetensors"))
    assert back.keypoints is None
    assert back.size is None


def test_a_saved_identity_holds_no_picture(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(save_identity(person(), tmp_path / "ann.safetensors"), "pt") as file:
        assert set(file.keys()) == {"embeddings", "keypoints"}
        assert file.metadata() == {
            "format": "hotpath.identity.1",
            "name": "Ann Ö",
            "recogniser": "antelopev2",
            "size": "120x80",
        }


def test_half_precision_and_views_are_saved_whole(tmp_path: Path) -> None:
    wide = torch.randn(24, 2, 1, generator=rng(1)).half()
    ann = person(embeddings=wide.permute(1, 2, 0))
    back = load_identity(save_identity(ann, tmp_path / "ann.safetensors"))
    assert back.embeddings.dtype == torch.float32
    assert torch.equal(back.embeddings, ann.embeddings.float())


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_identity(person(), tmp_path / "ann.safetensors")
    older = path.read_bytes()

    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="is full"):
        save_identity(person(name="Bob"), path)
    monkeypatch.undo()
    assert path.read_bytes() == older
    assert [p.name for p in tmp_path.iterdir()] == ["ann.safetensors"], "nothing half-written stays"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_a_face_is_for_the_umask_to_say(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        path = save_identity(person(), tmp_path / "ann.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_failing_rename_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_identity(person(), tmp_path / "ann.safetensors")
    older = path.read_bytes()

    def refuses(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "in use by another program")

    monkeypatch.setattr(Path, "replace", refuses)
    with pytest.raises(OSError, match=r"ann\.safetensors is closed to the user"):
        save_identity(person(name="Bob"), path)
    monkeypatch.undo()
    assert path.read_bytes() == older
    assert [p.name for p in tmp_path.iterdir()] == ["ann.safetensors"]


def write_identity(path: Path, **changes: Any) -> Path:
    metadata = {"format": "hotpath.identity.1", "name": "x", "size": "120x80", **changes.pop("metadata", {})}
    tensors = {"embeddings": torch.ones(1, 1, 24), "keypoints": torch.ones(5, 2), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metadata": {"format": "pt"}}, "is no saved identity: it holds embeddings, keypoints"),
        ({"metadata": {"format": "hotpath.identity.2"}}, "is no saved identity"),
        ({"embeddings": None}, "is no saved identity: it holds keypoints"),
        ({"embeddings": torch.full((1, 1, 24), math.nan)}, "not finite"),
        ({"embeddings": torch.full((1, 1, 24), math.inf)}, "not finite"),
        ({"embeddings": torch.ones(24)}, r"needs embeddings \[N, 1, D\]"),
        ({"embeddings": torch.ones(0, 1, 24)}, r"needs embeddings \[N, 1, D\]"),
        ({"embeddings": torch.ones(1, 2, 24)}, r"needs embeddings \[N, 1, D\]"),
        ({"keypoints": torch.ones(3, 2)}, r"needs key points \[5, 2\], not \(3, 2\)"),
        ({"metadata": {"size": "900000x900000"}}, "900000 x 900000"),
        ({"metadata": {"size": "0x80"}}, "0 x 80"),
    ],
)
def test_a_foreign_or_broken_identity_file_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = write_identity(tmp_path / "who.safetensors", **changes)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_identity(path)
    assert str(caught.value).startswith("who.safetensors")


def test_a_good_file_made_the_same_way_is_read(tmp_path: Path) -> None:
    assert load_identity(write_identity(tmp_path / "who.safetensors")).size == (120, 80)
    for size in ("large", "120x", "x80", "120x-80"):
        odd = write_identity(tmp_path / "odd.safetensors", metadata={"size": size})
        assert load_identity(odd).size is None


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "who.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"who.safetensors is not a whole safetensors file"):
        load_identity(tmp_path / "who.safetensors")


def test_a_cut_off_identity_is_refused(tmp_path: Path) -> None:
    path = save_identity(person(), tmp_path / "who.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"who.safetensors is not a whole safetensors file"):
        load_identity(path)


def test_a_missing_identity_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_identity(tmp_path / "none.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_embeddings_that_are_not_finite_are_refused(value: float) -> None:
    embeddings = torch.ones(2, 1, 24)
    embeddings[1, 0, 5] = value
    with pytest.raises(ValueError, match="'Ann Ö' are not finite"):
        person(embeddings=embeddings)


def test_merging_keeps_all_pictures_and_the_first_pose() -> None:
    ann, more = person(), person(embeddings=torch.ones(3, 1, 24), name="more", keypoints=None, size=None)
    both = ann.merged(more)
    assert torch.equal(both.embeddings, torch.cat((ann.embeddings, more.embeddings)))
    assert (both.name, both.size, both.recogniser) == ("Ann Ö", (120, 80), "antelopev2")
    assert both.keypoints is ann.keypoints
    assert ann.embeddings.shape[0] == 2, "what came in stays as it was"


def test_recognisers_do_not_mix() -> None:
    with pytest.raises(ValueError, match="made with antelopev2 and 'Bob' with buffalo_l"):
        person().merged(person(name="Bob", recogniser="buffalo_l"))
    with pytest.raises(ValueError, match="cannot be averaged"):
        person(recogniser="unknown").merged(person(embeddings=torch.ones(1, 1, 512)))


def test_an_unknown_recogniser_does_not_hide_a_known_one() -> None:
    both = person(recogniser="unknown").merged(person())
    assert both.recogniser == "antelopev2"
    with pytest.raises(ValueError, match="cannot be averaged"):
        both.merged(person(recogniser="buffalo_l"))


def test_similarity_is_the_cosine_with_the_mean_direction() -> None:
    ann = person(embeddings=torch.tensor([[[2.0, 0, 0]], [[0, 5.0, 0]]]))
    found = ann.similarity(torch.tensor([[3.0, 3, 0], [0, 0, 1], [-1, -1, 0], [1, 0, 0]]))
    assert torch.allclose(found, torch.tensor([1, 0, -1, math.sqrt(0.5)]), atol=1e-6)
