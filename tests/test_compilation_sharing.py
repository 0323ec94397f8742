"""What lets blocks share a graph although they look different, and what keeps them from one although they look alike."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compiled_models import assert_same_picture, compiled, sample
from hotpath.patches.compilation import compile_model, compiler_of, graphs, regional
from hotpath.patches.compilation.blocks import constants_of
from hotpath.patches.compilation.graphs import usual_order
from quantised_models import LAYER, fp8_file
from tiny_native_models import Tiny, tiny

pytestmark = pytest.mark.comfy


def test_classes_that_a_function_makes_are_one_kind() -> None:
    """As Stable Cascade's norms, which are of a class of their own in each block."""
    from comfy.ldm.cascade.common import LayerNorm2d_op

    first, second = (LayerNorm2d_op(torch.nn)(8) for _ in range(2))
    assert type(first) is not type(second) and constants_of(first) == constants_of(second)
    type(second).forward = lambda self, x: x
    assert constants_of(first) != constants_of(second)


def test_layers_of_quantised_checkpoints_are_one_kind_where_they_are_set_up_alike() -> None:
    """ComfyUI makes their class anew for every model it loads, with functions, settings and classes that name each other."""
    from comfy.ops import mixed_precision_ops

    def made(**changes: Any) -> torch.nn.Module:
        settings: dict[str, Any] = {"quant_config": {"mixed_ops": True}, "compute_dtype": torch.float32, **changes}
        return mixed_precision_ops(**settings).Linear(8, 8)

    first, second = made(), made()
    assert type(first) is not type(second) and constants_of(first) == constants_of(second)
    for changes in ({"disabled": {"float8_e4m3fn"}}, {"compute_dtype": torch.bfloat16}, {"full_precision_mm": True}):
        assert constants_of(made(**changes)) != constants_of(first), changes
    type(second).forward = lambda self, x: x
    assert constants_of(first) != constants_of(second)


def test_what_a_function_gives_the_classes_it_makes_counts_and_another_packs_are_kinds_of_their_own() -> None:
    def made(module: str, factor: float, by_default: float = 1.0) -> torch.nn.Module:
        class Block(torch.nn.Module):
            eps = 1e-5

            def forward(self, x: torch.Tensor, scale: float = by_default) -> torch.Tensor:
                return x * factor * scale

        Block.__module__ = module
        return Block()

    ours = constants_of(made("comfy.ops", 2.0))
    assert ours == constants_of(made("comfy.ops", 2.0))
    assert ours != constants_of(made("comfy.ops", 3.0)) and ours != constants_of(made("comfy.ops", 2.0, 5.0))
    # Their graphs are guarded by the class, and torch makes no more than eight of a kind.
    assert constants_of(made("another_pack", 2.0)) != constants_of(made("another_pack", 2.0))


def test_a_quantised_checkpoint_that_is_loaded_again_is_not_compiled_again(own_graphs: None) -> None:
    bench = tiny("z_image", device="cpu")
    names = tuple(LAYER.replace("1", str(number)) for number in range(3))
    expected = bench.sample(fp8_file(names))
    classes: list[weakref.ref[Any]] = []
    kinds: list[set[Any]] = []
    for _ in range(2):
        loaded = fp8_file(names)
        classes.append(weakref.ref(type(loaded.model.diffusion_model.get_submodule(LAYER))))
        model, compiler = compiled(loaded)
        assert_same_picture(bench.sample(model), expected)
        assert not compiler.fallbacks()
        kinds.append(set(regional._kinds.values()))
        graphs_made = sum(kind.graphs for kind in kinds[-1])
        assert graphs_made == compiler.graphs == len(kinds[-1]), "one of each kind, made for the first"
    assert kinds[0] and kinds[0] == kinds[1]
    del loaded, model, compiler
    gc.collect()
    assert sum(kind() is not None for kind in classes) <= 1, "torch may keep the one that the graphs were made with"


