"""The house rules that can be read from the source: import directions, ComfyUI behind its doors, no prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkout_files import files
from hotpath.nodes import FAMILIES

ROOT = Path(__file__).resolve().parent.parent

BASE = {"attention", "cache", "host", "products"}
FEATURES = {"face", "identity", "colorization", "comparison", "vision_language", "text_to_image"}
# What each part may import of the pack, beside itself. "" is the root's own modules.
ALLOWED: dict[str, set[str]] = {
    "attention": set(),
    "cache": set(),
    "host": set(),
    "products": set(),
    **{feature: BASE for feature in FEATURES},
    "patches": BASE | FEATURES,
    "nodes": BASE | FEATURES | {"patches"},
    "headless": BASE | FEATURES | {"patches", "nodes"},
    "distributed": BASE | FEATURES | {"patches", "nodes", "headless"},
    "commands": BASE | FEATURES | {"patches", "nodes", "headless", "distributed"},
    "panel": BASE | {"nodes"},
    "": BASE | FEATURES | {"patches", "nodes", "headless", "distributed", "commands", "panel"},
}
# The node that runs workflows itself: it asks for what imports all nodes when it runs, and not before.
LATE = {("nodes/map.py", "distributed")}
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}
MAY_USE_COMFYUI = {"nodes", "patches", "host"}
OUR_NAMES = set(ALLOWED) - {"", "nodes"} | {"hotpath"}
HEAVY = {
    "accelerate",
    "av",
    "cv2",
    "diffusers",
    "insightface",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "ray",
    "scenedetect",
    "skimage",
    "transformers",
}
MAY_PRINT = {"commands/console.py", "commands/progress.py", "cli.py"}
OUTSIDE = {"tests", "demo", "benchmarks", "build", "dist"}


@dataclass(frozen=True)
class Import:
    """One imported module. level: number of leading dots. top: runs when the module is imported."""

    module: str
    names: tuple[str, ...]
    level: int
    line: int
    top: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every import of a module, those inside functions and `if TYPE_CHECKING` marked as not at the top."""

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                inside = True
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, (), 0, child.lineno, top)
            elif isinstance(child, ast.ImportFrom):
                yield Import(child.module or "", tuple(a.name for a in child.names), child.level, child.lineno, top)
            elif isinstance(child, ast.Call) and (name := _imported_by_call(child)) is not None:
                yield Import(name.lstrip("."), (), len(name) - len(name.lstrip(".")), child.lineno, top)
            yield from walk(child, top and not inside)

    yield from walk(tree, True)


def _imported_by_call(call: ast.Call) -> str | None:
    if ast.unparse(call.func) not in ("__import__", "importlib.import_module", "import_module") or not call.args:
        return None
    first = call.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def violations(source: str, path: str) -> list[str]:
    """What a module at `path`, relative to the root, does against the rules; one sentence each."""
    tree = ast.parse(source)
    folders = Path(path).parts[:-1]
    part = folders[0] if folders else ""
    found = []
    for item in imports(tree):
        where = f"{path}:{item.line}"
        if item.level:
            for target in _parts_imported(item, folders):
                if target is None:
                    found.append(f"{where} imports from above the pack")
                elif target not in ALLOWED[part] | {part, ""} and ((path, target) not in LATE or item.top):
                    found.append(f"{where}: {part or 'the root'} may not import {target}")
            if folders == ("nodes",) and item.level == 1:
                named = [item.module.partition(".")[0]] if item.module else list(item.names)
                found += [f"{where}: a family may not import the family {f}" for f in named if f in FAMILIES]
            continue
        name = item.module.partition(".")[0]
        if name in OUR_NAMES:
            found.append(f"{where} imports {name} absolutely; inside ComfyUI the pack has another name")
        if name in COMFYUI and part not in MAY_USE_COMFYUI:
            found.append(f"{where} imports ComfyUI's {name}; only {', '.join(sorted(MAY_USE_COMFYUI))} may")
        if name in COMFYUI and item.top:
            found.append(f"{where} imports ComfyUI's {name} when it is imported; do it in a function")
        if name in HEAVY and item.top:
            found.append(f"{where} imports {name} when it is imported; do it in a function")
    if path not in MAY_PRINT:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write"):
                found.append(f"{path}:{node.lineno} prints; use logging")
    return found


