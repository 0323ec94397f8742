"""`hotpath doctor`: what works on this machine, what does not, and why."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__, cache, face, nodes
from ..headless.locate import PACK, carries_pack, find_comfyui, python_for
from ..host.cards import why_no_gpu
from ..host.headless import HeadlessHost, best_device
from ..host.known_models import KNOWN_MODELS
from ..host.model_store import describe
from .backends import look_at_backends, unmet_requirements
from .console import say, table
from .models_folder import headless_host

TORCH = "torch>=2.5"  # as in pyproject.toml; requirements.txt leaves torch to ComfyUI


def run(options: argparse.Namespace) -> int:
    """Exit code 1 when a node family could not be loaded or a requirement is not met."""
    if options.libraries:
        say(json.dumps(libraries()))
        return 0
    facts = examine(headless_host(options.models))
    if options.json:
        say(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 1 if facts["failed_families"] or facts["unmet_requirements"] else 0


def examine(host: HeadlessHost) -> dict[str, Any]:
    """Everything the doctor looks at, as plain data."""
    comfyui = find_comfyui()
    return {
        "hotpath": __version__,
        "place": str(PACK),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "devices": devices(),
        "unused_gpu": unused_gpu(),
        "comfyui": _comfyui(comfyui),
        **libraries(),
        "families": {family: sorted(_nodes_of(family)) for family in nodes.FAMILIES if _nodes_of(family)},
        "failed_families": dict(nodes.FAILED_FAMILIES),
        "caches": [str(seen) for seen in cache.all_statistics()],
        "cache_folder": str(host.cache_folder()),
        "model_folders": [str(folder) for folder in host.model_folders("")],
        "models": [describe(model, host) for model in KNOWN_MODELS],
    }


def libraries() -> dict[str, Any]:
    """Every optional library, and what this environment lacks."""
    requirements = PACK / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    return {
        "backends": [asdict(backend) for backend in look_at_backends()],
        "face_engines": face.diagnose(),
        "unmet_requirements": unmet_requirements([*lines, TORCH]),
    }


def devices() -> list[dict[str, Any]]:
    """Every device torch can compute on, the one used first."""
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            found.append(
                {
                    "device": f"cuda:{i}",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "free_gb": round(free / 1e9, 1),
                    "total_gb": round(total / 1e9, 1),
                }
            )
    elif best_device().type == "xpu":
        for i in range(torch.xpu.device_count()):
            card = torch.xpu.get_device_properties(i)
            found.append({"device": f"xpu:{i}", "name": card.name, "total_gb": round(card.total_memory / 1e9, 1)})
    elif (other := best_device()).type != "cpu":
        found.append({"device": str(other), "name": platform.processor() or platform.machine()})
    return [
        *found,
        {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    ]


def unused_gpu() -> str | None:
    """Why torch does not use the NVIDIA GPU whose driver is here, with the cure; None where it does, or there is none."""
    # Beside the driver on every system; pip gives Windows a torch for the CPU.
    driver = shutil.which("nvidia-smi") is not None
    return why_no_gpu() if driver and best_device().type == "cpu" else None


def _nodes_of(family: str) -> list[str]:
    module = sys.modules.get(f"{nodes.__name__}.{family}")
    return list(getattr(module, "NODES", ())) if family not in nodes.FAILED_FAMILIES else []


def _comfyui(comfyui: Path | None) -> dict[str, Any] | None:
    if comfyui is None:
        return None
    version = comfyui / "comfyui_version.py"
    text = version.read_text(encoding="utf-8") if version.is_file() else ""
    numbers = [
        line.partition("=")[2].strip().strip("\"'") for line in text.splitlines() if line.startswith("__version__")
    ]
    python, missing = python_for(comfyui)
    return {
        "folder": str(comfyui),
        "version": numbers[0] if numbers else "unknown",
        "pack_in_custom_nodes": carries_pack(comfyui),
        "python": str(python),
        "python_lacks": missing,
    }


def _show(facts: dict[str, Any]) -> None:
    say(f"hotpath {facts['hotpath']} in {facts['place']}", "bold")
    python, torch_facts = facts["python"], facts["torch"]
    say(f"python {python['version']} ({python['executable']}) on {facts['platform']}")
    build = (
        f"CUDA {torch_facts['cuda']}"
        if torch_facts["cuda"]
        else f"ROCm {torch_facts['hip']}"
        if torch_facts["hip"]
        else "no CUDA"
    )
    say(f"torch {torch_facts['version']} ({build})")
    for device in facts["devices"]:
        memory = f", {device['total_gb']} GB" if "total_gb" in device else ""
        memory = f", {device['free_gb']} of {device['total_gb']} GB free" if "free_gb" in device else memory
        capability = f", capability {device['capability']}" if "capability" in device else ""
        say(f"  {device['device']}: {device['name']}{capability}{memory}")
    if facts["unused_gpu"]:
        say(f"  the NVIDIA GPU is not used: {facts['unused_gpu']}", "red")
    comfyui = facts["comfyui"]
    if comfyui is None:
        say("ComfyUI: none found (COMFYUI_PATH, the folders above, ~/ComfyUI); workflows run without it")
    else:
        linked = (
            "this pack is in its custom_nodes"
            if comfyui["pack_in_custom_nodes"]
            else "this pack is not in its custom_nodes"
        )
        lacks = f"; it cannot be started: {comfyui['python_lacks']} are missing" if comfyui["python_lacks"] else ""
        say(f"ComfyUI {comfyui['version']} in {comfyui['folder']}; {linked}{lacks}")
    say()
    say("Backends", "bold")
    rows = [
        (
            "yes" if b["available"] else "no",
            b["name"],
            b["version"] or "-",
            "; ".join(filter(None, (b["used_for"], b["detail"]))),
        )
        for b in facts["backends"]
    ]
    say(table(rows, ("use", "library", "version", "what for, and why not")))
    for line in facts["unmet_requirements"]:
        say(f"requirement not met: {line}", "red")
    say()
    say("Face engines", "bold")
    for line in facts["face_engines"]:
        say(f"  {line}")
    say()
    say("Nodes", "bold")
    for family, ids in facts["families"].items():
        say(f"  {family}: {', '.join(ids)}")
    for family, reason in facts["failed_families"].items():
        say(f"  {family}: failed, {reason}", "red")
    say()
    say(f"Caches (in this process; files in {facts['cache_folder']})", "bold")
    for line in facts["caches"] or ["none in use yet"]:
        say(f"  {line}")
    say()
    say(f"Model files (searched: {', '.join(facts['model_folders'])})", "bold")
    for model in facts["models"]:
        if model["found"]:
            say(f"  {model['name']}: {model['found']}", "green")
        else:
            say(f"  {model['name']}: missing; belongs at {model['belongs']}")
            say(f"      from {model['source']} ({model['licence']})", "dim")
