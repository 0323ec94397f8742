"""Linear attention: the gated delta rule token by token and in chunks, by torch and by kernels, beside the library's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hotpath.vision_language import linear_attention
from hotpath.vision_language.decoding import text_decoder
from hotpath.vision_language.delta_rule import CHUNK, SEGMENT, delta_rule, length_one
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.prefill import prefill
from hotpath.vision_language.prompts import Question
from newer_models import newer_folder
from triton_interpreter import interpret
from two_questions import prompts

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = [(2, 4, 32, 24, 4), (1, 1, 16, 48, 3)]  # key heads, heads, widths of keys and values, inputs of the convolution

INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, torch
sys.path.insert(0, sys.argv[2])
from hotpath.vision_language.linear_attention import trial
from test_linear_attention import SIZES, TOLERANCE
for dtype in (torch.float32, torch.bfloat16):
    for sizes in SIZES:
        for found, wanted in trial(torch.device("cpu"), dtype, *sizes):
            most = wanted.float().abs().max().clamp_min(1).item()
            torch.testing.assert_close(found, wanted, atol=TOLERANCE[dtype] * most, rtol=0)
print("equal")
"""


def tokens(n: int, alike: float = 0.0, rows: int = 2) -> list[torch.Tensor]:
    """q, k, v, decay, rate and a state. alike: how much of every key is one and the same, as of a plain background."""
    generator = torch.Generator().manual_seed(n)
    keys, heads, key, value = 2, 4, 16, 8
    q, k = (torch.randn(rows, keys, n, key, generator=generator) for _ in range(2))
    k = (1 - alike) * k + alike * torch.randn(rows, keys, 1, key, generator=generator)
    v, state = (torch.randn(rows, heads, size, value, generator=generator) for size in (n, key))
    decay = -torch.rand(rows, heads, n, generator=generator) * (0.001 if alike else 0.5)
    rate = torch.rand(rows, heads, n, generator=generator) * (1 - alike) + alike
    return [length_one(q) * key**-0.5, length_one(k), v, decay, rate, state]


def one_by_one(q, k, v, decay, rate, state):
    parts = [
        delta_rule(*(part[:, :, place : place + 1] for part in (q, k, v, decay, rate)), state)
        for place in range(q.shape[2])
    ]
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("n", [2, CHUNK - 1, CHUNK, CHUNK + 1, SEGMENT, 2 * SEGMENT + 5])
@pytest.mark.parametrize("alike", [0.0, 0.99, 1.0])
def test_chunks_are_one_token_after_the_other(n, alike):
    *given, state = tokens(n, alike)
    first, second = state.clone(), state.clone()
    torch.testing.assert_close(delta_rule(*given, first), one_by_one(*given, second), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-5)
    assert not torch.equal(first, state)


