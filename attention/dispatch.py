"""One `attend(q, k, v, ...)` over every backend: chosen once per signature, with the reason on record.

`auto` picks among exact backends by a short measurement. A lossy one runs only when it is asked for by name, and is
checked against float32 when a signature first meets it, as is torch's own choice where nothing is measured; one that
fails is off for that signature. Nothing is measured or checked while torch traces or a CUDA graph records: there, exact
kernels of torch stay in the graph and everything else is one opaque operator that decides when it runs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .capabilities import AttentionCall, Backend, DeviceFacts, device_facts, one_line
from .choice import Choice, MeasuredChoices, fastest, milliseconds
from .compiled import attend_traced
from .events import AttentionEvent, AttentionLog
from .quantized_backends import QUANTIZED_BACKENDS
from .reference import fault
from .torch_backends import TORCH_BACKENDS

log = logging.getLogger("hotpath.attention")

BACKENDS: tuple[Backend, ...] = (*TORCH_BACKENDS, *QUANTIZED_BACKENDS)
# Tried in this order where nothing is measured, and the order that settles a tie.
AUTO = ("sdpa_cudnn", "sdpa_flash", "flash3", "flash2", "sdpa_efficient", "xformers")
LAST = ("sdpa", "sdpa_math")  # they take everything
# Devices where nothing but torch's own choice of a kernel is there to measure, and where kernels that it chose were wrong: for
# wide heads and on integrated cards of AMD's (pytorch 189849, ROCm/TheRock 1908), on Intel's older ones (oneDNN 5510).
UNMEASURED = ("hip", "xpu")
CHAINS = {"sage": ("sage2", "comfy_kitchen_int8", "sage1")}
POLICIES = ("auto", "sage", *(backend.name for backend in BACKENDS))
HND, NHD = "HND", "NHD"  # [B, heads, N, D], as torch has it; [B, N, heads, D], as flash-attn has it
PLANS = 1024

Given = tuple[Tensor, Tensor, Tensor, "Tensor | None", "float | None"]
"""q, k, v, mask, scale: what a backend's `run` takes."""
Measure = Callable[[list[Backend]], "Choice | None"]


class AttentionUnavailable(RuntimeError):
    """What was asked for strictly cannot run; the message says why."""


@dataclass(frozen=True)
class AttentionPolicy:
    """backend: one of POLICIES. strict: raise AttentionUnavailable instead of taking another backend."""

    backend: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.backend not in POLICIES:
            raise ValueError(f"{self.backend!r} is no attention backend; there are {', '.join(POLICIES)}.")


@dataclass(frozen=True)
class Plan:
    """What computes a signature, and why. proved: it ran before, and its result was checked where that is done."""

    backend: Backend
    event: AttentionEvent
    proved: bool


