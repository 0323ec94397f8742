"""The `hotpath` command line. What its commands do, and the options of most, are in `commands/`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from . import __version__
from .commands.console import complain
from .commands.feature_options import add_caption, add_colorize, add_generate
from .commands.option_types import CommandParser, add_models_folder, device
from .commands.workflow_options import add_compare, add_demo, add_map, add_run
from .host import fresh_memory, user
from .host.errors import install_requirements, missing_library
from .host.system_errors import sentence

if TYPE_CHECKING:
    from .commands.option_types import Commands


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = CommandParser(
        prog="hotpath",
        description="Runs Hotpath's ComfyUI workflows with and without ComfyUI, and looks after its model files.",
        epilog="`hotpath COMMAND --help` tells more about a command.",
    )
    top.add_argument("--version", action="version", version=f"hotpath {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="show log messages, and the traceback of an error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_run(commands)
    add_colorize(commands)
    add_demo(commands)
    _add_doctor(commands)
    _add_models(commands)
    _add_selftest(commands)
    add_caption(commands)
    add_compare(commands)
    add_generate(commands)
    add_map(commands)
    return top


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="show what works here, what does not, and why",
        description="Shows Python, torch, devices, every backend with its version or the reason it cannot be used, "
        "node families, caches and model files. Exit code 1 when a node family could not be loaded or a requirement is not met.",
    )
    doctor.add_argument("--json", action="store_true", help="print everything as JSON")
    doctor.add_argument("--libraries", action="store_true", help="only the optional libraries, as JSON")
    add_models_folder(doctor)


def _add_models(commands: Commands) -> None:
    models = commands.add_parser(
        "models",
        help="list, check and download model files",
        description="Lists, checks and downloads model files; without an ACTION it lists them.",
    )
    models.set_defaults(action="list", json=False, models=None)
    actions = models.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="every known model file, where it belongs and where it comes from")
    listing.add_argument("--json", action="store_true", help="print as JSON")
    add_models_folder(listing)
    verify = actions.add_parser("verify", help="check the files that are here: complete, readable, right checksum")
    verify.add_argument("names", nargs="*", metavar="NAME", help="default: all that are here")
    add_models_folder(verify)
    download = actions.add_parser("download", help="download model files; an interrupted download is continued")
    download.add_argument("names", nargs="+", metavar="NAME", help="names or families from `hotpath models list`")
    download.add_argument("--dry-run", action="store_true", help="say what would be downloaded, and do nothing")
    download.add_argument("--accept-licence", action="store_true", help="accept the licences that ask for it")
    add_models_folder(download)


def _add_selftest(commands: Commands) -> None:
    selftest = commands.add_parser(
        "selftest",
        help="load your own model files, run them, compare the fast paths with the reference",
        description="Faces, InstantID, colorization and vision-language: loads the model files that are here, runs them, "
        "compares each fast path with its reference path and measures the time. Exit code 1 when a check fails, 3 when "
        "there is nothing to check.",
    )
    selftest.add_argument("names", nargs="*", metavar="NAME", help="only checks with NAME in their name")
    selftest.add_argument("--json", action="store_true", help="print as JSON")
    selftest.add_argument("--device", type=device, help="such as cpu or cuda:1")
    add_models_folder(selftest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the program's own); returns the exit code."""
    try:
        options = parser().parse_args(argv)
        if argv is None:  # this process is ours
            user.give_a_name()
            fresh_memory.ask()
        return _run(options)
    except KeyboardInterrupt:  # also while the command is still being read and imported
        return 130


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        command = import_module(f".commands.{options.command}", __package__)
        return int(command.run(options))
    except BrokenPipeError:  # the reader of our output has gone, as in `hotpath models list | head`
        sys.stderr.close()
        return 141
    except Exception as error:
        if options.verbose:
            raise
        library = missing_library(error)
        if library:
            complain(f"{library} is not installed: {install_requirements()}")
            return 1
        if told := sentence(error):
            complain(told)
            return 1
        complain(f"{type(error).__name__}: {error}\n(run with --verbose for the traceback)")
        return 1
