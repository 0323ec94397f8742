"""What benchmarks/acceleration.py lets compete: models, and everything that runs each of them."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from acceleration_models import (
    CPU_Z_IMAGE,
    POOLED,
    SD15,
    SDXL,
    TINY_SDXL,
    TINY_Z_IMAGE,
    Z_IMAGE,
    cases,
    cpu_cases,
    diffusers_twin,
    native,
    prompt,
    with_identity,
)
from quiet import alone


@dataclass
class Contestant:
    """prepare: makes what samples a Case to a latent. est: seconds it is likely to need before it is warm."""

    name: str
    prepare: Callable[[], Callable[[Any], torch.Tensor]]
    est: float = 10.0
    run: Callable[[Any], torch.Tensor] | None = None
    warm_up: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    new_graphs: dict[str, int] = field(default_factory=dict)
    psnr: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    extra_gib: float = 0.0
    left_out: str = ""
    notes: str = ""

    def median(self, case: str) -> float | None:
        return statistics.median(self.seconds[case]) if self.seconds.get(case) else None


@contextlib.contextmanager
def fast_settings() -> Iterator[None]:
    """What ComfyUI's --fast sets for the process: fp16 accumulation and autotuned convolutions. Undone afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (getattr(matmul, "allow_fp16_accumulation", None), cudnn.benchmark)
    try:
        cudnn.benchmark = True
        if before[0] is not None:
            matmul.allow_fp16_accumulation = True
        yield
    finally:
        cudnn.benchmark = before[1]
        if before[0] is not None:
            matmul.allow_fp16_accumulation = before[0]


