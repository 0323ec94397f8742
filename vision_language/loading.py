"""Loading a Qwen-VL (or text) model folder: weights, tokenizer and processor, shared by every node that names it.

One copy of a model lives in the process however many nodes use it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import host
from ..cache import content_key
from ..host import streamed_layers
from ..host.errors import first_line, install
from ..host.interruption import is_stop
from ..host.library_parts import BrokenLibrary, parts
from ..host.saved_configs import misread
from ..host.unloading import before_unloading_all, prompts_begun, when_memory_is_short
from . import decoding, download, folders, guarded_attention, linear_attention, projections, stored_fp8
from .experts import pack_experts, unpacked_experts
from .folders import ModelFolder
from .gguf.building import build
from .gguf.file import Gguf
from .gguf.models import GgufModel
from .gguf.settings import write as write_settings
from .gguf.source import Source
from .interruption import interruptible_loading
from .load_choices import Choices, choices
from .loaded_model import LoadedModel, LoadOptions
from .mixed_decoding import MIXED_MODELS
from .quantization import OURS, PACKED, pack_head, quantize
from .unusable import UnusableModel
from .words import AS_IT_LIES, read_words

log = logging.getLogger("hotpath.vision_language")

RESERVE = 1 << 30  # bytes left for activations, keys and values, when the host decides what fits
WITHOUT_A_PACKAGE = "Choose the model as it was published, with quantization int8 or int4, which need no package."


@torch.inference_mode(False)
def load_folder(folder: ModelFolder, options: LoadOptions, weights: list[str]) -> LoadedModel:
    """Load `folder` anew, into ordinary tensors also where the host runs nodes in inference mode.

    weights: fingerprints of its weight files. Raises UnusableModel for what the library refuses, with its reason.
    """
    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    try:
        AutoModelForCausalLM, AutoModelForImageTextToText, *_ = parts("transformers", *names)
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except BrokenLibrary as error:
        raise UnusableModel(str(error)) from error
    except ImportError as error:
        needs = install('"transformers>=4.57"')
        raise UnusableModel(
            f"Vision-language models need transformers 4.57 or newer ({error}): install it with {needs}."
        ) from error
    if folder.model_type not in CONFIG_MAPPING_NAMES:
        raise UnusableModel(
            f"{folder.name} is of the type {folder.model_type!r}, which the transformers that is installed does not know: update "
            f"it with {install('--upgrade transformers')}."
        )
    if reason := misread(folder.config):
        raise UnusableModel(f"{folder.name} {reason}")
    chosen = choices(folder, options)
    start = time.perf_counter()
    auto = AutoModelForImageTextToText if folder.sees else AutoModelForCausalLM
    if folder.gguf is None:
        readers = read_words(folder.path, folder.sees)
        network, quantization, notes = from_library(folder, chosen, auto)
    else:
        readers, network, quantization, notes = from_gguf(folder.gguf, chosen, auto)
    network.eval().requires_grad_(False)
    if folder.sees:
        projections.patches_by_product(getattr(network.model, "visual", None))
    linear_attention.take_over(decoding.text_decoder(network).layers)
    attend, note = guarded_attention.guard(chosen.device, guarded_attention.one_key_head(network))
    if chosen.attention == "sdpa" and attend is not None:
        guarded_attention.take_over(network, attend)
        notes += [note] if note else []
    if chosen.device.type == "cpu" and quantization in OURS:
        count = projections.pack_products(network)
        log.debug("%s: %d matrices ordered for oneDNN", folder.name, count)
    streamed = stream_layers(network, chosen.device, options.stream_layers)
    notes += [streamed] if streamed else []
    model = LoadedModel(folder, options, network, notes, quantization, weights, readers)
    if folder.sees and not model.takes_encoder_outputs:
        log.debug("deeper levels come %s", "split by picture" if model.deepstack_in_parts else "joined")
    spent = time.perf_counter() - start
    log.info("%s loaded in %.1f s (%s, %s)", folder.name, spent, chosen.dtype, chosen.attention)
    return model


def from_gguf(model: GgufModel, chosen: Choices, auto: Any) -> tuple[Any, Any, str, list[str]]:
    """((processor, tokenizer), the network, what its quantisation is called, notes) of a GGUF file."""
    source = Source(Gguf(model.files), None if model.tower is None else Gguf([model.tower]))
    with TemporaryDirectory(prefix="hotpath-") as name:
        settings = Path(name)
        write_settings(source, settings)
        try:
            readers = read_words(settings, source.tower is not None)
        except UnusableModel as error:
            reason = first_line(error.__cause__ or error, 300)
            raise UnusableModel(
                f"The words of {model.files[0]} could not be read: {reason}. Fetch it again."
            ) from error
        network, quantization, notes = build(source, settings, chosen, auto)
    if model.tower is not None:
        notes.append(f"pictures by {model.tower.name}")
    return readers, network, quantization, notes


def from_library(folder: ModelFolder, chosen: Choices, auto: Any) -> tuple[Any, str, list[str]]:
    """(the network, what its quantisation is called, notes) of a folder: read by the library, then merged and packed."""
    device, dtype, packing = chosen.device, chosen.dtype, chosen.packing
    stored = folder.stored_quantization
    in_blocks = stored_fp8.serves(stored)
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": chosen.attention, **AS_IT_LIES}
    if packing.method.startswith("bitsandbytes"):
        settings |= {"quantization_config": bitsandbytes_settings(packing.method, dtype), "device_map": {"": device}}
    elif in_blocks:
        stored_fp8.let_dense_ones_load()
        settings |= stored_fp8.settings(stored, packing.method)
    elif stored is not None and device.type == "cuda":
        settings["device_map"] = {"": device}
    try:
        with interruptible_loading():
            network, found = auto.from_pretrained(folder.path, output_loading_info=True, **settings)
        if in_blocks and not (in_blocks := stored_fp8.take_over(network)):
            stored = None
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the library raises anything from KeyError to ImportError
        if is_stop(error):
            raise
        reason = first_line(error, 300)
        if folder.stored_quantization is not None:
            reason = f"{reason.rstrip('.')}. {WITHOUT_A_PACKAGE}"
        raise UnusableModel(
            f"The model folder {folder.path} could not be loaded as {folder.model_type}: {reason}"
        ) from error
    # The library would fill these with random numbers and go on.
    if wrong := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise UnusableModel(
            f"The weights in {folder.path} do not fit its config.json: {len(wrong)} are missing or of another shape, "
            f"such as {wrong[0]}. Fetch the folder again."
        )
    others = map(str, found["unexpected_keys"]) if getattr(network, "hf_quantizer", None) is None else ()
    if codes := sorted(key for key in others if belongs_to_weights(network, key)):
        raise UnusableModel(
            f"The weights in {folder.path} are packed in a way that is not known here (they come with {codes[0]}). "
            f"{WITHOUT_A_PACKAGE}"
        )
    network.requires_grad_(False)
    plain = stored is None and not packing.method.startswith("bitsandbytes")
    if plain or in_blocks:
        merge, layers = stored_fp8.merge if in_blocks else projections.merge, decoding.text_decoder(network).layers
        if network.config.model_type in decoding.DENSE_MODELS:
            projections.merge_decoder(layers, merge)
        elif network.config.model_type in MIXED_MODELS:
            projections.merge_mixed(layers, merge)
    if packing.method in PACKED:
        layers = decoding.text_decoder(network).layers
        count = pack_experts(layers, packing.method, device) + quantize(layers, packing.method, device)
        log.info("%s: %d layers packed to %s", folder.name, count, packing.method)
        if pack_head(network, packing.method, device):
            log.info("%s: the output head packed to int8", folder.name)
    kept = unpacked_experts(decoding.text_decoder(network).layers) if packing.method != "none" else ""
    quantization = packing.method if stored is None else str(stored.get("quant_method", "stored"))
    return network, quantization, [note for note in (kept, stored_fp8.NOTE * in_blocks) if note]


def belongs_to_weights(network: Any, key: str) -> bool:
    """Whether an entry of a file that the library passes over says how weights of a layer are to be read, such as a scale."""
    layer, _, name = key.rpartition(".")
    try:
        return name != "bias" and isinstance(network.get_submodule(layer), torch.nn.Linear)
    except AttributeError:
        return False


def stream_layers(network: Any, device: torch.device, asked: int) -> str:
    """Keep `asked` decoder layers in CPU memory (-1: as many as do not fit on `device`); returns a note, or ''."""
    layers = decoding.text_decoder(network).layers
    count = asked
    if asked < 0:
        if device.type == "cpu" or next(network.parameters()).device.type != "cpu":
            return ""
        whole = streamed_layers.nbytes(network) + RESERVE
        host.current().make_room(whole, device)
        count = streamed_layers.how_many(layers, whole - host.current().free_memory(device))
    count = min(count, len(layers))
    if not count:
        return ""
    streamed_layers.stream(layers, count)
    return f"{count} of {len(layers)} decoder layers are streamed from CPU memory"


def bitsandbytes_settings(method: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if method.endswith("8-bit"):
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def state_of(name: str, revision: str = "") -> str:
    """What changes when the files of the folder that a widget value means do; "" while there is none."""
    try:
        folder = download.local_folder(name, revision)
        return "" if folder is None else folders.fingerprint(folder)[1]
    except (UnusableModel, OSError):
        return ""


def host_bytes(network: torch.nn.Module) -> int:
    """Bytes of the weights that are in the computer's own memory, in which Metal computes too."""
    return sum(t.nbytes for t in (*network.parameters(), *network.buffers()) if t.device.type in ("cpu", "mps"))


