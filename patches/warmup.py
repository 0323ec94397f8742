"""The first steps of a model before the first picture: compiled, measured and recorded for the sizes to come.

A warm-up is a sampling of a few steps on noise, through ComfyUI's own sampler, so that it meets what a picture meets: the
conditioning with its IdentityNet, CFG's batch, the dtype, the device. What it makes is thrown away.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .. import host
from ..host.device_work import wait_for
from ..host.errors import kind_and_line
from ..host.letters import counted
from .attention_override import override_of
from .compilation import RegionalCompiler, compiler_of, uncompiled
from .compilation.recording import WARM_CALLS
from .model_call import is_sampled
from .step_caches import spared

STEPS = 2  # the first compiles, the second runs what was compiled
RECORDED_STEPS = WARM_CALLS + 2  # after those before it one is recorded, and the last is a replay
KEY = "hotpath_warmup"
MOST_SIZES = 32
EXAMPLE = "1024x1024, 832x1216"
PROMPT_WIDTHS = (
    "context_dim", "context_in_dim", "cap_feat_dim", "text_dim", "crossattn_emb_channels", "cond_seq_dim", "text_embed_dim",
    "llm_features_dim",
)  # fmt: skip
# Of Wan, Qwen-Image, Stable Diffusion 3, Ernie-Image, CogVideoX, Kandinsky 5, PixArt and PixelDiT, whose settings do not say.
PROMPT_LAYERS = (
    "text_embedding.0", "txt_in", "context_embedder", "text_proj", "patch_embed.text_proj", "text_embeddings.in_layer",
    "y_embedder.y_proj.fc1", "y_embedder.proj",
)  # fmt: skip
POOLED_LAYERS = ("pooled_text_embeddings.in_layer", "y_embedder.mlp.0")
SDXL_POOLED = 1280
MOMENT = 8  # in steps of a latent of sound; any number but 1, which torch makes a case of its own
# ComfyUI's latent formats of two dimensions that are no picture's: sound by pitch and time, and 3D models.
NO_PICTURES = frozenset({"ACEAudio", "TripoSplat", "Trellis2"})
PROMPT_TOKENS = 77  # CLIP's number
# What a network raises that was not given all it reads.
INCOMPLETE = (TypeError, AttributeError, KeyError, AssertionError)


@dataclass(frozen=True)
class SizeWarmup:
    """What one size took. graphs, recordings: made for it. step_seconds: of the last step that ran the model, all in place."""

    width: int
    height: int
    seconds: float
    step_seconds: float
    graphs: int
    recordings: int

    def sentence(self) -> str:
        made = f"{self.graphs} graphs" + (f", {self.recordings} recordings" if self.recordings else "")
        return (
            f"{self.width}x{self.height}: {self.seconds:.1f} s, {made}; a step then {1000 * self.step_seconds:.0f} ms"
        )


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "1024x1024, 832x1216" as [(width, height)] in pixels. Raises ValueError naming the piece that is no size."""
    sizes: list[tuple[int, int]] = []
    for piece in re.split(r"[,;\n]+", text):
        if not piece.strip():
            continue
        found = re.fullmatch(r"\s*(\d+)\s*[x×*]\s*(\d+)\s*", piece)
        if found is None:
            raise ValueError(f"{piece.strip()!r} is no size; write them as {EXAMPLE}.")
        width, height = int(found[1]), int(found[2])
        if not (16 <= width <= 16384 and 16 <= height <= 16384):
            raise ValueError(f"{piece.strip()!r} is out of range; both sides are 16 to 16384 pixels.")
        if (width, height) not in sizes:
            sizes.append((width, height))
    if not sizes:
        raise ValueError(f"There is no size to warm up; write some, such as {EXAMPLE}.")
    if len(sizes) > MOST_SIZES:
        raise ValueError(f"There are {len(sizes)} sizes; at most {MOST_SIZES} are warmed up in one go.")
    return sizes


def check_makes_pictures(model: Any) -> None:
    """Raises ValueError for a model of sound or of 3D bodies, and for one that no sampler calls."""
    layout = model.get_model_object("latent_format")
    kinds = {kind.__name__ for kind in type(layout).__mro__}
    pictures = getattr(layout, "latent_dimensions", 2) > 1 and NO_PICTURES.isdisjoint(kinds)
    if not (pictures and is_sampled(model.get_model_object("diffusion_model"))):
        raise ValueError(
            f"{type(model.model).__name__} makes no pictures, so no size in pixels warms it up; its first run does."
        )


