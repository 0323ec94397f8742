"""Warnings where they are seen: what a `hotpath` logger warns of while a node runs is shown on that node.

A feature only writes `log.warning(...)`, a sentence with the cure; code in another thread names its node with
`host.current().warn(text, node_id)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

ROOT_LOGGER = "hotpath"
SHOWN = "hotpath_shown"  # attribute of a record that `warn` has sent already


class NodeWarnings(logging.Handler):
    """Hands the text of each warning to `show`."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, SHOWN, False):
            return
        try:
            self._show(record.getMessage())
        except Exception:  # logging must never be what fails
            self.handleError(record)


def install(show: Callable[[str], None]) -> NodeWarnings:
    """Have `show` called with every warning of the pack. A second call replaces the first."""
    logger = logging.getLogger(ROOT_LOGGER)
    for handler in logger.handlers[:]:
        if isinstance(handler, NodeWarnings):
            logger.removeHandler(handler)
    mine = NodeWarnings(show)
    logger.addHandler(mine)
    return mine
