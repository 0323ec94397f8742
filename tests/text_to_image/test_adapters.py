"""LoRA files: every spelling of one file is the same change, stacks add up, and taking them off leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch
from hotpath.text_to_image.adapter_files import UnusableAdapter, read
from hotpath.text_to_image.adapters import Adapter
from hotpath.text_to_image.generation import Pipeline
from safetensors.torch import save_file

RANK = 3
LAYERS = ("layers.0.attention.to_q", "layers.0.attention.to_k", "layers.0.attention.to_v",
          "layers.1.attention.to_out.0", "noise_refiner.0.feed_forward.w1", "layers.1.adaLN_modulation.0")  # fmt: skip


@pytest.fixture
def network(load):
    model = load()  # held while the test runs: a checkpoint goes with its last holder
    yield model.transformer.managed.module.network


@pytest.fixture
def halves(network):
    """(down, up) of each of LAYERS, the three of one attention with one down as a fused layer has."""
    made, seeded = {}, torch.Generator().manual_seed(5)
    for name in LAYERS:
        out, inner = network.get_submodule(name).weight.shape
        down = made[LAYERS[0]][0] if name in LAYERS[1:3] else torch.randn(RANK, inner, generator=seeded) * 0.1
        made[name] = (down, torch.randn(out, RANK, generator=seeded))
    return made


def spelled(halves, how, alpha=None):
    """The same file as diffusers, PEFT, kohya and ComfyUI's names write it."""
    tensors = {}
    for name, (down, up) in halves.items():
        if how == "comfyui" and name in LAYERS[:3]:
            if name == LAYERS[0]:
                fused = torch.cat([halves[layer][1] for layer in LAYERS[:3]])
                tensors["diffusion_model.layers.0.attention.qkv.lora_A.weight"] = down
                tensors["diffusion_model.layers.0.attention.qkv.lora_B.weight"] = fused
            continue
        if how == "comfyui":
            native = name.replace("attention.to_out.0", "attention.out")
            keys = f"diffusion_model.{native}.lora_A.weight", f"diffusion_model.{native}.lora_B.weight"
        else:
            underscored = name.replace(".", "_")
            stem = {"kohya": f"lora_unet_{underscored}", "videox": f"lora_unet__{underscored}",
                    "peft": f"base_model.model.{name}"}.get(how, f"transformer.{name}")  # fmt: skip
            parts = {"kohya": ("lora_down.weight", "lora_up.weight"), "videox": ("lora_down.weight", "lora_up.weight"),
                     "peft": ("lora_A.default.weight", "lora_B.default.weight")}  # fmt: skip
            keys = tuple(f"{stem}.{part}" for part in parts.get(how, ("lora_A.weight", "lora_B.weight")))
            if alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
        tensors[keys[0]], tensors[keys[1]] = down, up
    return {key: tensor.clone().contiguous() for key, tensor in tensors.items()}


def write(path, tensors, **metadata):
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("how", ["diffusers", "peft", "kohya", "videox", "comfyui"])
def test_every_spelling_is_one_change(network, halves, tmp_path, how):
    products = read(write(tmp_path / "a.safetensors", spelled(halves, how)), network)
    assert products.keys() == set(LAYERS)
    for name, (down, up) in halves.items():
        delta = products[name].delta(torch.device("cpu"))
        assert delta.shape == network.get_submodule(name).weight.shape and torch.equal(delta, up @ down)


@pytest.mark.parametrize("how", ["diffusion_model.{}", "lora_unet_{}"])
def test_the_first_and_last_layers_have_names_of_their_own_in_comfyui(network, tmp_path, how):
    theirs = {"x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
              "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
              "cap_embedder.1": "cap_embedder.1", "t_embedder.mlp.2": "t_embedder.mlp.2"}  # fmt: skip
    tensors = {}
    for name, ours in theirs.items():
        out, inner = network.get_submodule(ours).weight.shape
        stem = how.format(name if how.startswith("d") else name.replace(".", "_"))
        tensors[f"{stem}.lora_down.weight"] = torch.ones(RANK, inner)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(out, RANK)
    assert read(write(tmp_path / "a.safetensors", tensors), network).keys() == set(theirs.values())


