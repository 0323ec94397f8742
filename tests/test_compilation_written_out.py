"""comfy-kitchen's operators in graphs: written out with the same result, or left with a reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hotpath.patches.compilation import CompileSettings, compile_model, compiler_of, settings, written_out
from hotpath.patches.compilation.graphs import CompiledKind, inductor
from hotpath.patches.compilation.written_out import FORMS, Given, write_out
from tiny_native_models import tiny

kitchen = pytest.importorskip("comfy_kitchen")

HEADS, WIDTH = 3, 32
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def rotations(tokens: int, pairs: int, heads_first: bool, seed: int = 1) -> torch.Tensor:
    angle = 6 * torch.rand(tokens, pairs, generator=torch.Generator().manual_seed(seed))
    turns = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(tokens, pairs, 2, 2)
    return turns[None, None] if heads_first else turns[None, :, None]


def arguments(name: str, dtype: torch.dtype, heads_first: bool = False, tokens: int = 7) -> dict[str, Any]:
    """What `name` is given by ComfyUI's blocks: views of one projection, [B, N, H, D] or [B, H, N, D]."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, tokens, 3 * HEADS * WIDTH, generator=generator).to(dtype)
    q, k, _ = packed.view(2, tokens, 3, HEADS, WIDTH).unbind(2)
    q, k = (q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)
    first, second = (1 + 0.1 * torch.randn(2, WIDTH, generator=generator)).to(dtype)
    modulation = torch.randn(2, 2, 1, WIDTH, generator=generator).to(dtype)
    known = {"q": q, "k": k, "xq": q, "xk": k, "x": q, "freqs_cis": rotations(tokens, WIDTH // 2, heads_first)}
    known |= {"q_scale": first, "k_scale": second, "scale": first, "epsilon": 1e-5, "eps": 1e-5}
    if name.endswith("adaln"):
        known |= {"x": packed[..., :WIDTH], "scale": modulation[0], "shift": modulation[1]}
    return {key: known[key] for key in inspect.signature(getattr(kitchen, name)).parameters if key in known}


def eager(name: str, given: dict[str, Any]) -> Any:
    with kitchen.use_backend("eager"):
        return getattr(kitchen, name)(**given)


def by_hand(name: str, given: dict[str, Any]) -> Any:
    held = {key: Given(value, value) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    return FORMS[name](**held)


def graph_of(function: Callable[..., Any], *inputs: Any) -> torch.fx.GraphModule:
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    def called(*values: Any) -> Any:
        return function(*values)

    called.__code__ = called.__code__.replace()  # Dynamo takes other sizes of the same code for open ones
    torch.compile(called, backend=backend, fullgraph=True)(*inputs)
    return seen[0]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", FORMS)
def test_formulas_are_those_of_the_eager_backend(name: str, dtype: torch.dtype) -> None:
    for heads_first in (False, True):
        given = arguments(name, dtype, heads_first)
        torch.testing.assert_close(by_hand(name, given), eager(name, given), rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_one_scale_part_of_a_head_and_spare_positions() -> None:
    given = arguments("rms_rope", torch.float32)
    del given["k_scale"]
    torch.testing.assert_close(by_hand("rms_rope", given), eager("rms_rope", given))
    given = arguments("rms_rope_split_half", torch.float32) | {"rot_dim": 8}
    given["freqs_cis"] = rotations(7, 4, False)
    torch.testing.assert_close(by_hand("rms_rope_split_half", given), eager("rms_rope_split_half", given))
    given = arguments("apply_rope", torch.float32, heads_first=True)
    given["freqs_cis"] = rotations(12, WIDTH // 2, True)
    torch.testing.assert_close(by_hand("apply_rope", given), eager("apply_rope", given))


@pytest.mark.parametrize("name", FORMS)
def test_a_graph_of_any_length_holds_the_formulas(name: str) -> None:
    names = list(arguments(name, torch.float32))

    def call(*values: Any) -> Any:
        return getattr(kitchen, name)(**dict(zip(names, values, strict=True)))

    given = arguments(name, torch.float32)
    for value in given.values():
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if size > 1 and not (dim == value.ndim - 1 and size == WIDTH):
                    torch._dynamo.maybe_mark_dynamic(value, dim)
    graph = graph_of(call, *given.values())
    assert write_out(graph) == {name: "written out"}
    assert "comfy_kitchen" not in graph.code
    graph.graph.lint()


def test_an_operator_that_is_used_or_called_otherwise_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments("rms_rope", torch.float32)
    values = list(given.values())
    graph = graph_of(kitchen.rms_rope, *values)
    monkeypatch.setattr(written_out, "_kernel", lambda *_: "cuda")
    nodes = len(graph.graph.nodes)
    assert write_out(graph) == {"rms_rope": "left as it is, comfy-kitchen has a cuda kernel for it"}
    assert len(graph.graph.nodes) == nodes
    monkeypatch.undo()

    node = next(node for node in graph.graph.nodes if "rms_rope" in str(node.target))
    rotation = node.args[2].meta
    rotation["example_value"] = rotation["example_value"].narrow(-1, 0, 1)
    assert write_out(graph) == {"rms_rope": "left as it is, its rotations are not one matrix for each pair"}
    assert len(graph.graph.nodes) == nodes  # the norm of the queries was there already
    graph.graph.lint()

    monkeypatch.setitem(FORMS, "rms_rope", lambda q, k: (q, k))
    assert "other parameters" in write_out(graph)["rms_rope"]


def test_a_kernel_of_comfy_kitchens_own_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_kitchen.registry import registry

    given = arguments("rms_rope", torch.float32)
    assert written_out._kernel("rms_rope", given) == ""  # CPUs have none
    monkeypatch.setattr(registry, "get_capable_backend", lambda name, kwargs=None: "cuda")
    assert written_out._kernel("rms_rope", given) == "cuda"
    assert written_out._kernel("apply_rope", given) == ""  # in one kernel with the norm before it


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("name", "operator"), [("z_image", "rms_rope"), pytest.param("flux", "apply_rope", marks=pytest.mark.long)]
)
@pytest.mark.usefixtures("own_graphs")
def test_native_models_run_without_opaque_rotations(name: str, operator: str) -> None:
    bench = tiny(name)
    model, _ = compile_model(bench.model, CompileSettings(), backend="eager")
    compiler = compiler_of(model)
    with torch.inference_mode():
        for size in ((16, 16), (16, 24)):
            expected = bench.sample(size=size)
            assert (bench.sample(model, size=size) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert compiler.fallbacks() == {}
    assert compiler.graphs == 2
    assert f"comfy_kitchen::{operator} written out" in compiler.report()


@pytest.mark.long
def test_norm_and_rotation_of_queries_and_keys_are_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if problem := settings.compiler_problem("cpu"):
        pytest.skip(problem)
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import fresh_inductor_cache

    class Block(torch.nn.Module):
        def forward(self, packed: torch.Tensor, freqs: torch.Tensor, scale: torch.Tensor) -> Any:
            batch, tokens, _ = packed.shape
            q, k, v = packed.view(batch, tokens, 3, HEADS, WIDTH).unbind(2)
            return (*kitchen.rms_rope(q, k, freqs, scale, scale, 1e-5), v)

    block = Block().eval()
    chosen = CompileSettings()
    kind = CompiledKind("Block", Block.forward, chosen, inductor(chosen.inductor_options()))
    made: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", made.append)
    with torch.inference_mode(), fresh_inductor_cache():
        for tokens in (7, 12):
            packed = torch.randn(2, tokens, 3 * HEADS * WIDTH, generator=torch.Generator().manual_seed(tokens))
            given = (packed, rotations(tokens, WIDTH // 2, False), torch.ones(WIDTH))
            torch.testing.assert_close(kind(block, given, {}), block(*given))
    assert kind.graphs == 1 and kind.operators == {"rms_rope": "written out"}
    assert len(made) == 1 and made[0].count("async_compile.cpp_pybinding(") == 1
