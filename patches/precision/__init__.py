"""Native ComfyUI models with their linear layers in 8 bits, in a clone, with the error stated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .comparison import OutputError, compare
from .comparison import describe as describe_errors
from .quantize import LayerError, QuantizationReport, quantize_model
from .schemes import DEFAULT_EXCLUDE, SCHEMES, PrecisionUnavailable, slow_on_a_cpu, unavailable


def set_precision(
    model: Any,
    scheme: str,
    exclude: str | Iterable[str] | None = None,
    latent: dict[str, Any] | None = None,
    positive: Any = None,
    table: int = 10,
) -> tuple[Any, str]:
    """A MODEL like `model` with its linear layers in `scheme`, one of SCHEMES, and a report. `model` is not changed.

    exclude: patterns of layers that stay (see `schemes.excluded_by`); None: DEFAULT_EXCLUDE. With a LATENT and a
    CONDITIONING, both models run on them and the report says how far apart they are. table: layers listed with their
    weight errors, largest first.
    Raises PrecisionUnavailable with the reason and the cure where it cannot be done.
    """
    patched, report = quantize_model(model, scheme, exclude)
    text = report.describe(table)
    if latent is not None and positive is not None:
        text += "\n" + describe_errors(compare(model, patched, latent, positive))
    return patched, text


__all__ = [
    "DEFAULT_EXCLUDE",
    "SCHEMES",
    "LayerError",
    "OutputError",
    "PrecisionUnavailable",
    "QuantizationReport",
    "compare",
    "quantize_model",
    "set_precision",
    "slow_on_a_cpu",
    "unavailable",
]