def _parts_imported(item: Import, folders: tuple[str, ...]) -> list[str | None]:
    """First folder under the root of each thing a relative import names; "" for the root, None for above it."""
    base = list(folders)
    for _ in range(item.level - 1):
        if not base:
            return [None]
        base.pop()
    path = [*base, *filter(None, item.module.split("."))]
    if path:
        return [path[0] if path[0] in ALLOWED else ""]
    return [name if name in ALLOWED else "" for name in item.names]


def modules() -> list[Path]:
    found = []
    for path in files("*.py"):
        folders = path.relative_to(ROOT).parts[:-1]
        if not folders or (folders[0] not in OUTSIDE and not any(f.startswith(".") for f in folders)):
            found.append(path)
    return found


def test_every_part_of_the_pack_has_rules():
    parts = {path.relative_to(ROOT).parts[0] for path in modules() if path.parent != ROOT}
    assert parts <= set(ALLOWED), f"new folders need their import directions written down here: {parts - set(ALLOWED)}"
    assert len(modules()) > 30


def test_the_pack_keeps_the_rules():
    found = [v for path in modules() for v in violations(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("face/a.py", "from ..nodes import x", "face may not import nodes"),
        ("face/a.py", "from .. import patches", "face may not import patches"),
        ("cache/a.py", "from .. import host", "cache may not import host"),
        ("identity/a.py", "def f():\n    from ..face import x", "identity may not import face"),
        ("colorization/colormnet/a.py", "from ...patches import x", "colorization may not import patches"),
        ("face/a.py", "from ... import x", "above the pack"),
        ("nodes/a.py", "from .instantid import HIDDEN", "may not import the family instantid"),
        ("nodes/a.py", "from . import instantid", "may not import the family instantid"),
        ("nodes/a.py", "def f():\n    from ..distributed import x", "nodes may not import distributed"),
        ("nodes/map.py", "from ..distributed import x", "nodes may not import distributed"),
        ("nodes/a.py", "import hotpath.cache", "absolutely"),
        ("nodes/a.py", "from host import current", "absolutely"),
        ("face/a.py", "def f():\n    import comfy.utils", "only host, nodes, patches may"),
        ("headless/a.py", "def f():\n    from nodes import NODE_CLASS_MAPPINGS", "ComfyUI's nodes"),
        ("headless/a.py", "def f():\n    importlib.import_module('folder_paths')", "ComfyUI's folder_paths"),
        ("patches/a.py", "import folder_paths", "do it in a function"),
        ("host/a.py", "class A:\n    import comfy", "do it in a function"),
        ("nodes/a.py", "try:\n    import cv2\nexcept ImportError:\n    cv2 = None", "imports cv2"),
        ("face/a.py", "def f():\n    print('x')", "prints"),
    ],
)
def test_a_breach_is_found(path: str, source: str, complaint: str):
    assert any(complaint in found for found in violations(source, path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nodes/a.py", "from .. import face, host\nfrom ..patches.instantid import x\nfrom . import b"),
        ("patches/a.py", "def f():\n    import comfy.samplers"),
        ("host/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import comfy"),
        ("colorization/colormnet/a.py", "from ..colour_space import x\nfrom ...attention import y"),
        ("face/a.py", "import torch\ndef f():\n    import onnx"),
        ("commands/a.py", "from .. import __version__, nodes"),
        ("__init__.py", "def f():\n    from . import nodes"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str):
    assert violations(source, path) == []


def test_what_families_declare_alike_needs_none_of_the_features():
    """Or the families of faces and caches would be missing where those of identities cannot be imported."""
    assert not [item for item in imports(ast.parse((ROOT / "nodes" / "sockets.py").read_text("utf-8"))) if item.level]
