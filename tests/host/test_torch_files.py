"""Files of torch under names of other formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath.colorization.checkpoint_file import key_names, read_tensors
from hotpath.host.torch_files import read_torch_file

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3)}


@pytest.fixture
def read_how(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.load as in torch 2.15, which takes a path that ends in .safetensors for a file of that kind."""
    load, how = torch.load, []

    def by_name(file: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike) and os.fspath(file).endswith(".safetensors"):
            raise ValueError("header too large")
        how.append("mapped" if options.get("mmap") else "read")
        return load(file, **options)

    monkeypatch.setattr(torch, "load", by_name)
    return how


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.SAFETENSORS"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_read_whatever_its_name(name: str, zipped: bool, tmp_path: Path, read_how: list[str]) -> None:
    path = tmp_path / name
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    for mapped in (False, True):
        assert torch.equal(read_torch_file(path, mapped=mapped)["weight"], WEIGHTS["weight"])
    assert read_how == ["read", "mapped" if zipped and name != "a.safetensors" else "read"]
    assert key_names(path) == {"weight"}
    assert torch.equal(read_tensors(path)["weight"], WEIGHTS["weight"])
