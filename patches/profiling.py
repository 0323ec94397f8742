"""Where the time of a picture goes: text encoding, every sampler step, decoding, and the gaps between them.

MODEL, CLIP and VAE are handed on as clones that note when their work begins and ends. On a GPU these are CUDA events, which
cost some microseconds and wait for nothing; the only wait is when the report is made. Other devices are waited for at each
moment. Beside each step's time on the GPU stands the time Python needed for it. Where the two are equal inside the model too,
and the GPU had nothing left to do when the model was called, the GPU waits for Python; a sampler that reads a number from
the GPU at every step takes as long as the GPU does, and is no sign of it.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..host import fresh_memory
from .attention_override import override_of
from .compilation import RegionalCompiler, compiler_of
from .profile_spans import (
    DECODE,
    ENCODE,
    ENCODE_IMAGE,
    FINISH,
    PREPARE,
    STEP,
    Moment,
    Profile,
    Span,
    resolve,
)
from .step_caches import spared

KEY = "hotpath_profile"
MOST_SPANS = 20_000  # a run has a few hundred
CLIP_METHODS = {"encode_from_tokens": ENCODE, "encode_from_tokens_scheduled": ENCODE, "generate": ENCODE}
VAE_METHODS = {
    "decode": DECODE, "decode_tiled": DECODE, "encode": ENCODE_IMAGE, "encode_tiled": ENCODE_IMAGE
}  # fmt: skip


class ProfileSession:
    """What the clones of one profile node note. Safe across threads; holds a run until it is reported."""

    def __init__(self) -> None:
        self._model: weakref.ref[Any] | None = None
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self._local = threading.local()
        self._before = dynamo_counts()
        self._processor: list[tuple[float, float]] = []  # seconds of sampling on a CPU: of the program, of the system

    def __deepcopy__(self, _: Any) -> ProfileSession:
        return self

    def watch(self, model: Any) -> None:
        """Report what happens inside `model`, a ModelPatcher, as long as others keep it."""
        self._model = weakref.ref(model)

    def add(self, span: Span) -> None:
        with self._lock:
            if len(self._spans) < MOST_SPANS:
                self._spans.append(span)

    @contextmanager
    def stage(self, name: str, device: torch.device | None) -> Iterator[None]:
        """Note what happens inside as `name`, unless that is itself part of a stage."""
        if getattr(self._local, "inside", False):
            yield
            return
        self._local.inside = True
        start = Moment.now(device)
        try:
            yield
        finally:
            self._local.inside = False
            self.add(Span(name, start, Moment.now(device)))

    def outer_sample(
        self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """An OUTER_SAMPLE wrapper: what comes before the first step, and each step up to the sampler's callback.

        Samplers of second order call it between the two evaluations of a step, so there a bar holds the second one of
        the step before.
        """
        device = executor.class_obj.model_patcher.load_device
        _evaluations_first(executor.class_obj.model_options)
        mask, callback, *rest = (
            args if len(args) >= 2 else (kwargs.pop("denoise_mask", None), kwargs.pop("callback", None))
        )
        self.watch(executor.class_obj.model_patcher)  # patches that came after the profile node count too
        run = _Steps(self, device, compiler_of(executor.class_obj.model_patcher))
        before = getattr(self._local, "run", None)
        self._local.run, self._local.inside = run, True

        def after_step(*step: Any) -> Any:
            run.step_done()
            return callback(*step) if callback is not None else None

        processor = fresh_memory.ProcessorTime(device)
        try:
            return executor(noise, latent, sampler, sigmas, mask, after_step, *rest, **kwargs)
        finally:
            self._local.run, self._local.inside = before, False
            run.close()
            self._processor.append(processor.spent())

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A PREDICT_NOISE wrapper: one evaluation of the model, all of CFG included."""
        run = getattr(self._local, "run", None)
        if run is None:
            return executor(*args, **kwargs)
        start, before = run.model_starts(), spared(executor.class_obj)
        try:
            return executor(*args, **kwargs)
        finally:
            run.model_ends(start, spared(executor.class_obj) > before)

    def take(self) -> Profile:
        """The run since the last report, as numbers. Waits for the GPU, and forgets the run."""
        with self._lock:
            spans, self._spans = self._spans, []
            spent, self._processor = self._processor, []
        counts, self._before = self._before, dynamo_counts()
        memory = fresh_memory.advice(sum(user for user, _ in spent), sum(system for _, system in spent))
        return resolve(spans, (*self._notes(counts), *([memory] if memory else ())))

    def _notes(self, before: dict[str, int]) -> tuple[str, ...]:
        notes = [f"torch.compile: {text}" for text in _changes(before, dynamo_counts())]
        model = self._model() if self._model is not None else None
        compiler = compiler_of(model) if model is not None else None
        if compiler is not None:
            notes += [f"compiled model: {line.strip()}" for line in compiler.report().splitlines()]
        override = override_of(model) if model is not None else None
        if override is not None:
            notes += [f"attention: {line}" for line in override.log.report().splitlines()[1:]]
        return tuple(notes)


