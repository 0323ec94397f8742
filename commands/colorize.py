"""`hotpath colorize`: a video file coloured after reference pictures, without ComfyUI."""

from __future__ import annotations

import argparse

from .. import host
from ..headless.interrupts import stopped_by_ctrl_c
from .console import complain, note, say
from .models_folder import headless_host

INTERRUPTED = 130  # what a shell expects of a program ended by Ctrl-C
REFUSED = 2


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 done, 2 refused before it began, 130 stopped; what is finished is then in the output file."""
    from ..colorization.file_job import colorize_file_by_path
    from ..colorization.film_options import FilmOptions

    mine = headless_host(options.models, device=options.device, show_progress=not options.quiet)
    before = host.use(mine)
    try:
        film = FilmOptions(
            method="Deep Exemplar" if options.method == "deep-exemplar" else "ColorMNet",
            colour_size=options.colour_size,
            memory_mode=options.memory.replace("-", "_"),
            strength=options.strength,
            edge_filter=options.edge_filter.replace("-", "_"),
            temporal_smoothing=options.smoothing,
            shots=options.shots.replace("-", " "),
            attention=options.attention,
            local_attention=options.local_attention.replace("-", "_"),
        )
        with stopped_by_ctrl_c(mine):
            report = colorize_file_by_path(
                options.video,
                options.output,
                options.reference,
                film,
                options.reference_frames,
                quality=options.quality,
                precision=options.precision,
                resume=not options.restart,
            )
    except (FileNotFoundError, ValueError, ImportError) as error:  # the last: a library that an option needs
        complain(str(error))
        return REFUSED
    except KeyboardInterrupt:
        note(f"Stopped. {options.output} holds what is finished; the same command goes on from there.", "yellow")
        return INTERRUPTED
    finally:
        host.use(before)
    if not options.quiet:
        note(report)
    say(str(options.output))
    return 0
