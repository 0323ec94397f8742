"""`hotpath generate`: pictures from prompts, one or a file of them, resumed where it stopped."""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import host
from ..distributed.retry import MEMORY, WORKER, failure_kind
from ..headless.interrupts import stopped_by_ctrl_c
from ..host import Interrupted, ModelNotFound
from ..host.device_work import give_back_cached
from ..host.errors import first_line
from ..text_to_image.adapter_files import UnusableAdapter
from ..text_to_image.denoising import seeds
from ..text_to_image.folders import UnusableCheckpoint
from ..text_to_image.jobs import Item, Job, forget_models, prepare
from ..text_to_image.loading import MODELS
from .console import complain, note, say
from .models_folder import headless_host

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 all pictures are there, 1 some failed, 2 nothing could begin, 130 stopped."""
    here = headless_host(options.models, device=options.device, show_progress=not options.quiet)
    before = host.use(here)
    try:
        items = listed_items(options)
        with stopped_by_ctrl_c(here):
            return _draw(items, options)
    except (ModelNotFound, ValueError, FileNotFoundError) as error:
        complain(str(error))
        return REFUSED
    except (Interrupted, KeyboardInterrupt):
        note("Stopped. What is drawn is kept; the same command goes on from there.", "yellow")
        return INTERRUPTED
    finally:
        forget_models()
        host.use(before)


def listed_items(options: argparse.Namespace) -> list[Item]:
    """An item for every picture that was asked for. Raises ValueError naming the line that is wrong."""
    if options.count < 1:
        raise ValueError(f"--count {options.count} draws nothing: give 1 or more.")
    common: dict[str, Any] = {
        "model": options.model,
        "negative": options.negative,
        "width": options.width,
        "height": options.height,
        "steps": options.steps,
        "guidance": options.guidance,
        "loras": [_lora(text) for text in options.lora or ()],
        "dtype": options.dtype,
        "attention": options.attention,
        "compile": options.compile,
        "precision": options.precision,
        "tiling": options.tiling,
        "prompt_cache": "memory and disk",
    }
    told: list[dict[str, Any]] = [{"prompt": text} for text in options.prompt or ()]
    for file in options.prompts or ():
        told += read_prompts(file)
    if not told:
        raise ValueError("There is no prompt: give --prompt TEXT or --prompts FILE.")
    items = []
    for entry in told:
        first = entry.get("seed", options.seed)
        # A prompt that brings its own seed means that one picture.
        wanted = seeds(first, options.count) if "seed" not in entry else [first]
        items += [Item.of({**common, **entry, "seed": seed}) for seed in wanted]
    return items


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """One prompt a line, or one JSON object a line (.jsonl): {"prompt": ..., "seed": ..., "width": ...}."""
    try:
        # Not splitlines, which would also cut at what JSON allows within a text (U+2028, say).
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ValueError(f"There is no file {file}: give a file of prompts.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give a file of prompts in UTF-8.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix.lower() not in (".jsonl", ".ndjson"):
            found.append({"prompt": line.strip()})
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("it is no JSON object")
            # Checked here, where the line is known.
            Item.of({"model": "any", **entry})
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        found.append(entry)
    if not found:
        raise ValueError(f"{file} holds no prompt: write one a line.")
    return found


def _lora(text: str) -> tuple[str, float]:
    name, mark, strength = text.rpartition("=")
    if not mark:
        return text, 1.0
    try:
        return name, float(strength)
    except ValueError:
        raise ValueError(f"--lora {text}: what follows = is the strength, a number such as 0.8.") from None


def _is_shared(error: Exception, items: list[Item]) -> bool:
    """Whether what is wrong with the first item is wrong with every other: with the same files, or the same settings."""
    if isinstance(error, ModelNotFound | UnusableCheckpoint | UnusableAdapter):
        return len({(item.model, item.loras) for item in items}) == 1
    return len({replace(item, prompt="", seed=0, name="") for item in items}) == 1


def _make_room() -> None:
    """Begin anew with all of the device."""
    for model in MODELS.loaded():
        model.release()
    gc.collect()
    give_back_cached(host.current().device())


def _draw(items: list[Item], options: argparse.Namespace) -> int:
    skipped = failed = 0
    for number, item in enumerate(items, 1):
        job: Job | None
        try:
            job = prepare(item, options.output_folder)
            if not options.overwrite and job.is_done():
                skipped += 1
                continue
            if not options.quiet:
                note(f"[{number}/{len(items)}] seed {item.seed}: {item.prompt[:80]}", "dim")
            drawn = job.run()
        except (ModelNotFound, ValueError) as error:
            if number == 1 and _is_shared(error, items):
                raise
            complain(f"{number} of {len(items)}: {error}")
            failed += 1
            continue
        except (MemoryError, RuntimeError) as error:
            kind = failure_kind(error)
            if kind == WORKER:
                complain(
                    f"{number} of {len(items)}: {first_line(error)}: the GPU computes nothing more for this process."
                )
                note("What is drawn is kept; the same command goes on from there.", "yellow")
                return FAILED
            if kind != MEMORY:
                raise
            complain(f"{number} of {len(items)}: {first_line(error, 300)}")
            job = None
        if job is None:
            # Out of the handler first: the traceback holds what filled the device.
            failed += 1
            _make_room()
            continue
        say(str(job.file))
        if not options.quiet:
            note(drawn.report, "dim")
    if failed == len(items):
        return REFUSED
    done = len(items) - skipped - failed
    if not options.quiet:
        note(f"{done} drawn, {skipped} were there already, {failed} failed")
    return FAILED if failed else 0
