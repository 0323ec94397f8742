"""Pictures from a prompt: encode, denoise, decode, with a report of what ran, why, and how long it took.

Picture i of a request is drawn from seed + i by itself, so it is the same picture whatever the request's size and
whichever worker draws it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from ..attention.capabilities import dtype_name
from ..host.compiling import compiled_call
from ..host.errors import is_out_of_memory, kind_and_line
from ..host.fresh_memory import ProcessorTime
from ..host.letters import counted
from ..products.rerouting import rerouted
from . import compilation, decoding, denoising
from .adapters import Adapter
from .compilation import CompilationPlan
from .denoising import Source
from .loading import ZImage
from .previews import Preview
from .prompts import Prompt, PromptCache, encode
from .requests import Request, check

log = logging.getLogger("hotpath.text_to_image")

# Activations of a forward pass, in values per token and width: the widest is the feed-forward's two inner products.
LIVE_ACTIVATIONS = 16
OF_THE_VAE = ("image", "control", "decode")  # stages


@dataclass(frozen=True)
class Pipeline:
    """A checkpoint and the LoRA files drawn with; the loaded checkpoint is shared, the stack is this value's own."""

    model: ZImage
    adapters: tuple[Adapter, ...] = ()

    def with_adapter(self, adapter: Adapter) -> Pipeline:
        """The same checkpoint with one more file on it; this pipeline stays as it is."""
        return replace(self, adapters=(*self.adapters, adapter))


@dataclass
class Drawn:
    """What came of a request. pictures: [B, H, W, 3] float32 RGB in 0..1; latents: [B, C, h, w], as a VAE reads them.

    A picture that came out as NaN is black, and told in the report. seconds: by stage. encoded: prompts the text encoder had
    to read; 0 when all came from the cache.
    """

    pictures: Tensor
    latents: Tensor
    seeds: list[int]
    report: str
    encoded: int
    seconds: dict[str, float] = field(default_factory=dict)


