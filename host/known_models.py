"""The model files the pack knows: where each belongs, where it comes from, under which licence.

Sizes and checksums stand here only where their source has published them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubFile:
    """One file of a Hugging Face repository; its checksum is asked of the hub when it is downloaded."""

    repo: str
    path: str

    def __str__(self) -> str:
        return f"https://huggingface.co/{self.repo}/blob/main/{self.path}"


@dataclass(frozen=True)
class HubRepository:
    """A whole Hugging Face repository: weights, configuration and tokenizer."""

    repo: str

    def __str__(self) -> str:
        return f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True)
class WebFile:
    """A file at an address. sha256 may be the first digits only."""

    url: str
    size: int | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class ZipMember:
    """A file inside a zip archive at an address, told by its name in whatever folder it lies."""

    archive: WebFile
    name: str

    def __str__(self) -> str:
        return f"{self.archive.url} ({self.name} in it)"


Source = HubFile | HubRepository | WebFile | ZipMember


@dataclass(frozen=True)
class KnownModel:
    """One file (or folder, for a HubRepository) at models/<kind>/<file>.

    about: what it is and, roughly, how large. non_commercial: the licence must be accepted before a download.
    """

    name: str
    family: str
    kind: str
    file: str
    source: Source
    licence: str
    about: str
    non_commercial: bool = False

    @property
    def place(self) -> str:
        return f"models/{self.kind}/{self.file}"


INSIGHTFACE = "insightface model licence: non-commercial research only"
COLORMNET = "CC BY-NC-SA 4.0: non-commercial"
QWEN_RESEARCH = "Qwen Research licence: non-commercial"
APACHE = "Apache-2.0"

ANTELOPE_ZIP = WebFile(
    "https://github.com/deepinsight/insightface/releases/download/model-zoo/antelopev2.zip",
    size=360_662_982,
    sha256="8e182f14",
)
DEEP_EXEMPLAR_ZIP = WebFile(
    "https://github.com/zhangmozhe/Deep-Exemplar-based-Video-Colorization/releases/download/v1.0/"
    "colorization_checkpoint.zip"
)


def _qwen(name: str, licence: str = APACHE, non_commercial: bool = False) -> KnownModel:
    about = "vision-language model" if "VL" in name else "language model"
    return KnownModel(
        name, "qwen_vl", "LLM", name, HubRepository(f"Qwen/{name}"), licence, about, non_commercial=non_commercial
    )


KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        "instantid-adapter",
        "instantid",
        "instantid",
        "ip-adapter.bin",
        HubFile("InstantX/InstantID", "ip-adapter.bin"),
        APACHE,
        "InstantID adapter for SDXL, about 1.69 GB",
    ),
    KnownModel(
        "instantid-controlnet",
        "instantid",
        "controlnet",
        "instantid/diffusion_pytorch_model.safetensors",
        HubFile("InstantX/InstantID", "ControlNetModel/diffusion_pytorch_model.safetensors"),
        APACHE,
        "InstantID's IdentityNet, a ControlNet for SDXL",
    ),
    KnownModel(
        "antelopev2-detector",
        "faces",
        "insightface",
        "models/antelopev2/scrfd_10g_bnkps.onnx",
        ZipMember(ANTELOPE_ZIP, "scrfd_10g_bnkps.onnx"),
        INSIGHTFACE,
        "face detector; about 17 MB of a 361 MB archive",
        non_commercial=True,
    ),
    KnownModel(
        "antelopev2-recogniser",
        "faces",
        "insightface",
        "models/antelopev2/glintr100.onnx",
        ZipMember(ANTELOPE_ZIP, "glintr100.onnx"),
        INSIGHTFACE,
        "face embedding; about 260 MB of the same archive",
        non_commercial=True,
    ),
    KnownModel(
        "colormnet",
        "colormnet",
        "colormnet",
        "DINOv2FeatureV6_LocalAtten_s2_154000.pth",
        WebFile(
            "https://github.com/yyang181/colormnet/releases/download/v0.1/DINOv2FeatureV6_LocalAtten_s2_154000.pth"
        ),
        COLORMNET,
        "video colorization with DINOv2 inside, about 495 MB",
        non_commercial=True,
    ),
    KnownModel(
        "deep-exemplar-colornet",
        "deep_exemplar",
        "deep_exemplar",
        "colornet_iter_76000.pth",
        ZipMember(DEEP_EXEMPLAR_ZIP, "colornet_iter_76000.pth"),
        "MIT (the repository; nothing is said of the weights apart)",
        "Deep Exemplar's colour network, about 131 MB",
    ),
    KnownModel(
        "deep-exemplar-nonlocal",
        "deep_exemplar",
        "deep_exemplar",
        "nonlocal_net_iter_76000.pth",
        ZipMember(DEEP_EXEMPLAR_ZIP, "nonlocal_net_iter_76000.pth"),
        "MIT (the repository; nothing is said of the weights apart)",
        "Deep Exemplar's correspondence network, about 28 MB",
    ),
    KnownModel(
        "deep-exemplar-vgg",
        "deep_exemplar",
        "deep_exemplar",
        "vgg19_conv.pth",
        ZipMember(DEEP_EXEMPLAR_ZIP, "vgg19_conv.pth"),
        "MIT (the repository; nothing is said of the weights apart)",
        "Deep Exemplar's VGG-19 features, about 80 MB",
    ),
    *(_qwen(f"Qwen3-VL-{size}-{kind}") for size in ("2B", "4B", "8B", "32B") for kind in ("Instruct", "Thinking")),
    _qwen("Qwen2.5-VL-3B-Instruct", QWEN_RESEARCH, non_commercial=True),
    _qwen("Qwen2.5-VL-7B-Instruct"),
    _qwen("Qwen2-VL-2B-Instruct"),
    _qwen("Qwen2-VL-7B-Instruct"),
    _qwen("Qwen2.5-3B-Instruct", QWEN_RESEARCH, non_commercial=True),
    _qwen("Qwen2.5-7B-Instruct"),
    _qwen("Qwen3-4B-Instruct-2507"),
    _qwen("Qwen3-4B-Thinking-2507"),
)


def select(names: list[str]) -> list[KnownModel]:
    """Models by name or family, in any case and with - or _, each once. Raises KeyError with a sentence for a name nobody
    knows."""
    found: dict[str, KnownModel] = {}
    for name in names:
        matching = [m for m in KNOWN_MODELS if _plain(name) in (_plain(m.name), _plain(m.family))]
        if not matching:
            families = ", ".join(dict.fromkeys(m.family for m in KNOWN_MODELS))
            raise KeyError(
                f"There is no model called {name!r}; `hotpath models list` shows all, and the families are: {families}."
            )
        found.update({m.name: m for m in matching})
    return list(found.values())


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
