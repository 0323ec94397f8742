"""The options of the commands that do one thing without a workflow: colorize, caption and generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .option_types import add_models_folder, device

if TYPE_CHECKING:
    from .option_types import Commands


def add_colorize(commands: Commands) -> None:
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
        "--colour-size",
        type=int,
        default=432,
        help="short side of the colours, in pixels (default 432); 0: the film's own",
    )
    colorize.add_argument(
        "--memory",
        choices=("balanced", "low-memory", "high-quality"),
        default="balanced",
        help="how much ColorMNet remembers",
    )
    colorize.add_argument("--strength", type=float, default=1.0, help="factor on the chroma, 0 is grey")
    colorize.add_argument(
        "--edge-filter",
        choices=("none", "guided", "fast-global-smoother"),
        default="guided",
        help="keeps enlarged colours from spilling over edges",
    )
    colorize.add_argument("--smoothing", type=float, default=0.0, help="0 to under 1: steadier colours")
    colorize.add_argument(
        "--shots",
        choices=("off", "reset", "reference-per-shot"),
        default="off",
        help="at every cut forget what came before, or also take the next reference",
    )
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
    colorize.add_argument(
        "--precision",
        choices=("automatic", "float32", "float16", "bfloat16"),
        default="automatic",
        help="number format of the networks",
    )
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
    colorize.add_argument(
        "--start-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="to try settings on a part of the film: where it begins, in seconds from the first frame; its file has the "
        "seconds in its name",
    )
    colorize.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="how many seconds are coloured (default: all that follow)",
    )
    colorize.add_argument("--restart", action="store_true", help="forget what an unfinished run left")
    colorize.add_argument("--device", type=device, help="such as cpu or cuda:1")
    colorize.add_argument("-q", "--quiet", action="store_true", help="say only where the film is")
    add_models_folder(colorize)


def add_caption(commands: Commands) -> None:
    caption = commands.add_parser(
        "caption",
        help="write a caption beside every picture or video of a folder",
        description="Describes every picture of a folder with a Qwen-VL model, in batches. A picture that has its "
        "caption is skipped, so the same command goes on where it was stopped. Several such commands, one for each card, share a "
        "folder, also on several machines.",
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
        "Description, Cinematic Description, Detailed Analysis, or the name of a text file in models/LLM/prompts",
    )
    caption.add_argument("--system", default="", help="how the model should behave")
    caption.add_argument("--format", choices=("txt", "jsonl", "both"), default="txt", help="what is written")
    caption.add_argument("--captions-to", type=Path, metavar="DIR", help="where to (default: beside the pictures)")
    caption.add_argument(
        "--media",
        choices=("pictures", "videos", "pictures-and-videos"),
        default="pictures",
        help="default: %(default)s",
    )
    caption.add_argument(
        "--max-frames", type=int, default=16, help="of a video, two a second at most (default: %(default)s)"
    )
    caption.add_argument("--pattern", default="", help="only file names that fit, such as 'portrait_*'")
    caption.add_argument("--recursive", action="store_true", help="also the folders in the folder")
    caption.add_argument("--overwrite", action="store_true", help="also pictures that have a caption")
    caption.add_argument("--before", default="", help="written before every caption as it stands, such as 'ohwx, '")
    caption.add_argument("--after", default="", help="written after every caption as it stands")
    caption.add_argument("--batch-size", type=int, default=8, help="pictures at a time")
    budgets = ("fast", "balanced", "high", "ultra", "native")
    caption.add_argument("--token-budget", choices=budgets, default="balanced", help="visual tokens a picture may cost")
    caption.add_argument("--max-new-tokens", type=int, default=256, help="the longest caption, in tokens")
    caption.add_argument(
        "--thinking",
        choices=("off", "on", "model"),
        default="off",
        help="whether a thinking model thinks before a caption",
    )
    caption.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    caption.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    caption.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="number format of the weights",
    )
    caption.add_argument("--quantization", default="none", help="none, int8, int4 or float8")
    caption.add_argument("--device", type=device, help="such as cpu or cuda:1")
    add_models_folder(caption)


def add_generate(commands: Commands) -> None:
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
    generate.add_argument(
        "-o", "--output-folder", type=Path, metavar="DIR", default=Path("output"), help="default: ./output"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count on")
    generate.add_argument("--count", type=int, default=1, metavar="N", help="pictures for each prompt")
    generate.add_argument("--width", type=int, default=1024, help="in pixels, a multiple of 16")
    generate.add_argument("--height", type=int, default=1024, help="in pixels, a multiple of 16")
    generate.add_argument("--steps", type=int, default=8, help="default: 8, for Z-Image-Turbo")
    generate.add_argument(
        "--guidance", type=float, default=0.0, help="as Turbo wants it (default: 0); Z-Image itself: 3 to 5"
    )
    generate.add_argument("--lora", action="append", metavar="FILE[=STRENGTH]", help="a LoRA file (may be repeated)")
    generate.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="number format of the networks"
    )
    generate.add_argument("--attention", default="auto", help="auto, or a backend by name")
    generate.add_argument(
        "--compile", choices=("none", "regional"), default="none", help="faster after a first picture"
    )
    generate.add_argument(
        "--precision",
        choices=("none", "float8", "int8"),
        default="none",
        help="of the products in the blocks; for speed, with --compile regional",
    )
    generate.add_argument("--tiling", choices=("auto", "never", "always"), default="auto", help="of the VAE")
    generate.add_argument("--overwrite", action="store_true", help="draw again what is there")
    generate.add_argument("--device", type=device, help="such as cpu or cuda:1")
    generate.add_argument("-q", "--quiet", action="store_true", help="say only where the pictures are")
    add_models_folder(generate)
