"""One call from questions to answers: look up or encode the pictures, prefill, write, and report what ran and why.

`answer` is what every node and the captioner call. Several questions are answered as one left-padded batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .. import host
from ..attention.capabilities import on_device
from ..host.errors import is_out_of_memory
from . import answers, linear_attention
from .budgets import PRESETS, Budget
from .decode_path import DecodePath, choose_path
from .embeddings import EmbeddingCache, VisualItem, look_up, to_device
from .generation import beam_search, decode, start
from .loaded_model import LoadedModel
from .loading import MODELS
from .prefill import states_at
from .prompts import Prompt, Question, build
from .sampling import Sampler, Sampling
from .timing import Timing
from .tower import RECORDED_TOWER, encode, keep

log = logging.getLogger("hotpath.vision_language")

SHOWN_EVERY = 0.1  # seconds between two looks at the text while it is written
SETTLED_AFTER = 16  # tokens after which a piece of text is decoded no more


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is made.

    answers: how many to each question (one question only). cache_images: use and fill the cache of vision features;
    cache_on_disk: its tier on disk as well. reuse_prefix: keep the keys and values of the pictures for the next
    question. decode: one of decode_path.DECODE_PATHS. keep_loaded: leave the weights on the device afterwards.
    encode_jointly: show the tower all pictures of a batch at once. node_id: where the growing text is shown.
    """

    max_new_tokens: int = 512
    budget: Budget = PRESETS["balanced"]
    answers: int = 1
    cache_images: bool = True
    cache_on_disk: bool = False
    reuse_prefix: bool = True
    decode: str = "auto"
    keep_loaded: bool = True
    encode_jointly: bool = False
    stream: bool = True
    node_id: str | None = None


@dataclass
class Answer:
    """One answer and how it came about: text without the thoughts before it, raw with them as they were written.

    finished: the model ended it, not the limit. report is the same for all answers of a batch, and so are notes: what was not
    done as asked, and why.
    """

    text: str
    raw: str
    thoughts: str
    tokens: int
    finished: bool
    report: str = ""
    items: list[VisualItem] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class BatchSize:
    """The most questions at a time that the device had room for; None: as many as are asked.

    Held by who asks one batch after the other, so that the next ones are not too large again.
    """

    most: int | None = None


@dataclass
class _Run:
    """The facts of one call, for its report."""

    notes: list[str]
    timing: Timing
    items: list[VisualItem]
    prompt_tokens: int = 0
    reused: int = 0
    prefill: str = ""
    path: str = ""
    encoded: int = 0


@torch.inference_mode(False)
@torch.no_grad()
def answer(
    model: LoadedModel,
    questions: Sequence[Question],
    sampling: Sampling,
    options: AnswerOptions = AnswerOptions(),
    looked_up: Sequence[list[VisualItem]] | None = None,
    fitting: BatchSize | None = None,
) -> list[Answer]:
    """Answers in the order of `questions`; with options.answers = n, n answers to the one question.

    looked_up: what `embeddings.look_up` gave for each question, when it was called ahead.
    When the device runs out of memory, fewer questions are asked at a time, as often as it takes, and `fitting` gets the
    number; a single question is tried once more with half the budget of its pictures. The report tells.
    """
    if not questions:
        return []
    if options.answers > 1 and len(questions) > 1:
        raise ValueError("Several answers can be asked for one question at a time: ask them one by one.")
    for question in questions:
        if model.processor is None and (question.pictures or question.clips):
            raise ValueError(f"{model.folder.name} is a text-only model: choose a -VL model to ask about pictures.")
        if not question.prompt.strip() and not question.pictures and not question.clips:
            raise ValueError("There is nothing to answer: give a prompt, a picture, or both.")
    sampling = sampling.resolved(model.network.generation_config)
    return _fitted(model, questions, sampling, options, looked_up, BatchSize() if fitting is None else fitting)


def _fitted(
    model: LoadedModel,
    questions: Sequence[Question],
    sampling: Sampling,
    options: AnswerOptions,
    looked_up: Sequence[list[VisualItem]] | None,
    fitting: BatchSize,
) -> list[Answer]:
    notes = list(model.notes)
    if fitting.most is not None:
        notes.append(f"the device ran out of memory; asked {fitting.most} at a time")
    if fitting.most is None or len(questions) <= fitting.most:
        try:
            return _answer(model, questions, sampling, options, notes, looked_up)
        except RuntimeError as error:
            seeing = bool(questions[0].pictures or questions[0].clips)
            if not is_out_of_memory(error) or (len(questions) == 1 and not seeing):
                raise
        # Out of the handler first: the traceback holds the tensors that filled the device.
        model.drop_device_state()
        host.current().make_room(model.cache_bytes(4096), model.device)
        if len(questions) == 1:
            smaller = options.budget.halved(model.image_sizes)
            notes.append(f"the device ran out of memory; tried again with {smaller.most} visual tokens a picture")
            log.warning("%s: %s", model.folder.name, notes[-1])
            return _answer(model, questions, sampling, replace(options, budget=smaller), notes)
        fitting.most = len(questions) // 2
        log.warning("%s: the device ran out of memory; asked %d at a time", model.folder.name, fitting.most)
    made: list[Answer] = []
    while len(made) < len(questions):
        # Anew for each part: an earlier one may have found that fewer fit.
        part = slice(len(made), len(made) + min(fitting.most, len(questions)))
        given = None if looked_up is None else looked_up[part]
        made += _fitted(model, questions[part], sampling, options, given, fitting)
    return made


