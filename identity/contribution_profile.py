"""Which blocks carry an identity, as a file: measured once, used by patch mode "adaptive".

A profile is JSON that a person can read. It says what was measured (blocks), on what (model, adapter), how (settings,
noise levels) and when, and nothing in it is executed or joined into a path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from ..cache import content_key
from ..host.letters import counted
from ..host.whole_files import whole_file
from .adapter import InstantIDAdapter
from .blocks import SDXL_BLOCKS, Block
from .contributions import Contributions, block_name

FORMAT = "hotpath.block_profile"
VERSION = 1
MAX_BYTES = 1 << 20
MAX_NAME = 200
LARGEST = 1e300
UNKNOWN = "unknown"
BLOCK_OF = {block_name(block): block for block in SDXL_BLOCKS}


class ProfileError(ValueError):
    """A file is no block profile; the message names it and says what is wrong."""


@dataclass(frozen=True)
class ContributionProfile:
    """The measured contribution of an identity to SDXL's blocks.

    size: by block, mean relative size of the contribution (see `Contributions.size`); only blocks that were measured.
    model, adapter: content keys, "unknown" where there was none. settings: what the identities were applied with.
    """

    name: str
    size: Mapping[Block, float]
    model: str = UNKNOWN
    adapter: str = UNKNOWN
    sigmas: tuple[float, ...] = ()
    runs: int = 1
    settings: tuple[Mapping[str, Any], ...] = ()
    date: str = ""
    made_with: str = ""

    @property
    def share(self) -> dict[Block, float]:
        """Each block's part of the whole contribution; sums to 1."""
        total = math.fsum(self.size.values())
        return {block: size / total for block, size in self.size.items()}

    def fewest_blocks(self, share: float, available: Sequence[Block]) -> tuple[tuple[Block, ...], float]:
        """The fewest of `available` that carry `share` (0..1) of the contribution of all of them, and what they carry.

        In the order of `available`. Blocks that were not measured, or where nothing was added, are left out.
        """
        size = {block: self.size[block] for block in available if self.size.get(block, 0) > 0}
        total = math.fsum(size.values())
        chosen: list[Block] = []
        carried = 0.0
        for block in sorted(size, key=lambda b: (-size[b], SDXL_BLOCKS.index(b))):
            # Sums of 70 numbers end a rounding error below 1.
            if carried >= share * total - 1e-9 * total:
                break
            chosen.append(block)
            carried = math.fsum(size[b] for b in chosen)
        return tuple(b for b in available if b in set(chosen)), carried / total if total > 0 else 0.0

    def describe(self) -> str:
        """Such as "portrait: 70 blocks over 20 steps, 1 run, 2026-01-02"."""
        steps, runs = counted(len(self.sigmas), "step"), counted(self.runs, "run")
        return f"{self.name}: {counted(len(self.size), 'block')} over {steps}, {runs}, {self.date[:10]}"


def make_profile(
    found: Contributions,
    name: str,
    model: str = UNKNOWN,
    settings: Sequence[Mapping[str, Any]] = (),
    made_with: str = "",
) -> ContributionProfile:
    """A profile of what was measured now. Raises ProfileError when nothing was, or not on SDXL's blocks.

    name: one line; what is over MAX_NAME characters is cut off. settings: one mapping per identity; their key "adapter"
    says which adapter it was, if all had the same one.
    """
    if not found.is_sdxl:
        raise ProfileError(
            "A profile is about SDXL's 70 blocks, and this model has others: there is a picture, no file."
        )
    size = {b: float(s) for b, s, known in zip(found.blocks, found.size, found.measured, strict=True) if known}
    if not size or not math.fsum(size.values()) > 0:
        raise ProfileError(
            "Nothing was measured: connect model of Block Telemetry to the sampler, the sampler's result to after, and let "
            "start_at of InstantID lie before end_at."
        )
    adapters = {str(entry.get("adapter", UNKNOWN)) for entry in settings}
    return ContributionProfile(
        name=re.sub(r"[\x00-\x20\ud800-\udfff]+", " ", name).strip()[:MAX_NAME] or "profile",
        size=size,
        model=model,
        adapter=adapters.pop() if len(adapters) == 1 else UNKNOWN,
        sigmas=tuple(float(f"{s:.6g}") for s in found.sigmas),
        runs=found.runs,
        settings=tuple(dict(entry) for entry in settings),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        made_with=made_with,
    )


def weights_key(tensors: Iterable[Tensor]) -> str:
    """A content key of small weights, the same whether they were loaded in float32 or in half precision of that."""
    return content_key(*(t.detach().cpu().half() for t in tensors))


