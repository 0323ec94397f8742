"""How a MODEL computes: which attention, which number format, and what came of it."""

from __future__ import annotations

from typing import Any

from .. import host
from ..patches.attention_override import POLICIES, attention_report, set_attention
from ..patches.precision import DEFAULT_EXCLUDE, SCHEMES, set_precision
from .sockets import HIDDEN, NATIVE_MODEL

CATEGORY = "Hotpath/acceleration"


class HotpathAttention:
    DISPLAY_NAME = "Attention Backend"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Chooses the attention kernel of this model, and shows what ran where after sampling. auto takes the exact "
        "kernel that measures fastest for each size; lossy ones run only when named, and are checked first."
    )
    SEARCH_ALIASES = ["sage attention", "sageattention", "flash attention", "sdpa", "xformers", "cudnn", "speed"]
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The model with this attention.",
        "What is available here. What ran, after sampling, comes from Attention Report.",
    )
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": NATIVE_MODEL,
                "backend": (
                    list(POLICIES),
                    {
                        "default": "auto",
                        "tooltip": "auto: the fastest exact kernel per size. sage: SageAttention 2, else comfy-kitchen int8, "
                        "else SageAttention 1 (lossy). Or one kernel by name.",
                    },
                ),
                "strict": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Stop with the reason where the backend cannot compute a call. Off: an exact kernel takes "
                        "that call, and the report says so.",
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    def patch(self, model: Any, backend: str, strict: bool, unique_id: str | None = None) -> tuple[Any, str]:
        patched, report = set_attention(model, backend, strict, unique_id)
        host.current().show_text(report, unique_id)
        return patched, report


class HotpathAttentionReport:
    DISPLAY_NAME = "Attention Report"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Reports what computed the attention of a model in its last sampling: backend, size, calls and reason."
    )
    SEARCH_ALIASES = ["attention backend", "which attention"]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("One line per kind of call, most calls first.",)
    OUTPUT_NODE = True
    FUNCTION = "show"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL", {"tooltip": "The model that went into the sampler."})},
            "optional": {
                "latent": ("LATENT", {"tooltip": "What the sampler made, so that this runs after it."}),
                "image": ("IMAGE", {"tooltip": "Or a picture that was made, for the same purpose."}),
            },
            "hidden": HIDDEN,
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # every run has its own report

    def show(self, model: Any, latent: Any = None, image: Any = None, unique_id: str | None = None) -> tuple[str]:
        report = attention_report(model)
        host.current().show_text(report, unique_id)
        return (report,)


class HotpathPrecision:
    DISPLAY_NAME = "Precision"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Computes the linear layers of any native model in fp8 or int8. Makes a second, smaller model; the original is not "
        "changed. With a latent and a prompt it runs both once and says how far apart they are."
    )
    SEARCH_ALIASES = ["quantize", "quantise", "fp8", "int8", "quantization", "vram", "speed"]
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The quantised model.",
        "Layers, memory, weight errors, and the outputs' errors if a latent and a prompt are connected.",
    )
    FUNCTION = "quantize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": NATIVE_MODEL,
                "scheme": (
                    list(SCHEMES),
                    {
                        "default": "fp8",
                        "tooltip": "fp8 (RTX 40, H100 and later), int8 (RTX 20 and later, CPUs with VNNI): weights and "
                        "activations, faster. int8_rotated: better quality, a little slower. *_weights: less memory, full "
                        "precision products.",
                    },
                ),
                "exclude": (
                    "STRING",
                    {
                        "default": ", ".join(DEFAULT_EXCLUDE),
                        "multiline": True,
                        "tooltip": "Layers that stay as they are: names with * and ?, separated by commas. A name also "
                        "covers everything inside it.",
                    },
                ),
            },
            "optional": {
                "latent": ("LATENT", {"tooltip": "To measure the error on; the first one of a batch is used."}),
                "positive": ("CONDITIONING", {"tooltip": "The prompt to measure the error with."}),
                "table": (
                    "INT",
                    {
                        "default": 10,
                        "min": 0,
                        "max": 10000,
                        "tooltip": "Layers the report lists with the error of their weights, the largest first.",
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    def quantize(
        self,
        model: Any,
        scheme: str,
        exclude: str,
        latent: Any = None,
        positive: Any = None,
        table: int = 10,
        unique_id: str | None = None,
    ) -> tuple[Any, str]:
        patched, report = set_precision(model, scheme, exclude, latent, positive, table)
        host.current().show_text(report, unique_id)
        return patched, report


NODES: dict[str, type[Any]] = {
    "HotpathAttention": HotpathAttention,
    "HotpathAttentionReport": HotpathAttentionReport,
    "HotpathPrecision": HotpathPrecision,
}
