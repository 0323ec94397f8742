"""Writing the answer token by token: what runs on a decode path, the loop around it, and the text while it grows.

The plain path is the library's forward pass with its own cache; the static path is `decoding.DecodeStep`. Both are fed
by the same loop, which reads tokens one step behind the device, so that the device never waits for the host.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import host
from ..host import pinned_memory
from ..host.compiling import compiled_call, inductor
from ..host.errors import first_line, is_out_of_memory
from ..host.interruption import is_stop
from . import decode_attention, decoding, fused_decode, mixed_decoding, replayed_prefill, rotary
from .decode_path import GRAPHS, DecodePath, simpler
from .encoder_outputs import given
from .loaded_model import LoadedModel, graph_memory
from .prefill import Prefilled, left_padded, prefill, rotary_positions
from .prompts import Prompt
from .sampling import Sampler, Sampling
from .timing import Timing

log = logging.getLogger("hotpath.vision_language")

COMPILED_SHAPES = 256  # versions of a decode layer: models, batch sizes and buckets together
WORKSPACES = 2  # decode buffers kept per model: the last batch sizes and buckets
OnTokens = Callable[[list[list[int]]], None]


class Runner(Protocol):
    def run(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] after `tokens` [B]."""


class PlainRunner:
    """The library's forward pass, one token at a time over its own cache: the reference for every other path."""

    def __init__(self, model: LoadedModel, prefilled: Prefilled) -> None:
        self.network, self.cache = model.network, {model.cache_argument: prefilled.cache}
        self.mask, self.positions = prefilled.mask, prefilled.positions.clone()
        self.axes = model.processor is not None
        self.text_positions = prefilled.mask.sum(-1)

    def run(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(tokens), 1)), dim=1)
        positions = self.positions.unsqueeze(1)
        if self.axes:
            positions = torch.stack((self.text_positions.unsqueeze(1), positions, positions, positions))
        result = self.network(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            **self.cache,
        )
        self.positions += 1
        self.text_positions = self.text_positions + 1
        return result.logits[:, -1]


def compiler(backend: str | Callable[..., Any] | None = None) -> Callable[[Any], Any]:
    """How a part of the step is compiled: once for all layers, anew only for another batch size or bucket."""
    if backend is None:
        # A product with one row is written as a reduction then, which reads weights at the speed of the memory.
        backend = inductor({"coordinate_descent_tuning": True})
    return lambda part: torch.compile(part, fullgraph=True, dynamic=False, backend=backend)


