"""The node classes a headless run can use, and their declared inputs in one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HIDDEN = "hidden"


@dataclass(frozen=True)
class InputDeclaration:
    """One entry of INPUT_TYPES. `kind` is a socket or widget type; `choices` is set for a combo."""

    name: str
    section: str
    kind: Any
    options: Mapping[str, Any]

    @property
    def required(self) -> bool:
        return self.section == "required"

    @property
    def lazy(self) -> bool:
        return bool(self.options.get("lazy"))

    @property
    def raw_link(self) -> bool:
        """The node wants the link itself and not what comes through it."""
        return bool(self.options.get("rawLink"))

    @property
    def choices(self) -> list[Any] | None:
        if isinstance(self.kind, list | tuple):
            return list(self.kind)
        if self.kind == "COMBO":
            return list(self.options.get("options", []))
        return None

    @property
    def kind_name(self) -> str:
        return "COMBO" if self.choices is not None else str(self.kind)


def declared_inputs(node_class: type[Any]) -> dict[str, InputDeclaration]:
    """Required, optional and hidden inputs by name. A hidden one has its source, such as UNIQUE_ID, as `kind`."""
    found: dict[str, InputDeclaration] = {}
    for section, entries in node_class.INPUT_TYPES().items():
        for name, entry in entries.items():
            kind = entry[0] if isinstance(entry, list | tuple) else entry
            options = entry[1] if isinstance(entry, list | tuple) and len(entry) > 1 else {}
            found[name] = InputDeclaration(name, section, kind, options)
    return found


def available_nodes() -> dict[str, type[Any]]:
    """All classes by id: the pack's own and the few of ComfyUI's core that are rebuilt here."""
    from .. import nodes
    from . import core_nodes, video_nodes

    return {**core_nodes.NODES, **video_nodes.NODES, **nodes.NODE_CLASS_MAPPINGS}