def _answer(
    model: LoadedModel,
    questions: Sequence[Question],
    sampling: Sampling,
    options: AnswerOptions,
    notes: list[str],
    looked_up: Sequence[list[VisualItem]] | None = None,
) -> list[Answer]:
    run = _Run(notes, Timing(model.device), [])
    cache = EmbeddingCache(options.cache_images, options.cache_on_disk)
    prompts: list[Prompt] = []
    for index, question in enumerate(questions):
        if looked_up is not None:
            items = looked_up[index]
        else:
            items = look_up(model, question.pictures, question.clips, options.budget, cache, run.timing)
        prompts.append(build(model, question, items))
        run.items += items
    run.prompt_tokens = max(prompt.length for prompt in prompts)
    most = min(options.max_new_tokens, model.context_length - run.prompt_tokens)
    if most < options.max_new_tokens:
        notes.append(f"the answer may have {most:,} tokens, because the context of {model.context_length:,} ends there")
    if sampling.beams > 1:  # one question after the other, each in as many rows as there are beams
        path = DecodePath("plain", f"{sampling.beams} beams, by the library")
        rows, answers_each = sampling.beams, 1
    else:
        path = choose_path(model, options.decode, options.keep_loaded, len(prompts) * options.answers)
        rows, answers_each = len(prompts), options.answers
    if options.keep_loaded:
        MODELS.keep(model, True)
    try:
        with model.resident(run.prompt_tokens, most, rows, answers_each, path.name), on_device(model.device):
            seen = encode(
                model, run.items, cache, run.timing, options.encode_jointly, keep_now=False, record=options.keep_loaded
            )
            run.encoded = len(seen)
            try:
                written = _write(model, prompts, path, sampling, options, most, run)
            finally:
                # After the device has all its work, and after a stop too: looking was the dear part.
                keep(seen, cache)
    finally:
        if not options.keep_loaded:
            MODELS.keep(model, False)
    texts = model.tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    seconds = run.timing.seconds()
    report = _report(model, run, sampling, written, most, seconds)
    made: list[Answer] = []
    for row, (text, tokens) in enumerate(zip(texts, written, strict=True)):
        prompt = prompts[row if options.answers == 1 else 0]
        thoughts, said = answers.split_thoughts(text, prompt.opens_thinking)
        made.append(
            Answer(
                said,
                text.strip(),
                thoughts,
                len(tokens),
                len(tokens) < most,
                report,
                prompt.items,
                seconds,
                tuple(notes),
            )
        )
    if thinking := sum(bool(part.thoughts and not part.text) for part in made):
        for part in made:
            part.report += (
                f"\n{thinking} of {len(made)} answers are thoughts alone: raise max_new_tokens, or switch thinking off"
            )
    return made


def _write(
    model: LoadedModel,
    prompts: list[Prompt],
    path: DecodePath,
    sampling: Sampling,
    options: AnswerOptions,
    most: int,
    run: _Run,
) -> list[list[int]]:
    """Token lists, one a row; the network is resident."""
    if sampling.beams > 1:
        run.path = path.note
        if options.answers > sampling.beams:
            run.notes.append(f"{sampling.beams} answers, because {sampling.beams} beams find no more")
        with run.timing.stage("decode", on_device=True):
            return [row for prompt in prompts for row in beam_search(model, prompt, sampling, most, options.answers)]
    # A cache of pictures that is switched off leaves nothing of them behind, as a prefix neither.
    use_prefix = options.reuse_prefix and options.cache_images
    prompt_ids = None
    if sampling.penalises:
        # Before the prefill is queued, which a copy after it would wait for.
        prompt_ids = to_device(prompts[0].ids if len(prompts) == 1 else _padded(prompts), model.device)
    begun = start(model, path, prompts, options.answers, most, use_prefix, options.keep_loaded, run.timing)
    run.reused, run.path, run.prefill = begun.reused, begun.path.note, begun.prefill
    rows = len(prompts) * options.answers
    seeds = [sampling.seed + row for row in range(rows)] if options.answers > 1 else [sampling.seed] * rows
    runs, logits = begun.runner, begun.logits
    sampler = Sampler(sampling, model.device, seeds, prompt_ids, logits.shape[-1])
    with host.tracked(host.current(), most, "answer") as bar, run.timing.stage("decode", on_device=True):
        stream = TextStream(model, options.node_id) if options.stream else None
        done = 0

        def on_tokens(rows_so_far: list[list[int]]) -> None:
            nonlocal done
            longest = max(map(len, rows_so_far))
            bar.update(longest - done)
            done = longest
            if stream is not None:
                stream.show(rows_so_far[0])

        return decode(runs, sampler, logits, most, model.stop_ids, on_tokens)