@contextmanager
def many_shapes() -> Iterator[None]:
    """Let the compiler keep a version for every batch size and bucket; by default it gives up after eight."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: COMPILED_SHAPES}):
        yield


def workspace(
    model: LoadedModel, path: DecodePath, rows: int, tokens: int, backend: str | Callable[..., Any] | None = None
) -> decoding.Workspace:
    """The buffers for `rows` answers of up to `tokens` positions, those of an earlier call when the bucket is the same.

    On CUDA a new one compiles and captures here, before anything is written into it.
    """
    length = decoding.bucket_length(tokens)
    places = decoding.weight_addresses(model.network)
    if model.device_state.get("addresses", places) != places:
        # The host moved weights out and in again without telling: what points at them is void.
        model.device_state.pop("workspaces", None)
        log.info("%s: its weights moved; decode buffers are made anew", model.folder.name)
    model.device_state["addresses"] = places
    kept: dict[tuple[str, int, int], decoding.Workspace] = model.device_state.setdefault("workspaces", {})
    key = (path.name, rows, length)
    if key in kept:
        kept[key] = kept.pop(key)  # now the most recently used
        return kept[key]
    while len(kept) >= WORKSPACES:
        kept.pop(next(iter(kept)))
    attention, why = decode_attention.TORCH, ""
    if path.name in GRAPHS:
        attention, why = decode_attention.choose(
            decoding.query_shape(model.network, rows), length, model.device, model.dtype
        )
    steps: dict[tuple[str, str], decoding.DecodeStep] = model.device_state.setdefault("steps", {})
    style = (path.name if path.name in ("fused", "compiled") else "plain", attention)
    if style not in steps and path.name == "fused":
        host.current().show_text("Measuring kernels for this model on this card (once) ...")
        with torch.no_grad():
            steps[style] = fused_decode.step_of(model.network, attention)
    elif style not in steps:
        compile_part = compiler(backend) if path.name == "compiled" else None
        steps[style] = mixed_decoding.step_of(model.network, compile_part, attention)
    made = decoding.Workspace(steps[style], rows, length, model.device, model.dtype, growing=path.name == "static")
    notes = [steps[style].note, f"attention {attention}, {why}" if why else ""]
    made.note = "; ".join(note for note in notes if note)
    if model.device.type == "cuda":
        made.memory = graph_memory(model)
    if path.name in GRAPHS:
        host.current().show_text(f"Preparing fast decoding for {length:,} tokens (once) ...")
        with torch.no_grad(), many_shapes():
            if model.device.type == "cuda":
                made.capture()
            else:
                made.warm_up()
    kept[key] = made
    return made


def runner(model: LoadedModel, path: DecodePath, prefilled: Prefilled, new_tokens: int) -> tuple[Runner, DecodePath]:
    """The runner of `path`, continuing after `prefilled`, and the path that it took.

    A path that cannot be prepared here (no compiler, a driver that refuses the graph) gives way to the next simpler
    one; its note says why, and it is not tried again while the weights stay where they are.
    """
    rows, filled = prefilled.mask.shape
    buffers, path = prepared(
        model,
        path,
        rows,
        filled + new_tokens,
        lambda buffers: buffers.begin(*prefilled.layers(), prefilled.mask, prefilled.positions),
    )
    return (PlainRunner(model, prefilled) if buffers is None else buffers), path


def prepared(
    model: LoadedModel,
    path: DecodePath,
    rows: int,
    tokens: int,
    begin: Callable[[decoding.Workspace], None] = lambda buffers: None,
) -> tuple[decoding.Workspace | None, DecodePath]:
    """The buffers of `path`, or of a simpler one as `runner` tells, after `begin`; None for the plain one."""
    failed: dict[str, str] = model.device_state.setdefault("failed paths", {})
    why: list[str] = []
    while path.name != "plain":
        if path.name not in failed:
            try:
                with compiled_call() if path.name == "compiled" else nullcontext():
                    buffers = workspace(model, path, rows, tokens)
                    begin(buffers)
                notes = [path.note, *([buffers.note] if buffers.note else []), *why]
                return buffers, replace(path, note="; ".join(notes))
            except Exception as error:  # of compilers and drivers, in all its forms; Triton's are no RuntimeError
                if is_stop(error) or is_out_of_memory(error):
                    raise
                failed[path.name] = first_line(error)
                log.warning("%s: the %s decode path failed", model.folder.name, path.name, exc_info=True)
        why.append(f"not {path.name}, because it failed here: {failed[path.name]}")
        path = simpler(path, model.device)
    return None, replace(path, note="; ".join([path.note, *why]))


@dataclass(frozen=True)
class Started:
    """An answer after its prefill. logits: [B, V] of the first token. reused: tokens that came from the prefix cache."""

    runner: Runner
    path: DecodePath
    logits: Tensor
    reused: int
    prefill: str  # what ran, for the report


def start(
    model: LoadedModel,
    path: DecodePath,
    prompts: Sequence[Prompt],
    answers: int,
    new_tokens: int,
    use_prefix: bool,
    kept: bool,
    timing: Timing,
) -> Started:
    """Prefill `prompts`, each for `answers` answers, and have what decodes after it (the network is resident).

    One question on the way of a CUDA graph is prefilled by a graph as well, unless the model does not stay to use it
    again (kept=False).
    """
    failed: dict[str, str] = model.device_state.setdefault("failed paths", {})
    graphs = model.device.type == "cuda" and path.name in GRAPHS
    note = ""
    if graphs and len(prompts) == 1 and answers == 1 and kept:
        if reason := failed.get("replayed prefill") or replayed_prefill.why_not(model, prompts[0].length):
            note = f"the library's, because {reason}"
        elif found := _replayed(model, path, prompts[0], new_tokens, use_prefix, timing):
            return found
        else:
            note = f"the library's, because {failed.get('replayed prefill', 'there is no graph here')}"
    with timing.stage("prefill", on_device=True):
        filled = prefill(model, prompts, use_prefix)
    filled = filled.repeated(answers)
    with timing.stage("compile"):
        runs, path = runner(model, path, filled, new_tokens)
    return Started(runs, path, filled.logits, filled.reused, note)


def _replayed(
    model: LoadedModel, path: DecodePath, prompt: Prompt, new_tokens: int, use_prefix: bool, timing: Timing
) -> Started | None:
    """`start` by a recording; None, and why in the failed paths, where that does not go."""
    with timing.stage("compile"):
        buffers, path = prepared(model, path, 1, prompt.length + new_tokens)
    if buffers is None or buffers.graph is None:
        return None
    try:
        with timing.stage("prefill", on_device=True):
            logits, reused, note = replayed_prefill.replay(model, buffers, prompt, use_prefix)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        if is_stop(error):
            raise
        model.device_state["failed paths"]["replayed prefill"] = f"a recording failed here: {first_line(error)}"
        log.warning("%s: the prefill could not be recorded", model.folder.name, exc_info=True)
        buffers.prefills.clear()
        return None
    return Started(buffers, path, logits, reused, note)


class TokenReader:
    """Tokens of the device on the host, without waiting for the step that is running."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.behind = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[Tensor, Any]] = deque()
        self._staging: list[Tensor] = []
        if self.behind:
            self._staging = [pinned_memory.empty((rows,), torch.long) for _ in range(self.behind + 2)]
        self._turn = 0

    def push(self, tokens: Tensor) -> None:
        if not self.behind:
            self._waiting.append((tokens, None))
            return
        staged = self._staging[self._turn % len(self._staging)]
        self._turn += 1
        staged.copy_(tokens, non_blocking=True)
        done: Any = torch.cuda.Event()
        done.record()
        self._waiting.append((staged, done))

    def pop(self, all_of_them: bool = False) -> list[list[int]]:
        """Tokens [B] of each step that is ready to be read, oldest first."""
        ready: list[list[int]] = []
        while len(self._waiting) > (0 if all_of_them else self.behind):
            tokens, done = self._waiting.popleft()
            if done is not None:
                done.synchronize()
            ready.append(tokens.tolist())
        return ready


