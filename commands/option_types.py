"""What the options of several commands have in common: how devices and lists are read, and where models are looked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host.errors import first_line

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["CommandParser"]


class WithDefaults(argparse.HelpFormatter):
    """Ends what is said of an option with its default, where the sentence does not tell it and there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        none = action.default in (None, "", argparse.SUPPRESS) or isinstance(action.default, bool)
        return told if none or "default" in told else f"{told} (default: %(default)s)"


class CommandParser(argparse.ArgumentParser):
    """A parser whose help tells defaults, and so do those of its commands."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": WithDefaults, **options})


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