class Family:
    """One model and everything that runs it."""

    def __init__(self, title: str, steps: int, cfg: float, shrink: int, channels: int, tiny: bool) -> None:
        self.title, self.steps, self.cfg, self.shrink, self.channels, self.tiny = (
            title, steps, cfg, shrink, channels, tiny,
        )  # fmt: skip
        self.cases = cases(tiny)
        self.backend = "eager" if tiny else "inductor"

    def text(self, case: Any) -> Any:
        raise AssertionError("set by the family")

    def latent(self, case: Any) -> torch.Tensor:
        return torch.zeros(1, self.channels, case.height // self.shrink, case.width // self.shrink)

    def noise(self, case: Any) -> torch.Tensor:
        return torch.randn(self.latent(case).shape, generator=torch.Generator().manual_seed(11))

    def sampler(self, model: Any, steps: int | None = None) -> Callable[[Any], torch.Tensor]:
        """Samples `model`, a ModelPatcher, as KSampler does."""
        import comfy.sample

        def run(case: Any) -> torch.Tensor:
            positive, negative = self.text(case)
            return comfy.sample.sample(
                model, self.noise(case), steps or self.steps, self.cfg, "euler", "simple", positive, negative,
                self.latent(case), disable_pbar=True, seed=11,
            )  # fmt: skip

        return run

    def compiled(self, model: Any, **settings: Any) -> Callable[[], Callable[[Any], torch.Tensor]]:
        from hotpath.patches.compilation import CompileSettings, compile_model

        return lambda: self.sampler(compile_model(model, CompileSettings(**settings), self.backend)[0])

    def compiled_with_attention(self, model: Any, **settings: Any) -> Callable[[], Callable[[Any], torch.Tensor]]:
        """The same with attention by the fastest exact kernel, which is measured before anything is compiled."""
        from hotpath.patches.attention_override import set_attention

        def prepare() -> Callable[[Any], torch.Tensor]:
            chosen = set_attention(model, "auto")[0]
            with alone():  # kernels are measured
                self.sampler(chosen, steps=1)(self.cases[0])
            return self.compiled(chosen, **settings)()

        return prepare

    def without_a_compiler(self, model: Any, precision: str = "") -> Callable[[], Callable[[Any], torch.Tensor]]:
        """Attention by the fastest exact kernel and products by oneDNN, as Compile Model makes it without a compiler.

        precision: a scheme for the linear layers.
        """
        from hotpath.patches.attention_override import set_attention
        from hotpath.patches.cpu_products import multiply_by_onednn
        from hotpath.patches.precision import set_precision

        def prepare() -> Callable[[Any], torch.Tensor]:
            chosen = set_attention(set_precision(model, precision)[0] if precision else model, "auto")[0]
            multiply_by_onednn(chosen)
            return self.sampler(chosen)

        return prepare

    def torch_attention(self, model: Any) -> Callable[[], Callable[[Any], torch.Tensor]]:
        """What ComfyUI's --use-pytorch-cross-attention sets for the process."""
        from comfy.ldm.modules.attention import attention_pytorch

        def prepare() -> Callable[[Any], torch.Tensor]:
            made = model.clone()
            made.model_options["transformer_options"] = {
                **made.model_options.get("transformer_options", {}),
                "optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs),
            }
            return self.sampler(made)

        return prepare

    def core_compiled(self, model: Any) -> Callable[[], Callable[[Any], torch.Tensor]]:
        from comfy_api.torch_helpers import set_torch_compile_wrapper
        from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

        def prepare() -> Callable[[Any], torch.Tensor]:
            made = model.clone()
            set_torch_compile_wrapper(made, self.backend, options={"guard_filter_fn": skip_torch_compile_dict})
            return self.sampler(made)

        return prepare

    def fast(self, model: Any) -> Callable[[], Callable[[Any], torch.Tensor]]:
        def prepare() -> Callable[[Any], torch.Tensor]:
            run = self.sampler(model)

            def fast_run(case: Any) -> torch.Tensor:
                with fast_settings():
                    return run(case)

            return fast_run

        return prepare


def z_image(tiny: bool) -> tuple[Family, list[Contestant]]:
    import comfy.model_management
    import comfy.samplers

    config = TINY_Z_IMAGE if tiny else Z_IMAGE
    steps = 4 if tiny else 9  # the third is recorded where steps are
    family = Family(f"Z-Image, {'tiny, fp32' if tiny else 'bf16'}, {steps} steps, cfg 1", steps, 1.0, 8, 16, tiny)
    model = native("ZImage", config, torch.float32 if tiny else torch.bfloat16, seed=1)
    device = model.load_device
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", family.steps).to(
        device
    )

    def text(case: Any) -> Any:
        made = prompt(case.seed, case.tokens, config["cap_feat_dim"])
        return made, made

    family.text = text  # type: ignore[method-assign]

    def with_diffusers(compile_blocks: bool) -> Callable[[Any], torch.Tensor]:
        comfy.model_management.load_models_gpu([model])  # quantising another copy has put it away
        twin = diffusers_twin(model, config)
        dtype = next(twin.parameters()).dtype
        if compile_blocks:
            twin.compile_repeated_blocks(fullgraph=True, backend=family.backend)

        def run(case: Any) -> torch.Tensor:
            x = family.noise(case).to(device) * sigmas[0]
            caption = text(case)[0][0][0][0].to(device, dtype)
            for sigma, following in itertools.pairwise(sigmas):
                out = twin([x[0, :, None].to(dtype)], 1 - sigma[None], [caption], return_dict=False)[0][0]
                x = x - out[:, 0].float()[None] * (following - sigma)
            return model.model.process_latent_out(x)

        return run

    def maximum_speed() -> Callable[[Any], torch.Tensor]:
        from hotpath.patches.speed_profiles import PROFILES, apply_profile

        made, quantised.notes = apply_profile(model, PROFILES["maximum speed"])
        return family.sampler(made)

    quantised = Contestant("Hotpath maximum speed (fp8)", maximum_speed, 45)
    return family, [
        Contestant("ComfyUI", lambda: family.sampler(model)),
        Contestant("Hotpath compile, default", family.compiled(model), 40),
        Contestant(
            "Hotpath attention auto, reduce-overhead", family.compiled_with_attention(model, mode="reduce-overhead"), 35
        ),
        *(() if tiny else (quantised,)),  # its compiled profile needs a compiler
        Contestant("Hotpath compile, reduce-overhead", family.compiled(model, mode="reduce-overhead"), 10),
        Contestant("diffusers, eager", lambda: with_diffusers(False)),
        Contestant("diffusers, compile_repeated_blocks", lambda: with_diffusers(True), 40),
        Contestant("ComfyUI, --fast settings", family.fast(model)),
        Contestant("ComfyUI TorchCompileModel", family.core_compiled(model), 150),
    ]