def adapter_key(adapter: InstantIDAdapter) -> str:
    """A content key of the adapter that is the same on every machine (its `fingerprint` may hold the file's date)."""
    network = adapter.image_proj_model
    return weights_key([network.proj_in.bias, network.proj_out.bias, network.norm_out.weight, network.norm_out.bias])


def safe_name(name: str) -> str:
    """`name` as a file name without folders and ending; "profile" when nothing is left of it."""
    safe = "".join(c if c.isalnum() or c in " ._-" else "_" for c in name).strip(" .").removesuffix(".json")
    return safe.encode()[:200].decode(errors="ignore").strip(" .") or "profile"


def save_profile(profile: ContributionProfile, folder: Path) -> Path:
    """Write the profile into `folder` under its safe name, replacing an older one; an unfinished file is never left."""
    share = profile.share
    data = {
        "format": FORMAT,
        "version": VERSION,
        "name": profile.name,
        "date": profile.date,
        "made_with": profile.made_with,
        "model": profile.model,
        "adapter": profile.adapter,
        "runs": profile.runs,
        "settings": [dict(entry) for entry in profile.settings],
        "sigmas": list(profile.sigmas),
        "blocks": {
            block_name(block): {"size": profile.size[block], "share": share[block]} if block in profile.size else None
            for block in SDXL_BLOCKS
        },
    }
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    path = folder / f"{safe_name(profile.name)}.json"
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def load_profile(path: Path) -> ContributionProfile:
    """Read what `save_profile` wrote. Raises ProfileError for everything else."""
    if path.stat().st_size > MAX_BYTES:
        raise ProfileError(f"{path.name} is no block profile: it is larger than {MAX_BYTES >> 20} MiB.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path.name} is no block profile: it is not JSON ({error}).") from None
    try:
        return _read(data)
    except _Wrong as wrong:
        raise ProfileError(
            f"{path.name} is no block profile that can be used: {wrong}. Measure again with Block Telemetry Report."
        ) from None


class _Wrong(Exception):
    pass


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _read(data: Any) -> ContributionProfile:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _Wrong(f'it does not begin with "format": "{FORMAT}"')
    if data.get("version") != VERSION:
        raise _Wrong(f"it is of version {data.get('version')!r}, and version {VERSION} is what is read here")
    text = {key: _text(data, key) for key in ("name", "date", "made_with", "model", "adapter")}
    runs = data.get("runs")
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        raise _Wrong("runs is no whole number above 0")
    sigmas, settings = data.get("sigmas"), data.get("settings")
    if not isinstance(sigmas, list) or not all(_is_number(s) for s in sigmas):
        raise _Wrong("sigmas is no list of numbers")
    if not isinstance(settings, list) or not all(isinstance(entry, dict) for entry in settings):
        raise _Wrong("settings is no list of objects")
    size = _read_blocks(data.get("blocks"))
    return ContributionProfile(size=size, sigmas=tuple(map(float, sigmas)), runs=runs, settings=tuple(settings), **text)


def _read_blocks(blocks: Any) -> dict[Block, float]:
    if not isinstance(blocks, dict) or blocks.keys() != BLOCK_OF.keys():
        found = f"{len(blocks)} of other names" if isinstance(blocks, dict) else "none"
        raise _Wrong(f"blocks must name each of SDXL's {len(BLOCK_OF)} blocks once; it has {found}")
    size: dict[Block, float] = {}
    shares: dict[Block, float] = {}
    for name, entry in blocks.items():
        if entry is None:
            continue
        if not isinstance(entry, dict) or entry.keys() != {"size", "share"}:
            raise _Wrong(f"block {name} must have size and share, or be null")
        if not all(_is_number(value) and value >= 0 for value in entry.values()):
            raise _Wrong(f"size and share of block {name} must be numbers from 0 up")
        size[BLOCK_OF[name]], shares[BLOCK_OF[name]] = float(entry["size"]), float(entry["share"])
    total = math.fsum(size.values())
    if not total > 0:
        raise _Wrong("no block has a contribution")
    if any(abs(shares[block] - size[block] / total) > 1e-6 for block in size):
        raise _Wrong("sizes and shares contradict each other")
    return size


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or len(value) > 1000 or re.search(r"[\x00-\x1f]", value):
        raise _Wrong(f"{key} is no line of text")
    return value


def _is_number(value: Any) -> bool:
    # Compared with a bound, because a whole number too large for a float, or the sum of large ones, is an error elsewhere.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
