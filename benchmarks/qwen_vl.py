"""Speed and memory of the Qwen-VL nodes against plain transformers, as the older packs call it, in one run.

    python benchmarks/qwen_vl.py                      # a model of the 4B shape with random bfloat16 weights
    python benchmarks/qwen_vl.py --model models/LLM/Qwen3-VL-4B-Instruct
    python benchmarks/qwen_vl.py --shape 4b_ninth     # or 0.3b, for a machine without a card
    python benchmarks/qwen_vl.py --shape tiny         # a smoke test for any machine

Prints a table and writes it, with machine, versions and settings, to --json. The peer is the library's own model from
the same folder, untouched by the pack: processor, then `generate`, one picture at a time. Both sides take turns, so that
what else the machine does falls on both. vLLM is measured beside them where it is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - before the pack, which it makes importable
import numpy as np
import torch
from hotpath import host
from hotpath.cache import clear_all
from hotpath.demo.captioner_model import configuration, save_weights, write_processors, write_tokenizer
from hotpath.host.headless import HeadlessHost
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.budgets import PRESETS, Budget
from hotpath.vision_language.caption_job import CaptionJob
from hotpath.vision_language.captioning import FolderCaptioner
from hotpath.vision_language.loaded_model import LoadedModel, LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.pictures import Picture
from hotpath.vision_language.prompts import Question, render
from hotpath.vision_language.sampling import Sampling
from PIL import Image
from quiet import alone
from report import command, processor, versions

SHAPES: dict[str, dict[str, Any]] = {
    # The widths of Qwen3-VL-4B.
    "4b": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
        "rope_theta": 5000000.0,
        "vision": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "0.3b": {
        "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
        "rope_theta": 5000000.0,
        "vision": {
            "depth": 12, "hidden_size": 384, "intermediate_size": 1536, "num_heads": 6, "out_hidden_size": 1024,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [3, 6, 9],
        },
    },
    # Of 4b every ninth layer of the decoder and every eighth of the tower, for a machine without a card.
    "4b_ninth": {
        "vocab_size": 32768, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
        "rope_theta": 5000000.0,
        "vision": {
            "depth": 3, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1, 2],
        },
    },
    "tiny": {},
}  # fmt: skip
PROMPT = "Describe this image in detail."
ULTRA = PRESETS["ultra"]


def make_folder(folder: Path, shape: str, device: torch.device) -> Path:
    """A model folder of `shape` with random weights, written by way of the device that has room for them."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokens = write_tokenizer(folder)
    config = configuration("qwen3_vl", tokens, **SHAPES[shape])
    if shape != "tiny":
        config["text_config"]["rope_scaling"]["mrope_section"] = [24, 20, 20]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokens["<|im_end|>"], "pad_token_id": 0})
    )
    write_processors(folder, "qwen3_vl")
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    save_weights(model, folder, dtype=torch.bfloat16)
    return folder


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any], repeats: int = 3, warmups: int = 1) -> float:
    """Median seconds of `work`, everything it queued included."""
    for _ in range(warmups):
        work()
    times = []
    with alone():
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turns(device: torch.device, works: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """Median seconds of each of `works`, one after the other in every round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    with alone():
        for _ in range(repeats + 1):
            for name, work in works.items():
                synchronize(device)
                start = time.perf_counter()
                work()
                synchronize(device)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


class Peer:
    """Plain transformers on the same folder."""

    def __init__(self, model: LoadedModel, budget: Budget) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.ours, self.budget = model, budget
        self.processor = AutoProcessor.from_pretrained(model.folder.path)
        self.network = (
            AutoModelForImageTextToText.from_pretrained(model.folder.path, dtype=model.dtype).eval().to(model.device)
        )
        self.network.generation_config.eos_token_id = None

    def write(self, picture: Picture, tokens: int, sample: bool = False) -> list[int]:
        text = render(self.ours, Question(PROMPT, "", (picture,)))
        shortest, longest = self.budget.edges(self.ours.image_sizes)
        size = {"shortest_edge": shortest, "longest_edge": longest}
        shown = self.processor(
            text=[text], images=[Image.fromarray(picture.pixels)], images_kwargs={"size": size}, return_tensors="pt"
        ).to(self.network.device)
        settings = (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50} if sample else {"do_sample": False}
        )
        with torch.no_grad():
            made = self.network.generate(**shown, max_new_tokens=tokens, pad_token_id=0, **settings)
        return made[0, shown["input_ids"].shape[1] :].tolist()


class Benchmark:
    """All measurements on one model; `rows` is the table."""

    def __init__(self, model: LoadedModel, tokens: int, pictures: int, side: int) -> None:
        self.model, self.tokens, self.count, self.side = model, tokens, pictures, side
        # Random weights end nowhere in particular: every answer has its full length.
        model.stop_ids = frozenset()
        self.peer = Peer(model, ULTRA)
        self.decode_with, self.repeats = ["greedy", "sampled"], 3
        self.paths = ["plain", "auto", "compiled"] if model.device.type == "cuda" else ["plain", "static"]
        self.rows: list[dict[str, Any]] = []

    def note(self, what: str, value: float, unit: str, against: float | None = None, remark: str = "") -> None:
        ratio = None if not against else (against / value if unit == "s" else value / against)
        self.rows.append({"what": what, "value": value, "unit": unit, "times the peer": ratio, "remark": remark})
        factor = "" if ratio is None else f"  {ratio:6.2f}x"
        print(f"{what:58s} {value:12.4f} {unit:12s}{factor}  {remark}", flush=True)

    def picture(self, seed: int) -> Picture:
        random = np.random.default_rng(seed)
        small = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        return Picture(np.asarray(small.resize((self.side, self.side), Image.Resampling.BICUBIC)))

    def ask(self, picture: Picture, tokens: int, sampling: Sampling, prompt: str = PROMPT, **settings: Any) -> Any:
        options = replace(AnswerOptions(tokens, ULTRA, stream=False), **settings)
        return answer(self.model, [Question(prompt, "", (picture,))], sampling, options)[0]

    def decode(self) -> None:
        device, picture, paths = self.model.device, self.picture(0), self.paths
        for sample, sampling in (
            (False, Sampling(sample=False)),
            (True, Sampling(temperature=0.7, top_p=0.9, top_k=50)),
        ):
            word = "sampled" if sample else "greedy"
            if word not in self.decode_with:
                continue
            began: dict[str, str] = {}
            for path in paths:
                start = time.perf_counter()
                report = self.ask(picture, self.tokens, sampling, decode=path).report
                print(report, flush=True)
                ran = report.split("decode: ")[-1].split(";")[0]
                began[path] = f"first call {time.perf_counter() - start:.1f} s; {ran}"
            works: dict[str, Callable[[], Any]] = {
                "first": lambda s=sample: self.peer.write(picture, 1, s),
                "whole": lambda s=sample: self.peer.write(picture, self.tokens, s),
            }
            decoded: dict[str, list[float]] = {path: [] for path in paths}

            def ours(path: str, s: Sampling, into: dict[str, list[float]]) -> None:
                into[path].append(self.ask(picture, self.tokens, s, decode=path).timing["decode"])

            works |= {path: lambda p=path, s=sampling, d=decoded: ours(p, s, d) for path in paths}
            times = in_turns(device, works, self.repeats)
            base = (self.tokens - 1) / (times["whole"] - times["first"])
            self.note(f"decode, batch 1, {word}: transformers", base, "tokens/s")
            for path in paths:
                rate = (self.tokens - 1) / statistics.median(decoded[path][1:])
                self.note(f"decode, batch 1, {word}: {path}", rate, "tokens/s", base, began[path])

    def agreement(self) -> None:
        """How many leading tokens each path shares with the peer's greedy answer (in bfloat16 ties may fall apart)."""
        picture = self.picture(1)
        wanted = self.peer.write(picture, 64)
        written: list[list[int]] = []
        tokenizer = self.model.tokenizer
        original = tokenizer.batch_decode
        tokenizer.batch_decode = lambda rows, **kwargs: (written.append(rows[0]), original(rows, **kwargs))[1]
        try:
            for path in self.paths:
                self.ask(picture, 64, Sampling(sample=False), decode=path)
                same = next(
                    (i for i, (a, b) in enumerate(zip(wanted, written[-1], strict=False)) if a != b), len(wanted)
                )
                self.note(f"greedy tokens shared with transformers: {path}", same, "of 64")
        finally:
            tokenizer.batch_decode = original

    def first_token(self) -> None:
        device, greedy = self.model.device, Sampling(sample=False)
        seeds = iter(range(100, 10_000))
        known = self.picture(3)
        self.ask(known, 1, greedy)
        times = in_turns(
            device,
            {
                "peer": lambda: self.peer.write(self.picture(next(seeds)), 1),
                "miss": lambda: self.ask(self.picture(next(seeds)), 1, greedy, reuse_prefix=False),
                "hit": lambda: self.ask(known, 1, greedy, reuse_prefix=False),
                "prefix": lambda: self.ask(known, 1, greedy, f"What about it, number {next(seeds)}?"),
            },
        )
        base, miss = times["peer"], times["miss"]
        self.note("first token, new picture: transformers", base, "s")
        self.note("first token, new picture (miss)", miss, "s", base)
        for name, what in (("hit", "known picture (hit)"), ("prefix", "known picture, new question (prefix)")):
            self.note(f"first token, {what}", times[name], "s", base, f"{times[name] / miss:.0%} of a miss")
        for stage, value in self.ask(self.picture(4), 1, greedy).timing.items():
            self.note(f"stage of a miss: {stage}", value, "s")

    def captions(self) -> None:
        tokens, batch = 64, 16
        base = timed(self.model.device, lambda: self.peer.write(self.picture(5), tokens))
        self.note("captions, 64 tokens, one by one: transformers", 60 / base, "a minute")
        with tempfile.TemporaryDirectory() as folder:
            for index in range(self.count):
                Image.fromarray(self.picture(1000 + index).pixels).save(
                    Path(folder) / f"{index:04}.png", compress_level=1
                )
            options = AnswerOptions(tokens, ULTRA, cache_images=False)
            for size in (1, batch):
                job = CaptionJob(Path(folder), PROMPT, output="jsonl", overwrite=True, batch_size=size)
                FolderCaptioner(self.model, replace(job, pattern="000?.png"), Sampling(sample=False), options).run()
                with alone():
                    summary = FolderCaptioner(self.model, job, Sampling(sample=False), options).run()
                done = len(summary.captions) + len(summary.failed)
                remark = f"{len(summary.failed)} without text" if summary.failed else ""
                self.note(
                    f"captions, 64 tokens, batch {size}", done / summary.seconds * 60, "a minute", 60 / base, remark
                )

    def vllm(self) -> None:
        """The same answer by vLLM, whose process takes what it is given of the card's memory."""
        if self.model.device.type != "cuda" or importlib.util.find_spec("vllm") is None:
            print("vLLM is left out: it needs an NVIDIA card and the vllm package", flush=True)
            return
        from vllm import LLM, SamplingParams

        picture = self.picture(0)
        shortest, longest = ULTRA.edges(self.model.image_sizes)
        engine = LLM(
            str(self.model.folder.path), dtype=str(self.model.dtype).removeprefix("torch."), max_model_len=4096,
            gpu_memory_utilization=0.4, enable_prefix_caching=False,
            mm_processor_kwargs={"size": {"shortest_edge": shortest, "longest_edge": longest}},
        )  # fmt: skip
        text = render(self.model, Question(PROMPT, "", (picture,)))
        asked = {"prompt": text, "multi_modal_data": {"image": Image.fromarray(picture.pixels)}}

        def write(tokens: int) -> None:
            engine.generate(asked, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)

        times = in_turns(self.model.device, {"first": lambda: write(1), "whole": lambda: write(self.tokens)})
        rate = (self.tokens - 1) / (times["whole"] - times["first"])
        self.note("decode, batch 1, greedy: vLLM", rate, "tokens/s")

    def memory(self) -> None:
        item = self.ask(self.picture(6), 1, Sampling(sample=False)).items[0]
        assert item.features is not None
        held = sum(t.nbytes for t in (item.features.pooled, *item.features.deep))
        self.note("kept for one picture", held / 2**20, "MiB", None, f"{item.tokens(2)} visual tokens")
        if self.model.device.type == "cuda":
            del self.peer
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.ask(self.picture(7), 32, Sampling(sample=False))
            self.note("device memory at the peak, one answer", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "device": processor(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "versions": versions("torch", "transformers", "triton", "vllm", "llama-cpp-python", "bitsandbytes"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="4b", help="widths of the random model")
    parser.add_argument("--model", type=Path, help="a model folder instead of a random one")
    parser.add_argument("--quantization", default="none", help="of our side: none, int8, int4, float8")
    parser.add_argument("--tokens", type=int, default=256, help="length of the timed answers")
    parser.add_argument("--pictures", type=int, default=64, help="how many are captioned")
    parser.add_argument("--side", type=int, default=1024, help="edge of the pictures in pixels")
    parser.add_argument(
        "--only", nargs="*", default=["decode", "agreement", "first_token", "captions", "vllm", "memory"]
    )
    parser.add_argument("--decode-with", nargs="+", choices=("greedy", "sampled"), default=["greedy", "sampled"])
    parser.add_argument("--paths", nargs="+", help="of decoding: auto, compiled, graph, static, plain")
    parser.add_argument("--rounds", type=int, default=3, help="of timed answers")
    parser.add_argument("--json", type=Path, default=Path("qwen_vl_benchmark.json"), help="written after every part")
    options = parser.parse_args()

    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        here = HeadlessHost(models=Path(scratch) / "models", show_progress=False)
        host.use(here)
        llm = here.model_folders("LLM")[0]
        llm.mkdir(parents=True)
        if options.model is not None:
            (llm / options.model.resolve().name).symlink_to(options.model.resolve(), target_is_directory=True)
            name = options.model.resolve().name
        else:
            name = make_folder(llm / f"random-{options.shape}", options.shape, here.device()).name
        start = time.perf_counter()
        model = MODELS.get(name, LoadOptions(quantization=options.quantization))
        facts = machine(model.device) | {
            "model": name,
            "quantization": options.quantization,
            "command": command(),
        }
        print(json.dumps(facts, indent=1))
        run = Benchmark(model, options.tokens, options.pictures, options.side)
        run.decode_with, run.repeats = options.decode_with, options.rounds
        run.paths = options.paths or run.paths
        run.note("loading", time.perf_counter() - start, "s", None, "both sides")
        for part in options.only:
            clear_all()
            getattr(run, part)()
            options.json.write_text(json.dumps(facts | {"rows": run.rows}, indent=1) + "\n", encoding="utf-8")
        MODELS.clear()


if __name__ == "__main__":
    main()
