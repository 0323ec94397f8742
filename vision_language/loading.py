"""Loading a Qwen-VL (or text) model folder: weights, tokenizer and processor, shared by every node that names it.

One copy of a model lives in the process however many nodes use it. Its weights are under the host's memory management;
what hangs on their addresses (decode buffers, CUDA graphs, prefix keys and values) goes when they leave the device.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .. import host
from ..cache import content_key, file_fingerprint
from ..host import Managed
from . import decoding, download, offloading, projections
from .budgets import TokenPixels
from .folders import ModelFolder, UnusableModel
from .interruption import interruptible_loading
from .quantization import QuantizationPlan, plan, quantize

log = logging.getLogger("hotpath.vision_language")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "eager")
PREFILL_BYTES_PER_TOKEN = 1 << 19  # activations of a prefill, generously; the logits are made for one position only


@dataclass(frozen=True)
class LoadOptions:
    """How a folder is loaded. The same folder with the same options is loaded once.

    dtype: auto, bfloat16, float16 or float32 (auto is float32 on the CPU). device: auto, cpu or a torch device.
    quantization, attention: what a widget says; what ran instead, and why, is in `LoadedModel.notes`.
    stream_layers: decoder layers that stay in CPU memory; -1 leaves it to the room there is on the device.
    """

    dtype: str = "auto"
    quantization: str = "none"
    attention: str = "auto"
    device: str = "auto"
    revision: str = ""
    stream_layers: int = -1


class NetworkHolder(nn.Module):
    """A library model as a plain module: the host keeps the present device on it, which library models do not allow."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._owner: weakref.ref[LoadedModel] | None = None

    def to(self, *args: Any, **kwargs: Any) -> Any:
        target = kwargs.get("device", args[0] if args else None)
        owner = self._owner() if self._owner is not None else None
        device = torch.device(target) if isinstance(target, str | torch.device) else None
        if owner is not None and device is not None and device.type != owner.device.type:
            owner.drop_device_state()
        return super().to(*args, **kwargs)


class LoadedModel:
    """A model ready to answer: its network, tokenizer and processor, and the facts read from them.

    One generation at a time: `resident()` holds the model's lock.
    """

    def __init__(
        self, folder: ModelFolder, options: LoadOptions, network: Any, notes: list[str], quantization: str = "none"
    ) -> None:
        from transformers import AutoProcessor, AutoTokenizer

        self.folder, self.options, self.network, self.notes = folder, options, network, notes
        self.quantization = quantization
        if folder.sees:
            self.processor: Any = AutoProcessor.from_pretrained(folder.path)
            self.tokenizer: Any = self.processor.tokenizer
        else:
            self.processor = None
            self.tokenizer = AutoTokenizer.from_pretrained(folder.path)
        self.holder = NetworkHolder(network)
        self.managed: Managed = manage(self.holder, options.device)
        self.holder._owner = weakref.ref(self)
        self.lock = threading.RLock()
        # Filled by the decoder and the prefix cache; both hold memory of the device.
        self.device_state: dict[str, Any] = {}

    # facts
    @property
    def device(self) -> torch.device:
        return self.managed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.get_input_embeddings().weight.dtype

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def context_length(self) -> int:
        return int(getattr(self.text_config, "max_position_embeddings", 32768))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        ids = self.network.generation_config.eos_token_id
        found = {ids} if isinstance(ids, int) else set(ids or ())
        if self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        return frozenset(found)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else next(iter(self.stop_ids), 0))

    @cached_property
    def tower_signature(self) -> list[str]:
        return list(inspect.signature(self.network.forward).parameters)

    @property
    def takes_encoder_outputs(self) -> bool:
        """Whether the library accepts vision features at its front door (transformers 5.20 and later)."""
        return "mm_encoder_outputs" in self.tower_signature

    @property
    def cache_argument(self) -> str:
        """What `forward` calls the keys and values of earlier tokens (renamed in transformers 5.24)."""
        return "cache" if "cache" in self.tower_signature else "past_key_values"

    @cached_property
    def deepstack_in_parts(self) -> bool:
        """Whether the library's feature objects hold the deeper levels split by picture, or joined (some 5.x versions).

        Asked once, when the model is loaded, of the smallest picture there is.
        """
        vision = self.config.vision_config
        side = int(vision.spatial_merge_size)
        width = int(getattr(vision, "in_channels", 3)) * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2
        with torch.no_grad():
            here = self.network.get_input_embeddings().weight.device
            pixels = torch.zeros(side * side, width, device=here, dtype=self.dtype)
            made = self.network.model.get_image_features(pixels, torch.tensor([[1, side, side]], device=here))
        levels = getattr(made, "deepstack_features", None)
        return levels is not None and len(levels) > 0 and not isinstance(levels[0], torch.Tensor)

    @cached_property
    def image_sizes(self) -> TokenPixels:
        processor = self.processor.image_processor
        size = dict(processor.size)
        side = int(processor.patch_size) * int(processor.merge_size)
        shortest = size.get("shortest_edge") or getattr(processor, "min_pixels", None) or 4 * side * side
        longest = size.get("longest_edge") or getattr(processor, "max_pixels", None) or 16384 * side * side
        return TokenPixels(side, int(shortest), int(longest))

    @cached_property
    def identity(self) -> str:
        """MD5 of the weights as loaded: survives a renamed folder, differs for a fine-tune, a dtype, a quantisation."""
        files = sorted([*self.folder.path.glob("*.safetensors"), *self.folder.path.glob("pytorch_model*.bin")])
        return content_key(
            [file_fingerprint(file) for file in files],
            self.model_type,
            self.dtype,
            self.quantization,
            str(self.attention),
            self.device.type,
        )

    @property
    def attention(self) -> str:
        return str(getattr(self.config, "_attn_implementation", "sdpa"))

    def cache_bytes(self, tokens: int, rows: int = 1) -> int:
        """Bytes of keys and values for `tokens` positions of `rows` sequences, at the length of their bucket."""
        text = self.text_config
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        length = decoding.bucket_length(tokens)
        return 2 * int(text.num_hidden_layers) * int(heads) * int(dim) * length * rows * self.dtype.itemsize

    # memory
    @contextmanager
    def resident(self, tokens: int, rows: int = 1, keep: bool = True) -> Iterator[Any]:
        """The network on its device, with room for `rows` sequences of `tokens`; sent back afterwards unless kept."""
        extra = 2 * self.cache_bytes(tokens, rows) + tokens * rows * PREFILL_BYTES_PER_TOKEN
        with self.lock, self.managed.resident(extra_bytes=extra, keep=keep):
            yield self.network

    def drop_device_state(self) -> None:
        """Free what was built for the weights' present place: decode buffers, graphs, prefix keys and values."""
        self.device_state.clear()

    def release(self) -> None:
        """Send the weights back to the offload device and free everything that was built on the compute device."""
        with self.lock:
            self.drop_device_state()
            self.managed.release()


