"""Pictures from a prompt: encode, denoise, decode, with a report of what ran, why, and how long it took.

Picture i of a request is drawn from seed + i by itself, so it is the same picture whatever the request's size and
whichever worker draws it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from ..host.compiling import until_nothing_compiles
from ..host.errors import kind_and_line
from . import compilation, decoding, denoising
from .adapters import Adapter
from .compilation import CompilationPlan
from .denoising import Guidance, Source
from .loading import ZImage
from .previews import Preview
from .prompts import CACHES, MAX_TOKENS, Prompt, PromptCache, encode

log = logging.getLogger("hotpath.text_to_image")

# Activations of a forward pass, in values per token and width: the widest is the feed-forward's two inner products.
LIVE_ACTIVATIONS = 16
NO_GUIDANCE = Guidance()


@dataclass(frozen=True)
class Pipeline:
    """A checkpoint and the LoRA files drawn with; the loaded checkpoint is shared, the stack is this value's own."""

    model: ZImage
    adapters: tuple[Adapter, ...] = ()

    def with_adapter(self, adapter: Adapter) -> Pipeline:
        """The same checkpoint with one more file on it; this pipeline stays as it is."""
        return replace(self, adapters=(*self.adapters, adapter))


@dataclass(frozen=True)
class Request:
    """What is drawn. width, height: pixels, multiples of `ZImage.step_of_size`. seed: of the first picture.

    image: [B, H, W, 3] in 0..1 to draw over, with `strength` (over 0 to 1) of the schedule; mask: [B, H, W] or [H, W], 1
    where it is drawn, stretched to the image when it has another size. control: [B, H, W, 3], edges, depth or a pose that a
    checkpoint with a ControlNet draws after, with the weight `control_strength`. pictures_at_a_time: 1 makes a picture
    independent of its company to the last bit; more is faster for small pictures. tiling, prompt_cache: one of
    decoding.TILING, prompts.CACHES.
    """

    prompt: str
    negative: str = ""
    width: int = 1024
    height: int = 1024
    steps: int = 8
    guidance: Guidance = NO_GUIDANCE
    seed: int = 0
    pictures: int = 1
    image: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 0.6
    control: Tensor | None = None
    control_strength: float = 0.75
    max_tokens: int = MAX_TOKENS
    pictures_at_a_time: int = 1
    tiling: str = "auto"
    prompt_cache: str = "memory"


@dataclass
class Drawn:
    """What came of a request. pictures: [B, H, W, 3] float32 RGB in 0..1; latents: [B, C, h, w], as a VAE reads them.

    seconds: by stage. encoded: prompts the text encoder had to read; 0 when all came from the cache.
    """

    pictures: Tensor
    latents: Tensor
    seeds: list[int]
    report: str
    encoded: int
    seconds: dict[str, float] = field(default_factory=dict)


def check(request: Request, model: ZImage) -> None:
    """Raises ValueError, in one sentence, for a request that cannot be drawn."""
    if not request.prompt.strip():
        raise ValueError("The prompt is empty: say what the picture should show.")
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative)):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(
                f"The {name} holds half a letter (a lone surrogate), which no tokenizer reads: type it again."
            )
    side = model.step_of_size
    for name, size, longest in (
        ("height", request.height, model.tallest),
        ("width", request.width, model.widest),
    ):
        if size % side or size <= 0:
            near = max(side, round(size / side) * side)
            raise ValueError(f"The {name} {size} is no multiple of {side}, which this checkpoint needs: try {near}.")
        if size > longest:
            raise ValueError(f"The {name} {size} is over {longest}, the largest this checkpoint has positions for.")
    if request.steps < 1 or request.pictures < 1 or request.pictures_at_a_time < 1:
        raise ValueError("Steps, pictures and pictures at a time are 1 or more.")
    if not 1 <= request.max_tokens <= model.longest_prompt:
        raise ValueError(
            f"A prompt has 1 to {model.longest_prompt} tokens here, and {request.max_tokens} were asked for."
        )
    for what, asked, known in (
        ("tiling", request.tiling, decoding.TILING),
        ("prompt cache", request.prompt_cache, CACHES),
    ):
        if asked not in known:
            raise ValueError(f"{asked!r} is no {what}: choose one of {', '.join(known)}.")
    if not 0.0 <= request.guidance.scale < math.inf:
        raise ValueError(
            f"Guidance {request.guidance.scale} is no number from 0 up: 0 is none, and more follows the prompt closer."
        )
    if not 0.0 < request.strength <= 1.0:
        raise ValueError(f"A strength of {request.strength} draws nothing: choose over 0 to 1.")
    if request.mask is not None and request.image is None:
        raise ValueError("A mask needs an image that it lies on: connect one.")
    _check_tensor("image", request.image, ("pictures", "height", "width", "RGB"), request.pictures)
    _check_tensor("mask", request.mask, ("pictures", "height", "width"), request.pictures)
    _check_tensor("control image", request.control, ("pictures", "height", "width", "RGB"), request.pictures)
    if request.control is not None and not model.checkpoint.controlled:
        raise ValueError(
            f"{model.checkpoint.name} has no ControlNet to draw after a control image: choose a ZImageControlNetPipeline."
        )