class _Steps:
    """The steps of one sampling."""

    def __init__(self, session: ProfileSession, device: torch.device, compiler: RegionalCompiler | None) -> None:
        self.session, self.device, self.compiler = session, device, compiler
        self.last = Moment.now(device)
        self.graphs = self._graphs()
        self.model: list[tuple[Moment, Moment]] = []
        self.spared = 0
        self.started = False
        self.ended: Moment | None = None  # the last call of the model

    def _graphs(self) -> int:
        return self.compiler.graphs if self.compiler is not None else 0

    def model_starts(self) -> Moment:
        moment = Moment.now(self.device)
        moment.behind = self.ended is not None and self.ended.event is not None and not self.ended.event.query()
        if not self.started:
            self.started = True
            self._close(PREPARE, moment)
        return moment

    def model_ends(self, start: Moment, spared: bool = False) -> None:
        self.ended = Moment.now(self.device)
        self.model.append((start, self.ended))
        self.spared += spared

    def step_done(self) -> None:
        self._close(STEP, Moment.now(self.device))

    def _close(self, stage: str, moment: Moment) -> None:
        graphs = self._graphs()
        self.session.add(Span(stage, self.last, moment, graphs - self.graphs, self.model, self.spared))
        self.last, self.graphs, self.model, self.spared = moment, graphs, [], 0

    def close(self) -> None:
        """What follows the last step; a step that was interrupted counts as that."""
        self._close(FINISH, Moment.now(self.device))


def _evaluations_first(options: dict[str, Any]) -> None:
    """Put our PREDICT_NOISE wrapper outside of all others in the options of one sampling: a step cache does not call what is
    inside of it."""
    from comfy.patcher_extension import WrappersMP

    wrappers = options["transformer_options"]["wrappers"]
    ours = wrappers[WrappersMP.PREDICT_NOISE]
    wrappers[WrappersMP.PREDICT_NOISE] = {KEY: ours[KEY], **ours}


def dynamo_counts() -> dict[str, int]:
    """What torch.compile counted so far in this process; read, never changed."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return {}
    counters = utils.counters
    return {
        "graphs compiled": counters["stats"].get("unique_graphs", 0),
        "graph breaks": sum(counters["graph_break"].values()),
        "CUDA graphs skipped": counters["inductor"].get("cudagraph_skips", 0),
    }


def _changes(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [f"{n - before.get(name, 0)} {name}" for name, n in after.items() if n > before.get(name, 0)]


def _timed_class(kind: type, methods: tuple[tuple[str, str], ...]) -> type:
    """A subclass of `kind` whose `methods` (name, stage) are noted, and whose clones are of the same class."""

    def timed(name: str, stage: str) -> Callable[..., Any]:
        original = getattr(kind, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Packs bring text encoders and VAEs that nobody moves; the host's clock alone times them.
            patcher = getattr(self, "patcher", None)
            with self.hotpath_profile.stage(stage, getattr(patcher, "load_device", None)):
                return original(self, *args, **kwargs)

        return method

    members: dict[str, Any] = {name: timed(name, stage) for name, stage in methods if hasattr(kind, name)}
    if hasattr(kind, "clone"):

        def clone(self: Any, *args: Any, **kwargs: Any) -> Any:
            return timed_copy(kind.clone(self, *args, **kwargs), self.hotpath_profile, dict(methods))

        members["clone"] = clone
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **members})


_timed_class_of: Callable[..., type] = functools.cache(_timed_class)


def timed_copy(thing: Any, session: ProfileSession, methods: dict[str, str]) -> Any:
    """A shallow copy of a CLIP or VAE that notes its work in `session`. The original is not changed."""
    made = copy.copy(thing)
    kind = type(thing)
    if "hotpath_profile" in vars(thing):
        kind = kind.__mro__[1]  # profiled before: not twice
    made.__class__ = _timed_class_of(kind, tuple(methods.items()))
    made.hotpath_profile = session
    return made


def profile(model: Any, clip: Any = None, vae: Any = None) -> tuple[Any, Any, Any, ProfileSession]:
    """Clones of a MODEL, and of a CLIP and a VAE if given, that note their work, and the session they note it in."""
    from comfy.patcher_extension import WrappersMP

    session = ProfileSession()
    made = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, session.outer_sample),
        (WrappersMP.PREDICT_NOISE, session.predict_noise),
    ):
        made.remove_wrappers_with_key(kind, KEY)
        made.add_wrapper_with_key(kind, KEY, wrapper)
    session.watch(made)
    if clip is not None:
        clip = timed_copy(clip.clone() if hasattr(clip, "clone") else clip, session, CLIP_METHODS)
    timed_vae = timed_copy(vae, session, VAE_METHODS) if vae is not None else None
    return made, clip, timed_vae, session
