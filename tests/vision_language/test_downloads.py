"""Downloads that end otherwise than the hub's library says."""

from __future__ import annotations

import huggingface_hub
import pytest
from hotpath.host import Interrupted
from hotpath.vision_language import download
from hotpath.vision_language.folders import UnusableModel


class ReadTimeout(Exception):
    """A transport's own kind of error, as httpx has it: neither OSError nor ValueError."""


class InterruptProcessingException(Exception):
    """The stop of older versions of ComfyUI."""


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (ReadTimeout("timed out"), UnusableModel, "could not be fetched \\(timed out\\): .*connect and run again"),
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
