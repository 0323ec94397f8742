"""Loading a Z-Image checkpoint: three networks, each under the host's memory management for itself, each when needed.

The text encoder is apart from the transformer so that it can leave the device while the picture is drawn, and is not
even read from the disk while prompts come from the cache. One copy lives in the process however many nodes use it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from .. import host
from ..attention.capabilities import dtype_name
from ..cache import content_key
from ..host.errors import first_line, install
from ..host.library_parts import BrokenLibrary, parts
from ..host.saved_configs import misread
from . import compilation, interruption, precision, stream_attention
from .adapters import Adapters
from .component import Component
from .folders import COMPONENTS, Checkpoint, UnusableCheckpoint, find

log = logging.getLogger("hotpath.text_to_image")

# Not float16: the transformer's activations run over its range.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OLDEST_DIFFUSERS = (0, 39)
PATCH = 2  # latent pixels on a side of one token
# What a ControlNet takes from the transformer, and its files hold again.
SHARED: tuple[str, ...] = ("t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner")
SHARED += ("context_refiner", "x_pad_token", "cap_pad_token")
PROMPT_MULTIPLE = 32  # the transformer fills a prompt's tokens up to a multiple of it


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded. The same folder with the same options is loaded once.

    dtype: auto, bfloat16 or float32 (auto is float32 on the CPU). attention, compile, precision: one of
    stream_attention.BACKENDS, compilation.MODES, precision.PRECISIONS; what ran instead, and why, is in `ZImage.notes()`.
    """

    dtype: str = "auto"
    attention: str = "auto"
    compile: str = "none"
    precision: str = "none"