@pytest.mark.parametrize("n", [1, 40, 300])
def test_the_rule_is_the_librarys(n):
    library = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    q, k, v, decay, rate, state = tokens(n)
    given = [part.transpose(1, 2) for part in (q, k, v)]
    groups = v.shape[1] // k.shape[1]
    q_there, k_there = (part.repeat_interleave(groups, 2) for part in given[:2])
    wanted, after = library.torch_chunk_gated_delta_rule(
        q_there * q.shape[-1] ** 0.5, k_there, given[2], g=decay.transpose(1, 2), beta=rate.transpose(1, 2),
        initial_state=state.clone(), output_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close(delta_rule(q, k, v, decay, rate, state).transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, after, atol=1e-5, rtol=1e-5)


@pytest.fixture
def qwen3_5(llm):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if "qwen3_5" not in CONFIG_MAPPING_NAMES:
        pytest.skip("this transformers has no qwen3_5")
    return MODELS.get(newer_folder(llm / "qwen3_5", "qwen3_5").name, LoadOptions())


def as_the_library_wrote_it(network):
    """The library's own layers again."""
    for layer in text_decoder(network).layers:
        if hasattr(layer, "linear_attn"):
            del layer.linear_attn.forward


def test_layers_are_the_librarys(qwen3_5, pictures):
    """Of two prompts, the shorter one padded, and of the tokens that are written then, one at a time."""
    asked = prompts(qwen3_5, pictures)
    assert len({prompt.length for prompt in asked}) == 2
    found = []
    for library in (False, True):
        if library:
            as_the_library_wrote_it(qwen3_5.network)
        filled = prefill(qwen3_5, asked)
        logits = [filled.logits]
        for token in (5, 77):
            filled.mask = torch.cat((filled.mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
            with torch.no_grad():
                made = qwen3_5.network(
                    input_ids=torch.full((2, 1), token), attention_mask=filled.mask,
                    position_ids=filled.positions.view(1, 2, 1).expand(4, -1, -1), use_cache=True,
                    **{qwen3_5.cache_argument: filled.cache},
                )  # fmt: skip
            logits.append(made.logits[:, -1])
            filled.positions += 1
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=1e-4)


def test_without_a_cache_nothing_is_kept(qwen3_5, pictures):
    ids = prompts(qwen3_5, pictures)[0].ids[:, -20:]
    with torch.no_grad():
        first, again = (qwen3_5.network(input_ids=ids, use_cache=False).logits for _ in range(2))
        as_the_library_wrote_it(qwen3_5.network)
        wanted = qwen3_5.network(input_ids=ids, use_cache=False).logits
    assert torch.equal(first, again)
    torch.testing.assert_close(first, wanted, atol=2e-4, rtol=1e-4)


@torch.random.fork_rng(devices=[])
def layer_of(keys, heads, key, value, reach, hidden=24):
    """A layer with the parts of the library's, with random weights."""
    torch.manual_seed(0)
    channels = 2 * keys * key + heads * value
    part = torch.nn.Module()
    part.num_k_heads, part.num_v_heads, part.head_k_dim, part.head_v_dim = keys, heads, key, value
    part.conv_kernel_size = reach
    for name, width in (("qkv", channels), ("z", heads * value), ("a", heads), ("b", heads)):
        setattr(part, f"in_proj_{name}", torch.nn.Linear(hidden, width, bias=False))
    part.conv1d = torch.nn.Conv1d(channels, channels, reach, groups=channels, bias=False)
    part.A_log, part.dt_bias = torch.nn.Parameter(torch.randn(heads)), torch.nn.Parameter(torch.randn(heads))
    part.norm = torch.nn.Module()
    part.norm.weight, part.norm.variance_epsilon = torch.nn.Parameter(1 + 0.1 * torch.randn(value)), 1e-6
    part.out_proj = torch.nn.Linear(heads * value, hidden, bias=False)
    assert linear_attention.known(part)
    return part


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("parts", [(50,), (1,) * 6, (2, 1, 40, 3)])
def test_tokens_in_parts_are_tokens_at_once(sizes, parts):
    layer = layer_of(*sizes)
    x = torch.randn(2, sum(parts), 24, generator=torch.Generator().manual_seed(1))

    def fresh():
        return [torch.zeros(size, dtype=kind) for size, kind in linear_attention.state_shapes(layer, 2, x.dtype)]

    with torch.no_grad():
        at_once, apart = fresh(), fresh()
        wanted = linear_attention.many(layer, x, *at_once)
        found = torch.cat([linear_attention.many(layer, part, *apart) for part in x.split(parts, 1)], dim=1)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        # Padded at the right, as a recording is; nothing of the padding is kept.
        padded = fresh()
        longer = torch.cat((x, torch.randn(2, 7, 24)), dim=1)
        made = linear_attention.many(layer, longer, *padded, count=torch.tensor([x.shape[1]]))
        torch.testing.assert_close(made[:, : x.shape[1]], wanted, atol=1e-5, rtol=1e-5)
        # At the left, as a row of a batch is.
        left = fresh()
        mask = torch.cat((torch.zeros(2, 5), torch.ones(2, x.shape[1])), dim=1)
        made = linear_attention.many(layer, torch.cat((torch.randn(2, 5, 24), x), dim=1), *left, mask=mask)
        torch.testing.assert_close(made[:, 5:], wanted, atol=1e-5, rtol=1e-5)
    for states in (apart, padded, left):
        for mine, theirs in zip(states, at_once, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 40])
def test_a_compiled_layer_calls_one_operator(monkeypatch, n):
    """As a card compiles it: nothing inside is traced, and states are rewritten where they are."""
    layer = layer_of(*SIZES[0])
    x = torch.randn(2, n, 24, generator=torch.Generator().manual_seed(1))
    shapes = linear_attention.state_shapes(layer, 2, x.dtype)
    ours, theirs = ([torch.ones(size, dtype=kind) for size, kind in shapes] for _ in range(2))
    with torch.no_grad():
        wanted = linear_attention.many(layer, x, *theirs)
        monkeypatch.setattr(linear_attention, "SERVED", ("cpu",))
        monkeypatch.setattr(linear_attention, "by_torch", torch._dynamo.disable(linear_attention.by_torch))
        run = torch.compile(linear_attention.many, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(layer, x, *ours), wanted, atol=1e-5, rtol=1e-5)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)
        assert not torch.equal(mine, torch.ones_like(mine))


