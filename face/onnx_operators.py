"""The ONNX operators that face networks are made of, as torch functions.

Each takes the node's attributes and its inputs (None for one left out) and returns the first output, as the ONNX
operator specification defines it for opsets 7 to 21. Integer tensors are shapes and stay on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Attributes = dict[str, Any]
Operator = Callable[..., Tensor]

LARGEST = 1 << 28  # numbers of a value that is made of its size alone
# The element types of ONNX (TensorProto.DataType) that a shape or an activation can have.
ELEMENT_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


class UnsupportedOperator(ValueError):
    """The graph needs an operator, or a mode of one, that is not in this table; the message names it."""


def _same(attributes: Attributes, size: list[int], kernel: list[int]) -> list[int]:
    """Padding for auto_pad SAME_UPPER and SAME_LOWER, in ONNX order: all beginnings, then all ends."""
    mode = attributes.get("auto_pad", b"NOTSET")
    if mode in (b"NOTSET", b"", b"VALID"):
        return list(attributes.get("pads", [0] * 2 * len(kernel)))
    strides = attributes.get("strides", [1] * len(kernel))
    dilations = attributes.get("dilations", [1] * len(kernel))
    begins, ends = [], []
    for length, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max(0, (-(-length // stride) - 1) * stride + (k - 1) * dilation + 1 - length)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == b"SAME_UPPER" else large)
        ends.append(large if mode == b"SAME_UPPER" else small)
    return begins + ends


def _pad(x: Tensor, pads: list[int], value: float = 0.0, most: list[int] | None = None) -> tuple[Tensor, list[int]]:
    """Symmetric padding of at most `most` is left to the operator that follows, anything else is done here."""
    half = len(pads) // 2
    if pads[:half] == pads[half:] and (most is None or all(p <= m for p, m in zip(pads, most, strict=False))):
        return x, pads[:half]
    flat = [p for i in reversed(range(half)) for p in (pads[i], pads[half + i])]
    return F.pad(x, flat, value=value), [0] * half


def padded_for_conv(attributes: Attributes, x: Tensor, weight: Tensor) -> tuple[Tensor, list[int]]:
    """The input of a convolution, and the symmetric padding that is left for the convolution to do."""
    return _pad(x, _same(attributes, list(x.shape[2:]), list(weight.shape[2:])))


def conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dimensions = weight.dim() - 2
    if dimensions not in (1, 2):
        raise UnsupportedOperator(f"Conv over {dimensions} dimensions is not supported, only over 1 or 2.")
    x, padding = padded_for_conv(attributes, x, weight)
    strides = attributes.get("strides", [1] * dimensions)
    dilations = attributes.get("dilations", [1] * dimensions)
    function = F.conv2d if dimensions == 2 else F.conv1d
    return function(x, weight, bias, strides, padding, dilations, attributes.get("group", 1))


def batch_normalization(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def scale_shift(attributes: Attributes, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A batch normalisation with its four vectors folded into two."""
    per_channel = (-1,) + (1,) * (x.dim() - 2)
    return torch.addcmul(shift.reshape(per_channel), x, scale.reshape(per_channel))