class Registry:
    """The loaded models of the process. A model stays while somebody holds it or it was asked to be kept.

    Models that nobody but the registry holds are let go when ComfyUI unloads every model, or when it runs short of the memory
    in which they wait; and the least recently used of them when their weights would not fit once more into the memory that is
    free, where the last one stays.
    """

    def __init__(self) -> None:
        self._models: weakref.WeakValueDictionary[str, LoadedModel] = weakref.WeakValueDictionary()
        self._kept: dict[str, LoadedModel] = {}  # the least recently used first
        self._held: weakref.WeakSet[LoadedModel] = weakref.WeakSet()  # by who does not say when it is done
        self._borrowers: Counter[LoadedModel] = Counter()
        self._lock = threading.RLock()

    def get(self, name: str, options: LoadOptions, must_see: bool = True) -> LoadedModel:
        """The model a widget value means: the copy that is loaded, else a fresh one. For who holds on to it."""
        folder = download.locate(name, options.revision, must_see)
        with self._lock:
            model = self._find(folder, options)
            self._held.add(model)
            return model

    @contextmanager
    def borrowed(self, name: str, options: LoadOptions, must_see: bool = True) -> Iterator[LoadedModel]:
        """`get` for the length of one call.

        With the last borrower of a model that nobody holds, and that was not asked to be kept, its weights are freed where they
        are: on their way to another device they would take seconds and as much memory again.
        """
        folder = download.locate(name, options.revision, must_see)
        with self._lock:
            model = self._find(folder, options)
            self._borrowers[model] += 1
        try:
            yield model
        finally:
            with self._lock:
                self._borrowers[model] -= 1
                if not self._borrowers[model]:
                    del self._borrowers[model]
                    if model not in self._held and model not in self._kept.values():
                        self._forget(model)
                        model.discard()

    def _find(self, folder: ModelFolder, options: LoadOptions) -> LoadedModel:
        before_unloading_all(self.let_go)
        when_memory_is_short(self.give_back)
        chosen = choices(folder, options)
        # Before loading: files that are changed while they load are told from what they were at the next call.
        weights, files = folders.fingerprint(folder)
        place = content_key(str(folder.path.resolve()), chosen.key)
        key = f"{place} {files}"
        model = self._models.get(key)
        if model is None:
            # What the folder held before is of use to nobody who asks from now on.
            self._kept = {k: m for k, m in self._kept.items() if not k.startswith(f"{place} ")}
            model = load_folder(folder, options, weights)
            self._models[key] = model
        # Of who asked last: what ran is the same for all, why it is not what was asked is not.
        model.notes_of_choices = chosen.notes
        return model

    def _forget(self, model: LoadedModel) -> None:
        for key in [key for key, known in self._models.items() if known is model]:
            del self._models[key]

    def keep(self, model: LoadedModel, keep: bool) -> None:
        """keep=False takes the weights off the device at once and out of memory with the last node that holds them.

        What is only borrowed goes when it is given back.
        """
        with self._lock:
            key = next((k for k, known in self._models.items() if known is model), None)
            if not keep:
                self._kept.pop(key or "", None)
                if model in self._held or not self._borrowers[model]:
                    model.release()
            elif key is not None:
                self._kept.pop(key, None)
                self._kept[key] = model
                model.kept_in = prompts_begun()
                self._let_go_of_old_ones()

    def _let_go_of_old_ones(self) -> None:
        kept = self._kept
        while len(kept) > 1:
            held = sum(streamed_layers.whole_bytes(model.network) for model in kept.values())
            if held <= host.current().free_memory(torch.device("cpu")):
                return
            oldest = kept.pop(next(iter(kept)))
            log.info("%s is no longer kept: memory is short", oldest.folder.name)

    def give_back(self, missing: int) -> int:
        """Free models that only wait in the computer's memory, the least recently used first, until `missing` bytes are free
        again; returns how many are. Not those of the running prompt, which may ask once more."""
        given = 0
        with self._lock:
            for key, model in list(self._kept.items()):
                waiting = host_bytes(model.network)
                used = model in self._held or self._borrowers[model] or model.kept_in == prompts_begun()
                if given >= missing or used or not waiting:
                    continue
                log.info("%s is no longer kept: memory is short", model.folder.name)
                del self._kept[key]
                self._forget(model)
                model.discard()
                given += waiting
        return given

    def let_go(self) -> None:
        """Keep no model any more; those that somebody holds stay loaded, for the host to take off its devices."""
        # No lock: a model that another thread loads must not hold up a user who wants memory back.
        self._kept = {}
        for model in list(self._models.values()):
            model.leave_unmanaged()

    def loaded(self) -> list[LoadedModel]:
        with self._lock:
            return list(self._models.values())

    def clear(self) -> int:
        """Release every model and forget the kept ones; returns how many there were."""
        with self._lock:
            models = list(self._models.values())
            self._kept = {}
            for model in models:
                model.release()
            self._models.clear()
            return len(models)


MODELS = Registry()
