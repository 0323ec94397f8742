"""ONNX files as torch modules: folding, packed convolutions, precision, outlines without weights, broken files."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hotpath.demo.face_networks import Scrfd, export_detector, randomise
from hotpath.face import FaceError
from hotpath.face.onnx_graph import OnnxNetwork
from hotpath.face.onnx_outline import outline
from onnx_files import agree, floats, ints, node, normed, write

pytest.importorskip("onnxruntime")


def test_normalisation_disappears_into_the_convolution(tmp_path):
    nodes, constants = normed([node("Relu", "b")])
    path = write(tmp_path / "m.onnx", nodes, constants)
    agree(path)
    assert [n.kind for n in OnnxNetwork(path).nodes] == ["Conv", "Relu"]


def test_normalisation_stays_when_somebody_else_reads_the_convolution(tmp_path):
    nodes, constants = normed([node("Add", "a b")])
    path = write(tmp_path / "m.onnx", nodes, constants)
    agree(path)
    assert [n.kind for n in OnnxNetwork(path).nodes] == ["Conv", "ScaleShift", "Add"]


def test_normalisation_stays_when_the_convolution_is_an_output(tmp_path):
    nodes, constants = normed()
    agree(write(tmp_path / "m.onnx", nodes, constants, outputs=("a", "b")))


def test_weights_shared_by_two_convolutions_are_folded_for_one_only(tmp_path):
    nodes, constants = normed([node("Conv", "x w", "c", pads=[1] * 4), node("Add", "b c")])
    agree(write(tmp_path / "m.onnx", nodes, constants))


def test_relu_never_writes_into_a_value_that_is_read_again(tmp_path):
    nodes, constants = normed([node("Relu", "b", "r"), node("Add", "r b")])
    agree(write(tmp_path / "m.onnx", nodes, constants))


@pytest.mark.parametrize("view", ["Identity", "Dropout", "Reshape", "Squeeze"])
def test_relu_never_writes_into_what_a_view_still_shows(tmp_path, view):
    constants = {"w": floats(4, 4, 1, 1), "s": ints(0, 0, 0, 0)}
    nodes = [
        node("Conv", "x w", "c"),
        node(view, "c s" if view == "Reshape" else "c", "seen"),
        node("Relu", "c", "r"),
        node("Sub", "seen r"),
    ]
    path = write(tmp_path / "m.onnx", nodes, constants)
    agree(path)
    with torch.no_grad():
        agree(path)


def test_normalisation_first_and_alone(tmp_path):
    constants = {"g": floats(4), "h": floats(4, seed=1), "m": floats(4, seed=2), "v": np.abs(floats(4, seed=3)) + 0.1}
    agree(write(tmp_path / "m.onnx", [node("BatchNormalization", "x g h m v")], constants))


@pytest.mark.parametrize(
    ("nodes", "constants", "said"),
    [
        ([node("Add", "x nowhere")], {}, "Add reads 'nowhere', which no step before it makes"),
        ([node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b")], {}, "Add reads 'b', which no step"),
        ([node("Relu", "x", "z")], {}, "no step makes its output 'y'"),
        ([node("Add", "v w", "c"), node("Add", "x c")], {"v": floats(3), "w": floats(4)}, r"computed \(The size"),
        (
            [node("ConstantOfShape", "s", "c"), node("Add", "x c")],
            {"s": ints(1 << 20, 1 << 20)},
            "larger than any face",
        ),
        (
            [node("Expand", "v s", "c"), node("Add", "x c")],
            {"v": floats(1), "s": ints(1 << 40)},
            "larger than any face",
        ),
    ],
)
def test_a_graph_that_leads_nowhere_is_refused_with_its_file(tmp_path, nodes, constants, said):
    with pytest.raises(FaceError, match=rf"m\.onnx describes a network .*{said}"):
        OnnxNetwork(write(tmp_path / "m.onnx", nodes, constants))


def test_weights_are_a_modules_own_and_half_precision_is_a_cast(tmp_path):
    nodes, constants = normed([node("Relu", "b")])
    network = OnnxNetwork(write(tmp_path / "m.onnx", nodes, constants))
    assert sum(p.numel() for p in network.parameters()) == 6 * 4 * 9 + 6
    assert not any(p.requires_grad for p in network.parameters())
    x = torch.from_numpy(floats(1, 4, 8, 8))
    full = network(x)[0]
    half = network.to(torch.bfloat16)(x.bfloat16())[0]
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), full, atol=0.1, rtol=0.05)


def test_no_step_of_a_detector_reads_a_value_off_the_device(tmp_path):
    """On the meta device every value of an activation is out of reach: what runs there never waits for a GPU."""
    detector = Scrfd(0.25)
    randomise(detector)
    export_detector(detector, tmp_path / "d.onnx")
    network = OnnxNetwork(tmp_path / "d.onnx").to("meta")
    rows = [o.shape[0] for o in network(torch.empty(3, 3, 320, 320, device="meta"))]
    assert rows[:3] == [3 * 2 * 1600, 3 * 2 * 400, 3 * 2 * 100]


def test_the_outline_tells_files_apart_without_their_weights(tmp_path):
    nodes, constants = normed()
    path = write(tmp_path / "m.onnx", nodes, constants, shape=(1, 3, 112, 112), outputs=("b",))
    found = outline(path)
    assert found.inputs == (("x", (1, 3, 112, 112)),) and found.outputs[0][0] == "b"
    assert found.kind == "recognition"
    wide = write(tmp_path / "w.onnx", nodes, constants, shape=(1, 3, 192, 192), outputs=("b",))
    assert outline(wide).kind == "landmarks"


@pytest.mark.parametrize("part", [0, 1, 60, 0.5, 0.97])
def test_a_file_that_ends_early_is_refused_with_its_name(tmp_path, part):
    nodes, constants = normed()
    whole = write(tmp_path / "m.onnx", nodes, constants).read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: int(len(whole) * part) if isinstance(part, float) else part])
    with pytest.raises(FaceError, match=r"cut\.onnx is no whole ONNX file .* copy or download it again"):
        outline(cut)


def test_another_kind_of_file_is_refused(tmp_path):
    page = tmp_path / "page.onnx"
    page.write_text("<html><body>404 not found, and long enough to have fields of every wire type</body></html>")
    with pytest.raises(FaceError, match="no whole ONNX file"):
        outline(page)
    with pytest.raises(FaceError, match="no readable ONNX file"):
        OnnxNetwork(page)


@pytest.mark.parametrize(
    "attributes", [{"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {"group": 4}]
)
def test_packed_convolutions_are_the_plain_ones_and_follow_the_weights(tmp_path, attributes):
    kernel = floats(8, 4 // attributes.get("group", 1), 3, 3)
    path = write(tmp_path / "conv.onnx", [node("Conv", "x w b", **attributes)], {"w": kernel, "b": floats(8)})
    network = OnnxNetwork(path)
    for size in (8, 11):
        x = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(size))
        plain = network(x)[0]  # gradients are on, so this is torch's own convolution
        with torch.inference_mode():
            for _ in range(3):
                assert torch.allclose(network(x)[0], plain, atol=1e-5)
        assert network._packed.size == x.shape and len(network._packed) == 1
    copied = copy.deepcopy(network)
    assert copied._packed is None and network._packed is not None
    held = network._packed
    network.to("cpu")
    assert network._packed is held, "a move to where it is changes nothing"
    network.double().float()
    assert network._packed is None
    with torch.no_grad():
        next(network.parameters()).mul_(2)
        network.double().float()
        x = torch.randn(1, 4, 8, 8)
        plain = torch.enable_grad()(network)(x)[0]
        for _ in range(3):
            assert torch.allclose(network(x)[0], plain, atol=1e-5)
        assert len(network._packed) == 1


def test_a_convolution_of_one_channel_and_column_is_torchs_own(tmp_path):
    path = write(tmp_path / "conv.onnx", [node("Conv", "x w", strides=[1, 2])], {"w": floats(8, 1, 3, 3)})
    x = torch.randn(1, 1, 7, 3, generator=torch.Generator().manual_seed(1))
    network = OnnxNetwork(path)
    plain = network(x)[0]
    with torch.no_grad():
        assert torch.allclose(network(x)[0], plain, atol=1e-5)


def test_weights_packed_for_one_size_are_not_used_for_another(tmp_path):
    """A probe at load is small, and faces come one, two, one: what is packed for those would be slow for the rest."""
    path = write(tmp_path / "conv.onnx", [node("Conv", "x w", pads=[1] * 4)], {"w": floats(8, 4, 3, 3)})
    network = OnnxNetwork(path)
    small, large, two = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 32, 32), torch.zeros(2, 4, 32, 32)

    def packed_after(x):
        network(x)
        return network._packed and network._packed.size

    with torch.no_grad():
        assert packed_after(small) is None
        assert packed_after(small) == small.shape
        assert packed_after(large) == small.shape, "kept, and not used: the size may be an exception"
        held = network._packed
        held._made = {0: lambda *_: pytest.fail("used for another size")}
        network(two)
        assert packed_after(large) == small.shape
        assert packed_after(large) == large.shape


def test_a_relu_is_done_with_its_packed_convolution_only_when_nobody_else_reads_that(tmp_path):
    weights = {"w": floats(4, 4, 3, 3), "v": floats(4, 4, 3, 3, seed=1)}
    nodes = [
        node("Conv", "x w", "a", pads=[1] * 4),
        node("Relu", "a", "b"),
        node("Conv", "b v", "c", pads=[1] * 4),
        node("Relu", "c", "d"),
        node("Add", "d c"),  # reads what came before the second ReLU
    ]
    network = OnnxNetwork(write(tmp_path / "relu.onnx", nodes, weights))
    assert [n.then_relu for n in network.nodes] == [True, False, False, False, False]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    plain = network(x)[0]
    with torch.no_grad():
        assert torch.allclose(network(x)[0], plain, atol=1e-5)