@pytest.mark.parametrize("n", [1, 40])
def test_the_operator_says_what_it_rewrites(n):
    layer = layer_of(*SIZES[1])
    x = torch.randn(1, n, 24)
    states = [torch.ones(size, dtype=kind) for size, kind in linear_attention.state_shapes(layer, 1, x.dtype)]
    with torch.no_grad():
        given = *linear_attention.projected(layer, x), *linear_attention.Weights.of(layer), *states, torch.tensor([n])
        given = [part.detach() if isinstance(part, torch.Tensor) else part for part in given]
        torch.library.opcheck(linear_attention.LINEAR_ATTENTION, tuple(given))


def test_kernels_are_torchs_numbers_in_the_interpreter():
    interpret(INTERPRETED, Path(__file__).parents[1], Path(__file__).parent)


def test_elsewhere_it_is_torchs():
    assert "cpu" in linear_attention.why_not(torch.device("cpu"), torch.float32, 2, 2, 16, 16, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(16, 32, 128, 128, 4), (16, 48, 128, 128, 4), *SIZES])
def test_kernels_are_torchs_numbers_on_the_gpu(sizes, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    for found, wanted in linear_attention.trial(device, dtype, *sizes):
        most = wanted.float().abs().max().clamp_min(1).item()
        torch.testing.assert_close(found, wanted, atol=TOLERANCE[dtype] * most, rtol=0)
    assert linear_attention.why_not(device, dtype, *sizes) == ""


@pytest.mark.parametrize(
    ("kind", "streamed"), [("qwen3_5", 0), ("qwen3_5", 2), ("qwen3_5_moe", 0), ("qwen3_vl_moe", 0)]
)
def test_another_question_reads_only_its_own_words(llm, ask, pictures, kind, streamed):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    newer_folder(llm / kind, kind)
    model = MODELS.get(kind, LoadOptions(stream_layers=streamed))
    first, second = (Question(text, "Be brief.", (pictures.a,)) for text in ("What is it?", "And which colour has it?"))
    wanted = [ask(model, asked, reuse_prefix=False, decode="plain", max_new_tokens=8) for asked in (first, second)]
    for decode in ("plain", "static"):
        model.device_state.pop("prefix", None)
        runs = [ask(model, asked, decode=decode, max_new_tokens=8) for asked in (first, second, second, first)]
        assert [run.raw for run in runs] == [wanted[0].raw, wanted[1].raw, wanted[1].raw, wanted[0].raw]
        assert ["reused" in run.report for run in runs] == [False, True, True, True]
