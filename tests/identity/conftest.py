"""What the tests of identities share."""

from __future__ import annotations

import pytest
from hotpath.cache import registry as registry_module


@pytest.fixture
def own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache is known yet, and none has a limit; those of others are there again after the test."""
    monkeypatch.setattr(registry_module, "_caches", {})
    monkeypatch.setattr(registry_module, "_limit", None)
