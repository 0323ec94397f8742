"""HDR pictures on an SDR screen: ITU-R BT.2100's PQ and HLG by BT.2390's curve, and BT.2020's colours in BT.709's.

Each channel goes through the curves by itself, which for a grey picture is exact.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PQ = 16  # ffmpeg's number of the transfer; the other one is HLG
HDR_PEAK, SDR_PEAK = 1000.0, 100.0  # cd/m²
STEPS = 4095  # of the second curve's table, in square roots, which are dense where eyes are fine

TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)


def to_sdr(codes: Array, transfer: int) -> Array:
    """codes: [H, W, 3] uint16, full range. Returns [H, W, 3] uint8."""
    light = _light(transfer)[codes]
    # Nothing grey changes colour: the rows sum up to 1.
    light = light @ (TO_709 / TO_709.sum(axis=1, keepdims=True)).T
    np.clip(light, 0, 1, out=light)
    return _gamma()[(np.sqrt(light) * STEPS + 0.5).astype(np.uint16)]


@lru_cache(maxsize=2)
def _light(transfer: int) -> Array:
    """[65536] light of each code, in parts of SDR_PEAK."""
    code = np.arange(65536) / 65535
    nits = _from_pq(code) if transfer == PQ else HDR_PEAK * _scene_light(code) ** 1.2
    return (_from_pq(_compressed(_to_pq(nits))) / SDR_PEAK).astype(np.float32)


@lru_cache(maxsize=1)
def _gamma() -> Array:
    """[STEPS + 1] the level of each root of light, as a screen of BT.1886 shows it."""
    light = (np.arange(STEPS + 1) / STEPS) ** 2
    return np.round(255 * light ** (1 / 2.4)).astype(np.uint8)


def _from_pq(code: Array) -> Array:
    power = code ** (1 / 78.84375)
    return 10000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def _to_pq(nits: Array) -> Array:
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def _scene_light(code: Array) -> Array:
    """HLG's inverse OETF."""
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)


def _compressed(code: Array) -> Array:
    """BT.2390's EETF of PQ codes: as it is up to a knee, from there a spline that ends at SDR_PEAK."""
    source = _to_pq(np.array(HDR_PEAK))
    peak = _to_pq(np.array(SDR_PEAK)) / source
    knee = 1.5 * peak - 0.5
    code = np.minimum(code / source, 1)
    t = np.maximum(code - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * peak
    return np.where(code < knee, code, spline) * source