def sdxl(tiny: bool) -> tuple[Family, list[Contestant]]:
    config = TINY_SDXL if tiny else SDXL
    steps = 4 if tiny else 8
    family = Family(f"SDXL, {'tiny, fp32' if tiny else 'fp16'}, {steps} steps, CFG", steps, 7.0, 8, 4, tiny)
    model = native("SDXL", config, torch.float32 if tiny else torch.float16, seed=2)

    def text(case: Any) -> Any:
        tokens = 77 * -(-case.tokens // 77)  # CLIP's
        made = (prompt(seed, tokens, config["context_dim"], POOLED) for seed in (case.seed, 99))
        return tuple(made)

    family.text = text  # type: ignore[method-assign]
    person = with_identity(model)
    return family, [
        Contestant("ComfyUI", lambda: family.sampler(model)),
        Contestant("Hotpath cudagraphs", family.compiled(model, mode="cudagraphs"), 4),
        Contestant("Hotpath compile, default", family.compiled(model), 60),
        Contestant("Hotpath compile, reduce-overhead", family.compiled(model, mode="reduce-overhead"), 10),
        Contestant("InstantID", lambda: family.sampler(person)),
        Contestant("InstantID, Hotpath cudagraphs", family.compiled(person, mode="cudagraphs"), 4),
        Contestant("InstantID, Hotpath compile, reduce-overhead", family.compiled(person, mode="reduce-overhead"), 30),
        Contestant(
            "Hotpath attention auto, reduce-overhead", family.compiled_with_attention(model, mode="reduce-overhead"), 40
        ),
        Contestant("Hotpath compile, transformer blocks", family.compiled(model, regions="transformer blocks"), 10),
        Contestant("ComfyUI, --fast settings", family.fast(model)),
        Contestant("ComfyUI TorchCompileModel", family.core_compiled(model), 150),
    ]


def _on_a_cpu(family: Family, model: Any) -> list[Contestant]:
    return [
        Contestant("ComfyUI", lambda: family.sampler(model)),
        Contestant("ComfyUI, --use-pytorch-cross-attention", family.torch_attention(model)),
        Contestant("Hotpath attention auto, compile without a compiler", family.without_a_compiler(model)),
        Contestant("Hotpath int8, the same", family.without_a_compiler(model, "int8")),
        Contestant("Hotpath attention auto, compile", family.compiled_with_attention(model), 60),
        Contestant("ComfyUI TorchCompileModel", family.core_compiled(model), 150),
    ]


def sd15(tiny: bool) -> tuple[Family, list[Contestant]]:
    family = Family("SD 1.5 on a CPU, fp32, 1 step, CFG", 1, 7.0, 8, 4, tiny)
    family.cases = cpu_cases()
    model = native("SD15", SD15, torch.float32, seed=3)
    family.text = lambda case: tuple(  # type: ignore[method-assign]
        prompt(seed, case.tokens, SD15["context_dim"]) for seed in (case.seed, 99)
    )
    return family, _on_a_cpu(family, model)


def z_image_on_a_cpu(tiny: bool) -> tuple[Family, list[Contestant]]:
    family = Family("Z-Image with 3 of its 30 layers on a CPU, fp32, 1 step, cfg 1", 1, 1.0, 8, 16, tiny)
    family.cases = cpu_cases()
    model = native("ZImage", CPU_Z_IMAGE, torch.float32, seed=4)

    def text(case: Any) -> Any:
        made = prompt(case.seed, case.tokens, CPU_Z_IMAGE["cap_feat_dim"])
        return made, made

    family.text = text  # type: ignore[method-assign]
    return family, _on_a_cpu(family, model)


FAMILIES = {"z_image": z_image, "sdxl": sdxl}
CPU_FAMILIES = {"sd15_cpu": sd15, "z_image_cpu": z_image_on_a_cpu}