def test_alpha_in_the_file_and_in_the_header(network, halves, tmp_path):
    plain = read(write(tmp_path / "a.safetensors", spelled(halves, "diffusers")), network)
    inside = read(write(tmp_path / "b.safetensors", spelled(halves, "kohya", alpha=6)), network)
    settings = {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {LAYERS[0]: 12}}
    header = {"lora_adapter_metadata": json.dumps(settings)}
    outside = read(write(tmp_path / "c.safetensors", spelled(halves, "diffusers"), **header), network)
    assert plain[LAYERS[3]].scale == 1.0 and inside[LAYERS[3]].scale == outside[LAYERS[3]].scale == 2.0
    assert outside[LAYERS[0]].scale == 4.0


def test_peft_settings_name_layers_by_their_end_and_may_divide_by_the_root(network, halves, tmp_path):
    settings = {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"attention.to_q": 12, "w1": 9, "o_k": 1}}
    told = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    products = read(write(tmp_path / "a.safetensors", spelled(halves, "diffusers"), **told), network)
    alphas = {name: 6 for name in LAYERS} | {LAYERS[0]: 12, LAYERS[4]: 9}
    for name in LAYERS:
        assert products[name].scale == pytest.approx(alphas[name] / RANK**0.5)
    pattern = {"lora_adapter_metadata": json.dumps({"alpha_pattern": {"layers.*to_q": 12}})}
    with pytest.raises(UnusableAdapter, match=r"alpha_pattern 'layers\.\*to_q' is no layer's name"):
        read(write(tmp_path / "b.safetensors", spelled(halves, "diffusers"), **pattern), network)


@pytest.mark.parametrize("how", ["kohya", "diffusers", "comfyui"])
def test_diffusers_reads_the_same_out_of_it(network, halves, tmp_path, how):
    """diffusers' own reader, where it knows the spelling."""
    from diffusers.loaders import ZImageLoraLoaderMixin

    tensors = spelled({k: v for k, v in halves.items() if how != "comfyui" or k == LAYERS[4]}, how)
    theirs = ZImageLoraLoaderMixin.lora_state_dict(dict(tensors))
    ours = read(write(tmp_path / "a.safetensors", tensors), network)
    for name, product in ours.items():
        found = {key.removeprefix("transformer."): value for key, value in theirs.items()}
        wanted = found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
        assert torch.allclose(product.delta(torch.device("cpu")), wanted, atol=1e-6)


def test_a_stack_is_added_and_taken_off_to_the_bit(load, draw, halves, tmp_path):
    model = load()
    network = model.transformer.managed.module.network
    a = Adapter(write(tmp_path / "a.safetensors", spelled(halves, "diffusers")), 0.5)
    b = Adapter(write(tmp_path / "b.safetensors", spelled({k: halves[k] for k in LAYERS[2:4]}, "kohya", alpha=6)), -0.3)
    before, plain = weights(network), draw(model).pictures
    bare = Pipeline(model)
    one = bare.with_adapter(a)
    both = one.with_adapter(b)
    assert (bare.adapters, one.adapters, both.adapters) == ((), (a,), (a, b))
    stacked = draw(both)
    assert "a.safetensors at 0.5, b.safetensors at -0.3; 6 layers changed" in stacked.report
    for name, tensor in weights(network).items():
        layer = name.removesuffix(".weight")
        delta = 0.5 * halves[layer][1] @ halves[layer][0] if layer in LAYERS and name.endswith(".weight") else 0.0
        if layer in LAYERS[2:4]:
            delta = delta - 0.3 * 2.0 * halves[layer][1] @ halves[layer][0]
        assert torch.allclose(tensor, before[name] + delta, atol=1e-6), name
    assert not torch.equal(stacked.pictures, plain)
    # In any order: each pipeline draws its own, and the bare one has every bit back.
    waiting = dict(model.adapters._originals)
    single = draw(one).pictures
    # What both change is not fetched back and copied again.
    assert all(model.adapters._originals[name] is waiting[name] for name in LAYERS)
    assert torch.equal(draw(both).pictures, stacked.pictures) and torch.equal(draw(one).pictures, single)
    assert torch.equal(draw(bare).pictures, plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(network).items())
    assert torch.equal(draw(bare.with_adapter(Adapter(a.path, 0.0))).pictures, plain)


def test_bfloat16_weights_come_back_to_the_bit(load, draw, halves, tmp_path):
    model = load(dtype="bfloat16")
    network = model.transformer.managed.module.network
    before = weights(network)
    path = write(tmp_path / "a.safetensors", spelled(halves, "diffusers"))
    draw(Pipeline(model, (Adapter(path),)))
    assert not torch.equal(network.state_dict()[f"{LAYERS[0]}.weight"], before[f"{LAYERS[0]}.weight"])
    draw(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(network).items())


