"""An ONNX file as a torch module: weights that ComfyUI can move and evict, on whatever device torch has.

The graph is run node by node. At load, nodes that depend on constants alone are computed, batch normalisation is
folded into the convolution or matrix product before it, or into one multiply-add; a node with an operator that is not
in `onnx_operators` is refused by name. Shape arithmetic is on integers, which stay on the CPU: no device waits for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..host.errors import first_line
from ..products.convolution import can_pack
from .faces import FaceError
from .onnx_operators import OLDER_OPERATORS, OPERATORS, Attributes, UnsupportedOperator, scale_shift
from .packed_convolution import PackedConvolutions

COMPUTES = ("Conv", "Add", "ScaleShift", "Gemm")  # into memory of its own, which is no view of something else
READS_NUMBERS = ("Clip", "Expand", "Pad", "Resize", "Slice", "Upsample")


class Node:
    """One step of the graph: an operator with its attributes and the names of what it reads and writes."""

    def __init__(
        self, kind: str, function: Callable[..., Tensor], attributes: Attributes, inputs: list[str], output: str
    ) -> None:
        self.kind, self.function, self.attributes = kind, function, attributes
        self.inputs, self.output = inputs, output
        self.finished: list[str] = []  # values nobody reads after this node
        self.then_relu = False  # a convolution whose only reader is a ReLU
        self.done_before = False  # that ReLU


def read_model(path: Path) -> Any:
    """The parsed ModelProto. Raises FaceError when the file is not a whole ONNX model."""
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's DecodeError has no common base with onnx's own errors
        raise FaceError(
            f"{path} is no readable ONNX file ({type(error).__name__}): it is truncated or of another kind; copy or "
            "download it again."
        ) from error
    if not model.graph.node or not model.graph.output:
        raise FaceError(f"{path} holds no network (an empty ONNX graph); copy or download it again.")
    return model


def _attribute(value: Any) -> Any:
    import onnx

    found = onnx.helper.get_attribute_value(value)
    if isinstance(found, onnx.TensorProto):
        return torch.from_numpy(onnx.numpy_helper.to_array(found).copy())
    return found


class OnnxNetwork(nn.Module):
    """The network in an ONNX file with one input.

    forward(x) returns the outputs in the file's order. Weights are parameters without gradient.
    """

    def __init__(self, path: Path, order: torch.memory_format = torch.channels_last) -> None:
        """order: of pictures and of the weights of convolutions in memory.

        Raises FaceError for a broken file and UnsupportedOperator for a graph this module cannot run.
        """
        super().__init__()
        self._order = order
        try:
            self._read(path)
        except (FaceError, UnsupportedOperator):
            raise
        except Exception as error:  # of shapes that do not fit each other, torch raises whatever its operator raises
            raise FaceError(
                f"{path} describes a network that cannot be computed ({first_line(error)}): copy or download it again."
            ) from error

    def _read(self, path: Path) -> None:
        import onnx

        model = read_model(path)
        graph = model.graph
        self.file = path
        self.when_moved: Callable[[], Any] | None = None  # called when the weights are elsewhere
        self._packed: PackedConvolutions | None = None
        self._last_size: torch.Size | None = None
        self._constants: dict[str, Tensor] = {
            t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer
        }
        inputs = [value for value in graph.input if value.name not in self._constants]
        if len(inputs) != 1:
            raise FaceError(f"{path} has {len(inputs)} inputs where a face network has one; this is another model.")
        self.input_name: str = inputs[0].name
        self.output_names: list[str] = [value.name for value in graph.output]
        opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
        nodes = self._read_nodes(graph, opset)
        nodes = self._fold_constants(nodes)
        nodes = self._fold_normalisation(nodes)
        self._schedule(nodes)

    def _read_nodes(self, graph: Any, opset: int) -> list[Node]:
        nodes = []
        for item in graph.node:
            attributes = {a.name: _attribute(a) for a in item.attribute}
            if item.op_type == "Constant":
                self._constants[item.output[0]] = _constant_value(attributes)
                continue
            function = OPERATORS.get(item.op_type) if item.domain in ("", "ai.onnx") else None
            until, older = OLDER_OPERATORS.get(item.op_type, (0, function))
            function = older if opset < until else function
            if function is None:
                name = f"{item.domain}.{item.op_type}" if item.domain else item.op_type
                raise UnsupportedOperator(
                    f"{self.file.name} uses the operator {name}, which the torch engine does not have: choose the "
                    "onnxruntime engine for this file."
                )
            if any(name for name in item.output[1:]) and item.op_type not in ("Dropout", "BatchNormalization"):
                raise UnsupportedOperator(
                    f"{self.file.name} uses the second output of {item.op_type}, which is not supported."
                )
            nodes.append(Node(item.op_type, function, attributes, list(item.input), item.output[0]))
        return nodes

    def _fold_constants(self, nodes: list[Node]) -> list[Node]:
        kept = []
        for node in nodes:
            if node.output not in self.output_names and all(i == "" or i in self._constants for i in node.inputs):
                given = [self._constants[i] if i else None for i in node.inputs]
                self._constants[node.output] = self._computed(node, given)
            else:
                kept.append(node)
        return kept

    def _fold_normalisation(self, nodes: list[Node]) -> list[Node]:
        """Batch normalisation as part of what computes its input, in float64 so that nothing is lost by it."""
        reads = Counter(name for node in nodes for name in node.inputs)
        makers = {node.output: node for node in nodes}
        kept = []
        for node in nodes:
            if node.kind != "BatchNormalization" or any(i not in self._constants for i in node.inputs[1:]):
                kept.append(node)
                continue
            scale, bias, mean, variance = (self._constants[i].double() for i in node.inputs[1:5])
            factor = scale / torch.sqrt(variance + node.attributes.get("epsilon", 1e-5))
            shift = bias - mean * factor
            maker = makers.get(node.inputs[0])
            alone = maker is not None and reads[maker.output] == 1 and maker.output not in self.output_names
            if maker is not None and alone and self._absorb(maker, factor, shift):
                maker.output = node.output
                makers[node.output] = maker
                continue
            names = f"{node.output}.scale", f"{node.output}.shift"
            for name, value in zip(names, (factor, shift), strict=True):
                self._constants[name] = value.float()
            kept.append(Node("ScaleShift", scale_shift, {}, [node.inputs[0], *names], node.output))
        return kept

    def _absorb(self, maker: Node, factor: Tensor, shift: Tensor) -> bool:
        """Scale the weights and the bias of a convolution or matrix product; False when they are not constants."""
        if maker.kind not in ("Conv", "Gemm") or maker.inputs[1] not in self._constants:
            return False
        if maker.kind == "Gemm" and (
            maker.attributes.get("alpha", 1.0) != 1.0 or maker.attributes.get("beta", 1.0) != 1.0
        ):
            return False
        weight = self._constants[maker.inputs[1]].double()
        has_bias = len(maker.inputs) > 2 and maker.inputs[2] != ""
        if has_bias and maker.inputs[2] not in self._constants:
            return False
        old = self._constants[maker.inputs[2]].double() if has_bias else torch.zeros_like(factor)
        per_output = factor.reshape(-1, *[1] * (weight.dim() - 1))
        if maker.kind == "Gemm" and not maker.attributes.get("transB", 0):
            per_output = factor.reshape(1, -1)
        if weight.shape[0 if per_output.shape[0] > 1 else -1] != factor.numel():
            return False
        # New names: another node may share the old tensors.
        names = [f"{maker.output}.weight", f"{maker.output}.bias"]
        self._constants[names[0]] = (weight * per_output).float()
        self._constants[names[1]] = (old * factor + shift).float()
        maker.inputs = [maker.inputs[0], *names]
        return True

    def _schedule(self, nodes: list[Node]) -> None:
        """Make the floating-point constants parameters, and note after which node each value is no longer needed."""
        # What an operator reads as numbers, not as weights, stays on the CPU: reading it there makes nobody wait.
        numbers = {i for node in nodes if node.kind in READS_NUMBERS for i in node.inputs[1:]}
        used = {name for node in nodes for name in node.inputs} | set(self.output_names)
        self._parameter_of: dict[str, str] = {}
        for name in list(self._constants):
            value = self._constants[name]
            if name not in used:
                del self._constants[name]
            elif value.is_floating_point() and value.dim() > 0 and value.numel() > 0 and name not in numbers:
                own = f"w{len(self._parameter_of)}"
                if value.dim() == 4:
                    value = value.contiguous(memory_format=self._order)
                self.register_parameter(own, nn.Parameter(value, requires_grad=False))
                self._parameter_of[name] = own
                del self._constants[name]
        last: dict[str, int] = {}
        reads = Counter(name for node in nodes for name in node.inputs)
        makers = {node.output: node for node in nodes}
        there = {self.input_name, *self._parameter_of, *self._constants, ""}
        for position, node in enumerate(nodes):
            last.update(dict.fromkeys(node.inputs, position))
            if unmade := [name for name in node.inputs if name not in there]:
                raise ValueError(f"{node.kind} reads {unmade[0]!r}, which no step before it makes")
            there.add(node.output)
        if unmade := [name for name in self.output_names if name not in there]:
            raise ValueError(f"no step makes its output {unmade[0]!r}")
        for position, node in enumerate(nodes):
            node.finished = [i for i in set(node.inputs) if i and last[i] == position and i not in self.output_names]
            # What another reader made of the value may be a view of it, such as Identity's or Reshape's.
            maker = makers.get(node.inputs[0]) if node.kind == "Relu" and reads[node.inputs[0]] == 1 else None
            if maker is not None and node.inputs[0] in node.finished and maker.kind in COMPUTES:
                node.function = _relu_in_place
                maker.then_relu = node.done_before = maker.kind == "Conv"
        self.nodes = nodes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: the network's input, of the dtype and on the device of its weights."""
        if x.dim() == 4:
            x = x.contiguous(memory_format=self._order)
        values: dict[str, Tensor] = {self.input_name: x}
        weights, parameter_of, constants = self._parameters, self._parameter_of, self._constants
        packed = self._packed_for(x)
        for position, node in enumerate(self.nodes):
            given: list[Tensor | None] = []
            for name in node.inputs:
                if name in values:
                    given.append(values[name])
                elif name in parameter_of:
                    given.append(weights[parameter_of[name]])
                else:
                    given.append(constants[name] if name else None)
            if packed is not None and node.kind == "Conv" and given[1] is not None and given[1].dim() == 4:
                values[node.output] = packed(position, node.attributes, node.then_relu, *given)
            elif packed is not None and node.done_before and given[0] is not None and given[0].dim() == 4:
                values[node.output] = given[0]
            else:
                values[node.output] = self._computed(node, given)
            for name in node.finished:
                values.pop(name, None)
        return tuple(values[name] if name in values else self._fixed(name) for name in self.output_names)

    def _computed(self, node: Node, given: list[Tensor | None]) -> Tensor:
        try:
            return node.function(node.attributes, *given)
        except UnsupportedOperator as error:
            raise UnsupportedOperator(
                f"{self.file.name}: {str(error).rstrip('.')}: choose the onnxruntime engine for this file."
            ) from error

    def _packed_for(self, x: Tensor) -> PackedConvolutions | None:
        """Weights as oneDNN wants them for the size of `x`; kept from the second call of a size in a row on.

        One copy is enough, and a size that comes once in between does not take its place. What is computed does not
        depend on the calls before.
        """
        if not can_pack(x):
            return None
        packed, again = self._packed, self._last_size == x.shape
        self._last_size = x.shape
        if packed is not None and packed.size == x.shape:
            return packed
        if again:
            self._packed = None  # the old copy goes before the new one is made
            self._packed = packed = PackedConvolutions(x.shape)
            return packed
        return PackedConvolutions(x.shape, keep=False)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        # Hosts ask a module to be where it is already before every use; torch takes milliseconds to find that out.
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.device):
            device = args[0]
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
            if all(weight is None or weight.device == device for weight in self._parameters.values()):
                return self
        return super().to(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = self.addresses()
        made = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if before != self.addresses():
            self._packed = None
            if self.when_moved is not None:
                self.when_moved()
        return made

    def addresses(self) -> list[int]:
        """Where the weights are."""
        return [weight.data_ptr() for weight in self._parameters.values() if weight is not None]

    def __getstate__(self) -> dict[str, Any]:
        # What oneDNN packed cannot be copied, and graphs are of these weights.
        return {**self.__dict__, "_packed": None, "when_moved": None}

    def _fixed(self, name: str) -> Tensor:
        found = self._parameters.get(self._parameter_of.get(name, ""))
        return self._constants[name] if found is None else found


def _relu_in_place(attributes: Attributes, x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def _constant_value(attributes: Attributes) -> Tensor:
    if "value" in attributes:
        value: Tensor = attributes["value"]
        return value
    for name, dtype in (
        ("value_float", torch.float32),
        ("value_floats", torch.float32),
        ("value_int", torch.int64),
        ("value_ints", torch.int64),
    ):
        if name in attributes:
            return torch.tensor(attributes[name], dtype=dtype)
    raise UnsupportedOperator(f"a Constant of the kind {', '.join(attributes)} is not supported.")