class AttentionDispatcher:
    """A registry, what was measured, and what went wrong. The pack has one (`dispatcher`); tests make their own.

    device, clock: stand in for torch's facts and for timing.
    """

    def __init__(
        self,
        backends: Iterable[Backend] = BACKENDS,
        choices: MeasuredChoices | None = None,
        device: Callable[[torch.device], DeviceFacts] = device_facts,
        clock: Callable[[Callable[[], object], torch.device], float] = milliseconds,
    ) -> None:
        self.backends = {backend.name: backend for backend in backends}
        self.choices = choices if choices is not None else MeasuredChoices()
        self.device = device
        self.clock = clock
        self._plans: dict[tuple[AttentionPolicy, AttentionCall, bool], Plan] = {}
        self._off: dict[tuple[str, AttentionCall], str] = {}
        self._lock = threading.RLock()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        *,
        policy: AttentionPolicy,
        record: AttentionLog | None = None,
        exact: bool = False,
    ) -> Tensor:
        """q [B, H, N, D]; see the function `attend`."""
        call = AttentionCall.of(q, k, v, mask)
        given = (q, k, v, mask, scale)
        out: Tensor | None = None
        if _recording(q.device):
            plan = self.plan(call, policy, exact)
            out = plan.backend.run(*given)
        while out is None:  # what failed is switched off, so that the next plan is another one
            plan = self.plan(call, policy, exact, lambda able: self._measure(able, call, given))
            out = self._run(plan, (policy, call, exact), given)
        if record is not None:
            record.note(plan.event)
        return out

    def plan(
        self,
        call: AttentionCall,
        policy: AttentionPolicy,
        exact: bool = False,
        measure: Measure | None = None,
    ) -> Plan:
        """What will compute `call` under `policy`. Raises AttentionUnavailable when strict and nothing asked for can.

        exact: the model asked for full precision in this call. measure: times candidates, when `auto` has several.
        """
        key = (policy, call, exact)
        with self._lock:
            if (known := self._plans.get(key)) is not None:
                return known
            backend, reason = self._asked_for(call, policy, exact)
            lasting = True
            if backend is None:
                backend, why, lasting = self._fastest_exact(call, measure)
                reason = "; ".join(filter(None, (reason, why)))
            plan = Plan(backend, AttentionEvent(policy.backend, backend.name, reason, call.describe()), False)
            if lasting:
                while len(self._plans) >= PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = plan
            return plan

    def _asked_for(self, call: AttentionCall, policy: AttentionPolicy, exact: bool) -> tuple[Backend | None, str]:
        """The backend that was named, or the first able one of a chain; None, with the reasons, when it cannot run."""
        if policy.backend == "auto":
            return None, ""
        facts = self.device(call.device)
        reasons: list[str] = []
        for name in CHAINS.get(policy.backend, (policy.backend,)):
            backend = self.backends[name]
            if exact and not backend.exact:
                return None, "the model asks for full precision here"
            refusal = self._off.get((name, call)) or backend.refusal(call, facts)
            if refusal is None:
                return backend, "; ".join(reasons)
            reasons.append(f"{name}: {refusal}")
        if policy.strict:
            raise AttentionUnavailable(
                f"Attention by {policy.backend} cannot compute {call.describe()}: {'; '.join(reasons)}. "
                "Choose auto, or switch strict off."
            )
        return None, "; ".join(reasons)

    def _fastest_exact(self, call: AttentionCall, measure: Measure | None) -> tuple[Backend, str, bool]:
        """(backend, why that one, whether it stays the one for such calls)."""
        facts = self.device(call.device)
        able = [
            self.backends[name]
            for name in AUTO
            if name in self.backends
            and (name, call) not in self._off
            and self.backends[name].refusal(call, facts) is None
        ]
        if len(able) < 2:
            wrong = None if able else self._off.get((LAST[0], call))
            reason = "the one candidate here" if wrong is None else f"{LAST[0]}: {wrong}"
            return (able[0] if able else self._last(call)), reason, True
        choice = self.choices.get(call, facts)
        if choice is None or self.backends.get(choice.backend) not in able:  # it cannot here, or failed since
            if measure is None:
                return able[0], "not measured yet", False
            choice = measure(able)
            if choice is None:
                able = [backend for backend in able if (backend.name, call) not in self._off]
                if not able:
                    return self._last(call), "the others were wrong when they were measured", True
                # For good: what ran out of memory now would do so at every call.
                return able[0], "there was no memory to measure with", True
            self.choices.put(call, facts, choice)
        return self.backends[choice.backend], choice.describe(), True

    def _last(self, call: AttentionCall) -> Backend:
        """One of those that take everything."""
        return self.backends[next(name for name in LAST if name in self.backends and (name, call) not in self._off)]

    def _measure(self, able: list[Backend], call: AttentionCall, given: Given) -> Choice | None:
        """Time `able` on these tensors; those that fail or compute something else are off for this signature."""
        times: dict[str, float] = {}
        # The backward pass would time other kernels, and keep what it needs of every run.
        with torch.no_grad():
            for backend in able:
                run = functools.partial(backend.run, *given)
                try:
                    reason = fault(run(), *given)
                    if reason is None:
                        times[backend.name] = self.clock(run, call.device)
                except torch.OutOfMemoryError:
                    log.info("attention: %s was not timed for %s: out of memory", backend.name, call.describe())
                    continue
                except Exception as error:
                    reason = f"it fails: {one_line(error)}"
                if reason is not None:
                    self._switch_off(backend, call, reason)
        return fastest(times) if times else None

    def _run(self, plan: Plan, key: tuple[AttentionPolicy, AttentionCall, bool], given: Given) -> Tensor | None:
        """What the plan for `key` computes, checked until it is proved. None when it failed: it is off then."""
        backend, call = plan.backend, key[1]
        try:
            out = backend.run(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if backend.name in LAST:
                raise
            self._switch_off(backend, call, f"it fails: {one_line(error)}")
            return None
        if plan.proved:
            return out
        if not backend.exact or (backend.name == LAST[0] and self.device(call.device).type in UNMEASURED):
            try:
                with torch.no_grad():
                    reason = fault(out, *given)
            except torch.OutOfMemoryError:  # there was memory for the result, and that is what was asked for
                log.info("attention: %s was not checked for %s: out of memory", backend.name, call.describe())
                return out
            except Exception as error:
                reason = None if backend.exact else f"it fails: {one_line(error)}"
            if reason is not None:
                self._switch_off(backend, call, reason)
                return None
        with self._lock:
            if key in self._plans:
                self._plans[key] = replace(plan, proved=True)
        return out

    def _switch_off(self, backend: Backend, call: AttentionCall, reason: str) -> None:
        with self._lock:
            while len(self._off) >= PLANS:
                del self._off[next(iter(self._off))]
            self._off[backend.name, call] = reason
            for key in [key for key, plan in self._plans.items() if key[1] == call and plan.backend is backend]:
                del self._plans[key]
        log.warning("attention: %s is off for %s, because %s", backend.name, call.describe(), reason)

    def traced(self, call: AttentionCall, policy: AttentionPolicy, exact: bool) -> tuple[str, str]:
        """(backend, reason) for a graph that is being traced; only dtype, width, mask and device of `call` count."""
        backend, because = self._asked_for(call, policy, exact)
        failed = self._failed_at_some_size(call)
        if backend is not None and (policy.strict or backend.name not in failed):
            return backend.name, because
        if backend is not None:
            because = f"{backend.name}: {failed[backend.name]}"
        facts = self.device(call.device)
        choice = self.choices.largest(call, facts)
        times = {
            name: ms
            for name, ms in (choice.milliseconds.items() if choice is not None else ())
            if name not in failed
            and (known := self.backends.get(name)) is not None
            and known.in_graph
            and known.refusal(call, facts) is None
        }
        if times:
            reason = f"fastest of {len(times)} that a graph can hold, at the largest size measured so far"
            return fastest(times).backend, "; ".join(filter(None, (because, reason)))
        if "sdpa" in failed:
            return "sdpa_math", "; ".join(filter(None, (because, f"sdpa: {failed['sdpa']}")))
        return "sdpa", "; ".join(filter(None, (because, "nothing was measured before compiling, torch picks")))

    def _failed_at_some_size(self, call: AttentionCall) -> dict[str, str]:
        """What is off for a call that differs from `call` in its sizes only: no graph for all sizes may hold it."""
        with self._lock:
            return {
                name: reason
                for (name, known), reason in self._off.items()
                if (known.device, known.dtype, known.width, known.value_width, known.mask)
                == (call.device, call.dtype, call.width, call.value_width, call.mask)
            }

    def available(self, device: torch.device) -> dict[str, str | None]:
        """Every backend by name, with the reason why it cannot run on `device`, or None."""
        facts = self.device(device)
        return {name: backend.unavailable(facts) for name, backend in self.backends.items()}


def _recording(device: torch.device) -> bool:
    """Whether a CUDA graph records: then nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def library_versions() -> dict[str, str]:
    """Of all that could change which kernel is fastest."""
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("flash-attn", "flash-attn-3", "xformers", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def dispatcher() -> AttentionDispatcher:
    """The pack's own."""
    return AttentionDispatcher(choices=MeasuredChoices(versions=library_versions()))


def keep_choices_in(cache: Path) -> None:
    """Keep what `dispatcher` measures in files in a folder of its own under `cache`."""
    choices, folder = dispatcher().choices, cache / "attention"
    if choices.folder != folder:
        choices.folder = folder
        choices.forget()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    layout: str = HND,
    *,
    policy: AttentionPolicy,
    record: AttentionLog | None = None,
    exact: bool = False,
) -> Tensor:
    """softmax(scale q k^T + mask) v, by the backend that `policy` leads to.

    layout HND: q [B, H, N, D], k [B, H', M, D], v [B, H', M, D'], H a multiple of H'. layout NHD: [B, N, H, D] and so on.
    All of one floating dtype and on one device; none is changed. mask: broadcasts to [B, H, N, M], True where a key
    takes part, or added to the logits. scale: D ** -0.5 by default. exact: no lossy backend for this call.
    Returns [B, H, N, D'] or [B, N, H, D'], in q's dtype.
    Raises AttentionUnavailable under a strict policy, ValueError for another layout.
    """
    if layout not in (HND, NHD):
        raise ValueError(f"{layout!r} is no attention layout; there are {HND} and {NHD}.")
    if layout == NHD:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is not None and mask.ndim < 4:
        mask = mask[(None,) * (4 - mask.ndim)]
    if torch.compiler.is_compiling():
        number = record.number if record is not None else ""
        out = attend_traced(q, k, v, mask, scale, policy.backend, policy.strict, exact, number)
    else:
        out = dispatcher().attend(q, k, v, mask, scale, policy=policy, record=record, exact=exact)
    return out.transpose(1, 2) if layout == NHD else out
