"""The options of the commands that run workflows: run, demo, compare and map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .option_types import add_models_folder, device, list_of

if TYPE_CHECKING:
    from .option_types import Commands


def add_run(commands: Commands) -> None:
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
    run.add_argument(
        "-o", "--output-folder", type=Path, metavar="DIR", default=Path("output"), help="default: ./output"
    )
    add_models_folder(run)
    run.add_argument("--device", type=device, help="such as cpu or cuda:1; only for a run in this process")
    run.add_argument("-q", "--quiet", action="store_true", help="say only what came out")


def add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="run the example workflows on small models and show the results",
        description="Runs the example workflows on the demo pictures with the small demo models, in ComfyUI where "
        "one is found, else without, and writes the results and a page that shows them.",
    )
    demo.add_argument(
        "--output-folder", type=Path, metavar="DIR", default=Path("demo_output"), help="default: ./demo_output"
    )
    demo.add_argument("--only", metavar="NAME", action="append", help="run only workflows with NAME in their name")
    where = demo.add_mutually_exclusive_group()
    where.add_argument("--comfyui", metavar="FOLDER", type=Path, help="use this ComfyUI")
    where.add_argument("--headless", action="store_true", help="use no ComfyUI, even if one is found")


def add_compare(commands: Commands) -> None:
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
    compare.add_argument("--seeds", type=list_of(int), metavar="1,2,3", help="render every seed")
    compare.add_argument(
        "--weights", type=list_of(float), metavar="0.6,0.8", help="render every weight of the identity"
    )
    compare.add_argument(
        "--controlnet-strengths", type=list_of(float), metavar="0.4,0.8", help="render every strength of IdentityNet"
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
    compare.add_argument("--device", type=device, help="such as cpu or cuda:1")
    compare.add_argument("-q", "--quiet", action="store_true", help="say only what came out")
    add_models_folder(compare)


def add_map(commands: Commands) -> None:
    mapped = commands.add_parser(
        "map",
        help="run a workflow once per picture, line or shot of a film, on all GPUs or a Ray cluster",
        description="Runs a workflow in API format once per item: without a ComfyUI when all its nodes exist here, else in "
        "one that is started for each GPU, here or on its machine of the cluster. Items that are done are skipped, so the same "
        "command goes on where it was stopped. Exit code 0 when every item has its result, 1 when one has none, 2 when nothing "
        "could begin, 130 after Ctrl-C.",
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
    where = mapped.add_mutually_exclusive_group()
    where.add_argument(
        "--server", metavar="URL", action="append", help="queue it on the ComfyUI at URL (may be repeated)"
    )
    where.add_argument("--comfyui", metavar="FOLDER", type=Path, help="start the ComfyUI in FOLDER for each worker")
    where.add_argument("--headless", action="store_true", help="never start a ComfyUI; refuse what needs one")
    mapped.add_argument("--set", metavar="NODE.INPUT=VALUE", action="append", help="change a value (may be repeated)")
    mapped.add_argument(
        "--input-folder",
        type=Path,
        metavar="DIR",
        help="default: here, else the folder of the items; of a list in a ComfyUI that is started its own",
    )
    mapped.add_argument(
        "-o", "--output-folder", type=Path, metavar="DIR", default=Path("output"), help="default: ./output"
    )
    mapped.add_argument("--restart", action="store_true", help="forget what was done before, and replace it")
    mapped.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine, or actors of a Ray cluster",
    )
    mapped.add_argument("--workers", type=int, default=0, metavar="N", help="default: one per GPU, or one on the CPU")
    mapped.add_argument("--gpus", default="all", metavar="all|none|0,1", help="GPUs of this machine (default: all)")
    mapped.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads of each worker (default: up to 4)"
    )
    mapped.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster (default: one is started here)")
    mapped.add_argument("--token-file", type=Path, metavar="FILE", help="the token of that cluster")
    mapped.add_argument(
        "--policy",
        choices=("least_busy", "round_robin", "random"),
        default="least_busy",
        help="which worker gets the next item",
    )
    mapped.add_argument("--retries", type=int, default=2, metavar="N", help="new attempts after errors that can pass")
    mapped.add_argument(
        "--minutes", type=float, default=0.0, metavar="N", help="end an attempt that takes longer (default: never)"
    )
    mapped.add_argument(
        "--seeds", choices=("item", "workflow"), default="item", help="own seeds for every item, or one"
    )
    mapped.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="run every item N times, each time with other seeds"
    )
    mapped.add_argument("-q", "--quiet", action="store_true", help="no progress line")
    add_models_folder(mapped)
