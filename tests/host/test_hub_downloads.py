"""Files and repositories of a hub: compared with its checksums, whole or not at all, of one revision."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hotpath.host import downloads, hub
from hotpath.host.downloads import DownloadError
from model_server import CONTENT, SHA, Handler, leftovers


@pytest.fixture
def a_hub(server, monkeypatch):
    """huggingface_hub's answers about the repository a/Tiny, whose files are on the local server."""
    import huggingface_hub

    files = {"config.json": b"{}", "model.safetensors": CONTENT, "run.py": b"print()", "sub/tokenizer.json": b"[]"}

    def sibling(name: str) -> Any:
        whole = files[name]
        lfs = type("Lfs", (), {"sha256": hashlib.sha256(whole).hexdigest()}) if name.endswith("safetensors") else None
        return type("Sibling", (), {"rfilename": name, "size": len(whole), "lfs": lfs})

    def info(self: Any, repo: str, files_metadata: bool, timeout: float) -> Any:
        assert repo == "a/Tiny" and files_metadata and timeout < 120
        return type("Info", (), {"sha": "abc", "siblings": [sibling(name) for name in files]})

    Handler.files = {f"/a/Tiny/{name}": content for name, content in files.items()}

    def url(repo: str, name: str, revision: str | None = None) -> str:
        Handler.behaviour.setdefault("revisions", []).append(revision)
        return f"{server}/{repo}/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_url", url)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    return files


def test_a_hub_file_is_compared_with_the_hubs_own_checksum(a_hub, tmp_path, monkeypatch):
    import huggingface_hub

    stated = type("Metadata", (), {"etag": SHA, "size": len(CONTENT)})
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: stated)
    target = tmp_path / "controlnet" / "instantid" / "model.safetensors"
    assert hub.fetch_from_hub("a/Tiny", "model.safetensors", target).read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["model.safetensors"]
    stated.etag = "0" * 64
    target.unlink()
    with pytest.raises(DownloadError, match="checksum"):
        hub.fetch_from_hub("a/Tiny", "model.safetensors", target)
    assert not target.exists()
    stated.size = 1195  # of the answer by which a mirror leads to another address
    for nothing in (None, "0" * 40):  # what a small file has says nothing of its bytes
        stated.etag = nothing
        assert hub.fetch_from_hub("a/Tiny", "config.json", target.with_suffix(".json")).read_bytes() == b"{}"
        with pytest.raises(DownloadError, match=r"gave something else than model\.safetensors"):
            hub.fetch_from_hub("a/Tiny", "model.safetensors", target)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: 1 / 0)
    with pytest.raises(DownloadError, match=r"a/Tiny/model\.safetensors could not be downloaded: division"):
        hub.fetch_from_hub("a/Tiny", "model.safetensors", target)


def test_a_repository_gets_its_name_when_all_of_it_is_there(a_hub, tmp_path):
    target = tmp_path / "LLM" / "Tiny"
    Handler.behaviour["cut_after"] = [2, *[100_000] * downloads.ATTEMPTS]
    with pytest.raises(DownloadError, match="to go on"):
        hub.fetch_repository("a/Tiny", target)
    assert not target.exists()
    Handler.requests.clear()
    steps: list[tuple[int, int | None]] = []
    assert hub.fetch_repository("a/Tiny", target, progress=lambda *step: steps.append(step)) == target
    assert not (target.parent / downloads.STAGING).exists() and set(Handler.behaviour["revisions"]) == {"abc"}
    assert leftovers(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]  # and no code
    assert (target / "model.safetensors").read_bytes() == CONTENT and (target / "sub" / "tokenizer.json").is_file()
    assert [r.get("Range") for r in Handler.requests] == ["bytes=500000-", None]  # config.json was there
    whole = len(CONTENT) + 4
    assert steps[-1][0] == whole and {total for _, total in steps} == {whole}
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    with pytest.raises(DownloadError, match="there already"):
        hub.fetch_repository("a/Tiny", target)
    with pytest.raises(DownloadError, match=r"a/Tiny holds none of the files .*\(\*\.gguf\)"):
        hub.fetch_repository("a/Tiny", tmp_path / "LLM" / "Other", ["*.gguf"])


def test_a_repository_is_of_one_revision(a_hub, tmp_path, monkeypatch):
    """What came before the repository changed is not kept beside what comes after it."""
    import huggingface_hub

    target, stated = tmp_path / "LLM" / "Tiny", huggingface_hub.HfApi().model_info
    Handler.behaviour["cut_after"] = [2, *[100_000] * downloads.ATTEMPTS]
    with pytest.raises(DownloadError, match="to go on"):
        hub.fetch_repository("a/Tiny", target)

    def later(self: Any, *args: Any, **options: Any) -> Any:
        found = stated(*args, **options)
        found.sha = "def"
        return found

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", later)
    Handler.files["/a/Tiny/config.json"] = b"[]"
    (target.parent / downloads.STAGING / "Another").mkdir()
    hub.fetch_repository("a/Tiny", target)
    assert (target / "config.json").read_bytes() == b"[]"
    assert [half.name for half in (target.parent / downloads.STAGING).iterdir()] == ["Another"]
    assert leftovers(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_repository_with_a_file_that_was_changed_on_the_way(a_hub, tmp_path):
    Handler.files["/a/Tiny/model.safetensors"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match="checksum"):
        hub.fetch_repository("a/Tiny", tmp_path / "LLM" / "Tiny")
    assert not (tmp_path / "LLM" / "Tiny").exists()


def test_a_repository_that_does_not_fit_is_seen_before(a_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: type("Usage", (), {"free": len(CONTENT)}))
    with pytest.raises(DownloadError, match="Free some space"):
        hub.fetch_repository("a/Tiny", tmp_path / "LLM" / "Tiny")
    assert Handler.requests == []
    # What came before needs no room again.
    half = tmp_path / "LLM" / downloads.STAGING / "Tiny" / "model.safetensors.part"
    half.write_bytes(CONTENT[:1000])
    hub.fetch_repository("a/Tiny", tmp_path / "LLM" / "Tiny")
    assert Handler.requests[1]["Range"] == "bytes=1000-" and leftovers(tmp_path)[1] == "model.safetensors"


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub

    def gone(self: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Name or service not known")

    def gated(self: Any, *_: Any, **__: Any) -> Any:
        error = huggingface_hub.errors.GatedRepoError
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gone)
    with pytest.raises(
        DownloadError, match=r"a/Tiny could not be downloaded: Name .* Connect and try again.*HF_ENDPOINT"
    ):
        hub.fetch_repository("a/Tiny", tmp_path / "Tiny")

    def expired(self: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError("401 Client Error: Unauthorized for url\n\nInvalid credentials in Authorization header")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", expired)
    with pytest.raises(
        DownloadError, match=r"a/Tiny could not be downloaded: the hub refuses the token .* log out with"
    ):
        hub.fetch_repository("a/Tiny", tmp_path / "Tiny")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gated)
    with pytest.raises(DownloadError, match="a/Tiny is behind a licence"):
        hub.fetch_repository("a/Tiny", tmp_path / "Tiny")