def _check_tensor(name: str, given: Tensor | None, axes: tuple[str, ...], pictures: int) -> None:
    """Raises ValueError for what has other axes, another number of pictures, no pixels, or NaN; alpha is no fault."""
    if given is None:
        return
    found = list(given.shape)
    shape = [1, *found] if name == "mask" and given.ndim == 2 else found
    if len(shape) != len(axes) or ("RGB" in axes and shape[-1] < 3) or 0 in shape[1:]:
        raise ValueError(f"The {name} is a tensor of {found} where [{', '.join(axes)}] is needed: connect another.")
    if shape[0] not in (1, pictures):
        raise ValueError(f"{shape[0]} {name}s for {pictures} pictures: connect one, or one for each.")
    if not given.isfinite().all():
        raise ValueError(f"The {name} holds values that are not finite (NaN): look at what made it.")


class Run:
    """One request on its way: progress, times and notes."""

    def __init__(self, pipeline: Pipeline, request: Request, preview: Preview | None) -> None:
        self.model, self.adapters, self.request, self.preview = pipeline.model, pipeline.adapters, request, preview
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.ran: list[str] = []
        self.bar: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def draw(self) -> Drawn:
        request, model = self.request, self.model
        with self.stage("prompts"):
            positive, negative, encoded = self._prompts()
        private = [denoising.generator(seed) for seed in denoising.seeds(request.seed, request.pictures)]
        steps = len(self._schedule()[1])
        parts = list(range(0, request.pictures, request.pictures_at_a_time))
        with host.tracked(host.current(), len(parts) * steps + request.pictures, "drawing") as self.bar:
            source, control = self._source(private), self._control()
            shape = (model.latent_channels, request.height // model.latent_scale, request.width // model.latent_scale)
            noise = denoising.noise(private, shape)
            found: list[Tensor] = []
            longest = max(len(prompt.states) for prompt in (positive, negative) if prompt is not None)
            with self._transformer(self._tokens + longest) as network, self.stage("denoise"):
                states = positive.states.to(model.device, model.dtype)
                against = None if negative is None else negative.states.to(model.device, model.dtype)
                for begin in parts:
                    part = slice(begin, begin + request.pictures_at_a_time)
                    found.append(self._denoise(network, noise[part], source, control, part, states, against))
                # Copied here, so that the time before is the time it took.
                latents = torch.cat(found).cpu()
            for seed, one in zip(private, latents, strict=True):
                if not one.isfinite().all():
                    raise ValueError(
                        f"The picture of seed {seed.initial_seed()} came out as NaN: choose dtype float32, attention auto or "
                        "a lower LoRA strength."
                    )
            with self.stage("decode"):
                pictures, how = decoding.decode(model, latents, request.tiling, lambda: self.bar.update(1))
        self.notes.append(f"decoded {how}")
        plain = decoding.unscaled(model, latents)
        with torch.inference_mode(False):
            pictures, plain = pictures.clone(), plain.clone()
        return Drawn(
            pictures,
            plain,
            [g.initial_seed() for g in private],
            self._report(positive, negative, encoded, steps),
            encoded,
            dict(self.seconds),
        )

    @property
    def _tokens(self) -> int:
        """Image tokens of one picture."""
        side = self.model.step_of_size
        return (self.request.width // side) * (self.request.height // side)

    def _schedule(self) -> tuple[Any, Tensor]:
        """A schedule for one part of the run, which nobody else has, and its timesteps."""
        request, scheduler = self.request, self.model.scheduler()
        strength = request.strength if request.image is not None else 1.0
        return scheduler, denoising.prepare(scheduler, request.steps, self._tokens, self.model.device, strength)

    def _prompts(self) -> tuple[Prompt, Prompt | None, int]:
        request = self.request
        texts = [request.prompt] + ([request.negative] if request.guidance.scale > 0 else [])
        prompts, encoded = encode(self.model, texts, PromptCache(request.prompt_cache), request.max_tokens)
        return prompts[request.prompt], prompts[request.negative] if len(texts) > 1 else None, encoded

    def _source(self, private: list[torch.Generator]) -> tuple[Tensor, Tensor | None] | None:
        """Scaled latents of the image for every picture, and where to draw; None without an image."""
        request, model = self.request, self.model
        if request.image is None:
            return None
        with self.stage("image"):
            fitted = decoding.fit_pictures(request.image[..., :3], request.width, request.height)
            latents = decoding.encode(model, fitted, private, request.tiling)
            if request.mask is None:
                return latents, None
            mask = request.mask[None] if request.mask.ndim == 2 else request.mask
            # It lies on the image, so what is cut off there is cut off here.
            mask = F.interpolate(mask[:, None].float(), size=request.image.shape[1:3], mode="bilinear")
            planes = decoding.fit_pictures(mask.movedim(1, -1), request.width, request.height)
            drawn = (planes >= 0.5).float().movedim(-1, 1)
            small = F.interpolate(drawn, size=latents.shape[-2:]).bool()
            if not small.flatten(1).any(dim=1).all():
                self.notes.append("a mask is empty, so its image stays as it is: load one with alpha, or paint it")
            small = small.to(model.device)
            return latents, small.expand(request.pictures, -1, -1, -1)

    def _control(self) -> Tensor | None:
        """What the ControlNet reads, [B, channels, 1, h, w]: the control picture's latents, and zeros for what it could
        be given besides."""
        request, model = self.request, self.model
        if request.control is None or request.control_strength == 0.0:
            return None
        with self.stage("control"):
            fitted = decoding.fit_pictures(request.control[..., :3], request.width, request.height)
            latents = decoding.encode(model, fitted, [None] * len(fitted), request.tiling).to(model.dtype)
        channels = int(model.checkpoint.config("controlnet").get("control_in_dim") or latents.shape[1])
        wide = F.pad(latents, (0, 0, 0, 0, 0, channels - latents.shape[1]))
        return wide.unsqueeze(2).expand(request.pictures, -1, -1, -1, -1)

    @contextmanager
    def _transformer(self, tokens: int) -> Iterator[Any]:
        """The transformer on its device with the run's LoRA files on it."""
        width = int(self.model.checkpoint.config("transformer").get("dim", 3840))
        at_a_time = min(self.request.pictures_at_a_time, self.request.pictures)
        room = LIVE_ACTIVATIONS * tokens * width * at_a_time * self.model.dtype.itemsize
        with ExitStack() as held:
            with self.stage("transformer"):
                network = held.enter_context(self.model.transformer.resident(room))
                changed = held.enter_context(self.model.adapters.on(network, self.adapters))
            self.model.attention.record.begin()
            if self.adapters:
                names = ", ".join(f"{a.path.name} at {a.strength:g}" for a in self.adapters)
                self.notes.append(f"LoRA: {names}; {changed} layers changed")
            yield network
            # Before another run draws with the same network.
            self.ran = self.model.notes()

    def _denoise(
        self,
        network: Any,
        noise: Tensor,
        image: tuple[Tensor, Tensor | None] | None,
        control: Tensor | None,
        part: slice,
        positive: Tensor,
        negative: Tensor | None,
    ) -> Tensor:
        request, model = self.request, self.model
        scheduler, timesteps = self._schedule()
        latents = noise.to(model.device)
        source = None
        if image is not None:
            source = Source(image[0][part], latents, None if image[1] is None else image[1][part])
            latents = scheduler.scale_noise(source.latents, timesteps[:1], latents)
        return denoising.denoise(
            lambda x, t, states: self._forward(network, x, t, states, None if control is None else control[part]),
            scheduler,
            timesteps,
            latents,
            positive,
            negative,
            request.guidance,
            model.dtype,
            self._on_step,
            source,
        )

    def _forward(
        self, network: Any, x: list[Tensor], t: Tensor, states: list[Tensor], control: Tensor | None
    ) -> list[Tensor]:
        def forward() -> list[Tensor]:
            added = None
            if control is not None:
                added = network.controlnet(
                    x, t, states, list(control.unbind(0)), conditioning_scale=self.request.control_strength
                )
            return list(network(x, t, states, return_dict=False, controlnet_block_samples=added)[0])

        if self.model.compilation.mode != "none":
            until_nothing_compiles()
        try:
            return forward()
        except Exception as error:
            if self.model.compilation.mode == "none" or not compilation.is_compiler_error(error):
                raise
            note = f"compile: none instead of regional, because {kind_and_line(error, 200)}"
            log.warning("%s", note)
            self.model.compilation = CompilationPlan("none", note)
            compilation.undo(network)
        return forward()

    def _on_step(self, step: int, estimate: Tensor) -> None:
        self.bar.update(1, self.preview.picture(estimate) if self.preview is not None else None)

    def _report(self, positive: Prompt, negative: Prompt | None, encoded: int, steps: int) -> str:
        request, model = self.request, self.model
        count = f"{request.pictures} picture{'s' if request.pictures > 1 else ''}"
        drawn = denoising.seeds(request.seed, request.pictures)
        seeds = f"seed {drawn[0]}" if len(drawn) == 1 else f"seeds {drawn[0]} to {drawn[-1]}"
        passes = f"{steps} step{'s' if steps > 1 else ''}"
        where = f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
        lines = [
            f"{model.checkpoint.name}: {count} of {request.width} x {request.height}, {passes}, {seeds}, {where}",
        ]
        asked = [prompt for prompt in (positive, negative) if prompt is not None]
        read = "the text encoder was not needed" if not encoded else f"the text encoder read {encoded}"
        lines.append(f"prompts: {len(asked)} of {', '.join(str(len(p.states)) for p in asked)} tokens; {read}")
        for name, prompt in (("prompt", positive), ("negative prompt", negative)):
            if prompt is not None and prompt.cut:
                lines.append(
                    f"the {name} has {prompt.tokens} tokens; what comes after {len(prompt.states)} was not read"
                )
        if request.negative.strip() and negative is None:
            lines.append("the negative prompt was not used, because guidance is 0")
        lines += [*self.ran, *self.notes]
        times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        forwards = len(range(0, request.pictures, request.pictures_at_a_time)) * steps
        per_step = self.seconds["denoise"] / forwards
        lines.append(f"time: {times} ({per_step:.3f} s a step)")
        return "\n".join(lines)


def generate(pipeline: Pipeline, request: Request, preview: Preview | None = None, node_id: str | None = None) -> Drawn:
    """Draw `request`. preview: how latents become a small picture for the progress bar; None shows none.

    node_id: the node that the report is shown under. Raises ValueError for what cannot be drawn, UnusableCheckpoint and
    UnusableAdapter for files; the host's interrupt ends it between any two blocks of the transformer.
    """
    check(request, pipeline.model)
    drawn = Run(pipeline, request, preview).draw()
    log.info("%s", drawn.report)
    if node_id is not None:
        host.current().show_text(drawn.report, node_id)
    return drawn
