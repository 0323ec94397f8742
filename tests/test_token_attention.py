"""The fused kernel, the reference and the operator agree, for every shape, dtype and mask."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hotpath.attention import token_attention
from hotpath.attention.capabilities import DeviceFacts
from hotpath.attention.token_attention import attend_text_and_tokens, attend_tokens, attend_tokens_reference
from torch import Tensor
from triton_interpreter import interpret, run_apart

# samples, queries, heads, head dim, tokens, identities, pictures in the mask
SHAPES = [
    (2, 70, 2, 64, 16, 1, 0),
    (1, 33, 3, 40, 16, 2, 1),
    (3, 64, 1, 80, 4, 3, 3),
    (2, 17, 2, 160, 64, 1, 2),
    (2, 5, 1, 96, 100, 2, 1),
    (2, 1, 1, 128, 1, 1, 2),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def token_inputs(shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False) -> dict[str, Any]:
    batch, queries, heads, dim, tokens, identities, masks = shape
    random = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(dtype)

    width = heads * dim
    q, out = normal(batch, queries, width), normal(batch, queries, width)
    if strided:  # as a fused q, k, v projection leaves them
        q = torch.cat((q, normal(batch, queries, 2 * width)), dim=-1)[..., :width]
        out = normal(queries, batch, width).transpose(0, 1)
    weights = torch.rand(identities, batch, generator=random) * 2 - 0.5
    weights[0, -1] = 0  # a sample that takes no part
    return {
        "q": q,
        "out": out,
        "keys": normal(2 * identities, tokens, width),
        "values": normal(2 * identities, tokens, width),
        "rows": torch.randint(0, 2 * identities, (identities, batch), generator=random, dtype=torch.int32),
        "weights": weights,
        "heads": heads,
        "mask": torch.rand(identities, masks, queries, generator=random) if masks else None,
    }


def by_definition(inputs: dict[str, Any]) -> Tensor:
    """Sample by sample, head by head, in float64."""
    q, keys, values = (inputs[name].double() for name in ("q", "keys", "values"))
    result = inputs["out"].double().clone()
    dim = q.shape[-1] // inputs["heads"]
    for (identity, rows), sample, head in itertools.product(
        enumerate(inputs["rows"].tolist()), range(q.shape[0]), range(inputs["heads"])
    ):
        part = slice(head * dim, (head + 1) * dim)
        logits = q[sample, :, part] @ keys[rows[sample], :, part].T / math.sqrt(dim)
        added = logits.softmax(-1) @ values[rows[sample], :, part] * inputs["weights"][identity, sample].item()
        if inputs["mask"] is not None:
            mask = inputs["mask"][identity]
            added = added * mask[sample if len(mask) > 1 else 0, :, None]
        result[sample, :, part] += added
    return result


def text_inputs(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """`inputs` with keys and values of a text, and `out`, in float64, as what q attends to in them."""
    q, heads = inputs["q"], inputs["heads"]
    random = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(q.shape[0], tokens, q.shape[2], generator=random).to(q.dtype) for _ in range(2))
    split = [x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    return {**inputs, "out": out, "text": (k, v)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = token_inputs(shape, dtype)
    before = inputs["out"].clone()
    made = attend_tokens_reference(**inputs)
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), by_definition(inputs), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(inputs["out"], before)


@pytest.mark.parametrize("name", ["rows", "weights"])
def test_rows_of_another_batch_are_refused(name: str) -> None:
    inputs = token_inputs(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="q has 1: give each one its own"):
        attend_tokens(**{**inputs, name: inputs[name].repeat(1, 2)})
    assert not token_attention._failed


def test_stats_are_the_sums_of_squares() -> None:
    inputs = token_inputs(SHAPES[1], torch.float32)
    stats = torch.tensor([1.0, 2.0])
    made = attend_tokens(**inputs, stats=stats)
    added = made.double() - inputs["out"].double()
    expected = torch.stack((1 + added.square().sum(), 2 + inputs["out"].double().square().sum()))
    torch.testing.assert_close(stats.double(), expected, rtol=1e-5, atol=0)


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, itertools, torch
from test_token_attention import SHAPES, TOLERANCE, by_definition, text_inputs, token_inputs
from hotpath.attention.token_attention_kernel import _plans, attend_tokens_fused
for number, (shape, dtype) in enumerate(itertools.product(SHAPES, TOLERANCE)):
    inputs = token_inputs(shape, dtype, strided=number % 2 == 1)  # each shape and each dtype both ways
    stats = torch.zeros(2)
    before = inputs["out"].clone()
    made = attend_tokens_fused(**inputs, stats=stats)
    wanted = by_definition(inputs)
    torch.testing.assert_close(made.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    added = (wanted - before.double()).square().sum()
    torch.testing.assert_close(stats.double(), torch.stack((added, before.double().square().sum())), rtol=2e-2, atol=1e-3)
    assert made.dtype == dtype and torch.equal(inputs["out"], before)
for shape, dtype, texts in ((SHAPES[0], torch.float16, (77, 154, 1)), (SHAPES[1], torch.float32, (33,)),
                            (SHAPES[2], torch.bfloat16, (77,))):
    plans = len(_plans)
    for tokens in texts:
        inputs = text_inputs(token_inputs(shape, dtype), tokens)
        given = {name: value for name, value in inputs.items() if name != "out"}
        stats, before = torch.zeros(2), inputs["text"][0].clone()
        made, wanted = attend_tokens_fused(out=None, **given, stats=stats), by_definition(inputs)
        torch.testing.assert_close(made.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        sums = torch.stack(((wanted - inputs["out"]).square().sum(), inputs["out"].square().sum()))
        torch.testing.assert_close(stats.double(), sums, rtol=2e-2, atol=1e-3)
        assert made.dtype == dtype and torch.equal(inputs["text"][0], before)
    assert len(_plans) == plans + 1, "a text of another length needs nothing new"
empty = token_inputs((1, 1, 2, 64, 16, 1, 0), torch.float32)
assert attend_tokens_fused(**{**empty, "q": empty["q"][:, :0], "out": empty["out"][:, :0]}).shape == (1, 0, 128)
print("equal")
"""