class Run:
    """One request on its way. seconds: by stage; doing: the stage it is in; notes, ran: lines for the report."""

    def __init__(self, pipeline: Pipeline, request: Request, preview: Preview | None) -> None:
        self.model, self.adapters, self.request, self.preview = pipeline.model, pipeline.adapters, request, preview
        self.seconds: dict[str, float] = {}
        self._processor = ProcessorTime(self.model.device)
        self.notes: list[str] = []
        self.ran: list[str] = []
        self._products: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.model.compilation.mode == "none" and self.model.dtype == torch.float32:
            self._products, line = rerouted(self.model.device)
            self.notes += [line] if line else []
        self.doing = ""
        self.bar: Any = None
        # The fitted image [1 or B, H, W, 3], and the mask on it [1 or B, H, W, 1].
        self._masked: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, self.doing = time.perf_counter(), name
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def draw(self) -> Drawn:
        try:
            with self._products():
                return self._draw()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.debug("out of memory", exc_info=error)
        # Out of the handler first: the traceback holds what filled the device. Of the same kind, as hosts look at that.
        raise torch.OutOfMemoryError(self._without_room())

    def _without_room(self) -> str:
        """What a device that is full calls for, in a sentence."""
        request, model = self.request, self.model
        cures = ["a smaller width and height"]
        if request.pictures_at_a_time > 1:
            cures.insert(0, "one picture at a time")
        if request.tiling == "never":
            cures.insert(0, "tiling auto")
        if model.precision.method == "none" and model.device.type == "cuda":
            cures.append("precision float8 or int8")
        place = model.vae_device if self.doing in OF_THE_VAE else model.device
        return (
            f"{place} ran out of memory at {request.width} x {request.height} ({self.doing}): choose "
            f"{', '.join(cures[:-1]) + ' or ' if cures[1:] else ''}{cures[-1]}."
        )

    def _draw(self) -> Drawn:
        request, model = self.request, self.model
        with self.stage("prompts"):
            positive, negative, encoded = self._prompts()
        seeds = denoising.seeds(request.seed, request.pictures)
        generators = [denoising.generator(seed) for seed in seeds]
        steps = len(self._schedule()[1])
        parts = list(range(0, request.pictures, request.pictures_at_a_time))
        with host.tracked(host.current(), len(parts) * steps + request.pictures, "drawing") as self.bar:
            image, control = self._image(generators), self._control()
            shape = (model.latent_channels, request.height // model.latent_scale, request.width // model.latent_scale)
            noise = denoising.noise(generators, shape).to(model.device)
            source = None if image is None else Source(image[0], noise, image[1])
            found: list[Tensor] = []
            longest = max(len(prompt.states) for prompt in (positive, negative) if prompt is not None)
            with self._transformer(self._tokens + longest) as network, self.stage("denoise"):
                states = positive.states.to(model.device, model.dtype)
                against = None if negative is None else negative.states.to(model.device, model.dtype)
                for begin in parts:
                    part = slice(begin, begin + request.pictures_at_a_time)
                    over = None if source is None else source.part(part)
                    after = None if control is None else control[part]
                    found.append(self._denoise(network, noise[part], over, after, states, against))
                # Copied here, so that the time before is the time it took.
                latents = torch.cat(found).cpu()
            finite = self._finite(seeds, latents)
            latents = torch.where(finite.view(-1, 1, 1, 1), latents, 0.0)
            with self.stage("decode"):
                made, how = decoding.decode(model, latents[finite], request.tiling, lambda: self.bar.update(1))
                pictures = made.new_zeros(len(latents), *made.shape[1:])
                pictures[finite] = self._pasted(made, finite)
        self.notes.append(f"decoded {how}")
        plain = decoding.unscaled(model, latents)
        with torch.inference_mode(False):
            pictures, plain = pictures.clone(), plain.clone()
        return Drawn(
            pictures,
            plain,
            seeds,
            self._report(positive, negative, encoded, steps),
            encoded,
            dict(self.seconds),
        )

    def _finite(self, seeds: list[int], latents: Tensor) -> Tensor:
        """Which pictures did not come out as NaN, bool [B]. The others are told with the cure; ValueError when there is none."""
        finite = latents.isfinite().flatten(1).all(dim=1)
        broken = [seed for seed, good in zip(seeds, finite.tolist(), strict=True) if not good]
        if broken:
            which = "picture of seed " if len(broken) == 1 else "pictures of seeds "
            which += ", ".join(map(str, broken))
            cure = "choose dtype float32, attention auto or a lower LoRA strength."
            if len(broken) == len(seeds):
                raise ValueError(f"The {which} came out as NaN: {cure}")
            note = f"The {which} came out as NaN and {'is' if len(broken) == 1 else 'are'} black here: {cure}"
            log.warning("%s", note)
            self.notes.append(note)
        return finite

    def _pasted(self, pictures: Tensor, which: Tensor) -> Tensor:
        """The pictures [B, H, W, 3], with the image's own pixels outside the mask when that was asked for."""
        if self._masked is None or not self.request.keep_outside:
            return pictures
        image, mask = (part.expand(len(which), -1, -1, -1)[which] for part in self._masked)
        return torch.lerp(image.to(pictures), pictures, mask.to(pictures))

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

    def _image(self, generators: list[torch.Generator]) -> tuple[Tensor, Tensor | None] | None:
        """Scaled latents of the image for every picture, and where to draw, as in `Source`; None without an image."""
        request, model = self.request, self.model
        if request.image is None:
            return None
        with self.stage("image"):
            fitted = decoding.fit_pictures(request.image[..., :3], request.width, request.height)
            latents = decoding.encode(model, fitted, generators, request.tiling)
            if request.mask is None:
                return latents, None
            mask = request.mask[None] if request.mask.ndim == 2 else request.mask
            # It lies on the image, so what is cut off there is cut off here.
            mask = F.interpolate(mask[:, None].float(), size=request.image.shape[1:3], mode="bilinear")
            planes = decoding.fit_pictures(mask.movedim(1, -1), request.width, request.height)
            self._masked = (fitted, planes.clamp(0, 1))
            drawn = (planes >= 0.5).float().movedim(-1, 1)
            # All that the mask touches: what is thinner than a latent pixel would else be missed, or not, by where it lies.
            small = F.max_pool2d(drawn, model.latent_scale).bool()
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
                changed = held.enter_context(self.model.adapters.on(network, self.adapters, self.model.device))
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
        source: Source | None,
        control: Tensor | None,
        positive: Tensor,
        negative: Tensor | None,
    ) -> Tensor:
        scheduler, timesteps = self._schedule()
        latents = noise
        if source is not None:
            latents = scheduler.scale_noise(source.latents, timesteps[:1], noise)
        return denoising.denoise(
            lambda x, t, states: self._forward(network, x, t, states, control),
            scheduler,
            timesteps,
            latents,
            positive,
            negative,
            self.request.guidance,
            self.model.dtype,
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

        try:
            with nullcontext() if self.model.compilation.mode == "none" else compiled_call():
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
        count = counted(request.pictures, "picture")
        drawn = denoising.seeds(request.seed, request.pictures)
        seeds = f"seed {drawn[0]}" if len(drawn) == 1 else f"seeds {drawn[0]} to {drawn[-1]}"
        where = f"{dtype_name(model.dtype)} on {model.device}"
        lines = [
            f"{model.checkpoint.name}: {count} of {request.width} x {request.height}, {counted(steps, 'step')}, {seeds}, {where}",
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
        lines += [*self.ran, *self.notes, *filter(None, [self._processor.advice()])]
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