def decode(
    runner: Runner,
    sampler: Sampler,
    logits: Tensor,
    most: int,
    stop_ids: frozenset[int],
    on_tokens: OnTokens | None = None,
) -> list[list[int]]:
    """Up to `most` tokens for every row, each ended by (and without) a stop token.

    Checks for an interrupt at every token. on_tokens gets all rows whenever they grew.
    """
    rows = logits.shape[0]
    written: list[list[int]] = [[] for _ in range(rows)]
    ended = [False] * rows
    reader = TokenReader(rows, logits.device)

    def read(steps: list[list[int]]) -> bool:
        for step in steps:
            for row, token in enumerate(step):
                ended[row] = ended[row] or token in stop_ids
                if not ended[row]:
                    written[row].append(token)
        if steps and on_tokens is not None:
            on_tokens(written)
        return all(ended)

    here = host.current()
    with torch.no_grad():
        for index in range(most):
            here.check_interrupt()
            tokens = sampler(logits)
            reader.push(tokens)
            if read(reader.pop()) or index + 1 == most:
                break
            logits = runner.run(tokens)
        if not all(ended):
            read(reader.pop(all_of_them=True))
    return written


def beam_search(model: LoadedModel, prompt: Prompt, sampling: Sampling, most: int, rows: int) -> list[list[int]]:
    """The library's beam search over one prompt; `rows` best answers. Checks for an interrupt at every token."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    here = host.current()

    class Interruptible(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            here.check_interrupt()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    ids, mask, kinds = left_padded([prompt], model.pad_id)
    placed: AbstractContextManager[None] = nullcontext()
    if prompt.items and model.model_type in rotary.TRAINED_SO:
        placed = rotary.given_to(model.network.model, rotary_positions(model, ids, mask, kinds, prompt.items)[0][1:])
    ids, mask, kinds = (part.to(model.device) for part in (ids, mask, kinds))
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    steps = [item.step for item in prompt.items if item.kind == "video"]
    if prompt.items and "mm_token_type_ids" in model.tower_signature:
        arguments["mm_token_type_ids"] = kinds.int()
    if steps and "second_per_grid_ts" in model.tower_signature:
        arguments["second_per_grid_ts"] = torch.tensor(steps, device=model.device)
    with torch.no_grad(), placed, given(model, prompt.items) as seen:
        made = model.network.generate(
            **arguments,
            **seen,
            max_new_tokens=most,
            do_sample=False,
            num_beams=sampling.beams,
            num_return_sequences=min(rows, sampling.beams),
            repetition_penalty=sampling.repetition_penalty,
            stopping_criteria=StoppingCriteriaList([Interruptible()]),
            pad_token_id=model.pad_id,
        )
    # What the library remembers of this call must not reach the next one.
    if hasattr(getattr(model.network, "model", None), "rope_deltas"):
        model.network.model.rope_deltas = None
    return [until_stop(row, model.stop_ids) for row in made[:, ids.shape[1] :].tolist()]


def until_stop(tokens: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[:end])
