"""Downloads that end otherwise than the hub's library says."""

from __future__ import annotations

import io
from types import SimpleNamespace

import huggingface_hub
import pytest
from hotpath.host import Interrupted
from hotpath.host.downloads import DownloadError
from hotpath.vision_language import download
from hotpath.vision_language.folders import UnusableModel


class ReadTimeout(Exception):
    """A transport's own kind of error, as httpx has it: neither OSError nor ValueError."""


class InterruptProcessingException(Exception):
    """The stop of older versions of ComfyUI."""


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (
            ReadTimeout("timed out"),
            UnusableModel,
            "could not be fetched \\(timed out\\): .*connect and run again.*HF_ENDPOINT",
        ),
        (
            RuntimeError("401 Client Error: Unauthorized for url\n\nInvalid credentials in Authorization header"),
            UnusableModel,
            "refuses the token .* also for what is public: log in again .*or log out",
        ),
        (InterruptProcessingException(), InterruptProcessingException, ""),
        (Interrupted(), Interrupted, ""),
    ],
)
def test_a_connection_that_stalls_is_told_with_its_cure(headless_host, monkeypatch, error, raised, told):
    def fetch(repository, **settings):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(raised, match=told or None):
        download.locate("Absent-VL")


def test_a_revision_that_the_hub_does_not_have_is_named(headless_host, monkeypatch):
    from huggingface_hub.errors import RevisionNotFoundError

    def fetch(repository, **settings):
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UnusableModel, match="The repository owner/Some-VL has no revision 'v9': check the branch"):
        download.locate("owner/Some-VL", "v9")


def test_halves_of_tries_that_were_killed_go_when_the_folder_is_whole(headless_host, monkeypatch):
    """Half files that the hub's library begins anew at each try stay when the process ends; a whole folder needs none."""
    etag = "ab" * 32
    there = headless_host.model_folders("LLM")[0] / "owner" / "Some-VL" / ".cache" / "huggingface" / "download"
    there.mkdir(parents=True)
    for name in (f"x.{etag}.0123abcd.incomplete", f"x.{etag}.incomplete", "x.metadata"):
        (there / name).touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **settings: None)
    monkeypatch.setattr(download, "fetch_weights", lambda *_: True)
    download.fetch("owner/Some-VL", there.parents[2])
    assert {path.name for path in there.iterdir()} == {f"x.{etag}.incomplete", "x.metadata"}


class TestWeights:
    """The weights come by the pack's own downloader, which goes on inside a half file."""

    @pytest.fixture
    def stated(self, monkeypatch):
        lfs = SimpleNamespace(sha256="0" * 64)
        sizes = {"model-1.safetensors": 5, "model-2.safetensors": 7, "config.json": 1}
        files = [SimpleNamespace(rfilename=name, size=size, lfs=lfs) for name, size in sizes.items()]
        facts = SimpleNamespace(siblings=files, gated=False, private=False, sha="a" * 40)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repository, **_: facts)
        return facts

    def test_only_what_is_not_whole_comes_and_is_checked(self, stated, tmp_path, monkeypatch):
        (tmp_path / "model-1.safetensors").write_bytes(b"12345")
        asked, transfer = [], download.Transfer()

        def fetch(url, path, size, sha256, progress):
            asked.append((url.rpartition("/resolve/")[2], path, size, sha256))
            progress(3, size)
            assert (transfer.done, transfer.total) == (5 + 3, 12)

        monkeypatch.setattr(download.downloads, "fetch", fetch)
        monkeypatch.setattr(download, "AT_A_TIME", 1)
        assert download.fetch_weights("owner/Some-VL", tmp_path, "", transfer)
        assert asked == [("a" * 40 + "/model-2.safetensors", tmp_path / "model-2.safetensors", 7, "0" * 64)]

    @pytest.mark.parametrize("came", [False, True])
    def test_what_we_cannot_fetch_is_the_librarys_unless_some_has_come(self, stated, tmp_path, monkeypatch, came):
        def fetch(url, path, size, sha256, progress):
            if came:
                progress(1, size)
            raise DownloadError("the connection ended early. 1 bytes are kept")

        monkeypatch.setattr(download.downloads, "fetch", fetch)
        if came:
            with pytest.raises(DownloadError, match="bytes are kept"):
                download.fetch_weights("owner/Some-VL", tmp_path, "", download.Transfer())
        else:
            assert not download.fetch_weights("owner/Some-VL", tmp_path, "", download.Transfer())

    def test_a_licence_is_the_librarys(self, stated, tmp_path):
        stated.gated = "manual"
        assert not download.fetch_weights("owner/Some-VL", tmp_path, "", download.Transfer())

    def test_a_stop_ends_it(self, stated, tmp_path, monkeypatch):
        transfer = download.Transfer()
        transfer.stop()
        monkeypatch.setattr(download.downloads, "fetch", lambda url, path, size, sha256, progress: progress(1, size))
        with pytest.raises(download.TransferStopped):
            download.fetch_weights("owner/Some-VL", tmp_path, "", transfer)

    @pytest.mark.parametrize("ours", [True, False])
    def test_the_library_brings_the_rest(self, headless_host, tmp_path, monkeypatch, ours):
        patterns = []
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda _, allow_patterns, **__: patterns.append(allow_patterns)
        )
        monkeypatch.setattr(download, "fetch_weights", lambda *_: ours)
        download.fetch("owner/Some-VL", tmp_path)
        assert ["*.safetensors" in asked for asked in patterns] == ([False] if ours else [False, True])


def test_the_thread_that_watches_bars_outlives_a_stop():
    """tqdm's, which is one for all bars of the process."""
    transfer = download.Transfer()
    bar = transfer.bars()(total=10, unit="B", disable=False, file=io.StringIO())
    transfer.stop()
    bar.refresh(nolock=True)
    with pytest.raises(download.TransferStopped):
        bar.refresh()