def manage(holder: NetworkHolder, device: str) -> Managed:
    """The host's management, unless a certain device was asked for."""
    if device in ("auto", ""):
        return host.current().manage(holder)
    from ..host.headless import HeadlessManaged

    return HeadlessManaged(holder, compute_device(device), torch.device("cpu"))


def compute_device(asked: str) -> torch.device:
    """The device `asked` means; auto is the host's. Raises UnusableModel for one that is not there."""
    if asked in ("auto", ""):
        return host.current().device()
    wanted = torch.device(asked)
    absent = {
        "cuda": not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count(),
        "mps": not torch.backends.mps.is_available(),
    }
    if absent.get(wanted.type, False):
        raise UnusableModel(f"The device {asked} is not there: choose auto.")
    return wanted


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked in DTYPES:
        return DTYPES[asked]
    if asked not in ("auto", ""):
        raise ValueError(f"{asked!r} is no dtype: choose auto, {', '.join(DTYPES)}.")
    if device.type == "cpu":
        return torch.float32
    # Not float16: the activations of Qwen decoders run over its range.
    return host.current().compute_dtype(supported=(torch.bfloat16, torch.float32))


def choose_attention(asked: str) -> tuple[str, str]:
    """(implementation, note). Whatever cannot run here becomes sdpa, and the note says why."""
    if asked in ("auto", "sdpa", ""):
        return "sdpa", ""
    if asked == "eager":
        return "eager", "attention: eager"
    if asked == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            return asked, "attention: flash_attention_2"
        return "sdpa", "attention: sdpa, because the flash_attn package is not installed"
    if asked == "sage":
        return "sdpa", "attention: sdpa, because SageAttention has no kernel for one query and a cache"
    raise ValueError(f"{asked!r} is no attention: choose one of {', '.join(ATTENTIONS)}.")


