"""What each cross-attention block does with an identity, recorded while a picture is sampled.

A `BlockTelemetry` lies in the transformer_options of a MODEL. Once per call of the diffusion model it hands out a small
tensor on the device, attention adds its sums of squares to that, and nothing is read back before somebody asks: sampling
never waits for the recorder.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..identity.adapter import InstantIDAdapter
from ..identity.blocks import INDEX, SDXL_BLOCKS, Block
from ..identity.contribution_profile import UNKNOWN, adapter_key, weights_key
from ..identity.contributions import Contributions, energies_by_step
from .identity_attention import IdentityAttention
from .model_call import TELEMETRY, note_model_calls
from .sdxl_layout import UnsupportedModel, transformer_blocks

IDENTITIES = "hotpath_identities"
KEY = "hotpath_telemetry"  # of the wrapper that announces runs
KEPT_CALLS = 4096  # as tensors on their devices; older ones are added up on the CPU
RUNNING = 64  # the newest calls may still be filled by another thread
KEPT_STEPS = 4096
NO_SIGMA = -1.0

Energies = NDArray[np.float64]


@dataclass
class _Calls:
    """Calls not yet read, and by noise level the sum of those that were; count: of these, those with something in them."""

    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    steps: dict[float, Energies] = field(default_factory=dict)
    count: int = 0
    runs: int = 0


class BlockTelemetry:
    """Collects energies [blocks, 2] per model call: column 0 the identities' contribution, column 1 the block's own output.

    blocks: what the rows are; SDXL's 70 in the adapter's order (`INDEX`) for SDXL and its smaller relatives.
    keep_runs: add every sampling run to what is there, instead of beginning anew with each.
    settings: what the identities on the model were applied with, for the profile. Any thread may call anything.
    """

    def __init__(
        self,
        blocks: tuple[Block, ...] = SDXL_BLOCKS,
        keep_runs: bool = False,
        model: str = UNKNOWN,
        settings: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.blocks = blocks
        self.keep_runs = keep_runs
        self.model = model
        self.settings = tuple(settings)
        self._row = {block: row for row, block in enumerate(blocks)}
        self._calls = _Calls()
        self._lock = threading.Lock()
        self._thread = threading.local()

    def __deepcopy__(self, _: dict[int, Any]) -> BlockTelemetry:
        """Itself: copies of a MODEL, one per device say, record into one place."""
        return self

    def begin_run(self) -> None:
        """A sampler starts."""
        with self._lock:
            if not self.keep_runs:
                self._calls = _Calls()
            self._calls.runs += 1

    def begin_call(self, timestep: Tensor | None, device: torch.device) -> Tensor:
        """Zeros [blocks, 2] float32 on `device`, to be added to until the call ends.

        timestep: the noise level, its first element counts; it may be on a device and is not read now.
        """
        energies = torch.zeros(len(self.blocks), 2, dtype=torch.float32, device=device)
        if timestep is None:
            level = torch.full((1,), NO_SIGMA, device=device)
        else:
            # A copy: samplers that replay a graph write the next noise level into the same tensor.
            level = timestep.detach().reshape(-1)[:1].float().clone()
        with self._lock:
            calls = self._calls
            calls.waiting.append((level, energies))
            if len(calls.waiting) > KEPT_CALLS:
                self._read(calls, len(calls.waiting) - RUNNING)
        self._thread.energies, self._thread.owned = energies, set()
        return energies

    def add(self, block: Block, contribution: Tensor, own: Tensor) -> None:
        """Note a contribution to `block` in this thread's call; `own` counts the first time a block is named in it."""
        energies: Tensor | None = getattr(self._thread, "energies", None)
        row = self._row.get(block)
        if energies is None or row is None or energies.device != contribution.device:
            return
        energies[row, 0] += contribution.float().square().sum()
        if row not in self._thread.owned:
            self._thread.owned.add(row)
            energies[row, 1] += own.float().square().sum()

    def contributions(self) -> Contributions:
        """Everything recorded so far; this waits for the devices. Raises ValueError for values that are not finite."""
        with self._lock:
            calls = self._calls
            self._read(calls, len(calls.waiting))
            steps = dict(calls.steps)
            runs, count = max(calls.runs, 1), calls.count
        return energies_by_step(steps, self.blocks, runs, count)

    @staticmethod
    def _read(calls: _Calls, count: int) -> None:
        """Bring the oldest `count` calls to the CPU, one copy per device, and add them to their steps."""
        taken, calls.waiting = calls.waiting[:count], calls.waiting[count:]
        for device in dict.fromkeys(energies.device for _, energies in taken):
            here = [pair for pair in taken if pair[1].device == device]
            energies = torch.stack([pair[1] for pair in here]).cpu().double().numpy()
            levels = torch.cat([pair[0].to(device) for pair in here]).cpu().tolist()
            for level, energy in zip(levels, energies, strict=True):
                if energy.any():  # a step cache may have answered in the model's place
                    calls.count += 1
                    calls.steps[level] = calls.steps[level] + energy if level in calls.steps else energy
        while len(calls.steps) > KEPT_STEPS:
            _halve(calls.steps)