def test_added_or_beside_is_the_same_picture(load, draw, halves, tmp_path, monkeypatch):
    """The path for packed weights, run on plain ones."""
    from hotpath.text_to_image import adapters

    model = load()
    pipeline = Pipeline(model, (Adapter(write(tmp_path / "a.safetensors", spelled(halves, "diffusers")), 0.7),))
    wanted = draw(pipeline).pictures
    draw(model)
    monkeypatch.setattr(adapters, "is_dense", lambda layer: "w1" not in str(layer) and layer.in_features != 96)
    assert (draw(pipeline).pictures - wanted).abs().max() < 1e-5
    kinds = {type(layer).__name__ for layer in model.transformer.managed.module.network.modules()}
    assert "AdaptedLinear" not in kinds


def test_packed_weights_take_a_file_too(load, draw, halves, tmp_path):
    pytest.importorskip("torchao")
    path = write(tmp_path / "a.safetensors", spelled(halves, "diffusers"))
    exact = draw(Pipeline(load(), (Adapter(path),))).pictures
    model = load(precision="int8")
    plain = draw(model).pictures
    packed = draw(Pipeline(model, (Adapter(path),))).pictures
    assert (packed - exact).abs().mean() < 0.03 < (packed - plain).abs().max()
    assert torch.equal(draw(model).pictures, plain)


def test_files_cost_no_graph(load, draw, halves, tmp_path, graphs):
    model = load(compile="regional")
    plain = draw(model).pictures
    path = write(tmp_path / "a.safetensors", spelled(halves, "diffusers"))
    changed = draw(Pipeline(model, (Adapter(path, 0.8),))).pictures
    wanted = draw(Pipeline(load(), (Adapter(path, 0.8),))).pictures
    assert (changed - wanted).abs().max() < 1e-5 and not torch.equal(changed, plain)
    assert torch.equal(draw(model).pictures, plain) and len(graphs) == 1


def test_a_failure_half_way_is_undone(load, draw, halves, tmp_path, monkeypatch):
    from hotpath.text_to_image import changes

    model = load()
    plain = draw(model).pictures
    pipeline = Pipeline(model, (Adapter(write(tmp_path / "a.safetensors", spelled(halves, "diffusers"))),))
    made, delta = [], changes.Product.delta

    def fails_later(self, device):
        made.append(1)
        if len(made) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return delta(self, device)

    monkeypatch.setattr(changes.Product, "delta", fails_later)
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipeline)
    monkeypatch.setattr(changes.Product, "delta", delta)
    assert torch.equal(draw(model).pictures, plain)