def test_triton_of_torch_2_5_is_refused_with_the_torch_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    with monkeypatch.context() as older:
        older.setattr(triton, "__version__", "3.1.0")
        older.delitem(sys.modules, f"{token_attention.__package__}.token_attention_kernel", raising=False)
        token_attention.why_not_fused.cache_clear()
        reason = token_attention.why_not_fused(torch.device("cuda"), torch.float16, 16, 64)
    token_attention.why_not_fused.cache_clear()
    assert "needs torch 2.6 or newer" in reason and "this is Triton 3.1.0" in reason


def test_kernel_is_the_definition_in_the_interpreter() -> None:
    interpret(INTERPRETED, Path(__file__).parent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4096, 10, 64, 16, 1, 0), (2, 1024, 20, 64, 16, 2, 1)])
def test_kernel_is_the_definition_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> None:
    inputs = token_inputs(shape, dtype, strided)
    expected = by_definition(inputs)
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for _ in range(2):  # the second time by the plan of the first
        made = attend_tokens(**on_gpu)
        tolerance = max(TOLERANCE[dtype], 1e-5)  # float32 in three products of tensor cores
        torch.testing.assert_close(made.double().cpu(), expected, atol=tolerance, rtol=tolerance)
    assert token_attention.why_not_fused(made.device, dtype, shape[4], shape[3]) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 77, 154, 500])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4096, 10, 64, 16, 1, 0), (2, 1024, 20, 64, 16, 2, 1)])