def latent_for(model: Any, width: int, height: int, batch: int) -> torch.Tensor:
    """An empty latent [batch, channels, height / f, width / f] in the format of `model` (f its compression)."""
    layout = model.get_model_object("latent_format")
    shrink = int(getattr(layout, "spacial_downscale_ratio", 8) or 8)
    frames = [1] if getattr(layout, "latent_dimensions", 2) == 3 else []
    return torch.zeros(batch, layout.latent_channels, *frames, max(1, height // shrink), max(1, width // shrink))


def _with_sound(model: Any, latent: Any) -> Any:
    """`latent` and a moment of sound beside it for LTX-2, whose films without sound need other graphs."""
    network = model.get_model_object("diffusion_model")
    channels, pitches = (getattr(network, name, None) for name in ("num_audio_channels", "audio_frequency_bins"))
    if channels is None or pitches is None:
        return latent
    from comfy.nested_tensor import NestedTensor

    return NestedTensor((latent, torch.zeros(latent.shape[0], channels, MOMENT, pitches)))


def empty_prompt(model: Any) -> list[list[Any]]:
    """A CONDITIONING of zeros in the widths `model` reads, which its settings tell, or the layer that the prompt goes into."""
    config, network = model.model.model_config.unet_config, model.get_model_object("diffusion_model")
    width = next((config[key] for key in PROMPT_WIDTHS if config.get(key)), None) or _width_into(network, PROMPT_LAYERS)
    if isinstance(width, (list, tuple)):
        width = width[0]
    if not width:
        raise ValueError(
            f"What prompts of {type(model.model).__name__} look like cannot be told from the model; connect a positive "
            "conditioning to warm up with."
        )
    pooled = config.get("vec_in_dim") or _width_into(network, POOLED_LAYERS) or SDXL_POOLED
    return [[torch.zeros(1, PROMPT_TOKENS, int(width)), {"pooled_output": torch.zeros(1, int(pooled))}]]


def _width_into(network: torch.nn.Module, names: Sequence[str]) -> int | None:
    """What the first of these layers that `network` has reads."""
    layers = dict(network.named_modules())
    return next((int(width) for name in names if (width := getattr(layers.get(name), "in_features", None))), None)


def warm_up(
    model: Any,
    sizes: Sequence[tuple[int, int]],
    batch: int = 1,
    positive: Any = None,
    negative: Any = None,
    cfg: float = 1.0,
) -> tuple[list[SizeWarmup], str]:
    """Sample a few steps of `model` at each of `sizes` (width, height in pixels), and say what each took.

    positive, negative: CONDITIONINGs as the pictures will have; without, empty prompts. cfg: 1 leaves the negative out,
    as samplers do. Shows progress by size and can be interrupted between steps; the model stays usable then. Raises
    ValueError where `model` needs a positive conditioning, or makes no pictures.
    """
    import comfy.sample

    compiler = compiler_of(model)
    check_makes_pictures(model)
    made_up = positive is None
    positive = empty_prompt(model) if made_up else positive
    negative = negative if negative is not None else positive
    done: list[SizeWarmup] = []
    seconds: list[float] = []
    timed = _timed(model, seconds)
    steps = STEPS if compiler is None or compiler.recorder is None else RECORDED_STEPS

    def sample(sampled: Any, latent: Any, steps: int, after_step: Any = None) -> None:
        comfy.sample.sample(
            sampled, _noise(latent), steps, cfg, "euler", "simple", positive, negative, latent,
            callback=after_step, disable_pbar=True, seed=0,
        )  # fmt: skip

    with _enough(model, made_up), host.tracked(host.current(), len(sizes) * steps, "warm-up") as bar:
        for width, height in sizes:
            latent = latent_for(model, width, height, batch)
            latent = _with_sound(model, comfy.sample.fix_empty_latent_channels(model, latent))
            before = _made(compiler)
            start = _now(model)
            if compiler is not None and override_of(model) is not None:
                # A graph keeps the attention that is known to be fastest while it is traced; measured it is only here.
                sample(uncompiled(model), latent, 1)
            sample(timed, latent, steps, lambda *_: bar.update())
            _record_the_rest(compiler, functools.partial(sample, timed, latent, steps))
            graphs, recordings = (now - then for now, then in zip(_made(compiler), before, strict=True))
            done.append(SizeWarmup(width, height, _now(model) - start, seconds[-1], graphs, recordings))
    return done, describe(done, compiler)


def _noise(latent: Any) -> Any:
    """Noise like `latent`, a tensor or several that are sampled as one (the film and the sound of MiniMax H3)."""
    if getattr(latent, "is_nested", False):
        return type(latent)([_noise(part) for part in latent.unbind()])
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))


def _timed(model: Any, seconds: list[float]) -> Any:
    """A clone of `model` that adds to `seconds` what each step takes, without those that a step cache answers."""
    from comfy.patcher_extension import WrappersMP

    def step(executor: Any, *args: Any, **kwargs: Any) -> Any:
        start, before = _now(model), spared(executor.class_obj)
        made = executor(*args, **kwargs)
        if spared(executor.class_obj) == before:
            seconds.append(_now(model) - start)
        return made

    timed = model.clone()
    timed.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, step)
    return timed


def _record_the_rest(compiler: RegionalCompiler | None, sample: Callable[[], None]) -> None:
    """Sample again while that brings calls nearer to being recorded.

    A step cache leaves calls out, and where guidance is for some of the steps, the others are calls of another kind.
    """
    if compiler is None or compiler.recorder is None:
        return
    before: dict[Hashable, int] = {}
    for _ in range(WARM_CALLS):
        left = compiler.recorder.on_the_way
        if not left or left == before:
            return
        before = left
        sample()


@contextmanager
def _enough(model: Any, made_up: bool) -> Iterator[None]:
    """A model that reads more than a prompt says so in many ways: with a prompt of ours, as a ValueError with the cure."""
    try:
        yield
    except INCOMPLETE as error:
        if not made_up:
            raise
        raise ValueError(
            f"{type(model.model).__name__} needs more than an empty prompt ({kind_and_line(error)}); connect the positive "
            "conditioning of the pictures to warm up with."
        ) from error


def describe(done: Sequence[SizeWarmup], compiler: RegionalCompiler | None) -> str:
    """The report of a warm-up."""
    lines = [f"Warmed up {counted(len(done), 'size')} in {sum(size.seconds for size in done):.1f} s"]
    lines += [size.sentence() for size in done]
    lines.append(compiler.report() if compiler is not None else "The model is not compiled: only kernels were chosen.")
    return "\n".join(lines)


def _made(compiler: RegionalCompiler | None) -> tuple[int, int]:
    if compiler is None:
        return 0, 0
    return compiler.graphs, compiler.recorder.recorded if compiler.recorder is not None else 0


def _now(model: Any) -> float:
    """Seconds, when the device has done what it was given. Warming up may wait for it."""
    wait_for(model.load_device)
    return time.perf_counter()
