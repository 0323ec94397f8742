"""Small ONNX files, and whether torch and onnxruntime make the same of them."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from hotpath.face.onnx_graph import OnnxNetwork
from onnx import TensorProto, helper, numpy_helper


def write(path, nodes, constants=(), shape=("N", 4, 8, 8), outputs=("y",), opset=13):
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(value, name) for name, value in dict(constants).items()]
    graph = helper.make_graph(list(nodes), "g", [given], made, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), str(path))
    return path


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


def node(kind, inputs="x", output="y", **attributes):
    """`inputs` in words, or as a list where one is left out."""
    return helper.make_node(kind, inputs.split() if isinstance(inputs, str) else inputs, [output], **attributes)


def normed(extra=()):
    constants = {"w": floats(6, 4, 3, 3), "g": floats(6), "h": floats(6, seed=1), "m": floats(6, seed=2),
                 "v": np.abs(floats(6, seed=3)) + 0.1}  # fmt: skip
    nodes = [node("Conv", "x w", "a", pads=[1] * 4), node("BatchNormalization", "a g h m v", "b"), *extra]
    return nodes, constants


def agree(path, seed=4):
    x = floats(3, 4, 8, 8, seed=seed)
    import onnxruntime

    wanted = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    for got, want in zip(OnnxNetwork(path)(torch.from_numpy(x)), wanted, strict=True):
        assert torch.allclose(got, torch.from_numpy(want), atol=1e-4, rtol=1e-4)