TO_Q = "layers.0.attention.to_q"
BAD = {
    "another model": ({"transformer.blocks.0.attn.lora_A.weight": (3, 8), "transformer.blocks.0.attn.lora_B.weight": (8, 3)},
                      "does not have: it was trained for another model"),
    "another width": ({"layers.0.attention.to_q.lora_A.weight": (3, 8), "layers.0.attention.to_q.lora_B.weight": (96, 3)},
                      "as 96 x 8, and it is 96 x 96"),
    "half a pair": ({"layers.0.attention.to_q.lora_A.weight": (3, 96)}, "lacks half of its pair"),
    "LoKr of convolutions": ({f"{TO_Q}.lokr_w1": (3, 64), f"{TO_Q}.lokr_t2": (3, 3, 1, 1)}, "is a LoKr of convolutions"),
    "half a LoKr": ({f"{TO_Q}.lokr_w1": (8, 8)}, "lacks a half of w2"),
    "quarter of a LoKr": ({f"{TO_Q}.lokr_w1": (8, 8), f"{TO_Q}.lokr_w2_a": (12, 2)}, "lacks a half of w2"),
    "LoKr of another size": ({f"{TO_Q}.lokr_w1": (8, 8), f"{TO_Q}.lokr_w2": (12, 11)}, "trained for another model"),
    "LoRA and LoKr of one layer": ({f"{TO_Q}.lokr_w1": (8, 8), f"{TO_Q}.lora_A.weight": (3, 96)}, "not whole"),
    "matrices that do not fit": ({f"{TO_Q}.lora_A.weight": (3, 96), f"{TO_Q}.lora_B.weight": (96, 2)}, "do not fit"),
    "DoRA": ({"layers.0.attention.to_q.dora_scale": (64,)}, "is a DoRA"),
    "text encoder": ({"text_encoder.layers.0.q.lora_A.weight": (3, 8)}, "changes the text encoder"),
    "a checkpoint": ({"model.weight": (3, 8)}, "which is no part of a LoRA"),
    "one dimension": ({f"{TO_Q}.lora_A.weight": (96,), f"{TO_Q}.lora_B.weight": (96, 3)}, "two matrices"),
    "no dimension": ({f"{TO_Q}.lora_A.weight": (3, 96), f"{TO_Q}.lora_B.weight": ()}, "two matrices"),
    "a convolution": ({f"{TO_Q}.lora_A.weight": (3, 96, 1, 1), f"{TO_Q}.lora_B.weight": (96, 3, 1, 1)}, "two matrices"),
    "no rank": ({f"{TO_Q}.lora_A.weight": (0, 96), f"{TO_Q}.lora_B.weight": (96, 0), f"{TO_Q}.alpha": ()}, "two matrices"),
    "many alphas": ({f"{TO_Q}.lora_A.weight": (3, 96), f"{TO_Q}.lora_B.weight": (96, 3), f"{TO_Q}.alpha": (2,)}, "2 alphas"),
    "too few fused rows": ({"layers.0.attention.qkv.lora_A.weight": (3, 96), "layers.0.attention.qkv.lora_B.weight": (2, 3)},
                           "trained for another model"),
    "two prefixes": ({f"{TO_Q}.lora_A.weight": (3, 96), f"{TO_Q}.lora_B.weight": (96, 3),
                      f"transformer.{TO_Q}.lora_A.weight": (3, 96)}, "two prefixes"),
    "two spellings": ({f"{TO_Q}.lora_A.weight": (3, 96), f"{TO_Q}.lora_B.weight": (96, 3),
                       f"{TO_Q}.lora_down.weight": (2, 96)}, "two entries"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_files_that_cannot_be_used(network, tmp_path, case):
    shapes, words = BAD[case]
    path = write(tmp_path / "bad.safetensors", {key: torch.zeros(shape) for key, shape in shapes.items()})
    with pytest.raises(UnusableAdapter, match=words):
        read(path, network)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha"])
def test_values_that_are_not_finite_are_refused(network, tmp_path, part):
    tensors = {"lora_A.weight": torch.ones(3, 96), "lora_B.weight": torch.ones(96, 3), "alpha": torch.ones(())}
    tensors[part] = tensors[part] * float("nan")
    path = write(tmp_path / "a.safetensors", {f"{TO_Q}.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(UnusableAdapter, match=f"not finite .NaN. for {TO_Q}"):
        read(path, network)


def test_float8_files_are_read_and_whole_numbers_are_not(network, tmp_path):
    down, up = torch.full((3, 96), 0.5), torch.ones(96, 3)
    tensors = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
    short = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    product = read(write(tmp_path / "a.safetensors", short), network)[TO_Q]
    assert torch.equal(product.delta(torch.device("cpu")), up @ down)
    whole = {key: tensor.to(torch.int8) for key, tensor in tensors.items()}
    with pytest.raises(UnusableAdapter, match=r"holds torch\.int8 .* quantised LoRA"):
        read(write(tmp_path / "b.safetensors", whole), network)


def test_a_layer_in_two_spellings_is_changed_once(network, halves, tmp_path):
    """Fused and apart, as Anime-Z's trainer writes it; of another change under the fused name, neither is meant."""
    native = {key: part for key, part in spelled(halves, "comfyui").items() if "qkv" in key or ".out." in key}
    both = spelled(halves, "diffusers") | native
    products = read(write(tmp_path / "a.safetensors", both), network)
    assert products.keys() == set(LAYERS)
    for name, (down, up) in halves.items():
        assert torch.allclose(products[name].delta(torch.device("cpu")), up @ down, atol=1e-6)
    both["diffusion_model.layers.0.attention.qkv.lora_B.weight"] *= 1.1
    with pytest.raises(UnusableAdapter, match=r"changes layers\.0\.attention\.to_\w in two ways, once in a fused"):
        read(write(tmp_path / "b.safetensors", both), network)


@pytest.mark.parametrize("settings", ["[1]", "{", '{"transformer.lora_alpha": "x"}', '{"alpha_pattern": [1]}'])
def test_settings_that_cannot_be_read_are_not_passed_over(network, tmp_path, settings):
    """A file without its alpha would be drawn at another strength."""
    from safetensors.torch import save_file

    tensors = {f"{TO_Q}.lora_A.weight": torch.ones(3, 96), f"{TO_Q}.lora_B.weight": torch.ones(96, 3)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(UnusableAdapter, match=r"a\.safetensors: the LoRA settings in its header cannot be read"):
        read(tmp_path / "a.safetensors", network)


def test_pickles_and_cut_files_are_not_opened(network, halves, tmp_path):
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(UnusableAdapter, match="no safetensors file"):
        read(tmp_path / "a.pt", network)
    path = write(tmp_path / "a.safetensors", spelled(halves, "diffusers"))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UnusableAdapter, match="bytes"):
        read(path, network)


def kronecker_file(network, how="whole", prefix="diffusion_model.", names=LAYERS):
    """(tensors of a LoKr file, the change of each layer)."""
    seeded = torch.Generator().manual_seed(7)
    tensors, wanted = {}, {}
    for name in names:
        out, inner = network.get_submodule(name).weight.shape
        left = torch.randn(4, 2, generator=seeded) * 0.2
        right = torch.randn(out // 4, inner // 2, generator=seeded) * 0.2
        stem, scale = f"{prefix}{name}", 1.0
        if how == "halves":
            a, b = torch.randn(out // 4, 3, generator=seeded) * 0.2, torch.randn(3, inner // 2, generator=seeded)
            right, scale = a @ b, 6 / 3
            parts = {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}
        else:  # trainers write an alpha that is meant for nobody
            parts = {"lokr_w1": left, "lokr_w2": right, "alpha": torch.tensor(1e10)}
        tensors |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
        wanted[name] = scale * torch.kron(left, right)
    return tensors, wanted


@pytest.mark.parametrize("how", ["whole", "halves"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "base_model.model."])
def test_kronecker_products(network, tmp_path, how, prefix):
    tensors, wanted = kronecker_file(network, how, prefix)
    changes = read(write(tmp_path / "a.safetensors", tensors), network)
    assert changes.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(changes[name].delta(torch.device("cpu")), delta)


def test_a_fused_kronecker_product_is_one_of_three_layers(network, tmp_path):
    """Its thirds are no Kronecker products of their own."""
    out, inner = network.get_submodule(LAYERS[0]).weight.shape
    left, right = torch.randn(4, 2), torch.randn(3 * out // 4, inner // 2)
    stem = "diffusion_model.layers.0.attention.qkv"
    path = write(tmp_path / "a.safetensors", {f"{stem}.lokr_w1": left, f"{stem}.lokr_w2": right})
    changes, whole = read(path, network), torch.kron(left, right)
    for name, rows in zip(LAYERS[:3], whole.chunk(3), strict=True):
        torch.testing.assert_close(changes[name].delta(torch.device("cpu")), rows)


def test_kronecker_products_are_drawn_added_or_beside(load, draw, halves, tmp_path, monkeypatch):
    """In a stack with a LoRA; the second way is that of packed weights."""
    from hotpath.text_to_image import adapters

    model = load()
    plain = draw(model).pictures
    tensors, wanted = kronecker_file(model.transformer.managed.module.network, "halves")
    stack = (
        Adapter(write(tmp_path / "a.safetensors", tensors), 0.7),
        Adapter(write(tmp_path / "b.safetensors", spelled(halves, "diffusers")), 0.3),
    )
    added = draw(Pipeline(model, stack)).pictures
    network = model.transformer.managed.module.network
    before = network.get_submodule(LAYERS[5]).weight.clone()
    assert torch.equal(draw(model).pictures, plain)
    down, up = halves[LAYERS[5]]
    change = before - network.get_submodule(LAYERS[5]).weight
    torch.testing.assert_close(change, 0.7 * wanted[LAYERS[5]] + 0.3 * up @ down, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(adapters, "is_dense", lambda layer: False)
    beside = draw(Pipeline(model, stack)).pictures
    assert (beside - added).abs().max() < 1e-5 < (added - plain).abs().max()


def test_a_part_of_a_fused_kronecker_product_stands_beside_a_layer(network):
    from hotpath.text_to_image.changes import AdaptedLinear, Kronecker

    base, x = torch.nn.Linear(6, 8, bias=False), torch.randn(2, 5, 6)
    whole = Kronecker(torch.randn(4, 2), torch.randn(6, 3), 0.5)
    change = whole.part(slice(8, 16))
    assert change.shape == (8, 6) and whole.shape == (24, 6)
    layer = AdaptedLinear(base, [change, whole.part(slice(0, 8))], torch.device("cpu"), torch.float32)
    delta = 0.5 * torch.kron(whole.left, whole.right)
    torch.testing.assert_close(layer(x), x @ (base.weight + delta[8:16] + delta[:8]).T)
