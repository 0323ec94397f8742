"""Warnings: those of the pack's log reach the node that runs, and the browser that queued it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hotpath.host import node_warnings


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    logger = logging.getLogger("hotpath")
    before = logger.handlers[:]
    yield
    logger.handlers[:] = before


def test_warnings_of_the_pack_reach_the_node() -> None:
    shown: list[str] = []
    node_warnings.install(shown.append)
    node_warnings.install(shown.append)  # the second replaces the first
    logging.getLogger("hotpath.face").warning("%s is slow", "this")
    logging.getLogger("hotpath.face").info("not this")
    logging.getLogger("another").warning("nor this")
    logging.getLogger("hotpath.nodes").warning("sent already", extra={node_warnings.SHOWN: True})
    assert shown == ["this is slow"]


def test_without_comfyui_a_warning_is_logged_and_kept(headless_host: Any, caplog: Any) -> None:
    headless_host.warn("slow", "7")
    assert headless_host.texts == [("7", "Warning: slow")] and "slow" in caplog.text


@pytest.mark.comfy
def test_in_comfyui_a_warning_goes_to_the_browser_that_queued(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from hotpath.host import comfyui

    sent: list[tuple[str, dict[str, Any], str]] = []
    server = type("Server", (), {"client_id": "me", "send_sync": lambda self, *message: sent.append(message)})()
    module = type("Module", (), {"PromptServer": type("PromptServer", (), {"instance": server})})
    monkeypatch.setitem(sys.modules, "server", module)
    host = object.__new__(comfyui.ComfyUIHost)
    node_warnings.install(comfyui.send_warning)
    host.warn("slow", "7")
    assert sent == [("hotpath.warning", {"node": "7", "text": "slow"}, "me")]  # once, though it is logged, too
    assert "slow" in caplog.text
    host.warn("nobody runs")
    server.client_id = None  # a prompt that a program queued, and nobody looks on
    host.warn("slow", "7")
    assert len(sent) == 1
