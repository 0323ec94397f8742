"""What InstantID costs in a sampling step, against the unpatched model and the packs people use today.

    python benchmarks/instantid.py [--sizes 1024x1024 1536x1024] [--dtypes fp16 bf16] [--rounds 7] [--json FILE] [--write]
    python benchmarks/instantid.py --half          half SDXL's width in fp32, for a CPU and 8 GB; few contestants
    python benchmarks/instantid.py --tiny          a test of this script, on the CPU, in a minute

SDXL's own layout and width with random weights, in ComfyUI's own sampler, euler, every contestant in turn in every
round; a figure is the median over rounds of the time of one step. The original pack (cubiq/ComfyUI_InstantID) and
IPAdapter_plus take part where they are found: in ComfyUI's custom_nodes, HOTPATH_PEERS, or a folder `peers` beside it.
What our patch gives is compared with what the original gives before anything is timed. On a CPU a time is processor time,
which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quiet import alone

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Contestant:
    """A MODEL to sample with. seconds: of one step, a value per round."""

    name: str
    model: Any
    seconds: dict[str, list[float]] = field(default_factory=dict)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(run: Callable[[], Any]) -> float:
    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    wait()
    start = now()
    run()
    wait()
    return now() - start


class Stage:
    """The models of one dtype and the conditionings."""

    def __init__(self, dtype: torch.dtype, tiny: bool, half: bool = False) -> None:
        from hotpath.identity.adapter import InstantIDAdapter
        from hotpath.nodes import NODE_CLASS_MAPPINGS
        from instantid_scenarios import Bench

        self.sdxl = sys.modules["hotpath_demo.tiny_sdxl"]
        self.channels, self.context = (self.sdxl.CHANNELS, self.sdxl.CONTEXT) if tiny else (160 if half else 320, 2048)
        model = self._random_sdxl(dtype)
        self.state = self.sdxl.make_adapter_state(dim=1280, depth=4, context=self.context, channels=self.channels)
        adapter = InstantIDAdapter(self.state["image_proj"], self.state["ip_adapter"], "random.bin", "random").to(dtype)
        self.bench = Bench(NODE_CLASS_MAPPINGS, adapter, self.sdxl, model, None)
        self.positive, self.negative = (
            self.sdxl.encode_text(text, context=self.context) for text in ("a portrait", "blurry")
        )
        self.dtype = dtype
        self.originals: Any = None  # the original pack's nodes and adapter, once `original` has found them

    def _random_sdxl(self, dtype: torch.dtype) -> Any:
        import comfy.model_management

        device = comfy.model_management.get_torch_device()
        fill = self.sdxl.fill

        def on_device(module: torch.nn.Module, seed: int) -> None:
            module.to(device)
            random = torch.Generator(device).manual_seed(seed)
            for parameter in module.parameters():
                scale = 0.02 if parameter.ndim == 1 else 0.7 / parameter[0].numel() ** 0.5
                parameter.data.normal_(0, scale, generator=random)
                if parameter.ndim == 1:
                    parameter.data.add_(1)

        self.sdxl.fill = on_device  # 2.6 billion numbers take half a minute on a CPU
        try:
            return self.sdxl.make_sdxl(dtype=dtype, model_channels=self.channels, context_dim=self.context)
        finally:
            self.sdxl.fill = fill

    def sample(self, model: Any, size: tuple[int, int], cfg: float, steps: int) -> torch.Tensor:
        import comfy.sample

        latent = torch.zeros(1, 4, size[1] // 8, size[0] // 8)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(11))
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "euler",
            "normal",
            self.positive,
            self.negative,
            latent,
            disable_pbar=True,
            seed=11,
        )

    def ours(self, **changes: Any) -> Any:
        return self.bench.patch(**changes)[0]

    def ours_in(self, patch_mode: str) -> Any:
        from hotpath.patches.instantid import AttentionSettings, attach_identity, prepare_identity
        from instantid_scenarios import photo

        face = self.bench.faces.get((photo(1)[0].numpy() * 255).astype("uint8")[..., ::-1])[-1]
        prepared = prepare_identity(self.bench.instantid, torch.from_numpy(face["embedding"])[None, None])
        return attach_identity(
            self.bench.model, self.bench.instantid, prepared, AttentionSettings(0.8, patch_mode=patch_mode)
        )[0]

    def original(self) -> Any | None:
        """The original pack's patch on 70 blocks."""
        from instantid_scenarios import Bench, photo
        from peer_packs import PackMissing, find_pack

        try:
            folder = find_pack("ComfyUI_InstantID")
        except PackMissing as missing:
            print(f"original pack left out: {missing}")
            return None
        if "reference_pack" not in sys.modules:
            spec = importlib.util.spec_from_file_location(
                "reference_pack", folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            assert spec is not None and spec.loader is not None
            sys.modules["reference_pack"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["reference_pack"])
        pack, module = sys.modules["reference_pack"], sys.modules["reference_pack.InstantID"]
        adapter = module.InstantID(
            self.state, cross_attention_dim=1280, output_cross_attention_dim=self.context, clip_embeddings_dim=512
        )
        self.originals = Bench(pack.NODE_CLASS_MAPPINGS, adapter, self.sdxl, self.bench.model.clone(), None)
        return self.originals.patch(weight=0.8, image=photo(1))[0]

    def ip_adapter(self) -> Any | None:
        from peer_packs import PackMissing, pack_named

        try:
            return pack_named("IPAdapter_plus").apply(
                self.bench.model, context=self.context, place=(self.bench.model.load_device, self.dtype)
            )
        except PackMissing as missing:
            print(f"IPAdapter_plus left out: {missing}")
            return None


def compiled(model: Any, way: str) -> Any:
    """`model` under ComfyUI's own TorchCompileModel or under ours."""
    if way == "core":
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        return TorchCompileModel.execute(model, "inductor").args[0]
    from hotpath.nodes import NODE_CLASS_MAPPINGS

    node = NODE_CLASS_MAPPINGS["HotpathCompile"]()
    return getattr(node, node.FUNCTION)(model=model)[0]


def contestants(stage: Stage, ways: list[str], few: bool = False) -> list[Contestant]:
    from hotpath.patches.telemetry import record_blocks
    from instantid_scenarios import mask, photo

    if few:
        chosen = {
            "unpatched": stage.bench.model,
            "Hotpath, 70 blocks": stage.ours(weight=0.8),
            "Hotpath, 70 blocks, mask": stage.ours(weight=0.8, mask=mask(1)),
            "original pack, 70 blocks": stage.original(),
        }
        return [Contestant(name, model) for name, model in chosen.items() if model is not None]
    two = stage.ours(weight=0.8, mask=mask(1))
    models = {
        "unpatched": stage.bench.model,
        "Hotpath, 70 blocks": stage.ours(weight=0.8),
        "Hotpath, 70 blocks, mask": stage.ours(weight=0.8, mask=mask(1)),
        "Hotpath, 70 blocks, half the steps": stage.ours(weight=0.8, end_at=0.5),
        "Hotpath, two people": stage.ours(model=two, weight=0.8, image=photo(2), mask=1 - mask(1)),
        "Hotpath, balanced (55)": stage.ours_in("balanced"),
        "Hotpath, output_only (36)": stage.ours_in("output_only"),
        "Hotpath, fast (20)": stage.ours_in("fast"),
        "Hotpath, 70 blocks, telemetry": record_blocks(stage.ours(weight=0.8))[0],
        "original pack, 70 blocks": stage.original(),
        "IPAdapter_plus, 70 blocks": stage.ip_adapter(),
    }
    made = [Contestant(name, model) for name, model in models.items() if model is not None]
    for way in ways:
        for name in ("unpatched", "Hotpath, 70 blocks"):
            made.append(Contestant(f"{name}, {way} compile", compiled(models[name], way)))
    return made


def compare_first(stage: Stage, made: list[Contestant], size: tuple[int, int], steps: int) -> dict[str, float]:
    """Largest difference of each latent from the original's, as a part of its range."""
    latents = {c.name: stage.sample(c.model, size, 4.0, steps) for c in made if "70 blocks" in c.name and "," in c.name}
    original = latents.get("original pack, 70 blocks")
    if original is None:
        return {}
    scale = original.abs().max()
    return {name: float((latents[name] - original).abs().max() / scale) for name in ("Hotpath, 70 blocks",)}


def nodes_and_memory(stage: Stage, size: tuple[int, int], steps: int) -> dict[str, float]:
    """Milliseconds of the node, and what patching holds on the device beside the model."""
    from instantid_scenarios import mask, photo

    stage.ours(weight=0.8)
    applications = {
        "re-apply, other weight": lambda i: stage.ours(weight=0.5 + i / 100),
        "re-apply, other range": lambda i: stage.ours(end_at=0.5 + i / 100),
        "re-apply, other mask": lambda i: stage.ours(mask=mask(i)),
        "new face (its embedding given)": lambda i: stage.ours(image=photo(50 + i)),
    }
    found = {
        f"{name}, ms": 1e3 * statistics.median(clock(partial(apply, i)) for i in range(20))
        for name, apply in applications.items()
    }
    if stage.originals is not None:

        def original(i: int) -> Any:
            return stage.originals.patch(weight=0.5 + i / 100, image=photo(1))

        found["original pack, its node again with another weight, ms"] = 1e3 * statistics.median(
            clock(partial(original, i)) for i in range(5)
        )
        adapter = sum(p.nbytes for p in stage.originals.instantid.parameters())
        found["original pack, adapter it computes with, MiB"] = adapter / 2**20
    attn2 = stage.ours(weight=0.8).model_options["transformer_options"]["patches_replace"]["attn2"]
    prepared = {id(d.prepared): d.prepared for patch in attn2.values() for d in patch.callback}
    found["keys and values it computes with, MiB"] = sum(p.nbytes for p in prepared.values()) / 2**20
    if torch.cuda.is_available():
        held = {}
        for name, model in (("unpatched", stage.bench.model), ("patched", stage.ours(weight=0.8))):
            stage.sample(model, size, 4.0, steps)
            torch.cuda.reset_peak_memory_stats()
            stage.sample(model, size, 4.0, steps)
            held[name] = torch.cuda.max_memory_allocated()
        found["memory while sampling beyond the unpatched peak, MiB"] = (held["patched"] - held["unpatched"]) / 2**20
        before = torch.cuda.memory_allocated()
        for i in range(200):
            model = stage.ours(weight=0.5 + i / 1000)
        del model
        found["memory after 200 re-applies, MiB more"] = (torch.cuda.memory_allocated() - before) / 2**20
    return found


def kernel(dtype: torch.dtype, device: torch.device) -> list[str]:
    """The attention alone, in microseconds, against plain SDPA + multiply + add and against moving the bytes."""
    from hotpath.attention.token_attention import attend_tokens, attend_tokens_reference

    rows = ["| queries x width, heads | fused | SDPA, multiply, add | copy of the same bytes |", "|---|---|---|---|"]
    for queries, width in ((4096, 640), (1024, 1280), (6144, 640), (1536, 1280)):
        heads = width // 64
        q, out = torch.randn(2, 2, queries, width, device=device, dtype=dtype)
        keys, values = torch.randn(2, 2, 16, width, device=device, dtype=dtype)
        table = (torch.tensor([[0, 1]], dtype=torch.int32, device=device), torch.full((1, 2), 0.8, device=device))
        # Two reads and a write are three halves of a copy's read and write.
        source = torch.randn(3 * q.numel() // 2, device=device).to(dtype)
        runs = (
            partial(attend_tokens, q, out, keys, values, *table, heads),
            partial(attend_tokens_reference, q, out, keys, values, *table, heads),
            partial(torch.empty_like(source).copy_, source),
        )
        with alone():
            times = [per_run(run, 50 if device.type == "cuda" else 3) for run in runs]
        rows.append(f"| {queries} x {width}, {heads} | " + " | ".join(f"{t * 1e6:.1f}" for t in times) + " |")
    return rows


def per_run(run: Callable[[], Any], many: int) -> float:
    def repeat() -> None:
        for _ in range(many):
            run()

    repeat()
    if not torch.cuda.is_available():
        return statistics.median(clock(repeat) / many for _ in range(7))
    spans = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Busy until Python has queued all of them: what a sampler's long queue hides is not to be timed here.
        torch.cuda._sleep(10_000_000)
        start.record()
        repeat()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / 1000 / many)
    return statistics.median(spans)


def step_table(made: list[Contestant], cases: list[str]) -> list[str]:
    rows = ["| | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for contestant in made:
        cells = []
        for case in cases:
            middle = statistics.median(contestant.seconds[case])
            base_name = (
                "unpatched" + contestant.name[contestant.name.rindex(", ") :]
                if "compile" in contestant.name
                else "unpatched"
            )
            base = next(statistics.median(c.seconds[case]) for c in made if c.name == base_name)
            cells.append(f"{middle * 1e3:.2f} ms, {middle / base:.3f}x")
        rows.append(f"| {contestant.name} | " + " | ".join(cells) + " |")
    return rows


def as_record(made: list[Contestant], costs: dict[str, float], differences: dict[str, float]) -> dict[str, Any]:
    steps = {c.name: {case: statistics.median(times) for case, times in c.seconds.items()} for c in made}
    return {"steps": steps, "costs": costs, "differences": differences}


def keep(record: dict[str, Any], path: Path | None) -> None:
    """Written whenever more is known: what comes later may fail."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "results": record}, indent=1))


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}"
    load = f"load average {os.getloadavg()[0]:.0f}, " if hasattr(os, "getloadavg") else ""
    where = f"{platform.machine()}, no GPU, {os.cpu_count()} cores, {load}{torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}"


def run(options: argparse.Namespace) -> str:
    import comfy.model_management

    until = time.monotonic() + options.seconds

    device = comfy.model_management.get_torch_device()
    text, record = [], {}
    for dtype_name in options.dtypes:
        stage = Stage(DTYPES[dtype_name], options.tiny, options.half)
        made = contestants(stage, options.compile, options.half)
        if options.contestants:
            made = [c for c in made if c.name.startswith("unpatched") or c.name in options.contestants]
        sizes = [tuple(int(n) for n in size.split("x")) for size in options.sizes]
        with alone():  # kernels are tuned
            differences, costs = compare_first(stage, made, sizes[0], 2), {}
        cases = []
        for size in sizes:
            for cfg in (4.0, 1.0):
                case = f"{size[0]}x{size[1]}, {'CFG' if cfg > 1 else 'no CFG'}"
                cases.append(case)
                for contestant in made:  # loads, compiles, tunes
                    stage.sample(contestant.model, size, cfg, 2)
                with alone():
                    for number in range(options.rounds):
                        if number >= 3 and time.monotonic() > until:
                            break
                        for contestant in made:
                            seconds = clock(partial(stage.sample, contestant.model, size, cfg, options.steps))
                            contestant.seconds.setdefault(case, []).append(seconds / options.steps)
                record[dtype_name] = as_record(made, costs, differences)
                keep(record, options.json)
        with alone():
            costs = nodes_and_memory(stage, sizes[0], options.steps)
        record[dtype_name] = as_record(made, costs, differences)
        keep(record, options.json)
        text += [f"### {dtype_name}, a sampling step", "", *step_table(made, cases), ""]
        text += [
            f"- Difference from the original's latent, {name}: {value:.2e} of its range"
            for name, value in differences.items()
        ]
        text += [f"- {name}: {value:.2f}" for name, value in costs.items()]
        text += [
            "",
            f"Token attention alone, batch 2, microseconds, {dtype_name}:",
            "",
            *kernel(stage.dtype, device),
            "",
        ]
    command = f"python benchmarks/instantid.py {' '.join(sys.argv[1:])}".strip()
    return "\n".join(
        [
            "## InstantID: what 70 patched blocks cost",
            "",
            f"{date.today().isoformat()}, {machine()}. Median of {options.rounds} rounds of {options.steps} steps, "
            "contestants in turn; the factor is against the unpatched model, compiled the same way.",
            "",
            f"`{command}`",
            "",
            *text,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", help="1024x1024 1536x1024, with --half 256x256")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="fp16 bf16, with --half fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1e9, help="after these a case ends with its third round")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="these alone, and the unpatched model")
    parser.add_argument("--compile", nargs="*", default=["core", "Hotpath"], choices=["core", "Hotpath"])
    parser.add_argument("--half", action="store_true", help="half SDXL's width, without compiling: for a CPU")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--tiny", action="store_true", help="small widths, two steps: to see that this script works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="append to benchmarks/RESULTS.md")
    options = parser.parse_args()
    if options.tiny:
        options.sizes, options.dtypes, options.rounds, options.steps = ["128x128"], ["fp32"], 2, 2
        options.compile = []
    options.sizes = options.sizes or (["256x256"] if options.half else ["1024x1024", "1536x1024"])
    options.dtypes = options.dtypes or (["fp32"] if options.half else ["fp16", "bf16"])
    if options.threads:
        torch.set_num_threads(options.threads)
    sys.argv[1:], arguments = [], sys.argv[1:]  # ComfyUI reads them too
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
    import conftest  # noqa: F401 - makes `import hotpath` work in a bare checkout and finds ComfyUI

    sys.argv[1:] = arguments
    with torch.inference_mode():
        text = run(options)
    print(text)
    if options.write:
        path = ROOT / "benchmarks" / "RESULTS.md"
        before = path.read_text() if path.exists() else "# Measured\n"
        path.write_text(f"{before.rstrip()}\n\n{text}\n")


if __name__ == "__main__":
    main()
