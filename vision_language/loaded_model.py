"""A model ready to answer: its network, tokenizer and processor, the facts read from them, and its place in memory.

Its weights are under the host's memory management; what hangs on their addresses (decode buffers, CUDA graphs, prefix keys
and values) goes when they leave the device.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .. import host
from ..cache import content_key
from ..host import Managed
from ..host.capturing import GraphMemory, trim
from ..host.cards import numbered
from ..host.streamed_layers import lending
from ..products.linear import PackedLinear
from . import decoding
from .budgets import TokenPixels
from .folders import ModelFolder
from .gguf.linears import PackedEmbedding
from .quantization import OURS
from .unusable import UnusableModel

PREFILL_BYTES_PER_TOKEN = 1 << 19  # activations of a prefill, generously; the logits are made for one position only


@dataclass(frozen=True)
class LoadOptions:
    """How a folder is loaded. The same folder with options that come to the same is loaded once.

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

    def before_leaving(self) -> None:
        """The host takes weights off the device: what was built for their present place goes."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            owner.drop_device_state()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        target = kwargs.get("device", args[0] if args else None)
        owner = self._owner() if self._owner is not None else None
        device = torch.device(target) if isinstance(target, str | torch.device) else None
        if owner is not None and device is not None and device.type != owner.device.type:
            self.before_leaving()
        return super().to(*args, **kwargs)


class LoadedModel:
    """A model ready to answer: its network, tokenizer and processor, and the facts read from them.

    One generation at a time: `resident()` holds the model's lock.
    """

    def __init__(
        self,
        folder: ModelFolder,
        options: LoadOptions,
        network: Any,
        notes: Sequence[str],
        quantization: str,
        weights: Sequence[str],
        readers: tuple[Any, Any],
    ) -> None:
        self.folder, self.options, self.network = folder, options, network
        self.notes_of_loading, self.notes_of_choices = tuple(notes), tuple[str, ...]()
        self.quantization = quantization
        self.weights = list(weights)  # fingerprints of the files, as they were before they were read
        self.kept_in = -1  # the prompt in which it was last asked to be kept, by its number
        self.processor, self.tokenizer = readers
        self.holder = NetworkHolder(network)
        self.managed, self.hosted = manage(self.holder, options.device)
        self.holder._owner = weakref.ref(self)
        self.lock = threading.RLock()
        # Filled by the decoder and the prefix cache; both hold memory of the device.
        self.device_state: dict[str, Any] = {}

    # facts
    @property
    def notes(self) -> list[str]:
        """What is not as it was asked for, and why, for the report."""
        return [*self.notes_of_choices, *self.notes_of_loading]

    @property
    def device(self) -> torch.device:
        return self.managed.device

    @property
    def words(self) -> Any:
        """What has the dtype and the device of the network's embedding."""
        embedding = self.network.get_input_embeddings()
        return embedding if isinstance(embedding, PackedEmbedding) else embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.words.dtype
        return found

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
            here = self.words.device
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
        return content_key(
            self.weights,
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
        """Bytes of keys, values and states for `tokens` positions of `rows` sequences, at the length of their bucket."""
        text = self.text_config
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        length = decoding.bucket_length(tokens)
        linear = (getattr(text, "layer_types", None) or []).count("linear_attention")
        states = 0
        if linear:
            keys, values = (
                int(getattr(text, f"linear_num_{part}_heads")) * int(getattr(text, f"linear_{part}_head_dim"))
                for part in ("key", "value")
            )
            seen = (2 * keys + values) * int(text.linear_conv_kernel_dim) * self.dtype.itemsize
            states = linear * rows * (seen + int(text.linear_key_head_dim) * values * torch.float32.itemsize)
        attending = int(text.num_hidden_layers) - linear
        return 2 * attending * int(heads) * int(dim) * length * rows * self.dtype.itemsize + states

    # memory
    def room(
        self, prompt_tokens: int, new_tokens: int = 0, prompts: int = 1, answers: int = 1, path: str = "plain"
    ) -> int:
        """Bytes beside the weights for `answers` of up to `new_tokens` to each of `prompts` questions of `prompt_tokens`.

        path: how it is decoded. Buffers that are there already are asked for no more.
        """
        rows, positions = prompts * answers, prompt_tokens + new_tokens
        # What a prefill computes with, and the keys and values that it makes, or leaves for the next question.
        asked = prompt_tokens * prompts * PREFILL_BYTES_PER_TOKEN + self.cache_bytes(prompt_tokens, rows)
        whole = self.cache_bytes(positions, rows)
        if path == "plain":
            # The library's cache grows by a copy of one layer at a time.
            return asked + whole + whole // int(self.text_config.num_hidden_layers)
        here = (rows, decoding.bucket_length(positions))
        return asked + (0 if any(key[1:] == here for key in self.device_state.get("workspaces", ())) else whole)

    @contextmanager
    def resident(
        self,
        prompt_tokens: int,
        new_tokens: int = 0,
        prompts: int = 1,
        answers: int = 1,
        path: str = "plain",
        keep: bool = True,
    ) -> Iterator[Any]:
        """The network on its device, with `room` for what is asked; sent back afterwards unless kept."""
        with self.lock:
            extra = self.room(prompt_tokens, new_tokens, prompts, answers, path)
            with self.managed.resident(extra_bytes=extra, keep=keep), lending(self.network, self.device):
                yield self.network

    def drop_device_state(self) -> None:
        """Free what was built for the weights' present place: decode buffers, graphs, prefix keys and values."""
        graphs = "graph memory" in self.device_state
        self.device_state.clear()
        if graphs:
            trim(self.device)

    def release(self) -> None:
        """Send the weights back to the offload device and free everything that was built on the compute device."""
        with self.lock:
            self.drop_device_state()
            self.managed.release()

    def leave_unmanaged(self) -> None:
        """The host takes everything off its devices: so does this model on another one, unless it is being asked."""
        if not self.hosted and self.lock.acquire(blocking=False):
            try:
                self.release()
            finally:
                self.lock.release()

    @torch.inference_mode(False)
    def discard(self) -> None:
        """Free the weights where they are. Nothing can be asked of this model any more."""
        with self.lock:
            self.drop_device_state()
            if self.quantization in OURS:  # tensors of other libraries do not lend themselves to it
                for part in self.network.modules():
                    if isinstance(part, PackedLinear):
                        part.forget()
                for tensor in (*self.network.parameters(), *self.network.buffers()):
                    tensor.data = torch.empty(0, dtype=tensor.dtype)
            # For the host's books: what it sends away is next to nothing.
            self.managed.release()


def graph_memory(model: LoadedModel) -> GraphMemory:
    """What all graphs over this model's weights share: one of them runs at a time, and what it leaves is copied."""
    memory: GraphMemory = model.device_state.setdefault("graph memory", GraphMemory(model.device))
    return memory


def manage(holder: NetworkHolder, device: str) -> tuple[Managed, bool]:
    """The network on `device`, and whether that is the host's matter: a host looks after devices of the kind that it computes
    on, however many there are."""
    wanted, own = numbered(compute_device(device)), numbered(host.current().device())
    if wanted == own:
        return host.current().manage(holder), True
    if wanted.type == own.type:
        return host.current().manage(holder, wanted), True
    from ..host.headless import HeadlessManaged

    return HeadlessManaged(holder, wanted, torch.device("cpu")), False


def compute_device(asked: str) -> torch.device:
    """The device `asked` means; auto is the host's. Raises UnusableModel for one that is not there."""
    if asked in ("auto", ""):
        return host.current().device()
    try:
        wanted = torch.device(asked)
        absent = {
            "cuda": not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count(),
            "mps": not torch.backends.mps.is_available(),
            "xpu": not torch.xpu.is_available() or (wanted.index or 0) >= torch.xpu.device_count(),
            "cpu": False,
        }.get(wanted.type, True)
    except (RuntimeError, TypeError):  # no name of a device
        absent = True
    if absent:
        raise UnusableModel(f"The device {asked!r} is not there: choose auto.")
    return wanted