def _padded(prompts: list[Prompt]) -> torch.Tensor:
    """[B, T] ids, each row padded with its own first token, so that a padding never counts as a repetition."""
    longest = max(prompt.length for prompt in prompts)
    return torch.cat([torch.cat((p.ids[:, :1].expand(1, longest - p.length), p.ids), dim=1) for p in prompts])


class TextStream:
    """The growing text under the node, a few times a second, each time decoding only what is new.

    The host has the length of one step to do this in, or the device waits for it.
    """

    def __init__(self, model: LoadedModel, node_id: str | None) -> None:
        self.tokenizer, self.node_id = model.tokenizer, node_id
        self._text, self._before, self._from, self._shown = "", 0, 0, 0.0

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def show(self, tokens: list[int]) -> None:
        now = time.monotonic()
        if now - self._shown < SHOWN_EVERY:
            return
        self._shown = now
        # A piece of text may depend on the piece before it (a space, half a letter), not on those before that.
        before, both = self._decode(tokens[self._before : self._from]), self._decode(tokens[self._before :])
        new = both[len(before) :]
        host.current().show_text(self._text + new, self.node_id)
        if not new.endswith("\ufffd") and len(tokens) - self._from >= SETTLED_AFTER:
            self._text, self._before, self._from = self._text + new, self._from, len(tokens)


def _report(
    model: LoadedModel, run: _Run, sampling: Sampling, written: list[list[int]], most: int, seconds: dict[str, float]
) -> str:
    merge = 0 if model.processor is None else int(model.config.vision_config.spatial_merge_size)
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [f"{model.folder.name}: {model.model_type}, {dtype} on {model.device}, quantization {model.quantization}"]
    lines += run.notes
    if run.items:
        visual = sum(item.tokens(merge) for item in run.items)
        hits = [item.found for item in run.items if item.found]
        where = f", {len(hits)} from the cache ({', '.join(sorted(set(hits)))})" if hits else ""
        replayed = sum(item.replayed for item in run.items)
        how = f" ({replayed} by a CUDA graph)" if replayed else ""
        lines.append(f"pictures: {len(run.items)}, {visual:,} visual tokens, {run.encoded} encoded{how}{where}")
        if reason := model.device_state.get("failed paths", {}).get(RECORDED_TOWER):
            lines.append(f"vision tower: no CUDA graph, because a recording failed here: {reason}")
    reused = f", {run.reused:,} of them reused" if run.reused else ""
    how = f"; prefill: {run.prefill}" if run.prefill else ""
    lines.append(f"prompt: {run.prompt_tokens:,} tokens{reused}{how}")
    count = sum(map(len, written))
    rate = f", {count / seconds['decode']:.1f} tokens/s" if seconds.get("decode") and count else ""
    lines.append(f"answer: {count:,} tokens{rate}; decode: {run.path}; {sampling}")
    if states_at(model) and (missing := linear_attention.note(model.words.device)):
        lines.append(missing)
    if any(len(row) >= most for row in written):
        lines.append(f"an answer was cut off at max_new_tokens = {most:,}")
    lines.append("time: " + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()))
    if tip := _tip(run, seconds):
        lines.append(tip)
    return "\n".join(lines)


def _tip(run: _Run, seconds: dict[str, float]) -> str:
    """One sentence when the numbers of this call support it, else ''."""
    total = sum(seconds.values())
    looking = seconds.get("processor", 0.0) + seconds.get("transfer", 0.0) + seconds.get("tower", 0.0)
    if run.encoded and looking > 0.5 * total and looking > 0.5:
        return f"tip: looking took {looking:.1f} of {total:.1f} s; a smaller token budget shortens it"
    if run.items and seconds.get("prefill", 0.0) > 0.5 * total and not run.reused and seconds["prefill"] > 0.5:
        return f"tip: prefill took {seconds['prefill']:.1f} of {total:.1f} s; fewer visual tokens shorten it"
    return ""