def test_text_and_identities_in_one_launch_on_the_gpu(shape: tuple[int, ...], tokens: int, dtype: torch.dtype) -> None:
    inputs = text_inputs(token_inputs(shape, dtype), tokens)
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    from hotpath.attention import token_attention_kernel

    text = [part.cuda() for part in on_gpu.pop("text")]
    on_gpu.pop("out")
    made = attend_text_and_tokens(on_gpu.pop("q"), *text, **on_gpu)
    if shape[3] > token_attention_kernel.MAX_TEXT_HEAD_DIM:
        assert made is None
        return
    assert made is not None
    torch.testing.assert_close(made.double().cpu(), by_definition(inputs), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_follows_its_tensors() -> None:
    inputs = token_inputs((2, 256, 4, 64, 16, 1, 2), torch.float16)
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    attend_tokens(**on_gpu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = attend_tokens(**on_gpu)
    for name in ("weights", "mask", "keys"):
        on_gpu[name].mul_(0.5)
        inputs[name].mul_(0.5)
    graph.replay()
    torch.testing.assert_close(made.double().cpu(), by_definition(inputs), atol=4e-3, rtol=4e-3)


def test_operator_stays_whole_and_follows_its_tensors() -> None:
    """One graph, no break; what changes between calls is not baked in."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def block(q: Tensor, out: Tensor, tokens: dict[str, Any]) -> Tensor:
        return attend_tokens(q * 1, out, heads=2, **tokens) + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=count, fullgraph=True)
    names = ("keys", "values", "rows", "weights", "mask")
    for seed_shape in (SHAPES[0], SHAPES[0]):
        inputs = token_inputs(seed_shape, torch.float32)
        for scale in (1.0, 0.5, 0.0):
            tokens = {name: inputs[name] for name in names}
            tokens["weights"] = tokens["weights"] * scale
            made = compiled(inputs["q"], inputs["out"], tokens)
            expected = by_definition({**inputs, **tokens}) + 1
            torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    assert [node.target for node in graphs[0].graph.nodes if "hotpath" in str(node.target)] == [
        torch.ops.hotpath.attend_tokens
    ]
    torch._dynamo.reset()


def test_measured_operator_counts_under_compile() -> None:
    inputs = token_inputs(SHAPES[0], torch.float32)
    stats = torch.zeros(2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kwargs: attend_tokens(**kwargs), backend="aot_eager", fullgraph=True)
    compiled(**inputs, stats=stats)
    once = stats.clone()
    compiled(**inputs, stats=stats)
    plain = torch.zeros(2)
    attend_tokens(**inputs, stats=plain)
    torch.testing.assert_close(once, plain)
    torch.testing.assert_close(stats, 2 * plain)
    torch._dynamo.reset()


def test_operators_pass_torchs_own_checks() -> None:
    for strided in (False, True):
        inputs = token_inputs(SHAPES[2], torch.float32, strided)
        arguments = [inputs[name] for name in ("q", "out", "keys", "values", "rows", "weights", "mask")]
        torch.library.opcheck(torch.ops.hotpath.attend_tokens.default, (*arguments, inputs["heads"]))
    measured = torch.ops.hotpath.attend_tokens_measured.default
    torch.library.opcheck(measured, (*arguments, torch.zeros(2), inputs["heads"]))


def test_the_text_keeps_its_kernel_where_triton_has_no_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("hotpath.attention.token_attention_kernel", exc_type=ImportError)
    for capability, fused in (((7, 5), False), ((8, 0), True), (None, True)):  # None: AMD's
        facts = DeviceFacts("cuda", "the card", capability)
        monkeypatch.setattr(kernel, "device_facts", lambda device, facts=facts: facts)
        reason = kernel.why_not_text(torch.device("cuda", 0), torch.float16, 64, 77)
        assert (not reason) is fused and ("the card" in reason) is not fused


def test_a_failing_kernel_is_left_alone_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    from hotpath.attention import token_attention_kernel

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    class OnGPU(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(token_attention_kernel, "attend_tokens_fused", broken)
    monkeypatch.setattr(token_attention, "_failed", {})
    served = iter(["", "", "the kernel failed"])
    monkeypatch.setattr(token_attention, "why_not_fused", lambda *_: next(served))
    monkeypatch.setattr(token_attention.why_not_fused, "cache_clear", lambda: None, raising=False)
    inputs = token_inputs(SHAPES[0], torch.float32)
    expected = attend_tokens(**inputs)
    made = attend_tokens(**{**inputs, "q": inputs["q"].as_subclass(OnGPU)})
    torch.testing.assert_close(made.as_subclass(Tensor), expected)
    assert "Failed to find C compiler" in caplog.text
    assert "RuntimeError" in next(iter(token_attention._failed.values()))


LAUNCHED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
if "nvidia" not in triton.backends.backends:
    print("no assembler")
    sys.exit()
launches = []

class Launcher:
    def __init__(self, src, metadata):
        pass
    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        launches.append((x, y, z, arguments))

class Driver:
    launcher_cls = Launcher
    utils = SimpleNamespace(load_binary=lambda *_: (1, 2, 32, 0, 1024),
                            get_device_properties=lambda _: {"max_shared_mem": 227 << 10})
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)
    get_current_device = lambda _: 0
    get_current_stream = lambda _, device: 0

triton.runtime.driver.set_active(Driver())
from hotpath.attention import token_attention_kernel as kernel
from test_token_attention import SHAPES, text_inputs, token_inputs
asked = []
run = type(kernel._attend_tokens).run
type(kernel._attend_tokens).run = lambda *a, **k: (asked.append(1), run(*a, **k))[1]
for shape, tokens in [(shape, 0) for shape in SHAPES] + [(SHAPES[0], 77)]:
    inputs = token_inputs(shape, torch.float16)
    if tokens:
        inputs = {**text_inputs(inputs, tokens), "out": None}
    stats = torch.zeros(2)
    for measured in (None, stats):
        launches.clear(), asked.clear()
        kernel.attend_tokens_fused(**inputs, stats=measured)
        kernel.attend_tokens_fused(**inputs, stats=measured)
        trial, planned, again = launches  # Triton's own launch of the trial, then twice by the plan
        assert len(asked) == 1
        assert trial[:3] == planned[:3] == again[:3]
        assert len(trial[3]) == len(planned[3]) == len(again[3])
        for number, (first, later) in enumerate(zip(trial[3], again[3])):
            if not torch.is_tensor(first):
                assert first == later, number
            elif number not in (2, 8):  # the result and what is counted into are others each time
                assert first is later, number
        assert again[3][8] is (stats if measured is not None else inputs["weights"])
print("launched")
"""


def test_what_is_compiled_is_launched_with_the_same_arguments() -> None:
    """Against a driver that only notes what it is given: the short way must pass on what Triton's own call passes."""
    result = run_apart(LAUNCHED, Path(__file__).parent)
    if "no assembler" in result.stdout:
        pytest.skip("this Triton compiles for no card of NVIDIA")
    assert result.returncode == 0 and "launched" in result.stdout, result.stderr[-3000:]


@pytest.mark.parametrize("alike", [True, False])
def test_a_compiled_kernel_gets_its_constants_where_triton_takes_them(
    monkeypatch: pytest.MonkeyPatch, alike: bool
) -> None:
    """Triton 3.2's launcher counts its arguments, and constants are none; its own call leaves them out."""
    kernel = pytest.importorskip("hotpath.attention.token_attention_kernel", exc_type=ImportError)
    launches: list[int] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any) -> None:
                wanted = 12 + (9 + 12 if alike else 9)
                if len(arguments) != wanted:
                    raise TypeError(f"function takes exactly {wanted} arguments ({len(arguments)} given)")
                launches.append(len(arguments))

            return launch

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*arguments: Any, **options: Any) -> Compiled:
                launches.append(len(arguments))
                return Compiled()

            return run

    monkeypatch.setattr(kernel, "_attend_tokens", Kernel())
    monkeypatch.setattr(kernel, "_plans", {})
    monkeypatch.setattr(kernel, "LAUNCHED_ALIKE", alike)
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    q, keys, rows = torch.zeros(1, 8, 64), torch.zeros(1, 4, 64), torch.zeros(1, 1, dtype=torch.int32)
    for _ in range(2):
        kernel.attend_tokens_fused(q, q, keys, keys, rows, torch.ones(1, 1), 1)
    assert len(launches) == 3, "once to compile, and once for each call"
