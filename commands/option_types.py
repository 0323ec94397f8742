"""What the options of several commands have in common: how devices and lists are read, and where models are looked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..host.errors import first_line

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def list_of(kind: type) -> Callable[[str], list[float]]:
    """Reads numbers with commas between them."""

    def numbers(text: str) -> list[float]:
        return [kind(part) for part in text.split(",") if part.strip()]

    numbers.__name__ = f"list of {kind.__name__}"  # what argparse calls a value it cannot read
    return numbers


def device(text: str) -> str:
    """The name of a device that torch finds here."""
    import torch

    try:
        wanted = torch.device(text)
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device torch can use here ({first_line(error)}): leave it out, or try cpu"
        ) from None
    return text


def add_models_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--models",
        type=Path,
        metavar="DIR",
        help="the models folder (default: HOTPATH_MODELS, else the models folder of a ComfyUI that is found)",
    )
