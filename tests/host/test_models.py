"""Model files: the table, checks of what is there, the command line over both."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hotpath import cli
from hotpath.host.downloads import safe_target
from hotpath.host.known_models import KNOWN_MODELS, HubFile, HubRepository, KnownModel, WebFile, ZipMember, select
from hotpath.host.model_files import verify
from model_server import CONTENT, SHA, Handler, archive, leftovers
from safetensors.torch import save_file


def test_structures(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "good.safetensors")
    torch.save({"a": torch.zeros(4)}, tmp_path / "good.pth")
    torch.save({"a": torch.zeros(4)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("good.safetensors", "good.pth", "old.pth"):
        assert verify(tmp_path / name).status == "unverified", name
    save_file({}, tmp_path / "empty.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "empty.safetensors").status == "unverified"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.bin", b"", "empty"),
        ("a.bin", b"<!DOCTYPE html><html>", "web page"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        ("a.safetensors", b"\x01", "does not begin"),
        ("a.safetensors", struct.pack("<Q", 10) + b"not json!!", "cannot be read"),
        ("a.pth", b"hello", "does not begin"),
        ("a.onnx", b"\x08\x07\x12garbage", "ONNX|no network"),
    ],
)
def test_damaged_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    verdict = verify(tmp_path / name)
    assert verdict.status == "damaged"
    assert any(word in verdict.detail for word in words.split("|"))


def test_files_that_were_cut_off(tmp_path):
    save_file({"a": torch.zeros(4000)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(4000)}, tmp_path / "a.pth")
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-100])
        assert verify(path).status == "damaged", path.name


def test_files_that_were_renamed(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "a.bin")
    assert verify(tmp_path / "a.bin").status == "unverified"


def test_model_folders(tmp_path):
    assert verify(tmp_path).status == "damaged"
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in verify(tmp_path).detail
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(4)}, tmp_path / "one.safetensors")
    assert "1 of 2 weight files are missing: two.safetensors" in verify(tmp_path).detail
    save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
    assert verify(tmp_path).status == "unverified"
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes()[:-4])
    cut = verify(tmp_path)
    assert cut.status == "damaged" and cut.detail.startswith("two.safetensors: it has")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json cannot be read" in verify(tmp_path).detail


def test_the_table_is_sound(tmp_path):
    assert len({m.name for m in KNOWN_MODELS}) == len(KNOWN_MODELS)
    for model in KNOWN_MODELS:
        safe_target(tmp_path / model.kind, model.file)
        assert str(model.source).startswith("https://"), model.name
        assert model.licence and model.about
        if "non-commercial" in model.licence.lower():
            assert model.non_commercial, f"{model.name} must ask before it is downloaded"
        if isinstance(model.source, HubRepository):
            assert model.file == model.source.repo.partition("/")[2]
        if isinstance(model.source, HubFile | WebFile | ZipMember):
            assert Path(model.file).suffix


def test_selection_by_name_and_family():
    assert [m.name for m in select(["INSTANTID"])] == ["instantid-adapter", "instantid-controlnet"]
    assert [m.name for m in select(["colormnet", "colormnet"])] == ["colormnet"]
    assert select(["deep-exemplar"]) == select(["deep_exemplar"]) and len(select(["deep-exemplar"])) == 3
    with pytest.raises(KeyError, match="no model called 'x'"):
        select(["x"])


@pytest.fixture
def small_table(server, monkeypatch):
    """Three small models on the local server, in place of the real table."""
    from hotpath.commands import models
    from hotpath.host import known_models

    packed = WebFile(f"{server}/pack.zip")
    table = (
        KnownModel("free", "one", "one", "sub/model.bin", WebFile(f"{server}/model.bin", sha256=SHA), "MIT", "a file"),
        KnownModel(
            "bound", "two", "two", "x.onnx", ZipMember(packed, "x.onnx"), "non-commercial", "a", non_commercial=True
        ),
        KnownModel("gone", "three", "three", "y.bin", WebFile(f"{server}/nothing"), "MIT", "not there"),
    )
    monkeypatch.setattr(known_models, "KNOWN_MODELS", table)
    monkeypatch.setattr(models, "KNOWN_MODELS", table)
    return table


def command(capsys, tmp_path: Path, *words: str) -> tuple[int, str, str]:
    code = cli.main(["models", *words, "--models", str(tmp_path / "models")])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_download_from_the_command_line(small_table, capsys, tmp_path):
    code, out, _ = command(capsys, tmp_path, "download", "free")
    path = tmp_path / "models" / "one" / "sub" / "model.bin"
    assert code == 0 and out.strip() == str(path) and path.read_bytes() == CONTENT
    Handler.requests.clear()
    code, _, err = command(capsys, tmp_path, "download", "free")
    assert code == 0 and "here already" in err and Handler.requests == []


def test_a_dry_run_does_nothing(small_table, capsys, tmp_path):
    code, out, _ = command(capsys, tmp_path, "download", "free", "bound", "--dry-run")
    assert code == 0 and "pack.zip" in out and str(tmp_path / "models" / "two" / "x.onnx") in out
    assert "; licence: non-commercial" in out
    assert Handler.requests == [] and not (tmp_path / "models").exists()


def test_a_bar_takes_the_sum_so_far(monkeypatch):
    import tqdm
    from hotpath.commands.models import Bar

    class Counted:
        total, n, closed = None, 0, False

        def update(self, further: int) -> None:
            self.n += further

        def close(self) -> None:
            self.closed = True

    counted = Counted()
    monkeypatch.setattr(tqdm, "tqdm", lambda **_: counted)
    with Bar("a model") as bar:
        for done in (10, 25, 40):
            bar.update(done, 100)
            assert (counted.n, counted.total, counted.closed) == (done, 100, False)
    assert counted.closed


def test_a_licence_must_be_accepted(small_table, capsys, tmp_path, monkeypatch):
    import io

    Handler.files["/pack.zip"] = archive(tmp_path / "p.zip", **{"inner/x.onnx": b"model"}).read_bytes()
    code, _, err = command(capsys, tmp_path, "download", "two")
    assert code == 2 and "--accept-licence" in err and "non-commercial" in err and Handler.requests == []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert command(capsys, tmp_path, "download", "two")[0] == 2 and Handler.requests == []
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    code, out, _ = command(capsys, tmp_path, "download", "two")
    path = tmp_path / "models" / "two" / "x.onnx"
    assert code == 0 and out.strip() == str(path) and path.read_bytes() == b"model"
    assert leftovers(tmp_path / "models") == ["x.onnx"]  # the archive is gone
    path.unlink()
    assert command(capsys, tmp_path, "download", "two", "--accept-licence")[0] == 0


def test_one_failure_does_not_stop_the_others(small_table, capsys, tmp_path):
    code, out, err = command(capsys, tmp_path, "download", "gone", "free")
    assert code == 1 and "gone: " in err and "404" in err and "model.bin" in out


def test_unknown_names(small_table, capsys, tmp_path):
    code, _, err = command(capsys, tmp_path, "download", "nonsense")
    assert code == 2 and "families are: one, two, three" in err


def test_list_and_verify(small_table, capsys, tmp_path):
    command(capsys, tmp_path, "download", "free")
    entries = json.loads(command(capsys, tmp_path, "list", "--json")[1])
    assert [bool(e["found"]) for e in entries] == [True, False, False]
    assert entries[1]["belongs"] == str(tmp_path / "models" / "two" / "x.onnx")
    assert cli.main(["models"]) == 0  # lists, too
    assert "free" in capsys.readouterr().out
    _, out, _ = command(capsys, tmp_path, "list")
    assert "free   here" in out and "bound  missing" in out
    assert command(capsys, tmp_path, "verify")[0] == 1  # bytes that are no torch file
    code, out, _ = command(capsys, tmp_path, "verify", "bound")
    assert code == 1 and "missing" in out


def test_verify_with_nothing_there(small_table, capsys, tmp_path):
    code, _, err = command(capsys, tmp_path, "verify")
    assert code == 0 and "None of the known model files" in err