@torch.inference_mode(False)
def load_folder(folder: ModelFolder, options: LoadOptions) -> LoadedModel:
    """Load `folder` anew, into ordinary tensors also where the host runs nodes in inference mode.

    Raises UnusableModel for what the library refuses, with its reason.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    except ImportError as error:
        raise UnusableModel(
            f"Vision-language models need transformers 4.57 or newer ({error}): "
            'install it with pip install "transformers>=4.57".'
        ) from error
    device = compute_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    attention, attention_note = choose_attention(options.attention)
    packing = plan(options.quantization, device)
    stored = folder.config.get("quantization_config")
    if stored is not None and packing.method != "none":
        packing = QuantizationPlan("none", f"the folder is already quantised ({stored.get('quant_method')})")
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    if packing.method.startswith("bitsandbytes"):
        settings |= {"quantization_config": bitsandbytes_settings(packing.method, dtype), "device_map": {"": device}}
    elif stored is not None and device.type == "cuda":
        settings["device_map"] = {"": device}
    start = time.perf_counter()
    auto = AutoModelForImageTextToText if folder.sees else AutoModelForCausalLM
    try:
        with interruptible_loading():
            network, found = auto.from_pretrained(folder.path, output_loading_info=True, **settings)
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the library raises anything from KeyError to ImportError
        if type(error).__name__ == "InterruptProcessingException":  # ordinary in older versions of ComfyUI
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnusableModel(
            f"The model folder {folder.path} could not be loaded as {folder.model_type}: {first[:300]}"
        ) from error
    # The library would fill these with random numbers and go on.
    if wrong := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise UnusableModel(
            f"The weights in {folder.path} do not fit its config.json: {len(wrong)} are missing or of another shape, "
            f"such as {wrong[0]}. Fetch the folder again."
        )
    network.eval().requires_grad_(False)
    notes = [note for note in (attention_note,) if note]
    if packing.note and options.quantization.lower() not in ("none", "none (fp16)"):
        notes.append(f"quantization: {packing.note}")
    plain = stored is None and not packing.method.startswith("bitsandbytes")
    if plain and network.config.model_type in decoding.DENSE_MODELS:
        projections.merge_decoder(decoding.text_decoder(network).layers)
    if packing.method in ("int8", "int4", "float8"):
        count = quantize(decoding.text_decoder(network).layers, packing.method)
        log.info("%s: %d layers packed to %s", folder.name, count, packing.method)
    if note := stream_layers(network, device, options.stream_layers):
        notes.append(note)
    quantization = packing.method if stored is None else str(stored.get("quant_method", "stored"))
    model = LoadedModel(folder, options, network, notes, quantization)
    if folder.sees and not model.takes_encoder_outputs:
        log.debug("deeper levels come %s", "split by picture" if model.deepstack_in_parts else "joined")
    log.info("%s loaded in %.1f s (%s, %s)", folder.name, time.perf_counter() - start, dtype, attention)
    return model


def stream_layers(network: Any, device: torch.device, asked: int) -> str:
    """Keep `asked` decoder layers in CPU memory (-1: as many as do not fit on `device`); returns a note, or ''."""
    layers = decoding.text_decoder(network).layers
    count = asked
    if asked < 0:
        if device.type == "cpu" or next(network.parameters()).device.type != "cpu":
            return ""
        whole = sum(parameter.nbytes for parameter in network.parameters()) + offloading.RESERVE
        host.current().make_room(whole, device)
        count = offloading.layers_to_stream(network, layers, host.current().free_memory(device))
    count = min(count, len(layers))
    if not count:
        return ""
    offloading.stream(layers, count)
    return f"{count} of {len(layers)} decoder layers are streamed from CPU memory"


def bitsandbytes_settings(method: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if method.endswith("8-bit"):
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


class Registry:
    """The loaded models of the process. A model stays while somebody holds it or it was asked to be kept."""

    def __init__(self) -> None:
        self._models: weakref.WeakValueDictionary[str, LoadedModel] = weakref.WeakValueDictionary()
        self._kept: dict[str, LoadedModel] = {}
        self._lock = threading.RLock()

    def get(self, name: str, options: LoadOptions, must_see: bool = True) -> LoadedModel:
        """The model a widget value means: the copy that is loaded, else a fresh one."""
        folder = download.locate(name, options.revision, must_see)
        key = content_key(str(folder.path.resolve()), vars(options), str(host.current().device()))
        with self._lock:
            model = self._models.get(key)
            if model is None:
                model = load_folder(folder, options)
                self._models[key] = model
            return model

    def keep(self, model: LoadedModel, keep: bool) -> None:
        """keep=False takes the weights off the device at once and out of memory with the last node that holds them."""
        with self._lock:
            key = next((k for k, known in self._models.items() if known is model), None)
            if not keep:
                self._kept.pop(key or "", None)
                model.release()
            elif key is not None:
                self._kept[key] = model

    def loaded(self) -> list[LoadedModel]:
        with self._lock:
            return list(self._models.values())

    def clear(self) -> int:
        """Release every model and forget the kept ones; returns how many there were."""
        with self._lock:
            models = list(self._models.values())
            self._kept.clear()
            for model in models:
                model.release()
            self._models.clear()
            return len(models)


MODELS = Registry()
