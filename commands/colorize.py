"""`hotpath colorize`: a video file coloured after reference pictures, without ComfyUI."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import host
from ..headless.interrupts import stopped_by_ctrl_c
from ..host.system_errors import sentence
from .console import complain, note, say
from .models_folder import headless_host

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 stopped by an error after it had begun, 2 refused before that, 130 stopped by the person. What is
    finished is kept in all of them."""
    from ..colorization.file_job import colorize_file_by_path
    from ..colorization.film_options import FilmOptions
    from ..colorization.film_part import Extent

    mine = headless_host(options.models, device=options.device, show_progress=not options.quiet)
    before = host.use(mine)
    has_begun = False
    output: Path = options.output

    def begun() -> None:
        nonlocal has_begun
        has_begun = True

    try:
        extent = Extent(options.start_seconds, options.seconds)
        output = extent.named(output)
        film = FilmOptions(
            method="Deep Exemplar" if options.method == "deep-exemplar" else "ColorMNet",
            colour_size=options.colour_size,
            memory_mode=options.memory.replace("-", "_"),
            strength=options.strength,
            edge_filter=options.edge_filter.replace("-", "_"),
            temporal_smoothing=options.smoothing,
            shots=options.shots.replace("-", " "),
            shot_threshold=options.shot_threshold,
            propagate=options.propagate,
            compile=options.compile,
            attention=options.attention,
            local_attention=options.local_attention.replace("-", "_"),
        )
        with stopped_by_ctrl_c(mine):
            report = colorize_file_by_path(
                options.video,
                output,
                options.reference,
                film,
                options.reference_frames,
                begun=begun,
                quality=options.quality,
                checkpoint=options.checkpoint,
                precision=options.precision,
                resume=not options.restart,
                extent=extent,
            )
    except (OSError, ValueError, ImportError) as error:  # the last: a library that an option needs
        complain(_sentence(error, output))
        if not has_begun:
            return REFUSED
        note(_kept(output), "yellow")
        return FAILED
    except KeyboardInterrupt:
        note(f"Stopped. {_kept(output)}", "yellow")
        return INTERRUPTED
    except Exception:
        if has_begun:
            note(_kept(output), "yellow")
        raise
    finally:
        host.use(before)
    if not options.quiet:
        note(report)
    say(str(output))
    return 0


def _sentence(error: Exception, output: Path) -> str:
    return sentence(error, output) or str(error) or type(error).__name__


def _kept(output: Path) -> str:
    from ..colorization.playable_part import finished_so_far

    kept = finished_so_far(output)
    if kept is None:
        return "No part of the film was finished yet."
    return f"{kept} holds what is finished; the same command goes on from there."
