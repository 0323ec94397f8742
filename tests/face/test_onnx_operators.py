"""Operators of ONNX: each against onnxruntime, as its opset has it, and refused by name where torch computes otherwise."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hotpath.face.onnx_graph import OnnxNetwork
from hotpath.face.onnx_operators import UnsupportedOperator
from onnx import TensorProto, numpy_helper
from onnx_files import agree, floats, ints, node, write

onnxruntime = pytest.importorskip("onnxruntime")


GRAPHS = {
    "conv uneven pads": ([node("Conv", "x w b", pads=[0, 1, 2, 1], strides=[2, 2])], {"w": floats(6, 4, 3, 3), "b": floats(6)}),
    "conv groups dilated": ([node("Conv", "x w", group=4, dilations=[2, 2], pads=[2] * 4)], {"w": floats(4, 1, 3, 3)}),
    "conv same upper": ([node("Conv", "x w", auto_pad="SAME_UPPER", strides=[3, 3])], {"w": floats(5, 4, 3, 3)}),
    "conv same lower": ([node("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 2])], {"w": floats(5, 4, 3, 3)}),
    "max pool": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 1])], {}),
    "max pool same upper": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")], {}),
    "max pool same lower": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER")], {}),
    "max pool valid": ([node("MaxPool", kernel_shape=[3, 3], auto_pad="VALID")], {}),
    "max pool ceil": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}),
    "average pool": ([node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)], {}),
    "average pool counted": ([node("AveragePool", kernel_shape=[2, 2], pads=[1, 0, 0, 1], count_include_pad=1)], {}),
    "global average": ([node("GlobalAveragePool")], {}),
    "prelu": ([node("PRelu", "x s")], {"s": floats(4, 1, 1)}),
    "prelu of one slope": ([node("PRelu", "x s")], {"s": floats(1)}),
    "prelu along the rows": ([node("PRelu", "x s")], {"s": floats(1, 8)}),
    "leaky, clip, sigmoid": (
        [node("LeakyRelu", "x", "a", alpha=0.2), node("Clip", "a lo hi", "b"), node("Sigmoid", "b")],
        {"lo": np.float32(-0.1), "hi": np.float32(0.6)},
    ),
    "clip from below": ([node("Clip", "x lo")], {"lo": np.float32(-0.1)}),
    "clip from above": ([node("Clip", "x  hi")], {"hi": np.float32(0.6)}),
    "clip of nothing": ([node("Clip")], {}),
    "hard swish by parts": ([node("HardSigmoid", "x", "a", alpha=1 / 6, beta=0.5), node("Mul", "a x")], {}),
    "elu, tanh, exp, abs": (
        [node("Elu", "x", "a"), node("Tanh", "a", "b"), node("Exp", "b", "c"), node("Abs", "c")],
        {},
    ),
    "resize by scales": (
        [node("Resize", "x r s", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        {"r": floats(0), "s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize linear": (
        [node("Resize", "x r s", mode="linear", coordinate_transformation_mode="half_pixel")],
        {"r": floats(0), "s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "reduce": ([node("ReduceMean", "x", "a", axes=[2, 3], keepdims=1), node("ReduceL2", "a", axes=[1], keepdims=1)], {}),
    "pad": ([node("Pad", "x p v")], {"p": ints(0, 0, 1, 2, 0, 0, 3, 0), "v": np.float32(1.5)}),
    "pad with nothing said": ([node("Pad", "x p")], {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}),
    "slice from the first axis on": ([node("Slice", "x a b")], {"a": ints(1, -3), "b": ints(2, 9)}),
    "gemm turned, a matrix added": (
        [node("Flatten", "x", "a"), node("Gemm", "a w b", transA=1, alpha=0.5)],
        {"w": floats(2, 7), "b": floats(256, 7)},
    ),
    "gemm with nothing added": ([node("Flatten", "x", "a"), node("Gemm", "a w", alpha=0.5)], {"w": floats(256, 7)}),
    "gemm, half of a row added": (
        [node("Flatten", "x", "a"), node("Gemm", "a w b", beta=0.5)],
        {"w": floats(256, 7), "b": floats(7)},
    ),
    "flatten from the end": ([node("Flatten", axis=-1)], {}),
    "flatten all": ([node("Flatten", axis=0)], {}),
    "reduce all": ([node("ReduceMean", "x", "a", keepdims=0), node("Add", "a x")], {}),
    "squeeze": ([node("GlobalAveragePool", "x", "a"), node("Squeeze", "a")], {}),
    "squeeze two": ([node("GlobalAveragePool", "x", "a"), node("Squeeze", "a k")], {"k": ints(-1, 2)}),
    "gather from the end": ([node("Gather", "x k", axis=-1)], {"k": np.array([[0, -1], [3, -8]], np.int64)}),
    "whole numbers divided": (
        [node("Shape", "x", "s"), node("Div", "s k", "d"), node("Cast", "d", to=TensorProto.FLOAT)],
        {"k": ints(1, 3, -3, 5)},
    ),
    "zeros of a shape": (
        [node("Shape", "x", "s"), node("ConstantOfShape", "s", "z"), node("Add", "x z")],
        {},
    ),
    "ones of a shape": (
        [
            node("Shape", "x", "s"),
            node("ConstantOfShape", "s", "z", value=numpy_helper.from_array(np.ones(1, np.float32))),
            node("Add", "x z"),
        ],
        {},
    ),
    "slice": (
        [node("Slice", "x a b c d")],
        {"a": ints(1, -6), "b": ints(9999, -1), "c": ints(1, 3), "d": ints(1, 2)},
    ),
    "slice backwards": (
        [node("Slice", "x a b c d")],
        {"a": ints(-1, 6, -9), "b": ints(-(1 << 62), 1, -9), "c": ints(1, -1, 2), "d": ints(-1, -2, -1)},
    ),
    "flatten, gemm": (
        [node("Flatten", "x", "a"), node("Gemm", "a w b", transB=1, alpha=0.5, beta=2.0)],
        {"w": floats(7, 256), "b": floats(7)},
    ),
    "gemm untransposed with norm": (
        [
            node("Flatten", "x", "a"),
            node("Gemm", "a w b", "c"),
            node("BatchNormalization", "c g h m v"),
        ],
        {"w": floats(256, 7), "b": floats(7), "g": floats(7), "h": floats(7, seed=1), "m": floats(7, seed=2),
         "v": np.abs(floats(7, seed=3)) + 0.1},
    ),
    "norm by what is computed": (
        [node("ReduceMean", "x", "m", axes=[0, 2, 3], keepdims=0), node("Abs", "m", "v"),
         node("BatchNormalization", "x g h m v", epsilon=0.1)],
        {"g": floats(4), "h": floats(4, seed=1)},
    ),
    "unit length": ([node("LpNormalization", axis=1)], {}),
    "unit sum": ([node("LpNormalization", p=1)], {}),
    "what does not depend on the picture": ([node("Neg", "k")], {"k": floats(3)}),
    "shape arithmetic": (
        [
            node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Unsqueeze", "n axis", "u"),
            node("Concat", "u rest", "t", axis=0), node("Transpose", "x", "p", perm=[2, 3, 0, 1]),
            node("Transpose", "p", "q", perm=[2, 3, 0, 1]), node("Reshape", "q t"),
        ],
        {"zero": np.int64(0), "axis": ints(0), "rest": ints(-1)},
    ),
    "softmax, sqrt, pow": (
        [node("Softmax", "x", "a", axis=1), node("Sqrt", "a", "b"), node("Pow", "b e", "c"), node("Neg", "c")],
        {"e": np.float32(3)},
    ),
    "division and min, max": (
        [node("Div", "x k", "a"), node("Min", "a k", "b"), node("Max", "b j", "c"), node("Sub", "c k", "d"), node("Floor", "d")],
        {"k": np.float32(0.3), "j": np.float32(-0.4)},
    ),
    "max of three, min of one": ([node("Max", "x j k", "a"), node("Min", "a")], {"k": floats(8), "j": floats(4, 1, 1)}),
    "max pool of wide pads": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[2] * 4)], {}),
    "a linear layer by parts, with norm": (
        [node("Flatten", "x", "a"), node("MatMul", "a w", "c"), node("Add", "c b", "d"), node("BatchNormalization", "d b b b v")],
        {"w": floats(256, 2), "b": floats(2), "v": np.float32([0.5, 2])},
    ),
    "norm of three dimensions": (
        [node("Reshape", "x s", "a"), node("Relu", "a", "r"), node("BatchNormalization", "r b b b v")],
        {"s": ints(0, 0, -1), "b": floats(4), "v": np.float32([0.5, 2, 3, 1])},
    ),
    "whole numbers stay whole": (
        [node("Shape", "x", "s"), node("Clip", "s lo hi", "c"), node("Div", "c two", "d"), node("Cast", "d", "f", to=1),
         node("ReduceSum", "f", "t"), node("Mul", "x t")],
        {"lo": np.int64(3), "hi": np.int64(5), "two": np.int64(2)},
    ),
}  # fmt: skip


OLDER_GRAPHS = {
    "softmax": (11, [node("Softmax")], {}),
    "softmax over one axis": (11, [node("Softmax", axis=-1)], {}),
    "upsample": (9, [node("Upsample", "x s")], {"s": np.array([1, 1, 2, 3], np.float32)}),
    "resize": (10, [node("Resize", "x s")], {"s": np.array([1, 1, 2, 3], np.float32)}),
    "resize of some axes": (18, [node("Resize", ["x", "", "", "s"], axes=[-1, 2])], {"s": ints(16, 24)}),
    "pad of some axes": (18, [node("Pad", ["x", "p", "", "a"])], {"p": ints(1, 2, 3, 0), "a": ints(-1, 1)}),
    "reduction along no axis": (18, [node("ReduceL2", noop_with_empty_axes=1)], {}),
}

REFUSED = {
    "MaxPool over 1 dimensions": ([node("Reshape", "x s", "a"), node("MaxPool", "a", kernel_shape=[2])], {"s": ints(0, 0, -1)}),
    "ceil_mode and pads": ([node("MaxPool", kernel_shape=[2, 2], pads=[0, 0, 1, 1], ceil_mode=1)], {}),
    "AveragePool with these dilations": ([node("AveragePool", kernel_shape=[2, 2], dilations=[2, 2])], {}),
    "pads [2, 2, 2, 2] that are not counted": ([node("AveragePool", kernel_shape=[3, 3], pads=[2] * 4)], {}),
    "pads [2, 0, 0, 0] that are not counted": ([node("AveragePool", kernel_shape=[3, 3], pads=[2, 0, 0, 0])], {}),
    "Slice backwards to an end beyond": (
        [node("Slice", "x a b c d")], {"a": ints(2), "b": ints((1 << 63) - 1), "c": ints(3), "d": ints(-1)}
    ),
    "only of height and width": ([node("Resize", ["x", "", "s"])], {"s": np.float32([2, 1, 1, 1])}),
    "gives no whole pixels": ([node("Resize", ["x", "", "s"])], {"s": np.float32([1, 1, 1.1, 1.1])}),
    "antialias": ([node("Resize", ["x", "", "s"], mode="linear", antialias=1)], {"s": np.float32([1, 1, 0.5, 0.5])}),
    "keep_aspect_ratio_policy": (
        [node("Resize", ["x", "", "", "s"], keep_aspect_ratio_policy="not_larger")], {"s": ints(3, 4, 16, 32)}
    ),
    "pytorch_half_pixel is not supported": (
        [node("Resize", ["x", "", "", "s"], mode="linear", coordinate_transformation_mode="pytorch_half_pixel")],
        {"s": ints(3, 4, 1, 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", list(REFUSED))
def test_what_torch_computes_otherwise_is_refused_by_name(tmp_path, said):
    nodes, constants = REFUSED[said]
    path = write(tmp_path / "m.onnx", nodes, constants, opset=19)
    # onnxruntime takes each of them, and what it gives differs.
    assert onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"x": floats(3, 4, 8, 8)}
    )
    with pytest.raises(UnsupportedOperator, match=f"{re.escape(said)}.*: choose the onnxruntime engine"):
        OnnxNetwork(path)(torch.zeros(3, 4, 8, 8))


@pytest.mark.parametrize("name", list(OLDER_GRAPHS))
def test_operators_mean_what_they_did_in_the_opset_of_the_file(tmp_path, name):
    opset, nodes, constants = OLDER_GRAPHS[name]
    agree(write(tmp_path / "m.onnx", nodes, constants, opset=opset))


COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
ROUNDINGS = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")


def test_a_resize_is_onnxruntimes_or_refused_by_name(tmp_path):
    """Which pixel is the nearest has more ways than torch knows."""
    taken = []
    for factor in (2, 3):
        constants = {"r": floats(0), "s": np.array([1, 1, factor, factor], np.float32)}
        for where in COORDINATES:
            for rounding in ROUNDINGS:
                settings = {"coordinate_transformation_mode": where, "nearest_mode": rounding}
                path = write(tmp_path / "m.onnx", [node("Resize", "x r s", mode="nearest", **settings)], constants)
                x = floats(3, 4, 8, 8)
                session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
                wanted = session.run(None, {"x": x})[0]
                repeated = np.array_equal(wanted, x.repeat(factor, 2).repeat(factor, 3))
                try:
                    assert np.array_equal(OnnxNetwork(path)(torch.from_numpy(x))[0], wanted)
                    taken.append((factor, where, rounding))
                    assert repeated
                except UnsupportedOperator as error:
                    assert where in str(error) and rounding in str(error) and not repeated
    assert {(2, "asymmetric", "floor"), (3, "asymmetric", "floor"), (3, "half_pixel", "round_prefer_floor")} <= set(
        taken
    )
    assert (2, "asymmetric", "ceil") not in taken and (3, "align_corners", "round_prefer_floor") not in taken
    linear = [node("Upsample", "x s", mode="linear")]
    path = write(tmp_path / "m.onnx", linear, {"s": np.array([1, 1, 2, 2], np.float32)}, opset=9)
    with pytest.raises(
        UnsupportedOperator, match=r"^m\.onnx: .*mode linear with asymmetric .*: choose the onnxruntime"
    ):
        agree(path)
    linear = [node("Resize", "x r s", mode="linear", coordinate_transformation_mode="half_pixel")]
    constants = {"r": floats(0), "s": np.array([1, 1, 1.3, 1.3], np.float32)}
    path = write(tmp_path / "m.onnx", linear, constants)
    with pytest.raises(UnsupportedOperator, match="gives no whole pixels"):
        agree(path)


@pytest.mark.parametrize("name", list(GRAPHS))
def test_operators_agree_with_onnxruntime(tmp_path, name):
    nodes, constants = GRAPHS[name]
    path = write(tmp_path / "m.onnx", nodes, constants)
    x = floats(2, 4, 8, 8, seed=9)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": x})[0]
    before = torch.from_numpy(x.copy())
    got = OnnxNetwork(path)(before)[0]
    assert got.shape == wanted.shape
    assert torch.allclose(got, torch.from_numpy(wanted), atol=1e-5, rtol=1e-5)
    assert np.array_equal(before.numpy(), x), "the input was written to"


def test_an_unknown_operator_is_refused_by_name(tmp_path):
    path = write(tmp_path / "odd.onnx", [node("Hardmax", "x")])
    with pytest.raises(UnsupportedOperator, match=r"odd\.onnx uses the operator Hardmax"):
        OnnxNetwork(path)


def test_numbers_stay_on_the_cpu_when_weights_leave_it(tmp_path):
    """Resize reads its factors on the host: on a GPU that would be a wait in every call."""
    nodes, constants = GRAPHS["resize by scales"]
    network = OnnxNetwork(write(tmp_path / "m.onnx", nodes, constants))
    assert not list(network.parameters())
    assert network(torch.ones(1, 4, 8, 8))[0].shape == (1, 4, 16, 16)
    network.to("meta")
    assert network(torch.ones(1, 4, 8, 8, device="meta"))[0].shape == (1, 4, 16, 16)