def prelu(attributes: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    # As broadcasting lays it; torch takes one slope per channel, or one for all.
    aligned = (1,) * (x.dim() - slope.dim()) + tuple(slope.shape)
    if slope.numel() == 1 or (x.dim() > 1 and slope.numel() == x.shape[1] == aligned[1]):
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


def clip(attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least = attributes.get("min") if low is None else low.item()
    most = attributes.get("max") if high is None else high.item()
    return x if least is None and most is None else x.clamp(least, most)


def _window(kind: str, attributes: Attributes, x: Tensor) -> tuple[list[int], list[int], list[int], bool]:
    """Kernel, strides, padding in ONNX order and ceil_mode of a pool, where torch has the same."""
    kernel, ceil = list(attributes["kernel_shape"]), bool(attributes.get("ceil_mode", 0))
    if len(kernel) != 2:
        raise UnsupportedOperator(f"{kind} over {len(kernel)} dimensions is not supported, only over 2.")
    dilated = any(d != 1 for d in attributes.get("dilations", ()))
    if dilated and (kind == "AveragePool" or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"")):
        raise UnsupportedOperator(f"{kind} with these dilations and auto_pad is not supported.")
    pads = _same(attributes, list(x.shape[2:]), kernel)
    if ceil and (pads[:2] != pads[2:] or any(2 * p > k for p, k in zip(pads, kernel * 2, strict=True))):
        raise UnsupportedOperator(f"{kind} with ceil_mode and pads {pads} is not supported.")
    return kernel, attributes.get("strides", [1, 1]), pads, ceil


def max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel, strides, pads, ceil = _window("MaxPool", attributes, x)
    x, padding = _pad(x, pads, float("-inf"), [k // 2 for k in kernel])
    return F.max_pool2d(x, kernel, strides, padding, attributes.get("dilations", 1), ceil)


def average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel, strides, pads, ceil = _window("AveragePool", attributes, x)
    x, padding = _pad(x, pads, 0.0, [k // 2 for k in kernel])
    if not attributes.get("count_include_pad", 0) and padding * 2 != pads:
        raise UnsupportedOperator(f"AveragePool with pads {pads} that are not counted is not supported.")
    return F.avg_pool2d(x, kernel, strides, padding, ceil, bool(attributes.get("count_include_pad", 0)))


def shape(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[attributes.get("start", 0) : attributes.get("end")], dtype=torch.int64)


def gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.dim()
    flat = indices.reshape(-1)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat).to(x.device)
    return x.index_select(axis, flat).reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _axes(attributes: Attributes, axes: Tensor | None) -> list[int] | None:
    return attributes.get("axes") if axes is None else [int(a) for a in axes]


def unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = _axes(attributes, axes) or []
    for axis in sorted(a % (x.dim() + len(given)) for a in given):
        x = x.unsqueeze(axis)
    return x


def squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = _axes(attributes, axes)
    return x.squeeze() if given is None else x.squeeze(tuple(given))


def cast(attributes: Attributes, x: Tensor) -> Tensor:
    wanted = ELEMENT_TYPES.get(attributes["to"])
    if wanted is None:
        raise UnsupportedOperator(f"Cast to ONNX element type {attributes['to']} is not supported.")
    # An activation keeps the precision the network was given: a graph's own "to float" must not undo fp16.
    return x if wanted.is_floating_point and x.is_floating_point() else x.to(wanted)


def slice_(
    attributes: Attributes,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    begin = attributes["starts"] if starts is None else starts.tolist()
    end = attributes["ends"] if ends is None else ends.tolist()
    along = attributes.get("axes", range(len(begin))) if axes is None else axes.tolist()
    stride = [1] * len(begin) if steps is None else steps.tolist()
    if any(s < 0 and e > LARGEST for e, s in zip(end, stride, strict=True)):
        raise UnsupportedOperator("Slice backwards to an end beyond the axis is not supported.")
    for b, e, axis, s in zip(begin, end, along, stride, strict=True):
        taken = range(x.shape[axis])[max(b, -x.shape[axis]) : e : s]
        rising = taken if s > 0 else taken[::-1]  # torch has no steps backwards
        cut: list[slice] = [slice(None)] * x.dim()
        cut[axis] = slice(rising.start, rising.stop, rising.step) if rising else slice(0)
        x = x[tuple(cut)] if s > 0 else x[tuple(cut)].flip(axis)
    return x


def resize(
    attributes: Attributes,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    mode = attributes.get("mode", b"nearest").decode()
    where = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    if attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise UnsupportedOperator("Resize with a keep_aspect_ratio_policy other than stretch is not supported.")
    whole, factors = list(x.shape), [1.0] * x.dim()
    along = attributes.get("axes", range(x.dim()))
    if sizes is not None and sizes.numel():
        for axis, t in zip(along, sizes.tolist(), strict=True):
            whole[axis], factors[axis] = t, t / x.shape[axis]
    elif scales is not None and scales.numel():
        for axis, s in zip(along, scales.tolist(), strict=True):
            whole[axis], factors[axis] = int(x.shape[axis] * s), s
    else:
        raise UnsupportedOperator("Resize without sizes or scales is not supported.")
    if x.dim() < 3 or factors[:2] != [1.0, 1.0]:
        raise UnsupportedOperator(f"Resize of {list(x.shape)} to {whole} is not supported, only of height and width.")
    target, factors = whole[2:], factors[2:]
    if attributes.get("antialias", 0) and any(t < n for n, t in zip(x.shape[2:], target, strict=True)):
        raise UnsupportedOperator("Resize with antialias is not supported.")
    if any(abs(n * s - t) > 1e-3 for n, s, t in zip(x.shape[2:], factors, target, strict=True)):
        raise UnsupportedOperator(f"Resize in mode {mode} of {list(x.shape[2:])} by {factors} gives no whole pixels.")
    if mode == "nearest":
        # With a whole factor most ways to choose a pixel are torch's, which is all a pyramid needs.
        if any(t % n for t, n in zip(target, x.shape[2:], strict=True)):
            raise UnsupportedOperator(f"Resize by a factor that is not whole ({list(x.shape[2:])} to {target}).")
        rounding = attributes.get("nearest_mode", b"round_prefer_floor").decode()
        if not all(_repeats(n, t, where, rounding) for n, t in zip(x.shape[2:], target, strict=True)):
            raise UnsupportedOperator(
                f"Resize in mode nearest with {where} and {rounding} is not supported for {list(x.shape[2:])} to {target}."
            )
        return F.interpolate(x, size=target, mode="nearest")
    # Of one pixel, pytorch_half_pixel takes the first where torch takes the middle.
    ours = "half_pixel", "align_corners", *(["pytorch_half_pixel"] if min(target) > 1 else [])
    if mode == "linear" and where in ours and x.dim() == 4:
        return F.interpolate(x, size=target, mode="bilinear", align_corners=where == "align_corners")
    raise UnsupportedOperator(f"Resize in mode {mode} with {where} is not supported for {list(x.shape)} to {whole}.")


@lru_cache(maxsize=256)
def _repeats(length: int, target: int, where: str, rounding: str) -> bool:
    """Whether this way to choose the nearest of `length` pixels repeats each as often, as torch does."""
    factor = target // length

    def source(i: int) -> float:
        if where == "asymmetric":
            return i / factor
        if where == "align_corners":
            return i * (length - 1) / (target - 1) if target > 1 else 0.0
        if where in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
            return (i + 0.5) / factor - 0.5 if target > 1 or where != "pytorch_half_pixel" else 0.0
        return math.nan

    nearest = {
        "floor": math.floor,
        "ceil": math.ceil,
        "round_prefer_floor": lambda at: math.ceil(at - 0.5),
        "round_prefer_ceil": lambda at: math.floor(at + 0.5),
    }.get(rounding)
    if nearest is None or math.isnan(source(0)):
        return False
    return all(min(max(nearest(source(i)), 0), length - 1) == i // factor for i in range(target))


def upsample(attributes: Attributes, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """What came before Resize of opset 11: counted from the first pixel's corner."""
    factors = torch.tensor(attributes["scales"]) if scales is None else scales
    from_corner = {"coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}
    return resize({"mode": attributes.get("mode", b"nearest"), **from_corner}, x, None, factors)


def reshape(attributes: Attributes, x: Tensor, target: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(target.tolist())])


def flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(int(torch.tensor(x.shape[:axis]).prod()) if axis else 1, -1)


def gemm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x.t() if attributes.get("transA", 0) else x
    weight = weight if attributes.get("transB", 0) else weight.t()
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if alpha == 1.0 and (bias is None or (beta == 1.0 and bias.dim() == 1)):
        return F.linear(x, weight, bias)
    product = alpha * F.linear(x, weight)
    return product if bias is None else product + beta * bias


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def reduced(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = _axes(attributes, axes)
        if not given and attributes.get("noop_with_empty_axes", 0):
            return function(x[None], (0,), False)
        return function(x, tuple(given or range(x.dim())), bool(attributes.get("keepdims", 1)))

    return reduced


def pad(
    attributes: Attributes,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    mode = attributes.get("mode", b"constant").decode()
    if mode != "constant":
        raise UnsupportedOperator(f"Pad in mode {mode} is not supported, only constant.")
    widths = list(attributes["pads"]) if pads is None else pads.tolist()
    along = range(x.dim()) if axes is None else [a % x.dim() for a in axes.tolist()]
    before = dict(zip(along, zip(widths[: len(along)], widths[len(along) :], strict=True), strict=True))
    flat = [p for axis in reversed(range(x.dim())) for p in before.get(axis, (0, 0))]
    return F.pad(x, flat, value=value.item() if value is not None else attributes.get("value", 0.0))


def constant_of_shape(attributes: Attributes, size: Tensor) -> Tensor:
    value = attributes.get("value")
    if value is None:
        return torch.zeros(_bounded(size))
    return torch.full(_bounded(size), value.item(), dtype=value.dtype)


def _bounded(size: Tensor) -> list[int]:
    """The sizes in a tensor that a file asks for. Raises ValueError for one that would fill the memory."""
    sizes: list[int] = size.tolist()
    if math.prod(sizes) > LARGEST:
        raise ValueError(f"a value of {' x '.join(map(str, sizes))} numbers is larger than any face network's")
    return sizes


def softmax(attributes: Attributes, x: Tensor) -> Tensor:
    return F.softmax(x, dim=attributes.get("axis", -1))


def softmax_of_rest(attributes: Attributes, x: Tensor) -> Tensor:
    """Before opset 13: over `axis` and all axes after it together."""
    axis = attributes.get("axis", 1) % x.dim()
    return F.softmax(x.flatten(axis), dim=-1).reshape(x.shape)


def l2_normalize(attributes: Attributes, x: Tensor) -> Tensor:
    return F.normalize(x, p=attributes.get("p", 2), dim=attributes.get("axis", -1))


OPERATORS: dict[str, Operator] = {
    "Abs": lambda a, x: x.abs(),
    "Add": lambda a, x, y: x + y,
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Cast": cast,
    "Clip": clip,
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "ConstantOfShape": constant_of_shape,
    "Conv": conv,
    "Div": lambda a, x, y: torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc"),
    "Dropout": lambda a, x, *ignored: x,
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Exp": lambda a, x: x.exp(),
    "Expand": lambda a, x, size: x * torch.ones(_bounded(size), dtype=x.dtype, device=x.device),
    "Flatten": flatten,
    "Floor": lambda a, x: x.floor(),
    "Gather": gather,
    "Gemm": gemm,
    "GlobalAveragePool": lambda a, x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "HardSigmoid": lambda a, x: (x * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda a, x: F.hardswish(x),
    "Identity": lambda a, x: x,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "LpNormalization": l2_normalize,
    "MatMul": lambda a, x, y: x @ y,
    "Max": lambda a, *x: reduce(torch.maximum, x),
    "MaxPool": max_pool,
    "Min": lambda a, *x: reduce(torch.minimum, x),
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "PRelu": prelu,
    "Pad": pad,
    "Pow": lambda a, x, y: x**y,
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "Relu": lambda a, x: F.relu(x),
    "Reshape": reshape,
    "Resize": resize,
    "Shape": shape,
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Slice": slice_,
    "Softmax": softmax,
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": squeeze,
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: x.tanh(),
    "Transpose": lambda a, x: x.permute(a.get("perm", list(reversed(range(x.dim()))))),
    "Unsqueeze": unsqueeze,
    "Upsample": upsample,
}

# Operators that meant something else before an opset.
OLDER_OPERATORS: dict[str, tuple[int, Operator]] = {"Resize": (11, upsample), "Softmax": (13, softmax_of_rest)}