class ZImage:
    """A checkpoint ready to draw: its networks, tokenizer and schedule, and the facts in their configurations.

    text_identity: MD5 of all that a prompt's states depend on beside the prompt; identity: of all that a picture depends
    on beside its request. Both are of the files as they were when this was made.
    """

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        import transformers

        self.checkpoint, self.options = checkpoint, options
        self.device = host.current().device()
        self.dtype = choose_dtype(options.dtype, self.device)
        self.vae_device = host.current().vae_device()
        elsewhere = self.vae_device.type != self.device.type
        self.vae_dtype = choose_dtype(options.dtype, self.vae_device) if elsewhere else self.dtype
        self.precision = precision.plan(options.precision, self.device, self.dtype)
        self.attention = stream_attention.choose(options.attention)
        packed = self.precision.method != "none" and precision.by_torchao(self.device)
        self.compilation = compilation.plan(options.compile, self.device, packed)
        versions = (str(self.dtype), self.device.type, transformers.__version__)
        self.text_identity = content_key(checkpoint.identity("text_encoder", "tokenizer"), *versions)
        lossy = () if stream_attention.is_exact(options.attention) else (options.attention,)
        apart = (str(self.vae_dtype), self.vae_device.type) if elsewhere else ()
        self.identity = content_key(
            checkpoint.identity(*COMPONENTS), str(self.dtype), self.precision.method, *lossy, *apart
        )
        self.adapters = Adapters()
        self.preview: Any = None  # previews.LinearPreview, once one was fitted
        self.transformer = Component("transformer", self._load_transformer, self.components)
        self.text_encoder = Component("text encoder", self._load_text_encoder, self.components)
        self.vae = Component("VAE", self._load_vae, self.components, self.vae_device if elsewhere else None)
        vae, transformer = checkpoint.config("vae"), checkpoint.config("transformer")
        self.latent_channels = int(vae.get("latent_channels", 16))
        self.scaling_factor = float(vae.get("scaling_factor") or 1.0)
        self.shift_factor = float(vae.get("shift_factor") or 0.0)
        self.latent_scale = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)  # pixels on a side of one latent
        positions = [int(n) for n in transformer.get("axes_lens", (1024, 512, 512))]
        self.longest_prompt = (positions[0] - 1) // PROMPT_MULTIPLE * PROMPT_MULTIPLE  # tokens
        self.tallest, self.widest = (n * self.step_of_size for n in positions[1:])
        if int(transformer.get("in_channels", 16)) != self.latent_channels:
            raise UnusableCheckpoint(
                f"{checkpoint.path}: the transformer draws {transformer.get('in_channels')} channels and the VAE reads "
                f"{self.latent_channels}: the folders are of different checkpoints."
            )

    @property
    def step_of_size(self) -> int:
        """Width and height are multiples of it, in pixels."""
        return self.latent_scale * PATCH

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self.checkpoint.path / "tokenizer", trust_remote_code=False, local_files_only=True
        )

    def scheduler(self) -> Any:
        """A schedule for one run; it holds the run's position, so it is never shared."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(self.checkpoint.config("scheduler"))

    def notes(self) -> list[str]:
        """What was asked for that runs otherwise, and how the rest runs; one line each."""
        waiting = [component.note() for component in self.components()]
        if self.vae_device.type != self.device.type:
            name = str(self.vae_dtype).removeprefix("torch.")
            waiting.append(f"the VAE computes on {self.vae_device} in {name}, as ComfyUI was started")
        lines = [*self.attention.lines(), self.precision.note, self.compilation.note, *waiting]
        return [line for line in lines if line]

    def describe(self) -> str:
        """What will run, for a report before anything has."""
        lines = [
            f"{self.checkpoint.name}: {self.checkpoint.pipeline}, {dtype_name(self.dtype)} on {self.device}",
            f"attention: {self.attention.policy.backend}",
            self.precision.note,
            self.compilation.note,
        ]
        return "\n".join(line for line in lines if line)

    def components(self) -> tuple[Component, ...]:
        return self.transformer, self.text_encoder, self.vae

    def release(self) -> None:
        for component in self.components():
            component.release()

    def _load_transformer(self) -> nn.Module:
        from diffusers import ZImageTransformer2DModel

        network = _from_pretrained(ZImageTransformer2DModel, self.checkpoint, "transformer", torch_dtype=self.dtype)
        if self.checkpoint.controlled:
            from diffusers import ZImageControlNetModel

            network.controlnet = _from_pretrained(
                ZImageControlNetModel, self.checkpoint, "controlnet", SHARED, torch_dtype=self.dtype
            )
        stream_attention.install(network, self.attention)
        precision.apply(network, self.precision, self.device)
        interruption.watch(network)
        if self.checkpoint.controlled:
            share_layers(network)
        if compilation.apply(network, self.compilation):
            stream_attention.make_traceable(self.attention)
        return network

    def _load_text_encoder(self) -> nn.Module:
        from transformers import Qwen3Model

        network = _from_pretrained(Qwen3Model, self.checkpoint, "text_encoder", dtype=self.dtype)
        return without_last_layer(network)

    def _load_vae(self) -> nn.Module:
        from diffusers import AutoencoderKL

        return _from_pretrained(AutoencoderKL, self.checkpoint, "vae", torch_dtype=self.vae_dtype)


def without_last_layer(encoder: Any) -> Any:
    """The encoder up to the hidden states the transformer reads: those that go into the last layer.

    `last_hidden_state` of what is returned equals `hidden_states[-2]` of the whole, one layer cheaper.
    """
    encoder.layers = encoder.layers[:-1]
    encoder.config.num_hidden_layers = len(encoder.layers)
    encoder.norm = nn.Identity()
    return encoder


def share_layers(transformer: Any) -> None:
    """Let the transformer's ControlNet use the layers it has in common with it.

    As plain attributes, not as modules of its own: whoever counts or moves weights must meet them once.
    """
    for name in SHARED:
        transformer.controlnet.__dict__[name] = getattr(transformer, name)
    transformer.controlnet.t_scale = transformer.t_scale


def _from_pretrained(
    kind: Any, checkpoint: Checkpoint, component: str, besides: tuple[str, ...] = (), **settings: Any
) -> Any:
    """Load strictly: every weight of the network is in the files, with its shape, and nothing else but `besides`.

    Raises UnusableCheckpoint.
    """
    folder = checkpoint.path / component
    try:
        network, found = kind.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            variant=checkpoint.variants.get(component) or None,
            **settings,
        )
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the libraries raise anything from KeyError to ImportError
        raise UnusableCheckpoint(
            f"{folder} could not be loaded as {kind.__name__}: {first_line(error, 300)}"
        ) from error
    # Left to themselves the libraries fill these with random numbers and go on.
    wrong = [*found["missing_keys"], *found.get("mismatched_keys", ()), *found.get("error_msgs", ())]
    if wrong:
        raise UnusableCheckpoint(
            f"The weights in {folder} do not fit its config.json: {len(wrong)} are missing or of another shape, such as "
            f"{sorted(map(str, wrong))[0][:200]}. Fetch the folder again."
        )
    strange = [str(key) for key in found.get("unexpected_keys", ()) if not str(key).startswith(besides or ("lm_head",))]
    if strange:
        raise UnusableCheckpoint(
            f"The weights in {folder} are of another architecture: {len(strange)} have no place in {kind.__name__}, such "
            f"as {sorted(strange)[0]}."
        )
    return network


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked in DTYPES:
        return DTYPES[asked]
    if asked != "auto":
        raise ValueError(f"{asked!r} is no dtype: choose auto, {' or '.join(DTYPES)}.")
    if device.type == "cpu":
        return torch.float32
    return host.current().compute_dtype(supported=(torch.bfloat16, torch.float32))


def require_libraries() -> None:
    """Raises UnusableCheckpoint when diffusers or transformers is missing or too old for Z-Image."""
    try:
        import diffusers

        # Older ones have Z-Image, too, but refuse to run it as this does or draw other pictures.
        if Version(diffusers.__version__).release < OLDEST_DIFFUSERS:
            raise ImportError(f"diffusers {diffusers.__version__} is installed")
        parts("transformers", "Qwen3Model")
        parts("diffusers", "ZImageTransformer2DModel")
    except BrokenLibrary as error:
        raise UnusableCheckpoint(str(error)) from error
    except (ImportError, RuntimeError) as error:
        needs = install('"diffusers>=0.39" "transformers>=4.57" accelerate')
        raise UnusableCheckpoint(
            f"Text to image needs diffusers 0.39 and transformers 4.57 or newer ({error}): install them with {needs}."
        ) from error


class Registry:
    """The loaded checkpoints of the process. One stays while somebody holds it."""

    def __init__(self) -> None:
        self._models: weakref.WeakValueDictionary[str, ZImage] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()

    def get(self, name: str, options: LoadOptions | None = None, anywhere: bool = False) -> ZImage:
        """The checkpoint a widget value means: the copy that is there, else a fresh one. See `folders.find`."""
        options = options or LoadOptions()
        checkpoint = find(name, anywhere)
        require_libraries()
        if reason := misread(checkpoint.config("text_encoder")):
            raise UnusableCheckpoint(f"{checkpoint.path / 'text_encoder'} {reason}")
        here = host.current()
        # With the files' content: a folder that was fetched anew is another model.
        files = checkpoint.identity(*COMPONENTS)
        key = content_key(str(checkpoint.path.resolve()), files, vars(options), str(here.device()), here.name)
        with self._lock:
            model = self._models.get(key)
            if model is None:
                model = self._models[key] = ZImage(checkpoint, options)
            return model

    def loaded(self) -> list[ZImage]:
        with self._lock:
            return list(self._models.values())

    def clear(self) -> int:
        """Release and forget every checkpoint; returns how many there were."""
        with self._lock:
            models = list(self._models.values())
            for model in models:
                model.release()
            self._models.clear()
            return len(models)


MODELS = Registry()
