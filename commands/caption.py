"""`hotpath caption`: a caption beside every picture of a folder."""

from __future__ import annotations

import argparse

from .. import host
from ..headless.interrupts import stopped_by_ctrl_c
from ..host import Interrupted
from ..vision_language import own_presets
from ..vision_language.answering import AnswerOptions
from ..vision_language.budgets import preset
from ..vision_language.caption_job import CaptionJob, begin
from ..vision_language.caption_sharing import taking_part, tidy
from ..vision_language.captioning import FolderCaptioner
from ..vision_language.loaded_model import LoadOptions
from ..vision_language.loading import MODELS
from ..vision_language.sampling import Sampling
from ..vision_language.unusable import UnusableModel
from .console import complain, note, say
from .models_folder import headless_host

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
THINKING = {"off": False, "on": True, "model": None}


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 every picture has its caption, 1 some failed, 2 nothing could begin, 130 stopped."""
    here = headless_host(options.models, device=options.device)
    before = host.use(here)
    try:
        with stopped_by_ctrl_c(here):
            return _caption(options)
    except (UnusableModel, ValueError, FileNotFoundError) as error:
        complain(str(error))
        return REFUSED
    except (Interrupted, KeyboardInterrupt):
        note("Stopped. Run the same command again to go on.", "yellow")
        return INTERRUPTED
    finally:
        MODELS.clear()
        host.use(before)


def _caption(options: argparse.Namespace) -> int:
    job = CaptionJob(
        options.folder,
        own_presets.described(options.prompt),
        options.system,
        options.format,
        options.recursive,
        options.overwrite,
        options.batch_size,
        options.before,
        options.after,
        options.captions_to,
        options.pattern,
        THINKING[options.thinking],
        options.media.replace("-", " "),
        options.max_frames,
    )
    # Before a model is fetched: what is wrong with the job, and whether anything is left to do.
    summary, waiting = begin(job)
    if waiting:
        job.check_target()
        answering = AnswerOptions(options.max_new_tokens, preset(options.token_budget), cache_images=False)
        sampling = Sampling(options.temperature > 0, options.temperature, seed=options.seed)
        load = LoadOptions(dtype=options.dtype, quantization=options.quantization)
        # From now on, as what others do while the model is loaded is done.
        with taking_part(job) as shares:
            summary = FolderCaptioner(MODELS.get(options.model, load), job, sampling, answering).run(shares)
    else:
        tidy(job, summary)
    say(summary.report())
    return FAILED if summary.failed else 0
