"""The `hotpath` command line: options here, what the commands do in `commands/`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .commands.console import complain
from .host.errors import first_line, install_requirements, missing_library

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="hotpath",
        description="Runs Hotpath's ComfyUI workflows with and without ComfyUI, and looks after its model files.",
        epilog="`hotpath COMMAND --help` tells more about a command.",
    )
    top.add_argument("--version", action="version", version=f"hotpath {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="show log messages, and the traceback of an error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_colorize(commands)
    _add_demo(commands)
    _add_doctor(commands)
    _add_models(commands)
    _add_selftest(commands)
    _add_caption(commands)
    _add_compare(commands)
    _add_generate(commands)
    _add_map(commands)
    return top


def _add_run(commands: Commands) -> None:
    run = commands.add_parser(
        "run",
        help="run a workflow in API format",
        description="Runs a workflow in API format (in ComfyUI: Workflow > Export (API)). Without --server it runs "
        "in this process when all its nodes exist here, else in a ComfyUI that is found and started for it.",
    )
    run.add_argument("workflow", type=Path, help="the JSON file")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--server", metavar="URL", help="queue it on the ComfyUI at URL, such as http://127.0.0.1:8188")
    where.add_argument("--comfyui", metavar="FOLDER", type=Path, help="start the ComfyUI in FOLDER and run it there")
    where.add_argument("--headless", action="store_true", help="never start a ComfyUI; refuse what needs one")
    run.add_argument(
        "--set",
        metavar="NODE.INPUT=VALUE",
        action="append",
        help="change a value; NODE is an id, a title or a class (may be repeated)",
    )
    run.add_argument("--input-folder", type=Path, metavar="DIR", help="pictures and videos to load")
    run.add_argument("--output-folder", type=Path, metavar="DIR", default=Path("output"), help="default: ./output")
    _add_models_folder(run)
    run.add_argument("--device", type=_device, help="such as cpu or cuda:1; only for a run in this process")
    run.add_argument("-q", "--quiet", action="store_true", help="say only what came out")


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="run the example workflows on small models and show the results",
        description="Runs the example workflows on the demo pictures with the small demo models, in ComfyUI where "
        "one is found, else without, and writes the results and a page that shows them.",
    )
    demo.add_argument("--output-folder", type=Path, metavar="DIR", default=Path("demo_output"), help="./demo_output")
    demo.add_argument("--only", metavar="NAME", action="append", help="run only workflows with NAME in their name")
    where = demo.add_mutually_exclusive_group()
    where.add_argument("--comfyui", metavar="FOLDER", type=Path, help="use this ComfyUI")
    where.add_argument("--headless", action="store_true", help="use no ComfyUI, even if one is found")


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="show what works here, what does not, and why",
        description="Shows Python, torch, devices, every backend with its version or the reason it cannot be used, "
        "node families, caches and model files. Exit code 1 when a node family could not be loaded.",
    )
    doctor.add_argument("--json", action="store_true", help="print everything as JSON")
    doctor.add_argument("--libraries", action="store_true", help="only the optional libraries, as JSON")
    _add_models_folder(doctor)


def _add_colorize(commands: Commands) -> None:
    colorize = commands.add_parser(
        "colorize",
        help="colour a video file after reference pictures",
        description="Colours a film; sound and timing are kept. Stopped or crashed, the same command goes on where it "
        "was. ColorMNet's weights are for non-commercial use only.",
    )
    colorize.add_argument("video", type=Path, help="the film")
    colorize.add_argument(
        "-r",
        "--reference",
        type=Path,
        action="append",
        required=True,
        metavar="PICTURE",
        help="a picture in the colours you want (may be repeated)",
    )
    colorize.add_argument("-o", "--output", type=Path, required=True, help="the coloured film, such as out.mp4")
    colorize.add_argument(
        "--method", choices=("colormnet", "deep-exemplar"), default="colormnet", help="default: colormnet"
    )
    colorize.add_argument(
        "--reference-frames", default="", metavar="N,...", help="the film's frame each reference is, - for an example"
    )
    colorize.add_argument(
        "--colour-size", type=int, default=432, help="short side of the colours (default 432); 0: the film's own"
    )
    colorize.add_argument("--memory", choices=("balanced", "low-memory", "high-quality"), default="balanced")
    colorize.add_argument("--strength", type=float, default=1.0, help="factor on the chroma")
    colorize.add_argument("--edge-filter", choices=("none", "guided", "fast-global-smoother"), default="guided")
    colorize.add_argument("--smoothing", type=float, default=0.0, help="0 to under 1: steadier colours")
    colorize.add_argument("--shots", choices=("off", "reset", "reference-per-shot"), default="off")
    colorize.add_argument(
        "--shot-threshold", type=float, default=27.0, help="change of brightness that counts as a cut (default 27)"
    )
    colorize.add_argument(
        "--no-propagate",
        dest="propagate",
        action="store_false",
        help="Deep Exemplar: frames do not see the colours of the one before",
    )
    colorize.add_argument(
        "--quality", type=int, default=16, help="x264's rate factor, 0 to 51 (default 16); lower is better"
    )
    colorize.add_argument("--precision", choices=("automatic", "float32", "float16", "bfloat16"), default="automatic")
    colorize.add_argument(
        "--checkpoint", default="automatic", metavar="NAME", help="ColorMNet's file in the folder models/colormnet"
    )
    colorize.add_argument("--compile", action="store_true", help="torch.compile: slower to begin, then faster")
    colorize.add_argument(
        "--attention",
        default="auto",
        help="backend of DINOv2's attention: auto, or one of `hotpath doctor`; sage is lossy",
    )
    colorize.add_argument(
        "--local-attention",
        choices=("automatic", "banded", "spatial-correlation-sampler"),
        default="automatic",
        help="what computes the 15x15 window",
    )
    colorize.add_argument("--restart", action="store_true", help="forget what an unfinished run left")
    colorize.add_argument("--device", type=_device, help="such as cpu or cuda:1")
    colorize.add_argument("-q", "--quiet", action="store_true", help="say only where the film is")
    _add_models_folder(colorize)


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
    _add_models_folder(listing)
    verify = actions.add_parser("verify", help="check the files that are here: complete, readable, right checksum")
    verify.add_argument("names", nargs="*", metavar="NAME", help="default: all that are here")
    _add_models_folder(verify)
    download = actions.add_parser("download", help="download model files; an interrupted download is continued")
    download.add_argument("names", nargs="+", metavar="NAME", help="names or families from `hotpath models list`")
    download.add_argument("--dry-run", action="store_true", help="say what would be downloaded, and do nothing")
    download.add_argument("--accept-licence", action="store_true", help="accept the licences that ask for it")
    _add_models_folder(download)


def _add_selftest(commands: Commands) -> None:
    selftest = commands.add_parser(
        "selftest",
        help="load your own model files, run them, compare the fast paths with the reference",
        description="Faces, InstantID, colorization and vision-language: loads the model files that are here, runs them, "
        "compares each fast path with its reference path and measures the time. Exit code 1 when a check fails.",
    )
    selftest.add_argument("names", nargs="*", metavar="NAME", help="only checks with NAME in their name")
    selftest.add_argument("--json", action="store_true", help="print as JSON")
    selftest.add_argument("--device", type=_device, help="such as cpu or cuda:1")
    _add_models_folder(selftest)


def _add_caption(commands: Commands) -> None:
    caption = commands.add_parser(
        "caption",
        help="write a caption beside every picture of a folder",
        description="Describes every picture of a folder with a Qwen-VL model, in batches. A picture that has its "
        "caption is skipped, so the same command goes on where it was stopped.",
    )
    caption.add_argument("folder", type=Path, help="the folder of pictures")
    caption.add_argument(
        "--model",
        default="Qwen3-VL-4B-Instruct",
        help="a folder under models/LLM, or a repository (default: %(default)s)",
    )
    caption.add_argument(
        "--prompt",
        default="Detailed Description",
        help="what to ask, or a preset: Tags, Simple Description, Detailed Description (the default), Ultra Detailed "
        "Description, Cinematic Description or Detailed Analysis",
    )
    caption.add_argument("--system", default="", help="how the model should behave")
    caption.add_argument("--format", choices=("txt", "jsonl", "both"), default="txt", help="what is written")
    caption.add_argument("--captions-to", type=Path, metavar="DIR", help="where to (default: beside the pictures)")
    caption.add_argument("--pattern", default="", help="only file names that fit, such as 'portrait_*'")
    caption.add_argument("--recursive", action="store_true", help="also the folders in the folder")
    caption.add_argument("--overwrite", action="store_true", help="also pictures that have a caption")
    caption.add_argument("--before", default="", help="written before every caption as it stands, such as 'ohwx, '")
    caption.add_argument("--after", default="", help="written after every caption as it stands")
    caption.add_argument("--batch-size", type=int, default=8, help="pictures at a time")
    budgets = ("fast", "balanced", "high", "ultra", "native")
    caption.add_argument("--token-budget", choices=budgets, default="balanced", help="visual tokens a picture may cost")
    caption.add_argument("--max-new-tokens", type=int, default=256, help="the longest caption")
    caption.add_argument(
        "--thinking",
        choices=("off", "on", "model"),
        default="off",
        help="whether a thinking model thinks before a caption",
    )
    caption.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    caption.add_argument("--seed", type=int, default=0)
    caption.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    caption.add_argument("--quantization", default="none", help="none, int8, int4 or float8")
    caption.add_argument("--device", type=_device, help="such as cpu or cuda:1")
    _add_models_folder(caption)


def _add_generate(commands: Commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="draw pictures from prompts with a Z-Image checkpoint",
        description="Draws a picture for every prompt with a Hugging Face-format Z-Image folder. A picture that is there "
        "is skipped, so the same command goes on where it was stopped.",
    )
    generate.add_argument("--model", required=True, metavar="FOLDER", help="a path, or a name under models/diffusers")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw (may be repeated)")
    generate.add_argument(
        "--prompts",
        action="append",
        type=Path,
        metavar="FILE",
        help="one prompt a line, or .jsonl with prompt, seed, width, height, steps and so on",
    )
    generate.add_argument("--negative", default="", metavar="TEXT", help="what to keep away from; needs --guidance")
    generate.add_argument("-o", "--output-folder", type=Path, metavar="DIR", default=Path("output"), help="./output")
    generate.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count on")
    generate.add_argument("--count", type=int, default=1, metavar="N", help="pictures for each prompt")
    generate.add_argument("--width", type=int, default=1024)
    generate.add_argument("--height", type=int, default=1024)
    generate.add_argument("--steps", type=int, default=8, help="default: 8, for Z-Image-Turbo")
    generate.add_argument("--guidance", type=float, default=0.0, help="0, as Turbo wants it; Z-Image itself: 3 to 5")
    generate.add_argument("--lora", action="append", metavar="FILE[=STRENGTH]", help="a LoRA file (may be repeated)")
    generate.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    generate.add_argument("--attention", default="auto", help="auto, or a backend by name")
    generate.add_argument(
        "--compile", choices=("none", "regional"), default="none", help="faster after a first picture"
    )
    generate.add_argument("--precision", choices=("none", "float8", "int8"), default="none")
    generate.add_argument("--tiling", choices=("auto", "never", "always"), default="auto", help="of the VAE")
    generate.add_argument("--overwrite", action="store_true", help="draw again what is there")
    generate.add_argument("--device", type=_device, help="such as cpu or cuda:1")
    generate.add_argument("-q", "--quiet", action="store_true", help="say only where the pictures are")
    _add_models_folder(generate)


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare two settings of a workflow, or two folders of pictures",
        description="Renders the same seeds in two settings of a workflow in API format, or takes two folders of "
        "pictures, and reports SSIM, PSNR, differences, LPIPS where it is installed and whether faces stay the same "
        "person, on a page with every pair. Exit code 0 when all pairs reach the thresholds, 1 when one does not, 2 when "
        "something cannot be compared.",
    )
    compare.add_argument("a", type=Path, metavar="A", help="a workflow, or a folder of pictures: the reference")
    compare.add_argument("b", type=Path, metavar="B", nargs="?", help="the other one (default: the workflow A again)")
    compare.add_argument("--seeds", type=_list_of(int), metavar="1,2,3", help="render every seed")
    compare.add_argument(
        "--weights", type=_list_of(float), metavar="0.6,0.8", help="render every weight of the identity"
    )
    compare.add_argument(
        "--controlnet-strengths", type=_list_of(float), metavar="0.4,0.8", help="render every strength of IdentityNet"
    )
    for option, what in (("--set", "both sides"), ("--set-a", "A"), ("--set-b", "B")):
        compare.add_argument(
            option, metavar="NODE.INPUT=VALUE", action="append", help=f"change a value in {what} (may be repeated)"
        )
    for axis in ("seed", "weight", "strength"):
        compare.add_argument(
            f"--{axis}-input",
            metavar="NODE.INPUT",
            action="append",
            help=f"which input is the {axis}, where the workflow does not say (may be repeated)",
        )
    compare.add_argument("--picture-from", metavar="NODE", help="compare the pictures of this node only")
    compare.add_argument("--min-ssim", type=float, default=0.95, help="lowest SSIM that passes (default 0.95)")
    compare.add_argument("--min-cosine", type=float, help="lowest face cosine that passes (default 0.98)")
    compare.add_argument("--max-lpips", type=float, help="highest LPIPS that passes (default: it is not judged)")
    compare.add_argument(
        "--faces",
        default="auto",
        metavar="NAME",
        help="face models, off, or auto: antelopev2 or else the first there are; without any that work, none",
    )
    where = compare.add_mutually_exclusive_group()
    where.add_argument("--server", metavar="URL", help="render on the ComfyUI at URL, such as http://127.0.0.1:8188")
    where.add_argument("--comfyui", metavar="FOLDER", type=Path, help="start the ComfyUI in FOLDER and render there")
    where.add_argument("--headless", action="store_true", help="never start a ComfyUI; refuse what needs one")
    compare.add_argument("--input-folder", type=Path, metavar="DIR", help="pictures that the workflow loads")
    compare.add_argument(
        "-o", "--output-folder", type=Path, metavar="DIR", default=Path("comparison"), help="default: ./comparison"
    )
    compare.add_argument("--device", type=_device, help="such as cpu or cuda:1")
    compare.add_argument("-q", "--quiet", action="store_true", help="say only what came out")
    _add_models_folder(compare)


def _list_of(kind: type) -> Callable[[str], list[float]]:
    """Reads numbers with commas between them."""

    def numbers(text: str) -> list[float]:
        return [kind(part) for part in text.split(",") if part.strip()]

    numbers.__name__ = f"list of {kind.__name__}"  # what argparse calls a value it cannot read
    return numbers


def _add_map(commands: Commands) -> None:
    mapped = commands.add_parser(
        "map",
        help="run a workflow once per picture, line or shot of a film, on all GPUs or a Ray cluster",
        description="Runs a workflow in API format (nodes that need no ComfyUI) once per item. Items that are done are "
        "skipped, so the same command goes on where it was stopped. Exit code 0 when every item has its result, 1 when "
        "one has none, 2 when nothing could begin, 130 after Ctrl-C.",
    )
    mapped.add_argument("workflow", type=Path, help="the JSON file")
    mapped.add_argument(
        "--over",
        required=True,
        metavar="ITEMS",
        help="a folder, a text file of lines, a .jsonl file, a film, or - (stdin)",
    )
    mapped.add_argument(
        "--input", metavar="NODE.INPUT", help="what an item goes into (default: the only input that fits)"
    )
    mapped.add_argument(
        "--items", choices=("pictures", "videos"), default="pictures", help="the files of a folder to take"
    )
    mapped.add_argument("--recursive", action="store_true", help="also the folders in the folder")
    mapped.add_argument(
        "--shots", action="store_true", help="an item is a film; its shots are done apart and put together"
    )
    mapped.add_argument("--set", metavar="NODE.INPUT=VALUE", action="append", help="change a value (may be repeated)")
    mapped.add_argument("--input-folder", type=Path, metavar="DIR", help="default: here, else the folder of the items")
    mapped.add_argument("--output-folder", type=Path, metavar="DIR", default=Path("output"), help="default: ./output")
    mapped.add_argument("--restart", action="store_true", help="forget what was done before, and replace it")
    mapped.add_argument("--executor", choices=("local", "ray"), default="local")
    mapped.add_argument("--workers", type=int, default=0, metavar="N", help="default: one per GPU, or one on the CPU")
    mapped.add_argument("--gpus", default="all", metavar="all|none|0,1", help="GPUs of this machine (default: all)")
    mapped.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads of each worker (default: up to 4)"
    )
    mapped.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster (default: one is started here)")
    mapped.add_argument("--token-file", type=Path, metavar="FILE", help="the token of that cluster")
    mapped.add_argument("--policy", choices=("least_busy", "round_robin", "random"), default="least_busy")
    mapped.add_argument("--retries", type=int, default=2, metavar="N", help="new attempts after errors that can pass")
    mapped.add_argument(
        "--minutes", type=float, default=0.0, metavar="N", help="end an attempt that takes longer (default: never)"
    )
    mapped.add_argument(
        "--seeds", choices=("item", "workflow"), default="item", help="own seeds for every item, or one"
    )
    mapped.add_argument("-q", "--quiet", action="store_true", help="no progress line")
    _add_models_folder(mapped)


def _device(text: str) -> str:
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


def _add_models_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--models",
        type=Path,
        metavar="DIR",
        help="the models folder (default: HOTPATH_MODELS, else the models folder of a ComfyUI that is found)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the program's own); returns the exit code."""
    options = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        # Inside, as what it imports takes long enough for a Ctrl-C.
        command = import_module(f".commands.{options.command}", __package__)
        return int(command.run(options))
    except KeyboardInterrupt:
        return 130
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
        complain(f"{type(error).__name__}: {error}\n(run with --verbose for the traceback)")
        return 1