def test_a_class_may_name_what_is_not_set_yet() -> None:
    def made(sets: bool) -> type[torch.nn.Module]:
        class Block(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return later(x)

        if sets:
            later = torch.relu
        return Block

    unset, again, whole = (constants_of(made(sets)()) for sets in (False, False, True))
    assert unset == again != whole


def test_tokens_that_are_a_turned_picture_are_put_in_order() -> None:
    picture = torch.rand(2, 8, 12)
    tokens = picture.transpose(1, 2)
    assert usual_order(tokens).is_contiguous() and torch.equal(usual_order(tokens), tokens)
    assert usual_order(torch.rand(2, 9, 8)[:, 4:]).is_contiguous()
    heads = torch.rand(2, 12, 4, 8).transpose(1, 2)
    for kept in (picture, heads, picture[0].T, torch.rand(2, 1, 1).expand(2, 5, 8), None):
        assert usual_order(kept) is kept


class Scaled(torch.nn.Linear):
    """A layer of another pack, which is told anew what to do while it samples, as AnimateDiff-Evolved's are."""

    told = "nothing"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.linear(x, self.weight, self.bias)
        return out * 0.5 if self.told == "half" else out


class Packed(torch.Tensor):
    """A weight on which it is written what its numbers mean, and the LoRAs to add, as ComfyUI-GGUF's are."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Unpacking(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)
        for strength in self.weight.told:  # type: ignore[attr-defined]
            weight = weight * strength
        return torch.nn.functional.linear(x, weight, self.bias)


def told_by_layer(layer: Any, what: str) -> None:
    layer.told = what


def told_by_weight(layer: Any, what: str) -> None:
    layer.weight.told = [0.5] if what == "half" else []


@contextmanager
def of_another_pack(bench: Tiny, kind: type[torch.nn.Linear], tell: Callable[[Any, str], None]) -> Iterator[list[Any]]:
    """One layer of each block of Z-Image is made a `kind` for the time being."""
    layers = [block.feed_forward.w1 for block in bench.model.model.diffusion_model.layers]
    before = [(type(layer), layer.weight) for layer in layers]
    for layer in layers:
        layer.__class__ = kind
        if kind is Unpacking:
            layer._parameters["weight"] = layer.weight.data.as_subclass(Packed)
        tell(layer, "nothing")
    try:
        yield layers
    finally:
        for layer, (own, weight) in zip(layers, before, strict=True):
            layer.__class__, layer.weight = own, weight
            vars(layer).pop("told", None)


@pytest.mark.parametrize(("kind", "tell"), [(Scaled, told_by_layer), (Unpacking, told_by_weight)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_another_packs_layers_are_told_meanwhile_is_followed(
    kind: type[torch.nn.Linear], tell: Callable[[Any, str], None], dynamic: bool
) -> None:
    bench = tiny("z_image")
    with of_another_pack(bench, kind, tell) as layers:
        model, compiler = compiled(bench.model, dynamic=dynamic)
        expected = sample(bench)
        assert_same_picture(sample(bench, model), expected)
        graphs = compiler.graphs
        if kind is Scaled:  # weights of a class of their own are beyond an older torch
            assert graphs and not compiler.fallbacks()
        for layer in layers:
            tell(layer, "half")
        other = sample(bench)
        assert_same_picture(sample(bench, model), other)
        assert (other - expected).abs().max() > 1e-3 * expected.abs().max()
        for layer in layers:
            tell(layer, "nothing")
        again = compiler.graphs
        assert_same_picture(sample(bench, model), expected)
        assert compiler.graphs == again, "both are kept"


def test_weights_of_another_packs_class_meet_no_operator_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one for oneDNN's products takes plain tensors, and torch raises where a graph hands it others."""
    asked: list[Any] = []
    monkeypatch.setattr(graphs, "reroute", asked.append)
    bench = tiny("z_image")
    with of_another_pack(bench, Unpacking, told_by_weight):
        model, compiler = compiled(bench.model)
        assert_same_picture(sample(bench, model), sample(bench))
    assert len(asked) < compiler.graphs, "but for the refiners, which have none"


def test_weights_that_a_compiled_graph_cannot_take_run_as_they_are() -> None:
    """With aot_eager torch itself hands them to its operators, one by one, and raises."""
    bench = tiny("z_image")
    with of_another_pack(bench, Unpacking, told_by_weight):
        model, _ = compile_model(bench.model, backend="aot_eager")
        assert_same_picture(sample(bench, model), sample(bench))
        assert sum(compiler_of(model).fallbacks().values()) in (0, 3)