def _halve(steps: dict[float, Energies]) -> None:
    """Add every second noise level to its neighbour."""
    levels = sorted(steps)
    for low, high in zip(levels[::2], levels[1::2], strict=False):
        steps[low] = steps[low] + steps.pop(high)


class _Measured:
    """A callback of another pack's open attention patch, whose contribution is noted."""

    def __init__(self, callback: Callable[..., Tensor], block: Block) -> None:
        self.callback = callback
        self.block = block

    def __call__(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **kwargs: Any
    ) -> Tensor:
        contribution = self.callback(out, q, k, v, extra_options, **kwargs)
        recorder = extra_options.get(TELEMETRY)
        if isinstance(recorder, BlockTelemetry) and isinstance(contribution, Tensor):
            recorder.add(self.block, contribution, out)
        return contribution


@functools.cache
def _keep_out_of_compiled_graphs() -> None:
    """A graph would go on adding to the record of the call it was traced in.

    Done with the first recorder and not by a decorator, because it imports torch's compiler, which takes seconds.
    """
    BlockTelemetry.add = torch.compiler.disable(BlockTelemetry.add)  # type: ignore[method-assign]


def note_identity(model: Any, adapter: InstantIDAdapter, **settings: Any) -> None:
    """Remember on `model`, a ModelPatcher that is already our clone, what an identity was applied with."""
    options = model.model_options.setdefault("transformer_options", {})
    entry = {"adapter": adapter_key(adapter), "adapter_file": adapter.name, **settings}
    options[IDENTITIES] = (*options.get(IDENTITIES, ()), entry)


def record_blocks(model: Any, keep_runs: bool = False) -> tuple[Any, BlockTelemetry]:
    """A clone of `model` that records what its identities do, and the recorder.

    Raises UnsupportedModel for a model without cross-attention blocks, and for one with nothing to record.
    """
    layout = transformer_blocks(model)
    name = type(model.model).__name__
    if not layout:
        raise UnsupportedModel(
            f"Block Telemetry looks at the cross-attention blocks of a UNet, and this model ({name}) has none. Use it "
            "with SDXL and InstantID, or with a UNet that another adapter acts on."
        )
    _keep_out_of_compiled_graphs()
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    foreign = _measure_foreign_callbacks(options.get("patches_replace", {}).get("attn2", {}), layout.keys())
    settings = options.get(IDENTITIES, ())
    if not foreign and not settings:
        raise UnsupportedModel(
            f"Nothing acts on the attention of this model ({name}), so there is nothing to record: connect the model that "
            "comes out of InstantID, with a weight that is not 0."
        )
    blocks = SDXL_BLOCKS if layout.keys() <= INDEX.keys() else tuple(layout)
    recorder = BlockTelemetry(blocks, keep_runs, model_key(model), settings)
    options[TELEMETRY] = recorder
    note_model_calls(patched)
    _announce_runs(patched)
    return patched, recorder


def model_key(model: Any) -> str:
    """A content key of the UNet's norms before text attention: small, and those of no two checkpoints are alike.

    "unknown" for weights that are not in memory. LoRAs leave norms alone, so they do not change it.
    """
    norms = [getattr(transformer, "norm2", None) for transformer in transformer_blocks(model).values()]
    weights = [norm.weight for norm in norms if norm is not None and norm.weight is not None]
    if not weights or any(weight.is_meta for weight in weights):
        return UNKNOWN
    return weights_key(weights)


def _measure_foreign_callbacks(attn2: dict[Any, Any], layout: Any) -> int:
    """Put `_Measured` around the callbacks of other packs' open patches; returns around how many."""
    count = 0
    for block, patch in attn2.items():
        callbacks = getattr(patch, "callback", None)
        if isinstance(patch, IdentityAttention) or not isinstance(callbacks, list) or block not in layout:
            continue
        own = copy.copy(patch)
        own.callback = [c if isinstance(c, _Measured) else _Measured(c, block) for c in callbacks]
        attn2[block] = own
        count += len(callbacks)
    return count


def _begin_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
    recorder = executor.class_obj.model_options.get("transformer_options", {}).get(TELEMETRY)
    if isinstance(recorder, BlockTelemetry):
        recorder.begin_run()
    return executor(*args, **kwargs)


def _announce_runs(model: Any) -> None:
    from comfy.patcher_extension import WrappersMP

    if not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _begin_run)
